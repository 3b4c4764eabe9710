"""losswatch: train a segmentation network with one loss, watch them all.

For your own training:

    Watch           a callback for Lightning's Trainer
    WatchHandler    a handler for engines of MONAI and Ignite
    Observer        for any other loop; needs only PyTorch

These take names of presets (`list_losses`, `load_loss`), modules of this package (`Dice`,
`CrossEntropy`, `Sum`; `LossSet` evaluates many together) and any other modules as losses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from losswatch.losses import CrossEntropy, Dice, LossSet, Sum
    from losswatch.presets import list_losses, load_loss
    from losswatch.watch.engine import WatchHandler
    from losswatch.watch.lightning import Watch
    from losswatch.watch.observer import Observer, Seen

# Imported at their first use: the command prints its help without PyTorch.
_PLACES = {
    "CrossEntropy": "losswatch.losses",
    "Dice": "losswatch.losses",
    "LossSet": "losswatch.losses",
    "Observer": "losswatch.watch.observer",
    "Seen": "losswatch.watch.observer",
    "Sum": "losswatch.losses",
    "Watch": "losswatch.watch.lightning",
    "WatchHandler": "losswatch.watch.engine",
    "list_losses": "losswatch.presets",
    "load_loss": "losswatch.presets",
}

__all__ = [
    "CrossEntropy",
    "Dice",
    "LossSet",
    "Observer",
    "Seen",
    "Sum",
    "Watch",
    "WatchHandler",
    "list_losses",
    "load_loss",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
