"""What networks return and what targets look like, brought into the forms that losses read.

The losses of this package read logits [N, C, *space] of a softmax, and class indices [N, *space] or
labels [N, C, *space]. A network with one channel, whose sigmoid is the probability of foreground,
is a softmax over the logits (0, z). A network that returns probabilities p is one over the logits
log p. So these losses can watch such networks, too, and the chain rule does the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losswatch.compat import has_hooks
from losswatch.losses import CrossEntropy, Dice, LossSet, Sum
from losswatch.losses.compose import shared_recipe, table_parts
from losswatch.losses.inputs import (
    check_logits,
    explain,
    first_fault,
    index_fault,
    label_fault,
    probability_fault,
)
from losswatch.losses.pixels import is_hard, one_hot, wide
from losswatch.presets import load_loss
from losswatch.watch.span import scaled

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


def as_target(target: Tensor, output: Tensor, ignore_index: int | None = None) -> Tensor:
    """Class indices [N, *space], or labels [N, C, *space] with the channels of `as_softmax`.

    Args:
        target: class indices [N, *space] or [N, 1, *space], also as floating point; or labels
            [N, C, *space], where C = 1 is the foreground of two classes.
        output: of the network, [N, C, *space].
        ignore_index: of labels of one channel; it marks both classes in what is returned.
    """
    if is_labels(target, output):
        return target
    indices = as_indices(target, output)
    if output.shape[1] > 1 or not target.is_floating_point():
        return indices.long()
    return two_classes(indices.unsqueeze(1), ignore_index)


def is_labels(target: Tensor, output: Tensor) -> bool:
    """Whether a target has labels for several channels."""
    return target.ndim == output.ndim and target.shape[1] > 1


def as_indices(target: Tensor, output: Tensor) -> Tensor:
    """Class indices without an axis of channels, [N, *space]."""
    return target.squeeze(1) if target.ndim == output.ndim else target


def two_classes(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Labels of foreground [N, 1, *space] as those of background and foreground."""
    both = torch.cat([1 - labels, labels], 1)
    return both if ignore_index is None else torch.where(labels == ignore_index, labels, both)


def as_labels(target: Tensor, output: Tensor, ignore_index: int | None = None) -> Tensor:
    """The target for losses that read each channel by itself; arguments as of `as_target`."""
    if output.shape[1] == 1 and target.numel() == output.numel():
        return target.view_as(output)
    return as_target(target, output, ignore_index)


def clean_target(
    target: Tensor, output: Tensor, activation: str, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """A target that losses of this package can read, and the fault of the one given, [3].

    No number is read (`losses.inputs`). Class indices that are not allowed become 0.

    Args:
        target, output: as given by the user.

    Raises:
        ValueError: the target is complex.
    """
    if target.is_complex():  # a cast to integers would only warn
        raise ValueError(
            f"target: {target.dtype} {tuple(target.shape)}, allowed are integers or real labels"
        )
    several = output.shape[1] > 1
    # One channel may have soft labels, whatever the shape of the target.
    if is_labels(target, output) or (not several and target.is_floating_point()):
        are_shares = several and activation != "sigmoid"
        fault = label_fault(target, ignore_index, are_shares=are_shares)
        return target, fault
    indices = as_indices(target, output)
    clean, fault = index_fault(indices, max(2, output.shape[1]), ignore_index)
    return clean, fault


def check_outputs(output: Tensor, activation: str) -> None:
    """Look at the numbers of an output; on a GPU this waits for them.

    Raises:
        ValueError: they are none that losses can take.
    """
    if activation == "softmax" and output.shape[1] == 1:
        raise ValueError(
            "the output has one channel, whose softmax is 1 everywhere; take activation='sigmoid'"
        )
    if not output.is_meta:
        check_logits(output.detach())


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
        found[unused(name or type(loss).__name__, found)] = loss
    if not found:
        raise ValueError("losses: at least one is needed")
    return found


def unused(name: str, taken: Container[str]) -> str:
    """A name that is not taken: the name itself, or with the first free number."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)


MARK = -1  # of ignored pixels among the labels of single channels


class EachChannel(nn.Module):
    """A loss of two classes for each channel of a sigmoid; of cross entropy, the binary one.

    >>> logits, target = torch.tensor([[[1.0], [-2.0]]]), torch.tensor([[[1.0], [1.0]]])
    >>> value = EachChannel(CrossEntropy())(logits, target)
    >>> torch.allclose(value, nn.BCEWithLogitsLoss()(logits, target))
    True
    """

    def __init__(self, loss: CrossEntropy) -> None:
        super().__init__()
        self.ignore_index = loss.ignore_index
        if loss.ignore_index is not None:
            loss = CrossEntropy(**loss.settings | {"ignore_index": MARK})
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The value for logits [N, C, *space] and labels of that shape, or class indices."""
        index = self.ignore_index
        given = target.unsqueeze(1) if is_hard(logits, target) else target
        labels = one_hot(given, logits) if is_hard(logits, target) else given.to(logits.dtype)
        if index is not None:
            labels = torch.where(given == index, MARK, labels)
        z, y = (x.flatten(0, 1).unsqueeze(1) for x in (logits, labels))
        mark = None if index is None else MARK
        return self.loss(as_softmax(z, "sigmoid"), two_classes(y, mark))


def of_each_channel(loss: nn.Module) -> nn.Module:
    """A loss that reads a softmax as one that reads each channel of a sigmoid by itself."""
    if type(loss) is Dice:
        return Dice(**loss.settings | {"activation": "sigmoid"})
    if type(loss) is Sum:
        return Sum([of_each_channel(part) for part in loss.losses], loss.weights)
    assert type(loss) is CrossEntropy  # `form`
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


def is_same(loss: nn.Module | None, other: nn.Module) -> bool:
    """Whether two losses are one module, or a Dice or cross entropy of equal settings."""
    if loss is other:
        return True
    are_plain = type(loss) is type(other) and type(loss) in (Dice, CrossEntropy)
    return are_plain and not has_hooks(loss) and loss.settings == other.settings  # type: ignore


def ignored_by(loss: nn.Module) -> int | None:
    """The label that a loss of this package ignores."""
    indices = (part.recipe.ignore_index for part in table_parts(loss))
    return next((index for index in indices if index is not None), None)


class Part(NamedTuple):
    """Losses that read a network's output in one form, and what they read."""

    losses: LossSet
    logits: Tensor
    target: Tensor

    def rows(self, failed: dict[str, Exception]) -> tuple[Tensor, Tensor, Tensor]:
        """Values, rows and coefficients, see `LossSet.rows`; the logits' type holds the rows."""
        values, rows, coefficients = self.losses.rows(self.logits, self.target, failed)
        if self.logits.dtype == torch.float16:
            rows, coefficients = scaled(rows, coefficients)
        return values, rows, coefficients


class Views:
    """The observed losses, sorted by the form in which they read a network's output.

    Args:
        losses, activation, ignore_index: see `Observer`.

    Attributes:
        names: of the losses, in the order of the observation.
        foreign: the losses that are not of this package.
    """

    def __init__(self, losses: Losses, activation: str, ignore_index: int | None) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.losses = named(losses, ignore_index)
        self.names = tuple(self.losses)
        self.foreign = [loss for loss in self.losses.values() if form(loss) == "given"]
        self.plans: dict[tuple[bool, str | None], dict[tuple[str, int | None], LossSet]] = {}

    def name_of(self, loss: nn.Module | None) -> str | None:
        """The name under which a loss is observed: this very module, or one of equal settings."""
        return next((name for name, other in self.losses.items() if is_same(loss, other)), None)

    def name_apart(self, loss: nn.Module | None) -> str | None:
        """The name of a loss whose own call gives what is observed, and that shares no rows."""
        reads_as_it_is = loss in self.foreign or self.activation == "softmax"
        is_apart = loss is not None and shared_recipe(loss) is None and reads_as_it_is
        return self.name_of(loss) if is_apart else None

    def parts(
        self, output: Tensor, target: Tensor, skipped: str | None = None
    ) -> tuple[list[Part], Tensor]:
        """Sets of losses with what each reads, and the fault of output and target, [3].

        The fault is for the losses of this package (`losses.inputs`).

        Args:
            skipped: a loss that is not among them.
        """
        found, faults = [], list[Tensor]()
        for (reads, index), losses in self._plan(output, skipped).items():
            if reads == "given":
                found.append(Part(losses, output, target))
                continue
            clean, fault = clean_target(target, output, self.activation, index)
            faults.append(fault)
            if reads == "softmax":
                pair = as_softmax(output, self.activation), as_target(clean, output, index)
            else:
                pair = output, as_labels(clean, output, index)
            found.append(Part(losses, *pair))
        if self.activation == "none" and faults:
            faults.append(probability_fault(output.detach()))
        none = torch.zeros(3, device=output.device)
        return found, first_fault(faults) if faults else none

    def explain(self, fault: Sequence[float], channels: int) -> str:
        """The line about a fault, its three numbers read; the output has so many channels."""
        own = (ignored_by(loss) for loss in self.losses.values() if form(loss) != "given")
        return explain(fault, max(2, channels), next(own))

    def _plan(self, output: Tensor, skipped: str | None) -> dict[tuple[str, int | None], LossSet]:
        """The sets of losses by what they read, and by the label that they ignore."""
        several = output.shape[1] > 1
        if (several, skipped) not in self.plans:
            sets: dict[tuple[str, int | None], dict[str, nn.Module]] = {}
            for name, loss in self.losses.items():
                if name == skipped:
                    continue
                reads = form(loss)
                index = None if reads == "given" else ignored_by(loss)
                if reads == "softmax" and several and self.activation == "sigmoid":
                    reads, loss = "labels", of_each_channel(loss)
                sets.setdefault((reads, index), {})[name] = loss
            self.plans[several, skipped] = {key: LossSet(x) for key, x in sets.items()}
        return self.plans[several, skipped]
