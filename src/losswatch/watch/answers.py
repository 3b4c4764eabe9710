"""What the trained loss says of answers that are known: a perfect one, its opposite, constant ones.

A loss that prefers the opposite of a perfect answer has a wrong sign or reads other labels. A loss
that changes between two perfect answers, of which one is only louder, misses its activation. And
the smallest value of a constant answer tells a network that has learned nothing from one that has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ANSWERS = (
    "perfect",  # its value at logits of 20 for the true class against the others
    "perfect_half",  # the same at logits of 10
    "perfect_quarter",  # the same at logits of 5
    "opposite",  # at logits of 20 for the wrong classes
    "opposite_half",  # the same at logits of 10
    "background",  # at logits of 20 for the background everywhere
    "foreground",  # at logits of 20 for the last class everywhere
    "even",  # at logits of 0
    "constant",  # the smallest value of a constant answer
    "constant_share",  # the foreground's probability in that answer
)
_LEVELS = (-16.0, -12.0, -9.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0)
LEVELS = (*_LEVELS, *(-z for z in reversed(_LEVELS[:-1])))


def ask(
    loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor, y: Tensor, kind: str
) -> Tensor:
    """The numbers of ANSWERS, float32 on the device of the output.

    Args:
        loss: gets an answer in place of the output, and the target.
        output: of the network, [N, C, *space]; only its shape and type count.
        y: the shares of the classes, [N, max(2, C), *space].
        kind: what the output holds: "logits", or probabilities ("none").
    """
    channels = output.shape[1]
    # A network that ends in a log-softmax, for a loss that reads it as it is.
    are_logs = output.logsumexp(1).abs().amax() < 1e-3 if channels > 1 else y.sum() < 0

    def value(logits: Tensor) -> Tensor:
        """The loss at logits [N, max(2, C), *space], as the network would output them."""
        if kind == "none":
            p = logits.softmax(1)
            answer = p[:, 1:] if channels == 1 else p
        else:
            answer = logits[:, 1:] - logits[:, :1] if channels == 1 else logits
            answer = torch.where(are_logs, answer.log_softmax(1), answer)
        return loss(answer.to(output.dtype), target).detach().float().reshape(())

    sure = 2 * y - 1
    known = [value(factor * sure) for factor in (10, 5, 2.5, -10, -5)]
    even = torch.zeros_like(y)
    one = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    wide = [1, -1, *[1] * (y.ndim - 2)]
    known += [value((20 * one[c]).view(wide).expand_as(y)) for c in (0, -1)] + [value(even)]
    constants, shares = _constants(y)
    values = torch.stack([value(z.expand_as(y)) for z in constants])
    best = values.nan_to_num(torch.inf).argmin(keepdim=True)  # as a tensor: reading it would wait
    return torch.cat([torch.stack(known), values.gather(0, best), shares.gather(0, best)])


def _constants(y: Tensor) -> tuple[list[Tensor], Tensor]:
    """Constant answers as logits [1, C, 1, ...], and the foreground's probability in each."""
    space = [1] * (y.ndim - 2)
    if y.shape[1] == 2:
        rows = [y.new_tensor([0.0, z]) for z in LEVELS]
    else:
        classes = y.shape[1]
        mean = y.mean([0, *range(2, y.ndim)]).clamp_min(1e-7).log()
        one = torch.eye(classes, dtype=y.dtype, device=y.device)
        rows = [mean, torch.zeros_like(mean)]
        rows += [16 * one[c] for c in range(min(classes, 8))]
    p = torch.stack([row.softmax(0) for row in rows])
    return [row.view(1, -1, *space) for row in rows], (1 - p[:, 0]).float()
