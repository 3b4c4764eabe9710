"""Converts outputs of networks and targets into the inputs that losses read.

The losses of this package read logits [N, C, *space] of a softmax, and class indices [N, *space] or
labels [N, C, *space]. A network with one channel, whose sigmoid is the probability of foreground,
is a softmax over the logits (0, z). A network that returns probabilities p is a softmax over the
logits log p. So these losses can watch such networks, too: autograd differentiates the conversion.
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
from losswatch.watch.span import scale_rows

Losses = Mapping[str, str | nn.Module] | Sequence[str | nn.Module] | LossSet
ACTIVATIONS = ("softmax", "sigmoid", "none")


def tensors(what: str, value: Any) -> list[Tensor]:
    """The tensors of a list or of a dict (torchvision's networks), or a list of one tensor.

    Raises:
        TypeError: `value` is none of these; the message calls it `what`.
    """
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
        activation: turns the output into probabilities.
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
        ignore_index: in labels of one channel; it marks both classes of the labels returned.
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
    """From labels of the foreground [N, 1, *space] to labels of background and foreground."""
    both = torch.cat([1 - labels, labels], 1)
    return both if ignore_index is None else torch.where(labels == ignore_index, labels, both)


def as_labels(target: Tensor, output: Tensor, ignore_index: int | None = None) -> Tensor:
    """The target for losses that read each channel by itself; arguments: see `as_target`."""
    if output.shape[1] == 1 and target.numel() == output.numel():
        return target.view_as(output)
    return as_target(target, output, ignore_index)


def clean_target(
    target: Tensor, output: Tensor, activation: str, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """A target that losses of this package can read, and the fault of the original, [3].

    No number of a GPU is read (`losses.inputs`). Class indices that are not allowed are clamped.

    Args:
        target, output: those of the user.

    Raises:
        ValueError: the target is complex.
    """
    if target.is_complex():  # a cast to integers would only warn
        raise ValueError(
            f"target: {target.dtype} {tuple(target.shape)}, allowed are integers or real labels"
        )
    several = output.shape[1] > 1
    # With one channel, a target of any shape may hold soft labels.
    if is_labels(target, output) or (not several and target.is_floating_point()):
        are_shares = several and activation != "sigmoid"
        fault = label_fault(target, ignore_index, are_shares=are_shares)
        return target, fault
    indices = as_indices(target, output)
    clean, fault = index_fault(indices, max(2, output.shape[1]), ignore_index)
    return clean, fault


def check_outputs(output: Tensor, activation: str) -> None:
    """Check that losses can take an output. Reads its numbers, so it waits for a GPU.

    Raises:
        ValueError: a number is NaN or infinite, or a softmax would have one channel.
    """
    if activation == "softmax" and output.shape[1] == 1:
        raise ValueError(
            "the output has one channel, whose softmax is 1 everywhere; take activation='sigmoid'"
        )
    if not output.is_meta:
        check_logits(output.detach())


# -- losses ---------------------------------------------------------------------------------------


def losses_by_name(losses: Losses, ignore_index: int | None) -> dict[str, nn.Module]:
    """Losses by name: a preset has its own name, a module has that of its class.

    Raises:
        ValueError: there are no losses, or a preset does not exist.
        TypeError: a loss is neither a name nor a module.
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
        found[unused_name(name or type(loss).__name__, found)] = loss
    if not found:
        raise ValueError("losses: at least one is needed")
    return found


def unused_name(name: str, taken: Container[str]) -> str:
    """A name that is not taken: the name itself, or the name with the first free number."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)


MARK = -1  # the label of ignored pixels in a single channel


class EachChannel(nn.Module):
    """Binary cross entropy: applies a loss of two classes to each channel of a sigmoid.

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
        index, hard = self.ignore_index, is_hard(logits, target)
        target = target.unsqueeze(1) if hard else target
        labels = one_hot(target, logits) if hard else target.to(logits.dtype)
        if index is not None:
            labels = torch.where(target == index, MARK, labels)
        z, y = (x.flatten(0, 1).unsqueeze(1) for x in (logits, labels))
        mark = None if index is None else MARK
        return self.loss(as_softmax(z, "sigmoid"), two_classes(y, mark))


def of_each_channel(loss: nn.Module) -> nn.Module:
    """From a loss that reads a softmax to one that reads each channel of a sigmoid by itself."""
    if type(loss) is Dice:
        return Dice(**loss.settings | {"activation": "sigmoid"})
    if type(loss) is Sum:
        return Sum([of_each_channel(part) for part in loss.losses], loss.weights)
    assert type(loss) is CrossEntropy  # the others have no "softmax" as `input_kind`
    return EachChannel(loss)


def input_kind(loss: nn.Module) -> str:
    """Which input a loss needs.

    Logits of a "softmax", "labels" for each channel, or output and target unchanged ("given").
    """
    if type(loss) is CrossEntropy:
        return "softmax"
    if type(loss) is Dice:
        return "softmax" if loss.activation == "softmax" else "labels"
    if type(loss) is Sum and len(kinds := set(map(input_kind, loss.losses))) == 1:
        return kinds.pop()
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
    """Losses with one kind of input, and that input."""

    losses: LossSet
    logits: Tensor
    target: Tensor

    def rows(self, failed: dict[str, Exception]) -> tuple[Tensor, Tensor, Tensor]:
        """Values, rows and coefficients, see `LossSet.rows`; scaled if the logits are float16."""
        values, rows, coefficients = self.losses.rows(self.logits, self.target, failed)
        if self.logits.dtype == torch.float16:
            rows, coefficients = scale_rows(rows, coefficients)
        return values, rows, coefficients


class WatchedLosses:
    """The observed losses, sorted by the kind of input that they need.

    Args:
        losses, activation, ignore_index: see `Observer`.

    Attributes:
        names: of the losses, in the order of the observation.
        foreign: the losses that do not belong to this package.
    """

    def __init__(self, losses: Losses, activation: str, ignore_index: int | None) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        self.activation, self.ignore_index = activation, ignore_index
        self.losses = losses_by_name(losses, ignore_index)
        self.names = tuple(self.losses)
        self.foreign = [loss for loss in self.losses.values() if input_kind(loss) == "given"]
        self.sets: dict[tuple[bool, str | None], dict[tuple[str, int | None], LossSet]] = {}

    def name_of(self, loss: nn.Module | None) -> str | None:
        """The name of an observed loss that is this module or has equal settings, or None."""
        return next((name for name, other in self.losses.items() if is_same(loss, other)), None)

    def name_of_called(self, loss: nn.Module | None) -> str | None:
        """The name of an observed loss that shares no rows, and whose own call can be used."""
        reads_unchanged = loss in self.foreign or self.activation == "softmax"
        shares_no_rows = loss is not None and shared_recipe(loss) is None
        return self.name_of(loss) if shares_no_rows and reads_unchanged else None

    def value(self, loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        """The value of one of the observed losses for output and target of the user."""
        if (kind := input_kind(loss)) == "given":
            return loss(output, target)
        index = ignored_by(loss)
        clean, _ = clean_target(target, output, self.activation, index)
        if kind == "labels":
            return loss(output, as_labels(clean, output, index))
        if self.activation == "sigmoid" and output.shape[1] > 1:
            return of_each_channel(loss)(output, as_labels(clean, output, index))
        return loss(as_softmax(output, self.activation), as_target(clean, output, index))

    def split(
        self, output: Tensor, target: Tensor, skip_loss: str | None = None
    ) -> tuple[list[Part], Tensor]:
        """Sets of losses with their inputs, and the fault of output and target, [3].

        Only losses of this package have faults (`losses.inputs`).

        Args:
            skip_loss: the name of a loss to leave out.
        """
        found, faults = [], list[Tensor]()
        for (kind, index), losses in self._sets(output, skip_loss).items():
            if kind == "given":
                found.append(Part(losses, output, target))
                continue
            clean, fault = clean_target(target, output, self.activation, index)
            faults.append(fault)
            if kind == "softmax":
                pair = as_softmax(output, self.activation), as_target(clean, output, index)
            else:
                pair = output, as_labels(clean, output, index)
            found.append(Part(losses, *pair))
        if self.activation == "none" and faults:
            faults.append(probability_fault(output.detach()))
        none = torch.zeros(3, device=output.device)
        return found, first_fault(faults) if faults else none

    def explain(self, fault: Sequence[float], channels: int) -> str:
        """The line about a fault, whose three numbers have been read, of so many channels."""
        own = (ignored_by(loss) for loss in self.losses.values() if input_kind(loss) != "given")
        return explain(fault, max(2, channels), next(own))

    def _sets(self, output: Tensor, skip_loss: str | None) -> dict[tuple[str, int | None], LossSet]:
        """The sets of losses, by the kind of their input and by the label that they ignore."""
        several = output.shape[1] > 1
        if (several, skip_loss) not in self.sets:
            sets: dict[tuple[str, int | None], dict[str, nn.Module]] = {}
            for name, loss in self.losses.items():
                if name == skip_loss:
                    continue
                kind = input_kind(loss)
                index = None if kind == "given" else ignored_by(loss)
                if kind == "softmax" and several and self.activation == "sigmoid":
                    kind, loss = "labels", of_each_channel(loss)
                sets.setdefault((kind, index), {})[name] = loss
            self.sets[several, skip_loss] = {key: LossSet(x) for key, x in sets.items()}
        return self.sets[several, skip_loss]
