"""The losses of other libraries that are installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def peers() -> dict[str, Loss]:
    """Losses of (logits [N, C, H, W], class indices [N, H, W]) by name."""
    losses: dict[str, Loss] = {"torch cross_entropy": torch.nn.CrossEntropyLoss()}
    for library in (monai, kornia, smp, nnunet):
        try:
            losses |= library()
        except ImportError:
            pass
    return losses


def monai() -> dict[str, Loss]:
    from monai.losses import DiceCELoss, DiceLoss

    dice, both = (cls(softmax=True, to_onehot_y=True) for cls in (DiceLoss, DiceCELoss))
    return {
        "MONAI Dice": lambda x, t: dice(x, t[:, None]),
        "MONAI DiceCE": lambda x, t: both(x, t[:, None]),
    }


def kornia() -> dict[str, Loss]:
    from kornia.losses import dice_loss

    return {
        "kornia Dice": dice_loss,
        "kornia Dice macro": lambda x, t: dice_loss(x, t, average="macro"),
    }


def smp() -> dict[str, Loss]:
    from segmentation_models_pytorch.losses import DiceLoss

    return {"smp Dice": DiceLoss("multiclass")}


def nnunet() -> dict[str, Loss]:
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss

    softmax = {"apply_nonlin": lambda x: x.softmax(1), "ddp": False, "batch_dice": True}
    return {
        "nnU-Net SoftDice": SoftDiceLoss(**softmax),
        "nnU-Net SoftDice memory-efficient": MemoryEfficientSoftDiceLoss(**softmax),
    }
