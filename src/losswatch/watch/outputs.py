"""What networks return and what targets look like, brought into the forms that losses read.

The losses of this package read logits [N, C, *space] of a softmax, and class indices [N, *space] or
labels [N, C, *space]. A network with one channel, whose sigmoid is the probability of foreground,
is a softmax over the logits (0, z). A network that returns probabilities p is one over the logits
log p. So these losses can watch such networks, too, and the chain rule does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from losswatch.losses import CrossEntropy, Dice, LossSet, Sum, check_inputs
from losswatch.losses.pixels import is_hard, one_hot, wide
from losswatch.presets import load_loss
from losswatch.watch.span import Span, joined

Losses = Mapping[str, str | nn.Module] | Sequence[str | nn.Module] | LossSet
ACTIVATIONS = ("softmax", "sigmoid", "none")


def tensors(what: str, value: Any) -> list[Tensor]:
    """One tensor as a list, or the tensors of a list or of a dict (torchvision's networks)."""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    parts = [value] if isinstance(value, Tensor) else parts
    if isinstance(parts, Sequence) and parts and all(isinstance(x, Tensor) for x in parts):
        return list(parts)
    raise TypeError(f"{what}: a tensor or a list of tensors is needed, got {type(value).__name__}")


# -- outputs and targets --------------------------------------------------------------------------


def as_softmax(output: Tensor, activation: str) -> Tensor:
    """Logits [N, C, *space], C at least 2, whose softmax gives the network's probabilities.

    Args:
        output: [N, C, *space]; one channel is the foreground of two classes.
        activation: what makes probabilities of the output.
    """
    if activation == "none":
        p = wide(output)
        p = torch.cat([1 - p, p], 1) if p.shape[1] == 1 else p
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()
    if output.shape[1] == 1:
        return torch.cat([torch.zeros_like(output), output], 1)
    return output


def as_target(target: Tensor, output: Tensor) -> Tensor:
    """Class indices [N, *space], or labels [N, C, *space] with the channels of `as_softmax`.

    Args:
        target: class indices [N, *space] or [N, 1, *space], also as floating point; or labels
            [N, C, *space], where C = 1 is the foreground of two classes.
        output: of the network, [N, C, *space].
    """
    if target.ndim == output.ndim and target.shape[1] > 1:
        return target
    indices = target.squeeze(1) if target.ndim == output.ndim else target
    if output.shape[1] > 1 or not target.is_floating_point():
        return indices.long()
    return torch.stack([1 - indices, indices], 1)


def as_labels(target: Tensor, output: Tensor) -> Tensor:
    """The target for losses that read each channel by itself; arguments as of `as_target`."""
    if output.shape[1] == 1 and target.numel() == output.numel():
        return target.view_as(output)
    return as_target(target, output)


def check_values(output: Tensor, target: Tensor, views: Views) -> None:
    """Look once at the numbers of output and target; on a GPU this waits for them.

    Raises:
        ValueError: they are none that losses can take.
    """
    if output.device.type == "meta":
        return
    p = output.detach()
    if views.activation == "none":
        sums = p.sum(1) if p.shape[1] > 1 else torch.ones_like(p)
        if p.min() < 0 or p.max() > 1 or (sums - 1).abs().max() > 0.01:
            raise ValueError(
                "activation='none' is for probabilities of classes, which lie in [0, 1] and add to "
                "1 over the channels; for logits take softmax, or sigmoid where classes overlap"
            )
    elif views.activation == "softmax" and p.shape[1] == 1:
        raise ValueError(
            "the output has one channel, whose softmax is 1 everywhere; take activation='sigmoid'"
        )
    if views.activation == "softmax":
        check_inputs(p, as_target(target, p), views.ignore_index)


# -- losses ---------------------------------------------------------------------------------------


def named(losses: Losses, ignore_index: int | None) -> dict[str, nn.Module]:
    """Losses by name: presets under theirs, and modules under that of their class.

    Raises:
        ValueError: there are none, or there is no such preset.
        TypeError: one is neither a name nor a module.
    """
    if isinstance(losses, LossSet):
        return dict(zip(losses.names, losses.losses, strict=True))
    settings = {} if ignore_index is None else {"ignore_index": ignore_index}
    pairs = list(losses.items()) if isinstance(losses, Mapping) else [(None, x) for x in losses]
    found: dict[str, nn.Module] = {}
    for name, loss in pairs:
        if isinstance(loss, str):
            name, loss = name or loss, load_loss(loss, **settings)
        if not isinstance(loss, nn.Module):
            raise TypeError(
                f"losses: names of presets and modules are needed, got a {type(loss).__name__}"
            )
        name = name or type(loss).__name__
        if name in found:
            number = sum(other.split("_")[0] == name for other in found) + 1
            name = f"{name}_{number}"
        found[name] = loss
    if not found:
        raise ValueError("losses: at least one is needed")
    return found


class EachChannel(nn.Module):
    """A loss of two classes for each channel of a sigmoid; of cross entropy, the binary one.

    >>> logits, target = torch.tensor([[[1.0], [-2.0]]]), torch.tensor([[[1.0], [1.0]]])
    >>> value = EachChannel(CrossEntropy())(logits, target)
    >>> torch.allclose(value, nn.BCEWithLogitsLoss()(logits, target))
    True
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The value for logits [N, C, *space] and labels of that shape, or class indices."""
        if is_hard(logits, target):
            target = one_hot(target.unsqueeze(1), logits)
        z, y = (x.to(logits.dtype).flatten(0, 1).unsqueeze(1) for x in (logits, target))
        return self.loss(as_softmax(z, "sigmoid"), torch.cat([1 - y, y], 1))


def of_each_channel(loss: nn.Module) -> nn.Module:
    """A loss that reads a softmax as one that reads each channel of a sigmoid by itself."""
    if type(loss) is Dice:
        return Dice(**loss.settings | {"activation": "sigmoid"})
    if type(loss) is Sum:
        return Sum([of_each_channel(part) for part in loss.losses], loss.weights)
    return EachChannel(loss)


def form(loss: nn.Module) -> str:
    """What a loss reads: the "softmax", "labels" of each channel, or things as they are "given"."""
    if type(loss) is CrossEntropy:
        return "softmax"
    if type(loss) is Dice:
        return "softmax" if loss.activation == "softmax" else "labels"
    if type(loss) is Sum and len(forms := set(map(form, loss.losses))) == 1:
        return forms.pop()
    return "given"


class Views:
    """The observed losses, sorted by the form in which they read a network's output.

    Args as of `Observer`.

    Attributes:
        names: of the losses, in the order of the observation.
        are_foreign: whether some are not of this package.
    """

    def __init__(self, losses: Losses, activation: str, ignore_index: int | None) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        self.activation, self.ignore_index = activation, ignore_index
        self.losses = named(losses, ignore_index)
        self.names = tuple(self.losses)
        self.are_foreign = "given" in map(form, self.losses.values())
        self.key: tuple[bool, bool] | None = None  # for which `sets` was made
        self.sets: dict[str, LossSet] = {}

    def of(self, output: Tensor, target: Tensor) -> list[tuple[LossSet, tuple[Tensor, Tensor]]]:
        """Sets of losses, and the logits and the target that each reads."""
        self._plan(output, target)
        pairs = {
            "softmax": lambda: (as_softmax(output, self.activation), as_target(target, output)),
            "labels": lambda: (output, as_labels(target, output)),
            "given": lambda: (output, target),
        }
        return [(losses, pairs[name]()) for name, losses in self.sets.items()]

    def _plan(self, output: Tensor, target: Tensor) -> None:
        many = output.shape[1] > 1
        # Where all losses read the same, one set lets them share more.
        same = many and self.activation == "softmax" and target.dtype == torch.int64
        key = (many, same and target.ndim < output.ndim)
        if key == self.key:
            return
        self.key, sets = key, dict[str, dict[str, nn.Module]]()
        for name, loss in self.losses.items():
            reads = "given" if key[1] else form(loss)
            if reads == "softmax" and many and self.activation == "sigmoid":
                reads, loss = "labels", of_each_channel(loss)
            sets.setdefault(reads, {})[name] = loss
        self.sets = {reads: LossSet(losses) for reads, losses in sets.items()}

    def in_order(self, parts: Sequence[Span]) -> Span:
        """The spans of the sets as one, with the losses in the order of `names`."""
        if len(parts) == 1:
            return parts[0]
        there = [name for losses in self.sets.values() for name in losses.names]
        order = [there.index(name) for name in self.names]
        values, coefficients, rows = joined(parts)
        values, coefficients = (torch.stack([x[i] for i in order]) for x in (values, coefficients))
        return Span(values, coefficients, rows)

    def is_foreign(self, name: str, output: Tensor, target: Tensor) -> bool:
        """Whether a loss is called with output and target as they are, and shares nothing."""
        self._plan(output, target)
        losses = self.sets.get("given")
        return losses is not None and name in losses.names and losses.is_foreign(name)

    def pivot(self, name: str, output: Tensor, target: Tensor) -> int | None:
        """A row of the span that the gradient of a loss always holds (`LossSet.pivot`).

        None: there is none, or losses read the output in several forms.
        """
        self._plan(output, target)
        return self.sets["given"].pivot(name, output.shape[1]) if self.key == (True, True) else None
