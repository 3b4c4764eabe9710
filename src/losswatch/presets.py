"""The losses of conf/loss by name, for use outside of `train.py`.

Hydra and PyTorch are imported only when a loss is loaded.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

HERE = Path(__file__).parent
# The wheel holds a copy of conf/. In a checkout of the repository, conf/ is at the top.
CONF = next((path for path in (HERE / "conf", HERE.parents[1] / "conf") if path.is_dir()), HERE)


def list_losses() -> list[str]:
    """The names that `load_loss` takes, sorted.

    >>> "dice" in list_losses() and "cce" in list_losses()
    True
    """
    return sorted(file.stem for file in (CONF / "loss").glob("*.yaml"))


def load_loss(name: str, **settings: Any) -> nn.Module:
    """The loss of a preset.

    Args:
        name: one of `list_losses`.
        settings: replace those of the preset. In a preset that adds losses, such as dice_cce, each
            loss gets the settings that it has.

    Returns:
        A module (logits, target) -> scalar.

    Raises:
        ValueError: there is no such preset, a setting belongs to no loss in it, or a value is not
            allowed.

    >>> load_loss("dice_nnunet", smooth_nr=0).smooth_nr
    0.0
    """
    names = list_losses()
    if name not in names:
        raise ValueError(f"there is no loss {name!r}; the presets are {', '.join(names)}")
    from hydra.errors import InstantiationException
    from hydra.utils import get_class, instantiate
    from omegaconf import OmegaConf

    config: Any = OmegaConf.load(CONF / "loss" / f"{name}.yaml")
    parts = [config, *config.get("losses", [])]
    allowed = [inspect.signature(get_class(part._target_)).parameters for part in parts]
    for key, value in settings.items():
        users = [part for part, own in zip(parts, allowed, strict=True) if key in own]
        if not users:
            has = ", ".join(dict.fromkeys(key for own in allowed for key in own))
            raise ValueError(f"loss {name} has no setting {key!r}; it has {has}")
        for part in users:
            part[key] = value
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise ValueError(f"loss {name}: {' '.join(str(error.__cause__).split())}") from error
