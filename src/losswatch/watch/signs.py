"""What one batch shows beside values, norms and cosines: its signs.

A sign is a number. All of them are computed on the device of the output, and none is read there, so
that nothing waits for a GPU. `SIGNS` names them; those of `BY_CLASS` have a number for each class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losswatch.doctor.history import ENDS
from losswatch.losses.pixels import one_hot, wide
from losswatch.watch.outputs import as_indices, as_softmax, is_labels

SIGNS = (
    "out_min", "out_max",  # the smallest and the largest output
    "out_sum",  # how far the outputs of a pixel are from adding to 1, at most
    "out_length",  # how far the outputs of a pixel are, as a vector, from length 1, at most
    "out_centre",  # |mean| / deviation of a channel in an image, at most: 0 after a normalisation
    "zeros",  # the share of outputs that are exactly 0
    "bits",  # of a number of the output
    "ends_in",  # the index in ENDS of the operation that made the output
    "multilabel",  # 1 where each channel has a sigmoid of its own
    "label_min", "label_max",  # among the labels that count
    "label_sum",  # the largest sum of a pixel's labels
    "images",  # of the batch
    "pixels",  # of an image
    "counted",  # the share of pixels that count
    "empty",  # the share of images without foreground
    "slope",  # the mean of p(1 - p)
    "saturated",  # the share of pixels where p(1 - p) < 1e-4 for each class
    "spread",  # the standard deviation of p over the pixels, mean over the classes
    "wrong",  # the mean of |p - y|
    "pull",  # Σ|g|, for g = the derivative of the trained loss by the output
    "pull_empty",  # the part of it on images without foreground
    "pull_ignored",  # the part of it on pixels that do not count
    "pull_absent",  # the part of it that comes from classes that the image does not hold
    "apart",  # Σ -g·(y - mean y): what moves the classes apart; below 0: in the wrong direction
    "shift",  # |Σ_c g| / Σ_c |g|: 0 where the loss takes a softmax
)  # fmt: skip
BY_CLASS = (
    "label",  # the share of the class among the pixels that count
    "hard",  # the share of pixels that are predicted to be of the class
    "soft",  # the mean of p
    "alike",  # Σ -g: what moves all pixels alike, towards the class if it is above 0
)

# The names of PyTorch's backward functions for what a network may end in (`ENDS`).
_NODES = {
    "SoftmaxBackward": "softmax",
    "SigmoidBackward": "sigmoid",
    "HardsigmoidBackward": "sigmoid",
    "ReluBackward": "ReLU",
    "SoftplusBackward": "ReLU",
    "AbsBackward": "ReLU",
    "TanhBackward": "tanh",
    "ClampBackward": "a clamp",
    "ClampMinBackward": "a clamp",
    "ClampMaxBackward": "a clamp",
    "HardtanhBackward": "a clamp",
    "NativeBatchNormBackward": "a normalisation",
    "NativeGroupNormBackward": "a normalisation",
    "NativeLayerNormBackward": "a normalisation",
}
_VIEWS = ("ToCopyBackward", "ViewBackward", "UnsafeViewBackward", "CloneBackward", "AliasBackward",
          "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward")  # fmt: skip


def sign_names(classes: int) -> list[str]:
    """The names of the numbers that `read_signs` returns.

    >>> sign_names(2)[-4:]
    ['soft/0', 'soft/1', 'alike/0', 'alike/1']
    """
    return [*SIGNS, *(f"{name}/{c}" for name in BY_CLASS for c in range(classes))]


def classes_of(output: Tensor) -> int:
    """The number of classes: one channel is the foreground of two classes."""
    return max(2, output.shape[1])


def read_signs(
    output: Tensor,
    target: Tensor,
    slope: Tensor | None,
    activation: str,
    ignore_index: int | None,
) -> Tensor:
    """The signs of a batch, float32 [S].

    Args:
        output: of the network, [N, C, *space].
        target: as for `Observer`. Labels that are not allowed are clamped, after they were noted.
        slope: the derivative of the trained loss by the output, or by the logits of two classes if
            the output has one channel; None if no loss is known to train.
        activation, ignore_index: see `Observer`.
    """
    z = wide(output.detach())
    raw, keep, y = read_labels(target.detach(), z, ignore_index)
    p, hard = _probabilities(z, activation)
    is_multilabel = activation == "sigmoid" and z.shape[1] > 1
    one = keep if keep.shape[1] == 1 else keep.amin(1, keepdim=True)  # [N, 1, *space]
    count = one.sum().clamp_min(1)
    space = [0, *range(2, z.ndim)]

    def mean(x: Tensor) -> Tensor:
        return (x * one).sum(space) / count

    foreground = (y if is_multilabel else y[:, 1:]).flatten(1).amax(1)
    empty = (foreground <= 0).to(z.dtype)  # [N]
    curve = p * (1 - p)
    shares, soft = mean(y), mean(p)
    per_image = z.flatten(2) if z.ndim > 2 else z.unsqueeze(-1)
    nothing = z.new_full((), torch.nan)
    alike = z.new_full((p.shape[1],), torch.nan)
    pull = pull_empty = pull_ignored = pull_absent = apart = shift = nothing
    if slope is not None:
        g = wide(slope.detach())
        g = torch.cat([-g, g], 1) if g.shape[1] < p.shape[1] else g
        size = g.abs()
        pull = size.sum()
        pull_empty = (size.flatten(1).sum(1) * empty).sum() / pull
        pull_ignored = (size * (1 - one)).sum() / pull
        there = (y.flatten(2).amax(2) > 0).to(z.dtype) if y.ndim > 2 else (y > 0).to(z.dtype)
        own = there.view(*there.shape, *[1] * (z.ndim - 2))
        pull_absent = (size * (1 - own)).sum() / pull
        alike = -g.sum(space)
        apart = -(g * (y - shares.view(1, -1, *[1] * (z.ndim - 2))) * one).sum()
        shift = g.sum(1).abs().sum() / pull
    largest = curve.amax(1, keepdim=True)
    scalars = [
        z.amin(), z.amax(),
        (z.sum(1) - 1).abs().amax(),
        (torch.linalg.vector_norm(z, dim=1) - 1).abs().amax(),
        (per_image.mean(-1).abs() / per_image.std(-1, correction=0).clamp_min(1e-30)).amax(),
        (z == 0).to(z.dtype).mean(),
        z.new_full((), float(torch.finfo(output.dtype).bits)),
        z.new_full((), float(end_of(output))),
        z.new_full((), float(is_multilabel)),
        *raw,
        z.new_full((), float(len(z))),
        z.new_full((), float(z[0, 0].numel())),
        one.mean(),
        empty.mean(),
        mean(curve).mean(),
        mean((largest < 1e-4).to(z.dtype)).mean(),
        (mean((p - soft.view(1, -1, *[1] * (z.ndim - 2))) ** 2)).sqrt().mean(),
        mean((p - y).abs()).mean(),
        pull, pull_empty, pull_ignored, pull_absent, apart, shift,
    ]  # fmt: skip
    found = torch.cat([torch.stack(scalars), shares, mean(hard), soft, alike])
    return found.float()


def read_labels(
    target: Tensor, z: Tensor, ignore_index: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Smallest label, largest label and largest sum; which pixels count; shares of the classes.

    Returns:
        three scalars; [N, 1 or C, *space], 1 where a pixel counts; [N, C, *space].
    """
    shaped = is_labels(target, z)
    labels = target if shaped else as_indices(target, z).reshape(len(z), 1, *z.shape[2:])
    keep = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        keep = labels != ignore_index
    x = wide(torch.where(keep, labels, 0).to(z.dtype) if not labels.is_floating_point()
             else torch.where(keep, labels, 0))  # fmt: skip
    low, high = x.amin(), x.amax()
    valid = keep.to(z.dtype)
    if shaped:
        y, most = x.clamp(0, 1), x.sum(1).amax()
    elif z.shape[1] == 1:
        foreground = x.clamp(0, 1)
        y, most = torch.cat([1 - foreground, foreground], 1), torch.ones_like(low)
    else:
        y, most = one_hot(x.long().clamp(0, z.shape[1] - 1), z), torch.ones_like(low)
    return (low.to(z.dtype), high.to(z.dtype), most.to(z.dtype)), valid, y * valid


def _probabilities(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Probabilities [N, C, *space] as the losses of this package see them, and the prediction."""
    if activation == "sigmoid" and z.shape[1] > 1:
        p = z.sigmoid()
        return p, (p > 0.5).to(z.dtype)
    p = as_softmax(z, activation).softmax(1)
    return p, one_hot(p.argmax(1, keepdim=True), p)


def end_of(output: Tensor) -> int:
    """The index in ENDS of the operation that made an output, from its graph."""
    node = output.grad_fn
    for _ in range(6):
        if node is None:
            return 0
        name = node.name().rstrip("0123456789")
        if name in _NODES:
            return ENDS.index(_NODES[name])
        if name not in _VIEWS:
            return 0
        node = node.next_functions[0][0]
    return 0
