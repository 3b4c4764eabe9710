"""Batch norm over all ranks on CPUs; PyTorch has it for GPUs only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins import TorchSyncBatchNorm
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _SumOverRanks.apply(g)


class _OverRanks:
    """Normalises [N, C, *space] by mean and variance over the batches of all ranks, of any sizes.

    A mixin for PyTorch's batch norm, which it leaves to work in evaluation, and in one process
    alone. (DistributedDataParallel refuses a subclass of nn.SyncBatchNorm on CPUs.)
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)  # type: ignore[misc]
        wide, axes = x.float() if x.dtype != torch.float64 else x, (0, *range(2, x.ndim))
        shape = (1, -1, *(1,) * (x.ndim - 2))
        pixels = wide.new_full((1,), x.numel() / x.shape[1])
        sums = _SumOverRanks.apply(torch.cat([wide.sum(axes), pixels]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = wide - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            means, variances, steps = self.running_mean, self.running_var, self.num_batches_tracked
            if means is not None and variances is not None and steps is not None:
                steps += 1
                share = self.momentum or 1 / steps.item()
                means.lerp_(mean, share)
                variances.lerp_(variance * count / (count - 1), share)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class OverRanks1d(_OverRanks, nn.BatchNorm1d):
    pass


class OverRanks2d(_OverRanks, nn.BatchNorm2d):
    pass


class OverRanks3d(_OverRanks, nn.BatchNorm3d):
    pass


_OVER_RANKS = {
    nn.BatchNorm1d: OverRanks1d,
    nn.BatchNorm2d: OverRanks2d,
    nn.BatchNorm3d: OverRanks3d,
}


class LayerSync(TorchSyncBatchNorm):
    """Lightning's plugin for trainer.sync_batchnorm=true; on CPUs it takes the classes above."""

    def apply(self, model: nn.Module) -> nn.Module:
        if next(model.parameters()).device.type != "cpu":
            return super().apply(model)
        for module in model.modules():
            for kind, over_ranks in _OVER_RANKS.items():
                if isinstance(module, kind):
                    module.__class__ = over_ranks
        return model
