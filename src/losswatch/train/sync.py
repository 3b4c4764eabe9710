"""Batch norm over all ranks on CPUs, where PyTorch's runs on GPUs only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
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


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalises [N, C, *space] by mean and variance of the batch of all ranks, of any sizes."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of spatial axes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
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


class LayerSync(TorchSyncBatchNorm):
    """Lightning's plugin for trainer.sync_batchnorm=true, which on CPUs takes the class above."""

    def apply(self, model: nn.Module) -> nn.Module:
        if next(model.parameters()).device.type != "cpu":
            return super().apply(model)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = SyncBatchNorm
        return model
