"""losswatch: train a segmentation network with one loss, watch them all.

Importing it needs nothing but PyTorch. In anybody's training:

    Watch           a callback for Lightning's Trainer
    WatchHandler    a handler for engines of MONAI and Ignite
    Observer        for any other loop

Their losses are presets by name (`list_losses`, `load_loss`), modules of this package (`Dice`,
`CrossEntropy`, `Sum`; `LossSet` evaluates many together) and any other modules.
"""

from losswatch.losses import CrossEntropy, Dice, LossSet, Sum
from losswatch.presets import list_losses, load_loss
from losswatch.watch.engine import WatchHandler
from losswatch.watch.lightning import Watch
from losswatch.watch.observer import Observer, Seen

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
