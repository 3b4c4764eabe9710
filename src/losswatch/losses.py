"""Segmentation losses: one Dice family, cross entropy, and sets of them evaluated together.

A batch-summed loss depends on the logits only through a small table of sums (per class: sum of y,
p, y*p and p**exponent, and the log-likelihood). So a set of losses shares one softmax and one
table, and the gradient of every loss is a short combination of the same few rows (`LossSet.rows`).

Everywhere: logits are floating point [N, C, *space] with any number of spatial axes; target holds
class indices [N, *space] (integers, the fast path) or one-hot or soft labels [N, C, *space].
Half-precision logits are cast to float32 before anything else, and nothing here is on autocast's
list of operations to lower, so the values are float32's with or without autocast. float64 stays
float64.

Under `torch.distributed` the sums, and the pixel count of cross entropy, run over all ranks (one
all-reduce). Gradients are scaled by the number of ranks, so that their average over ranks, as
`DistributedDataParallel` takes it, is the gradient of the joined batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# smooth_dr is at least TINY: a class with neither pixels nor probability gives 0 / TINY = 0 and
# finite gradients, not NaN. -log(d) and (1 - d)**power, or their slopes, are infinite at 0, so
# their arguments stop at NEAR.
TINY = 1e-20
NEAR = 1e-12


class Dice(nn.Module):
    """1 - Dice, with a knob for each way in which Dice losses differ; as it stands the article's.

    Per class, and per group of pixels summed together,

        tp = Σ y·p,  fp = Σ p^exponent - tp,  fn = Σ y^exponent - tp,
        d = (2·tp + smooth_nr) / (2·tp + 2·alpha·fp + 2·beta·fn + smooth_dr)

    and the loss is the mean of link(d) over kept classes, then over groups.

    Args:
        activation: makes p of the logits: "softmax", "sigmoid", or "none" for probabilities.
        include_background: keep class 0.
        exponent: of the denominator's terms, above 0; 1 is Dice, 2 Milletari's.
        alpha, beta: Tversky's weights of fp and fn; 0.5, 0.5 is Dice, 1, 1 Jaccard.
        smooth_nr, smooth_dr: added to numerator and denominator; a number or one per class.
        floor: the denominator is at least this.
        over: what one sum runs over: "row" (the last spatial axis), "sample", "batch" (of this
            rank), "global" (the batch of all ranks).
        joint: one d for all kept classes together (micro average).
        link: "1-d", "-d", "-log" or "power", which is (1 - d)**power.
        power: of link "power" (focal Tversky).
        weight: one factor per class on link(d).
        weight_normalised: divide by the kept classes' total weight instead of their number.
        reduction: "mean", or "sum" over classes and groups.
        absent: classes without a target pixel in a group count as the formula "smooth"-ly gives,
            as "zero", or are left out of the mean ("skip").
        intersection: tp is the sum of "product" y·p or of "minimum" min(y, p), which is 0 loss at
            p = y for soft labels too. Equal for hard labels.
        ignore_index: pixels of this label count nowhere (class indices only).

    Defined at the edges: with every pixel of a group ignored, or no class left to average, the
    group's loss is 0; where all sums and smoothings are 0, d is 0.

    Raises ValueError for settings, shapes or labels that don't fit, and (eager, on the CPU) for
    NaN logits.

    >>> logits, target = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]])
    >>> f"{Dice()(logits, target):.4f} {Dice(alpha=1, beta=1)(logits, target):.4f}"  # Dice, Jaccard
    '0.1192 0.2130'
    """

    def __init__(
        self,
        activation: str = "softmax",
        include_background: bool = True,
        exponent: float = 1,
        alpha: float = 0.5,
        beta: float = 0.5,
        smooth_nr: float | Sequence[float] = 1e-7,
        smooth_dr: float | Sequence[float] = 1e-7,
        floor: float = 0,
        over: str = "global",
        joint: bool = False,
        link: str = "1-d",
        power: float = 1,
        weight: Sequence[float] | None = None,
        weight_normalised: bool = False,
        reduction: str = "mean",
        absent: str = "smooth",
        intersection: str = "product",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = _choice("activation", activation, "softmax", "sigmoid", "none")
        self.include_background = include_background
        self.exponent = _number("exponent", exponent)
        self.alpha, self.beta = _number("alpha", alpha), _number("beta", beta)
        self.smooth_nr = _numbers("smooth_nr", smooth_nr)
        self.smooth_dr = _numbers("smooth_dr", smooth_dr)
        self.floor = _number("floor", floor)
        self.over = _choice("over", over, "row", "sample", "batch", "global")
        self.joint = joint
        self.link = _choice("link", link, "1-d", "-d", "-log", "power")
        self.power = _number("power", power)
        self.weight = None if weight is None else _per_class("weight", weight)
        self.weight_normalised = weight_normalised
        self.reduction = _choice("reduction", reduction, "mean", "sum")
        self.absent = _choice("absent", absent, "smooth", "zero", "skip")
        self.intersection = _choice("intersection", intersection, "product", "minimum")
        self.ignore_index = ignore_index
        if self.exponent == 0:
            raise ValueError("exponent=0: allowed is a number above 0")
        if self.weight and not sum(self.weight[0 if include_background else 1 :]):
            raise ValueError(f"weight={weight!r}: at least one kept class needs a weight above 0")
        for name in ("smooth_nr", "smooth_dr", "weight"):
            if joint and isinstance(getattr(self, name), tuple):
                raise ValueError(
                    f"{name}: one per class, but joint=True makes one d of all classes"
                )
        self.stack = _Stack([self], [])

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _checked(self.stack, logits, target, self.ignore_index).squeeze(0)


class CrossEntropy(nn.Module):
    """Mean over pixels of -Σ_c y_c·log p_c, p the softmax. The defaults are the article's CCE.

    Args:
        clip: p is clipped to [clip, 1 - clip], with gradient 0 outside; None: log-softmax, which
            never needs it.
        weight: one factor per class; the mean is then over the pixels' total weight.
        label_smoothing: this share of y spread evenly over the classes.
        ignore_index: pixels of this label count nowhere (class indices only); with all ignored the
            loss is 0.
        count_ignored: divide by the number of all pixels, ignored ones too.

    Raises ValueError as `Dice` does.

    >>> logits, target = torch.tensor([[[9.0, 0.0], [0.0, 99.0]]]), torch.tensor([[0, 0]])
    >>> f"{CrossEntropy()(logits, target):.3f} {CrossEntropy(clip=None)(logits, target):.3f}"
    '8.059 49.500'
    """

    def __init__(
        self,
        clip: float | None = 1e-7,
        weight: Sequence[float] | None = None,
        label_smoothing: float = 0,
        ignore_index: int | None = None,
        count_ignored: bool = False,
    ) -> None:
        super().__init__()
        if clip is not None and not 0 < clip < 0.5:
            raise ValueError(f"clip={clip!r}: allowed is a number between 0 and 0.5, or None")
        self.clip = clip
        self.weight = None if weight is None else _per_class("weight", weight)
        self.label_smoothing = _number("label_smoothing", label_smoothing, high=1)
        self.ignore_index = ignore_index
        self.count_ignored = count_ignored
        self.stack = _Stack([], [self])

    @property
    def settings(self) -> tuple:
        return self.clip, self.weight, self.label_smoothing, self.ignore_index, self.count_ignored

    @property
    def plain(self) -> bool:
        """Whether a pixel contributes through p of its own class alone, all pixels alike."""
        return self.weight is None and not self.label_smoothing and not self.count_ignored

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _checked(self.stack, logits, target, self.ignore_index).squeeze(0)


class Sum(nn.Module):
    """Weighted sum of losses, such as Dice + cross entropy.

    >>> logits, target = torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]])
    >>> f"{Sum([Dice(), CrossEntropy()], weights=[1, 0.5])(logits, target):.4f}"
    '0.8609'
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights or [1.0] * len(losses))
        if len(self.weights) != len(losses) or not losses:
            raise ValueError(
                f"weights={weights!r}: one per loss is needed, and there are {len(losses)} losses"
            )

        self.together = LossSet({str(i): loss for i, loss in enumerate(losses)})
        ignored = (getattr(part, "ignore_index", None) for _, part in _parts(self))
        self.ignore_index = next((index for index in ignored if index is not None), None)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _checked(self._value, logits, target, self.ignore_index)

    def _value(self, logits: Tensor, target: Tensor) -> Tensor:
        values = self.together(logits, target).unbind()
        return torch.stack([w * v for w, v in zip(self.weights, values, strict=True)]).sum()


class OneHotTarget(nn.Module):
    """Hands one-hot targets [N, C, *space] to another library's loss that wants them.

    >>> from monai.losses import DiceLoss
    >>> logits, target = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    >>> f"{OneHotTarget(DiceLoss(softmax=True))(logits, target):.4f}"
    '0.6667'
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss(logits, _one_hot(target.unsqueeze(1), logits).to(logits.dtype))


class LossSet(nn.Module):
    """Many losses of the same logits, evaluated together.

    Batch-summed softmax Dice losses and plain cross entropies of one ignore_index share one
    softmax and one table of sums, also as parts of a `Sum`. Any other module (logits, target) ->
    scalar is called as it is. Nothing here depends on the data but the tensors' values, so it all
    works under `torch.func` and `torch.compile`, as far as foreign modules do. Bad labels or
    logits are not looked for: see `check_inputs`.

    >>> losses = LossSet({"dice": Dice(), "cce": CrossEntropy()})
    >>> losses(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]]))
    tensor([0.5143, 0.6931])
    """

    order: Tensor | None

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not losses:
            raise ValueError("losses: at least one is needed")
        self.names = tuple(losses)
        self.losses = nn.ModuleList(losses.values())
        # Each loss as a list of (weight, part); parts are evaluated, losses are sums of parts.
        sums = [_parts(loss) for loss in losses.values()]
        keys = [_sharing(part) for parts in sums for _, part in parts]
        shared = max((k for k in keys if k is not None), key=keys.count, default=None)
        dices: list[Dice] = []
        ces: list[CrossEntropy] = []
        own: list[nn.Module] = []
        where: list[list[tuple[float, list, int]]] = []
        for parts in sums:
            where.append([])
            for weight, part in parts:
                group: list[Any] = own
                if shared is not None and _sharing(part) == shared:
                    group = dices if isinstance(part, Dice) else ces
                index = len(group)
                if group is ces:  # equal ones would double a row
                    index = next(
                        (i for i, c in enumerate(ces) if c.settings == part.settings), index
                    )
                if index == len(group):
                    group.append(part)
                where[-1].append((weight, group, index))
        first = {id(dices): 0, id(ces): len(dices), id(own): len(dices) + len(ces)}
        self.mix = [[(w, first[id(group)] + i) for w, group, i in parts] for parts in where]
        single = all(len(mix) == 1 and mix[0][0] == 1 for mix in self.mix)
        order = torch.tensor([mix[0][1] for mix in self.mix]) if single else None
        self.register_buffer("order", order, persistent=False)
        self.stack = _Stack(dices, ces)
        self.own = own  # a list: these modules are registered above already

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Values [K], float32 (float64 for float64 logits), differentiable by the logits."""
        parts = [self.stack(logits, target)] if self.stack.size else []
        parts += [_wide(loss(logits, target)).view(1) for loss in self.own]
        return self._mixed(parts[0] if len(parts) == 1 else torch.cat(parts))

    @torch.no_grad()
    def rows(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values [K], rows [M, *logits.shape] and coefficients [K, M], with

            d values[k] / d logits = Σ_m coefficients[k, m] · rows[m]

        exactly, for all k. M, at most K unless sums have many parts, depends on the settings and
        shapes alone, so one backward pass through a network per row gives the parameter gradients
        of all losses. With two classes four rows serve cross entropy and any number of Dice losses
        of exponent 1 and 2. The rows are a transposed view of one contiguous [N, M, C, *space]
        buffer.
        """
        logits = logits.detach()
        values, rows, size = [], [], self.stack.size
        coefficients = None
        if size:
            value, row, coefficients = self.stack.rows(logits, target)
            values.append(value)
            rows.append(row)
        for loss in self.own:
            row, value = torch.func.grad_and_value(loss)(logits, target)
            values.append(_wide(value).view(1))
            rows.append(_wide(row).unsqueeze(1))
        if len(rows) == 1 and coefficients is not None:
            return self._mixed(values[0]), rows[0].transpose(0, 1), self._mixed(coefficients)
        value = torch.cat(values)
        matrix = torch.eye(len(self.own), dtype=value.dtype, device=value.device)
        if coefficients is not None:
            below = F.pad(matrix, (coefficients.shape[1], 0))
            matrix = torch.cat([F.pad(coefficients, (0, len(self.own))), below])
        return self._mixed(value), torch.cat(rows, 1).transpose(0, 1), self._mixed(matrix)

    def pivot(self, name: str, num_classes: int) -> int | None:
        """Index of a row on which loss `name` always has a coefficient well away from 0.

        None where the data can make it vanish: an absent class that counts zero, a denominator at
        its floor, a link whose slope can be 0.
        """
        for weight, i in sorted(self.mix[self.names.index(name)], key=lambda part: -part[1]):
            row = self.stack.pivot(i, num_classes)
            if weight and row is not None:  # cross entropy before Dice: its row is its alone
                return row
        return None

    def _mixed(self, parts: Tensor) -> Tensor:
        """Losses from their parts, along the first axis."""
        if self.order is not None:
            return parts.index_select(0, self.order)
        each = parts.unbind()
        sums = [[w * each[i] for w, i in mix] for mix in self.mix]
        return torch.stack([torch.stack(terms).sum(0) for terms in sums])


def check_inputs(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> None:
    """Raise ValueError if the logits hold a NaN or the target a label outside [0, C).

    Reads the data, so on a GPU it waits for them; there losses don't call it by themselves.
    """
    if logits.isnan().any():
        raise ValueError(
            f"logits: {int(logits.isnan().sum())} of {logits.numel()} are NaN, none is allowed"
        )
    if target.ndim == logits.ndim:
        if target.is_floating_point() and target.isnan().any():
            raise ValueError("target: holds NaN, none is allowed")
        return
    counted = target if ignore_index is None else target[target != ignore_index]
    if counted.numel():
        low, high, classes = int(counted.min()), int(counted.max()), logits.shape[1]
        if low < 0 or high >= classes:
            but = "" if ignore_index is None else f" or ignore_index={ignore_index}"
            seen = low if low < 0 else high
            raise ValueError(f"target: holds class {seen}, allowed are 0 to {classes - 1}{but}")


class Saturation(NamedTuple):
    """What `saturation` sees; `reason` is empty for a healthy loss."""

    value: float  # of 1 - d, averaged as the loss averages
    slope: float  # Σ|∂(1-d)/∂logits|: its change per unit move of all logits, at best
    smoothing: float  # the largest share of smoothing in a kept class's denominator
    reason: str


def saturation(loss: Dice, logits: Tensor, target: Tensor) -> Saturation:
    """Tell whether a Dice loss is stuck near 1 without a gradient, or drowned by its smoothing.

    >>> far = torch.tensor([[[999.0, 999.0], [0.0, 0.0]]])
    >>> saturation(Dice(), far, torch.tensor([[1, 1]])).reason
    'value 1.000 with slope 0.0e+00: no gradient leads back'
    """
    plain = copy.copy(loss)
    plain.link, plain.reduction = "1-d", "mean"
    stack = _Stack([plain], [])
    with torch.no_grad():
        g, value = torch.func.grad_and_value(lambda x: stack(x, target)[0])(_wide(logits.detach()))
        sums = stack.measure(stack.pixels(stack.activate(_wide(logits)), target, dense=True))
        smooth = torch.as_tensor(loss.smooth_dr, dtype=value.dtype, device=value.device)
        total = sums.labels[0] + sums.powers[0]
        if loss.joint:
            total = total.sum(-1, keepdim=True)
        share = (smooth / (total + smooth).clamp_min(TINY)).expand_as(total)
        start = 0 if loss.include_background or loss.joint else 1
        v, slope, most = value.item(), g.abs().sum().item(), share[..., start:].max().item()
    reason = ""
    if v > 0.95 and slope < 1e-3:
        reason = f"value {v:.3f} with slope {slope:.1e}: no gradient leads back"
    elif most > 0.5:
        reason = f"smoothing makes {most:.0%} of a class's denominator: it hides the sums"
    return Saturation(v, slope, most, reason)


# --------------------------------------------------------------------------------------------------
# The one implementation: K Dice losses and Z cross entropies, from the sums they need.


class _Pixels(NamedTuple):
    p: Tensor  # [N, C, *space]
    y: Tensor | None  # [N, C, *space], or None: use `label`
    label: Tensor  # [N, 1, *space] indices, 0 where ignored
    valid: Tensor | None  # [N, 1, *space] 0 or 1, or None: all count
    own: Tensor | None  # [N, 1, *space] p of the label where asked for, 0 where ignored
    hard: bool  # y is 0 or 1
    py: Tensor | None = None  # p·y, if known


class _Sums(NamedTuple):
    tp: Tensor  # [*groups, C]
    counted: Tensor | None  # pixels, [*groups], or None: all
    powers: Sequence[Tensor]  # Σ p**exponent, [*groups, C] per exponent
    labels: Sequence[Tensor]  # Σ y**exponent, one for all if y is 0 or 1


class _Stack(nn.Module):
    """K Dice losses, then Z cross entropies, of equal activation, `over` and ignore_index.

    "batch" and "global" Dice losses may be mixed. All Dice losses are computed at once on
    [*groups, K, C], where groups is () for batch sums, [N] per sample, [N, *space[:-1]] per row.
    """

    knobs: Tensor
    which: Tensor

    def __init__(self, dices: Sequence[Dice], ces: Sequence[CrossEntropy]) -> None:
        super().__init__()
        self.dices, self.size = len(dices), len(dices) + len(ces)
        self.ces = [c.settings for c in ces]
        self.plain = all(c.plain for c in ces)
        self.logs = any(c.clip is None for c in ces)
        self.activation, self.over, self.minimum, self.mean = "softmax", "batch", False, True
        if dices:
            self.activation, self.over = dices[0].activation, dices[0].over
            self.minimum = dices[0].intersection == "minimum"
            self.mean = dices[0].reduction == "mean"
        self.grouped = self.over in ("sample", "row")
        first: Any = next(iter((*dices, *ces)), None)
        self.ignore_index: int | None = None if first is None else first.ignore_index
        self.exponents = sorted({d.exponent for d in dices})
        self.background = any(d.include_background for d in dices)
        self.joint = any(d.joint for d in dices)
        self.log, self.power = (any(d.link == link for d in dices) for link in ("-log", "power"))
        self.zero, self.skip = (
            any(d.absent == absent for d in dices) for absent in ("zero", "skip")
        )
        self.floors = any(d.floor for d in dices)
        # A coefficient of these can't vanish while tp's has a slope: see `pivot`.
        self.steady = [d.absent == "smooth" and d.link in ("1-d", "-d") and d.ignore_index is None
                       and not d.floor and not (d.weight and min(d.weight) == 0)
                       for d in dices]  # fmt: skip

        lists: dict[str, int] = {}  # what the per-class lists demand of the logits
        for loss in (*dices, *ces):
            for name in ("smooth_nr", "smooth_dr", "weight"):
                if isinstance(value := getattr(loss, name, None), tuple):
                    lists[f"{name} for {len(value)} classes"] = len(value)
        if len(set(lists.values())) > 1:
            raise ValueError(f"per-class lists of different lengths: {', '.join(lists)}")
        self.demand = next(iter(lists), "")
        self.classes = lists.get(self.demand)
        table = []
        for d in dices:
            kept = (d.weight or ())[0 if d.include_background else 1 :]
            divisor = (float(d.include_background) - 1, 1.0)  # plus, times the number of classes
            if d.reduction == "sum" and not d.joint:
                divisor = (1.0, 0.0)
            elif d.weight_normalised and d.weight:
                divisor = (sum(kept), 0.0)
            knobs = (
                2 - 2 * d.alpha - 2 * d.beta, 2 * d.alpha, 2 * d.beta, d.smooth_nr,
                _at_least(TINY, d.smooth_dr), d.floor or -math.inf, d.weight or 1.0,
                float(d.include_background), *divisor, float(d.link != "-d"), d.power,
            )  # fmt: skip
            flags = (d.link == "-log", d.link == "power", d.joint, d.absent == "zero",
                     d.absent == "skip", d.over == "global")  # fmt: skip
            row = (*knobs, *map(float, flags))
            table.append([x if isinstance(x, tuple) else (x,) * (self.classes or 1) for x in row])
        # The bits of float64 as integers: they follow .to(device), but half() doesn't round 1e-7
        # away.
        bits = torch.tensor(table, dtype=torch.float64).view(torch.int64)
        self.exponent_of = [self.exponents.index(d.exponent) for d in dices]
        which = torch.tensor(self.exponent_of, dtype=torch.int64)
        self.register_buffer("knobs", bits, persistent=False)
        self.register_buffer("which", which, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Values [K + Z]."""
        return _Evaluate.apply(logits, target, self)[0]

    # -- pixels and sums ---------------------------------------------------------------------------

    def activate(self, x: Tensor) -> Tensor:
        if self.activation == "softmax":
            if x.shape[1] != 2 or _traced(x):
                return x.softmax(1)
            p = torch.empty_like(x)  # a sigmoid of the difference, as exact in half the time
            torch.neg(torch.sub(x[:, 1], x[:, 0], out=p[:, 1]), out=p[:, 0])
            return p.sigmoid_()
        return x.sigmoid() if self.activation == "sigmoid" else x.view_as(x)

    def dense(self, logits: Tensor, target: Tensor) -> bool:
        """Whether to spell the target out as one-hot.

        Indexing is faster in eager mode on a CPU, but for Dice of two classes, and only there.
        """
        soft = target.ndim == logits.ndim or self.minimum or not self.plain
        few = target.ndim == 1 or (logits.shape[1] == 2 and self.dices > 0)
        return soft or few or logits.device.type != "cpu" or torch.compiler.is_compiling()

    def pixels(
        self,
        p: Tensor,
        target: Tensor,
        dense: bool,
        y: Tensor | None = None,
        own: Tensor | None = None,
    ) -> _Pixels:
        """What the losses read of p and target; y and own may be known from before."""
        if target.ndim == p.ndim:
            return _Pixels(p, target.to(p.dtype), target, None, None, False)
        label, valid = target.unsqueeze(1), None
        if self.ignore_index is not None:
            counted = label.ne(self.ignore_index)
            label, valid = torch.where(counted, label, 0), counted.to(p.dtype)
        if not dense:
            return _Pixels(p, None, label, valid, p.gather(1, label) if own is None else own, True)
        py = None
        if y is None:
            y = _one_hot(label, p)
            y = y if valid is None else y * valid
        if own is None and self.ces and self.plain:  # a compiler fuses this better than indexing
            py = p * y
            own = py.sum(1, keepdim=True)
        return _Pixels(p, y, label, valid, own, True, py)

    def measure(self, pixels: _Pixels) -> _Sums:
        p, y, label, valid, own, hard, py = pixels
        if p.ndim == 2:  # no space: one pixel per sample
            p = p.unsqueeze(-1)
            valid, y, py = (None if x is None else x.unsqueeze(-1) for x in (valid, y, py))
        last = p.ndim - 1
        axes = {"row": (last,), "sample": (*range(2, last), last)}.get(
            self.over, (0, *range(2, p.ndim))
        )

        def total(
            t: Tensor, axes: tuple[int, ...] = axes
        ) -> Tensor:  # [N, C, *space] to [*groups, C]
            t = t.sum(axes) if axes else t
            return t.movedim(1, -1) if self.over == "row" else t

        if y is not None:
            tp = total(torch.minimum(p, y) if self.minimum else p * y if py is None else py)
            labels = [total(y**e if e != 1 else y) for e in ([1] if hard else self.exponents)]
        else:
            # Row by row, since scattering adds one by one, and float32 can't add a million that
            # way.
            assert own is not None
            one = own.new_ones(()).expand_as(own) if valid is None else valid
            t, own, one = (
                x.squeeze(1) for x in (label, own if valid is None else own * valid, one)
            )
            rows = p.new_zeros(*t.shape[:-1], p.shape[1])
            tp, count = (
                total(rows.scatter_add(-1, t, x).movedim(-1, 1), axes[:-1]) for x in (own, one)
            )
            labels = [count]
        p = p if valid is None else p * valid
        powers = []
        for exponent in self.exponents:
            if (
                exponent == 2
            ):  # row by row for the same reason; the norm reads p once and writes no p²
                powers.append(total(torch.linalg.vector_norm(p, dim=-1).square(), axes[:-1]))
            else:
                powers.append(total(p if exponent == 1 else p**exponent))
        counted = None if valid is None else total(valid).squeeze(-1)
        return _Sums(tp, counted, powers, labels)

    # -- values and their derivatives by the sums --------------------------------------------------

    def evaluate(
        self, logits: Tensor, target: Tensor, dense: bool
    ) -> tuple[_Pixels, tuple[Tensor, ...]]:
        """The pixels; values [K+Z]; their derivatives a by tp, b by the power [*groups, K, C] and
        e by minus the likelihood [Z].
        """
        x = _wide(logits)
        logp = x.log_softmax(1) if self.logs else None
        pixels = self.pixels(self.activate(x) if logp is None else logp.exp(), target, dense)
        none = x.new_zeros(0)
        local = everywhere = self.measure(pixels) if self.dices else _Sums(none, None, [], [])
        ce = [-self._likelihood(pixels, logp, settings) for settings in self.ces]
        norm = [self._weight_sum(pixels, settings) for settings in self.ces]
        world = _world()
        if world > 1:
            everywhere, ce, norm = self._gather(local, ce, norm)
        a = b = e = none
        values = []
        if self.dices:
            dice, a, b = self._dice(local, everywhere, world, x.shape[1])
            values.append(dice)
        if ce:
            total = torch.stack(ce)
            if isinstance(norm[0], float):  # then all are
                e = total.new_full((len(ce),), 1 / norm[0] if norm[0] else 0)
            else:
                e = torch.stack(norm)  # type: ignore[arg-type]
                e = (e > 0) / e.clamp_min(TINY)
            values.append(total * e)
            e = e * world if world > 1 else e
        return pixels, (values[0] if len(values) == 1 else torch.cat(values), a, b, e)

    def _gather(self, local: _Sums, ce: list[Tensor], norm: list):
        """Sums over all ranks, in one all-reduce."""
        parts = [] if self.grouped or not self.dices else [local.tp, *local.powers, *local.labels]
        if parts and local.counted is not None:
            parts.append(local.counted)
        dices = len(parts)
        parts += ce + [
            torch.as_tensor(n, dtype=c.dtype, device=c.device)
            for n, c in zip(norm, ce, strict=True)
        ]
        if not parts:
            return local, ce, norm
        flat = torch.cat([t.reshape(-1) for t in parts])
        dist.all_reduce(flat)
        split = zip(flat.split([t.numel() for t in parts]), parts, strict=True)
        parts = [s.view(t.shape) for s, t in split]
        ce, norm = parts[dices : dices + len(ce)], parts[dices + len(ce) :]
        if dices:
            last = 1 + len(local.powers)
            powers, labels = parts[1:last], parts[last : last + len(local.labels)]
            counted = None if local.counted is None else parts[dices - 1]
            local = _Sums(parts[0], counted, powers, labels)
        return local, ce, norm

    def _dice(self, local: _Sums, everywhere: _Sums, world: int, classes: int):
        knobs = self.knobs.view(torch.float64).to(local.tp.dtype).unbind(1)
        (own, alpha, beta, smooth_nr, smooth_dr, floor, weight, background, plus, times,
         one, power, log, powered, joint, zero, skip, every) = knobs  # fmt: skip

        def each(
            tables: Sequence[Tensor],
        ) -> Tensor:  # [*groups, C] per exponent to [*groups, K, C]
            if len(tables) == 1:
                return tables[0].unsqueeze(-2)
            return torch.stack(list(tables), -2).index_select(-2, self.which)

        def stacked(sums: _Sums):
            count = None if sums.counted is None else sums.counted[..., None, None]
            return sums.tp.unsqueeze(-2), each(sums.labels), each(sums.powers), count

        tp, ys, ps, count = stacked(local)
        if everywhere is not local:
            pairs = zip(stacked(everywhere), (tp, ys, ps, count), strict=True)
            tp, ys, ps, count = (
                None if m is None else torch.where(every > 0, g, m) for g, m in pairs
            )
        keep = F.pad(background[:, :1], (0, classes - 1), value=1.0)
        if self.joint:
            tp, ys, ps = (
                torch.where(joint > 0, (s * keep).sum(-1, keepdim=True), s) for s in (tp, ys, ps)
            )
        w = weight * keep
        kept = w
        w = w / torch.add(plus, times, alpha=classes)
        if self.skip:
            kept = kept * (ys > 0)
            w = torch.where(skip > 0, kept / kept.sum(-1, keepdim=True).clamp_min(TINY), w)
        if self.zero:
            w = torch.where((zero > 0) & (ys <= 0), 0.0, w)
        if count is not None:
            w = w * (count > 0)

        den = torch.addcmul(torch.addcmul(torch.addcmul(smooth_dr, own, tp), alpha, ps), beta, ys)
        safe = torch.maximum(den, floor) if self.floors else den
        d = torch.add(smooth_nr, tp, alpha=2) / safe
        terms, slope = one - d, None
        if self.log:
            cut = d.clamp_min(NEAR)
            terms = torch.where(log > 0, -cut.log(), terms)
            slope = torch.where(log > 0, (d > NEAR) / -cut, -1.0)
        if self.power:
            cut = (1 - d).clamp_min(NEAR)
            terms = torch.where(powered > 0, cut**power, terms)
            steep = -power * cut ** (power - 1) * (1 - d > NEAR)
            slope = torch.where(powered > 0, steep, -1.0 if slope is None else slope)
        values = (w * terms).sum(-1)
        if self.grouped:
            groups: Any = values.shape[:-1].numel()
            values = values.flatten(0, -2).sum(0)
            if world > 1:
                flat = torch.cat([values, values.new_full((1,), groups)])
                dist.all_reduce(flat)
                values, groups = flat[:-1], flat[-1]
            if self.mean:
                values, w = values / groups, w / groups
        if world > 1:  # the average over ranks divides by as much
            w = w * (world if self.grouped else 1 + (world - 1) * every)
        u = (-w if slope is None else w * slope) / safe
        ud = u * d
        if self.floors:
            ud = ud * (den > floor)
        a, b = torch.addcmul(u + u, own, ud, value=-1), -alpha * ud
        if self.joint:
            a, b = (torch.where(joint > 0, keep * s.sum(-1, keepdim=True), s) for s in (a, b))
        return values, a, b

    def _likelihood(self, pixels: _Pixels, logp: Tensor | None, settings: tuple) -> Tensor:
        """Σ y log p of the softened target."""
        p, y, label, valid, own, hard, py = pixels
        clip = settings[0]
        if hard and self.plain:
            if clip is not None:
                assert own is not None
                log = own.clamp(clip, 1 - clip).log()
            else:
                assert logp is not None
                fuse = y is not None and _traced(logp)
                log = torch.where(y > 0, logp, 0.0) if fuse else logp.gather(1, label)  # type: ignore
            return (log if valid is None else log * valid).sum()
        q = self._soften(pixels, settings)
        log = p.clamp(clip, 1 - clip).log() if logp is None or clip is not None else logp
        return torch.where(q > 0, q * log, 0.0).sum()

    def _weight_sum(self, pixels: _Pixels, settings: tuple) -> Tensor | float:
        """What the cross entropy is divided by."""
        p, y, _, valid, _, _, _ = pixels
        _, weight, _, _, count_ignored = settings
        if count_ignored or (weight is None and valid is None):
            return p.numel() / p.shape[1]
        if weight is None:
            assert valid is not None
            return valid.sum()
        assert y is not None
        return (y * _shaped(weight, p)).sum()

    def _soften(self, pixels: _Pixels, settings: tuple) -> Tensor:
        """The target with label smoothing and class weights, dense."""
        p, y, _, valid, _, _, _ = pixels
        _, weight, smoothing, _, _ = settings
        assert y is not None
        if smoothing:
            y = (1 - smoothing) * y + smoothing / p.shape[1]
            y = y if valid is None else y * valid
        return y if weight is None else y * _shaped(weight, p)

    # -- gradients ---------------------------------------------------------------------------------

    def pullback(
        self,
        pixels: _Pixels,
        a: Tensor | None,
        powers: Mapping[float, Tensor],
        ces: Sequence[tuple[tuple, Tensor]],
    ) -> Tensor:
        """Gradient by the logits from the derivatives by the sums.

        a is by tp, `powers` by Σ p**exponent ([*groups, C] each); for pairs (settings, c) in `ces`,
        c is by minus the likelihood.

        Big tensors are few and reused: in large images allocating one costs more than filling it.
        """
        p, y, label, valid, own, hard, py = pixels
        if self.activation == "softmax" and p.shape[1] == 2 and y is not None:
            return _antisymmetric(self._up(pixels, a, powers, ces))
        bare = self.activation == "none"  # p are the logits; otherwise dp brings a factor p
        q: Any = None
        for exponent, c in powers.items():
            c = self._spread(exponent * c, p)
            if exponent == 1:
                q = c if q is None else q + c
            elif exponent == 2:
                q = c * p if q is None else _addcmul(q, c, p)
            else:  # p**(exponent - 1) may be infinite at 0, its product with p is not
                q = c * (p if bare else p.clamp_min(1e-30)) ** (exponent - 1) + (
                    0 if q is None else q
                )
        w: Any = None  # the part of q that lies on each pixel's label
        if a is not None:
            q = q if valid is None else q * valid
            if y is not None:
                hit = 0.5 * (1 - torch.sign(p - y)) if self.minimum else y
                q = _addcmul(q, self._spread(a, p), hit)
            else:
                if self.grouped:
                    w = self._spread(a, p).expand_as(p).gather(1, label)
                else:
                    w = a.flatten().index_select(0, label.flatten()).view(label.shape)
                w = w if bare else w * own
            full = q.shape == p.shape
            if bare:
                q = q if full else q.expand_as(p).clone()
            else:
                q = q.mul_(p) if full else q * p
        for settings, c in ces:
            if not (hard and self.plain):
                q = (0 if q is None else q) - c * self._ce_field(pixels, settings)
                continue
            assert own is not None
            clip = settings[0]
            mine = c.expand_as(own) if clip is None else c * (own == own.clamp(clip, 1 - clip))
            w = -mine if w is None else w - mine
        if w is not None:
            w = w if valid is None else w * valid
            if q is None:  # cross entropy alone
                q = p * -w
                return q.scatter_add_(1, label, w) if y is None else _addcmul(q, y, w)
            q = q.scatter_add_(1, label, w) if y is None else _addcmul(q, y, w)
        if bare:
            return q
        if self.activation == "sigmoid":
            return q * (1 - p)
        return _addcmul(q, p, q.sum(1, keepdim=True), value=-1)

    def _up(
        self,
        pixels: _Pixels,
        a: Tensor | None,
        powers: Mapping[float, Tensor],
        ces: Sequence[tuple[tuple, Tensor]],
    ) -> Tensor:
        """`pullback` for the second of two softmax logits, [N, *space]; the first's is minus it."""
        p, y, _, valid, own, _, _ = pixels
        assert y is not None
        p0, p1 = p.unbind(1)
        up: Any = None
        if a is not None:
            hit = 0.5 * (1 - torch.sign(p - y)) if self.minimum else y
            a0, a1 = self._spread(a, p).unbind(1)
            up = _addcmul(hit[:, 1] * a1, hit[:, 0], a0, value=-1)
            for exponent, b in powers.items():
                b0, b1 = self._spread(exponent * b, p).unbind(1)
                if exponent == 1:
                    up = up.add_(b1 - b0) if not _traced(up) else up + (b1 - b0)
                    continue
                for p_c, b_c in ((p0, -b0), (p1, b1)):
                    power = p_c if exponent == 2 else p_c.clamp_min(1e-30) ** (exponent - 1)
                    up = _addcmul(up, power, b_c)
            up = up * p0 if valid is None else up * (p0 * valid[:, 0])
            up = up * p1 if _traced(up) else up.mul_(p1)
        for settings, c in ces:
            row = self._ce_row(pixels, settings)[:, 1]
            up = c * row if up is None else _addcmul(up, c, row)
        return up

    def _ce_row(self, pixels: _Pixels, settings: tuple) -> Tensor:
        """Derivative of minus the likelihood by the logits."""
        field = self._ce_field(pixels, settings)
        return torch.addcmul(-field, pixels.p, field.sum(1, keepdim=True))

    def _by_exponent(self, b: Tensor) -> dict[float, Tensor]:
        """b with 0 for all losses but those of the exponent."""
        if len(self.exponents) == 1:
            return {self.exponents[0]: b}
        return {x: b * (self.which == i)[:, None] for i, x in enumerate(self.exponents)}

    def _spread(self, t: Tensor, p: Tensor) -> Tensor:
        """[*groups, C] to something that broadcasts with [N, C, *space]."""
        if self.over == "row":
            return t.movedim(-1, 1).unsqueeze(-1)
        t = t if self.over == "sample" else t.unsqueeze(0)
        return t.view(*t.shape, *(1,) * (p.ndim - 2))

    def _ce_field(self, pixels: _Pixels, settings: tuple) -> Tensor:
        """The softened target where clipping leaves a gradient, which is p Σ field - field."""
        p, y, _, _, own, hard, _ = pixels
        clip = settings[0]
        field = self._soften(pixels, settings)
        if clip is None:
            return field
        if hard and self.plain:
            assert own is not None
            return field * (own == own.clamp(clip, 1 - clip))
        return field * (p == p.clamp(clip, 1 - clip))

    # -- rows --------------------------------------------------------------------------------------

    def basis(self, classes: int) -> int:
        """Rows that span the gradients of all losses of these settings, whatever their number."""
        if not self.dices:
            return len(self.ces)
        kept = classes if self.background or classes == 2 else classes - 1
        rows = kept + len(self.ces)
        for exponent in self.exponents:
            if classes == 2:
                rows += 0 if exponent == 1 else 1 if exponent == 2 else 2
            else:
                rows += classes - 1 if exponent == 1 else kept
        return rows

    def pivot(self, k: int, classes: int) -> int | None:
        if k >= self.size:  # a row of its own
            return min(self.basis(classes), self.size) + k - self.size
        if self.basis(classes) > self.size:
            return k
        if k >= self.dices:
            return self.basis(classes) - self.size + k
        # tp of class 1, which every loss keeps. Its coefficient is -w (2 - (2 - 2 beta) d) / den
        # or further from 0.
        return (1 if self.background or classes == 2 else 0) if self.steady[k] else None

    def rows(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values [K + Z], rows [N, M, C, *space], coefficients [K + Z, M]."""
        _check_shapes(self, logits, target)
        classes = logits.shape[1]
        alone = self.basis(classes) > self.size or target.ndim == logits.ndim
        dense = not alone or self.dense(logits, target)
        pixels, (values, a, b, e) = self.evaluate(logits, target, dense)
        if alone:
            each = [
                self.pullback(pixels, a[k], {self.exponents[i]: b[k]}, [])
                for k, i in enumerate(self.exponent_of)
            ]
            for settings, c in zip(self.ces, e.unbind(), strict=True):
                each.append(self.pullback(pixels, None, {}, [(settings, c)]))
            one = torch.eye(self.size, dtype=values.dtype, device=values.device)
            return values, torch.stack(each, 1), one
        rows, columns = [], []
        if self.dices:
            spell = self._two_class_rows if classes == 2 else self._many_class_rows
            rows, columns = spell(pixels, a, self._by_exponent(b))
        top = torch.stack(columns, 1) if columns else values.new_zeros(0, 0)
        for settings in self.ces:
            row = self._ce_row(pixels, settings)
            rows.append(row[:, 1] if classes == 2 else row.unsqueeze(1))
        if self.ces:
            own = F.pad(torch.diag(e), (len(columns), 0))
            top = torch.cat([F.pad(top, (0, len(self.ces))), own]) if columns else own
        if classes > 2:
            return values, torch.cat(rows, 1), top
        return values, _antisymmetric(torch.stack(rows, 1), 2), top

    def _two_class_rows(self, pixels: _Pixels, a: Tensor, powers: dict[float, Tensor]):
        """Rows of Σ y_c p_c and Σ p_c**exponent for the second logit, and coefficients' columns.

        With v = p0·p1, a rising second logit and falling first one move Σ y_1 p_1 by y_1·v, Σ y_0
        p_0 by -y_0·v and Σ p_1 by v, their difference. Squared, p_1 gives 2p_1·v = v + (p_1 -
        p_0)·v and p_0 -v + (p_1 - p_0)·v. Rows of disjoint support keep float32 from cancelling.
        """
        assert pixels.y is not None
        p0, p1 = pixels.p.unbind(1)
        v = p0 * p1
        rows = list((pixels.y * v.unsqueeze(1)).unbind(1))
        if pixels.valid is not None:
            v = v * pixels.valid.squeeze(1)
        a0, a1 = a.unbind(1)
        columns = [-a0, a1]
        for exponent, b in powers.items():
            b0, b1 = b.unbind(1)
            if exponent in (1, 2):
                shift = b1 - b0
                columns[:2] = [columns[0] + shift, columns[1] + shift]
                if exponent == 2:
                    rows.append(v * (p1 - p0))
                    columns.append(b1 + b0)
            else:
                rows += [v * (-exponent * p0.clamp_min(1e-30) ** (exponent - 1)),
                         v * (exponent * p1.clamp_min(1e-30) ** (exponent - 1))]  # fmt: skip
                columns += [b0, b1]
        return rows, columns

    def _many_class_rows(self, pixels: _Pixels, a: Tensor, powers: dict[float, Tensor]):
        """As above for C classes; Σ_c Σ p_c is fixed, so that C - 1 rows serve the Σ p_c."""
        p, y, _, valid, _, _, _ = pixels
        assert y is not None
        one = _shaped(torch.eye(p.shape[1], dtype=p.dtype, device=p.device), p)
        start = 0 if self.background else 1

        def moves(field: Tensor, start: int) -> Tensor:  # [N, c, C, *space]: field_c (δ_cj - p_j)
            return field[:, start:, None] * (one[start:] - p[:, None])

        rows, columns = [moves(p * y, start)], list(a[:, start:].unbind(1))
        for exponent, b in powers.items():
            field = exponent * p**exponent if exponent != 1 else p
            field = field if valid is None else field * valid
            if exponent == 1:
                rows.append(moves(field, 1))
                columns += (b[:, 1:] - b[:, :1]).unbind(1)
            else:
                rows.append(moves(field, start))
                columns += b[:, start:].unbind(1)
        return rows, columns


class _Evaluate(torch.autograd.Function):
    """Values of a `_Stack` of logits and target, with the gradient in closed form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, target, stack):
        _check_shapes(stack, logits, target)
        pixels, rest = stack.evaluate(logits, target, stack.dense(logits, target))
        none = logits.new_zeros(0)
        y = none if pixels.y is None or not pixels.hard else pixels.y
        return rest[0], pixels.p, y, none if pixels.own is None else pixels.own, *rest[1:]

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, ctx.stack = inputs
        ctx.dtype = logits.dtype
        ctx.set_materialize_grads(False)  # no zeros for p
        ctx.save_for_backward(target, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return None, None, None
        target, p, y, own, a, b, e = ctx.saved_tensors
        stack = ctx.stack
        known = [x if x.numel() else None for x in (y, own)]
        pixels = stack.pixels(p, target, stack.dense(p, target), *known)
        dice, ce = g[: stack.dices, None], (g[stack.dices :] * e).unbind() if stack.ces else ()
        powers = (
            {x: (dice * each).sum(-2) for x, each in stack._by_exponent(b).items()}
            if stack.dices
            else {}
        )
        a = (dice * a).sum(-2) if stack.dices else None
        pairs = list(zip(stack.ces, ce, strict=True))
        return stack.pullback(pixels, a, powers, pairs).to(ctx.dtype), None, None


# --------------------------------------------------------------------------------------------------


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _traced(x: Tensor) -> bool:
    """Whether a compiler or a torch.func transform stands between us and the numbers."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _addcmul(q: Tensor, x: Tensor, y: Tensor, value: float = 1) -> Tensor:
    """q + value·x·y, into q where it has the size and nobody traces it."""
    if _traced(q) or q.shape != torch.broadcast_shapes(x.shape, y.shape):
        return torch.addcmul(q, x, y, value=value)
    return q.addcmul_(x, y, value=value)


def _antisymmetric(up: Tensor, dim: int = 1) -> Tensor:
    """Both logits' rows: what moves the second of two up moves the first down as much."""
    if _traced(up):
        return torch.stack([-up, up], dim)
    both = up.new_empty(*up.shape[:dim], 2, *up.shape[dim:])
    torch.neg(up, out=both.select(dim, 0))
    both.select(dim, 1).copy_(up)
    return both


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _one_hot(label: Tensor, logits: Tensor) -> Tensor:
    """Labels [N, 1, *space] as 0 and 1 [N, C, *space] of the logits' type, at least float32."""
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if logits.shape[1] == 2 and not _traced(label):  # half the work, if not for a compiler
        one = torch.empty(logits.shape, dtype=kind, device=label.device)
        torch.neg(one[:, 1:].copy_(label), out=one[:, :1]).add_(1)
        return one
    return (label == _shaped(torch.arange(logits.shape[1], device=label.device), logits)).to(kind)


def _shaped(values: Any, like: Tensor) -> Tensor:
    """[..., C] to [..., C, 1, ...], one 1 per spatial axis."""
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=like.dtype, device=like.device)
    return values.view(*values.shape, *(1,) * (like.ndim - 2))


def _parts(loss: nn.Module, weight: float = 1.0) -> list[tuple[float, nn.Module]]:
    if not isinstance(loss, Sum):
        return [(weight, loss)]
    pairs = zip(loss.weights, loss.losses, strict=True)
    return [part for w, f in pairs for part in _parts(f, weight * w)]


def _sharing(loss: nn.Module) -> tuple | None:
    """Losses with equal answers share their rows; None has its own."""
    if isinstance(loss, Dice):
        batch = loss.over in ("batch", "global") and loss.intersection == "product"
        return (loss.ignore_index,) if batch and loss.activation == "softmax" else None
    return (loss.ignore_index,) if isinstance(loss, CrossEntropy) and loss.plain else None


def _checked(loss: Any, logits: Tensor, target: Tensor, ignore_index: int | None) -> Tensor:
    """The value; bad data is explained where a look is cheap: in eager mode, on the CPU."""
    if logits.device.type != "cpu" or _traced(logits) or _traced(target):
        return loss(logits, target)
    index = (*logits.shape[:1], *logits.shape[2:])
    if target.shape == index and target.numel() and logits.ndim > 1 < logits.shape[1]:
        low, high = torch.aminmax(target)
        if low < 0 or high >= logits.shape[1]:
            check_inputs(logits, target, ignore_index)
    value = loss(logits, target)
    if value.isnan():
        check_inputs(logits, target, ignore_index)
    return value


def _check_shapes(stack: _Stack, logits: Tensor, target: Tensor) -> None:
    seen, wanted = tuple(target.shape), tuple(logits.shape)
    if logits.ndim < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits: {logits.dtype} {wanted}, allowed is floating point [N, C, *space]"
        )
    if stack.classes is not None and wanted[1] != stack.classes:
        raise ValueError(f"{stack.demand}, but logits {wanted} have {wanted[1]}")
    if stack.over == "row" and logits.ndim < 3:
        raise ValueError(f"logits: {wanted} have no rows, over='row' needs [N, C, *space]")
    if seen == wanted:
        if stack.ignore_index is not None:
            raise ValueError(f"target: {seen} is one-hot or soft, ignore_index needs class indices")
    elif seen != (wanted[0], *wanted[2:]) or wanted[1] == 1:
        index = "" if wanted[1] == 1 else f"class indices {(wanted[0], *wanted[2:])} or "
        raise ValueError(f"target: shape {seen}, allowed are {index}labels {wanted}")
    elif target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target: {target.dtype} {seen}, class indices must be integers")


def _choice(name: str, value: Any, *allowed: str) -> Any:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    return value


def _number(name: str, value: Any, high: float = float("inf")) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        upto = "at least 0" if high == float("inf") else f"from 0 to {high:g}"
        raise ValueError(f"{name}={value!r}: allowed is a number {upto}")
    return float(value)


def _per_class(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name}={value!r}: allowed is one number per class")
    return tuple(_number(f"{name}[{c}]", v) for c, v in enumerate(value))


def _at_least(low: float, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
    return tuple(max(low, v) for v in value) if isinstance(value, tuple) else max(low, value)


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    return _number(name, value) if isinstance(value, int | float) else _per_class(name, value)
