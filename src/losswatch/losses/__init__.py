"""Segmentation losses: one Dice family, cross entropy, and sets of them evaluated together.

Each is only a checked description of itself: `losses.sums` computes them, alone or together.

Everywhere: logits are floating point [N, C, *space] with any number of spatial axes; target holds
class indices [N, *space] (any integer type, or boolean) or one-hot or soft labels [N, C, *space].
An infinite logit gives the limit of large ones where that exists, as for one of two classes. Where
it does not, ValueError is raised on a CPU, and the value is NaN elsewhere. An empty batch gives 0.
Half-precision logits are cast to float32 before anything else, and nothing here is on autocast's
list of operations to lower, so the values are float32's with or without autocast. float64 stays
float64.

Under `torch.distributed` the sums, and the pixel count of cross entropy, run over all ranks (one
all-reduce). Gradients are scaled by the number of ranks, so that their average over ranks, as
`DistributedDataParallel` takes it, is the gradient of the joined batch.

Gradients are written out, not traced: to differentiate one again (`create_graph=True`, a gradient
inside a gradient of torch.func) raises NotImplementedError.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losswatch.losses.sums import TINY, Likelihood, Stack, one_hot, traced, wide


class _Frozen(nn.Module):
    """A module whose settings cannot change: its tables are made of them at construction."""

    _settings: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settings:
            raise AttributeError(
                f"{name} cannot change after construction; make a new {type(self).__name__}"
            )
        super().__setattr__(name, value)

    def _freeze(self, constructor: Any) -> None:
        """From now on the attributes named as arguments of the constructor are read-only."""
        names = inspect.signature(constructor).parameters
        self.__dict__["_settings"] = frozenset(names) - {"self"}


class Dice(_Frozen):
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
        self.include_background = _flag("include_background", include_background)
        self.exponent = _number("exponent", exponent)
        self.alpha, self.beta = _number("alpha", alpha), _number("beta", beta)
        self.smooth_nr = _numbers("smooth_nr", smooth_nr)
        self.smooth_dr = _numbers("smooth_dr", smooth_dr)
        self.floor = _number("floor", floor)
        self.over = _choice("over", over, "row", "sample", "batch", "global")
        self.joint = _flag("joint", joint)
        self.link = _choice("link", link, "1-d", "-d", "-log", "power")
        self.power = _number("power", power)
        self.weight = None if weight is None else _per_class("weight", weight)
        self.weight_normalised = _flag("weight_normalised", weight_normalised)
        self.reduction = _choice("reduction", reduction, "mean", "sum")
        self.absent = _choice("absent", absent, "smooth", "zero", "skip")
        self.intersection = _choice("intersection", intersection, "product", "minimum")
        self.ignore_index = _index("ignore_index", ignore_index)
        if self.exponent == 0:
            raise ValueError("exponent=0: allowed is a number above 0")
        if self.weight and not sum(self.weight[0 if include_background else 1 :]):
            raise ValueError(f"weight={weight!r}: at least one kept class needs a weight above 0")
        for name in ("smooth_nr", "smooth_dr", "weight"):
            if joint and isinstance(getattr(self, name), tuple):
                raise ValueError(
                    f"{name}: one per class, but joint=True makes one d of all classes"
                )
        self.stack = Stack([self], [])
        self._freeze(Dice.__init__)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _checked(self.stack, logits, target, self.ignore_index).squeeze(0)


class CrossEntropy(_Frozen):
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
        if clip is not None and not (_is_number(clip) and 0 < clip < 0.5):
            raise ValueError(f"clip={clip!r}: allowed is a number between 0 and 0.5, or None")
        self.clip = None if clip is None else float(clip)
        self.weight = None if weight is None else _per_class("weight", weight)
        self.label_smoothing = _number("label_smoothing", label_smoothing, high=1)
        self.ignore_index = _index("ignore_index", ignore_index)
        self.count_ignored = _flag("count_ignored", count_ignored)
        self.stack = Stack([], [self])
        self._freeze(CrossEntropy.__init__)

    @property
    def settings(self) -> Likelihood:
        numbers = (self.clip, self.weight, self.label_smoothing)
        return Likelihood(*numbers, self.ignore_index, self.count_ignored)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _checked(self.stack, logits, target, self.ignore_index).squeeze(0)


class Sum(_Frozen):
    """Weighted sum of losses, such as Dice + cross entropy.

    >>> logits, target = torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]])
    >>> f"{Sum([Dice(), CrossEntropy()], weights=[1, 0.5])(logits, target):.4f}"
    '0.8609'
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.losses = tuple(losses)
        self.weights = tuple(weights or [1.0] * len(losses))
        if len(self.weights) != len(losses) or not losses:
            raise ValueError(
                f"weights={weights!r}: one per loss is needed, and there are {len(losses)} losses"
            )
        for weight in self.weights:
            if not _is_number(weight) or not math.isfinite(weight):
                raise ValueError(f"weights={weights!r}: allowed are finite numbers")

        self.together = LossSet({str(i): loss for i, loss in enumerate(losses)})
        ignored = (getattr(part, "ignore_index", None) for _, part in _parts(self))
        self.ignore_index = next((index for index in ignored if index is not None), None)
        self._freeze(Sum.__init__)

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
        return self.loss(logits, one_hot(target.unsqueeze(1), logits).to(logits.dtype))


class LossSet(nn.Module):
    """Many losses of the same logits, evaluated together.

    Batch-summed softmax Dice losses and plain cross entropies of one ignore_index, and sums of
    them, share one softmax and one table of sums. Only `Dice`, `CrossEntropy` and `Sum` themselves
    do: a subclass, a module with hooks and any other module (logits, target) -> scalar is foreign,
    and called as it is. Nothing here depends on the data but the tensors' values, so it all works
    under `torch.func` and `torch.compile`, as far as foreign modules do. Bad labels or logits are
    not looked for: see `check_inputs`.

    Raises ValueError where there are no losses.

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
        self.losses = tuple(losses.values())  # immutable, for what follows is made of them
        for i, loss in enumerate(self.losses):
            self.add_module(str(i), loss)
        self._plan()

    def _plan(self) -> None:
        """Decide which losses share the table of sums, and which are called as they are.

        A loss is a list of (weight, part); parts are evaluated, losses are sums of parts.
        """
        sums = [_parts(loss) for loss in self.losses]
        keys = [_sharing(part) for parts in sums for _, part in parts]
        shared = max((k for k in keys if k is not None), key=keys.count, default=None)
        dices: list[Dice] = []
        ces: list[CrossEntropy] = []
        foreign: list[nn.Module] = []
        where: list[list[tuple[float, list, int]]] = []
        for loss, parts in zip(self.losses, sums, strict=True):
            if shared is None or any(_sharing(part) != shared for _, part in parts):
                where.append([(1.0, foreign, len(foreign))])
                foreign.append(loss)
                continue
            where.append([])
            for weight, part in parts:
                group: list[Any] = dices if isinstance(part, Dice) else ces
                index = len(group)
                if group is ces:  # equal ones would double a row
                    index = next(
                        (i for i, c in enumerate(ces) if c.settings == part.settings), index
                    )
                if index == len(group):
                    group.append(part)
                where[-1].append((weight, group, index))
        first = {id(dices): 0, id(ces): len(dices), id(foreign): len(dices) + len(ces)}
        self.mix = [[(w, first[id(group)] + i) for w, group, i in parts] for parts in where]
        single = all(len(mix) == 1 and mix[0][0] == 1 for mix in self.mix)
        order = torch.tensor([mix[0][1] for mix in self.mix]) if single else None
        self.register_buffer("order", order, persistent=False)
        self.stack = Stack(dices, ces)
        # Lists, since these modules are registered already: parts that share, and whole losses.
        self.sharing: list[nn.Module] = [*dices, *ces]
        self.foreign = foreign

    def _see_hooks(self) -> None:
        """Plan again where a module that shares has been given a hook since."""
        if any(map(_customised, self.sharing)):
            device = self.stack.knobs.device
            self._plan()
            self.to(device)

    def is_foreign(self, name: str) -> bool:
        """Whether loss `name` is called as it is, and shares nothing."""
        return any(self.losses[self.names.index(name)] is loss for loss in self.foreign)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Values [K], float32 (float64 for float64 logits), differentiable by the logits."""
        self._see_hooks()
        parts = [self.stack(logits, target)] if self.stack.size else []
        parts += [wide(loss(logits, target)).view(1) for loss in self.foreign]
        return self._mixed(parts[0] if len(parts) == 1 else torch.cat(parts))

    @torch.no_grad()
    def rows(
        self,
        logits: Tensor,
        target: Tensor,
        known: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """values [K], rows [M, *logits.shape] and coefficients [K, M], with

            d values[k] / d logits = Σ_m coefficients[k, m] · rows[m]

        exactly, for all k. M, at most K unless sums have many parts, depends on the settings and
        shapes alone, so one backward pass through a network per row gives the parameter gradients
        of all losses. With two classes four rows serve cross entropy and any number of Dice losses
        of exponent 1 and 2. The rows are a transposed view of one contiguous [N, M, C, *space]
        buffer.

        `known` holds the value and the derivative by the logits of foreign losses that have been
        called for these logits already; they are not called again.
        """
        self._see_hooks()
        logits = logits.detach()
        values, rows, size = [], [], self.stack.size
        coefficients = None
        if size:
            value, row, coefficients = self.stack.rows(logits, target)
            values.append(value)
            rows.append(row)
        names = {id(loss): name for name, loss in zip(self.names, self.losses, strict=True)}
        for loss in self.foreign:
            value, row = known.get(names[id(loss)]) or value_and_slope(loss, logits, target)
            values.append(wide(value).view(1))
            rows.append(wide(row).unsqueeze(1))
        if len(rows) == 1 and coefficients is not None:
            return self._mixed(values[0]), rows[0].transpose(0, 1), self._mixed(coefficients)
        value = torch.cat(values)
        matrix = torch.eye(len(self.foreign), dtype=value.dtype, device=value.device)
        if coefficients is not None:
            below = F.pad(matrix, (coefficients.shape[1], 0))
            matrix = torch.cat([F.pad(coefficients, (0, len(self.foreign))), below])
        return self._mixed(value), torch.cat(rows, 1).transpose(0, 1), self._mixed(matrix)

    def pivot(self, name: str, num_classes: int) -> int | None:
        """Index of a row on which loss `name` always has a coefficient well away from 0.

        None where the data can make it vanish: an absent class that counts zero, a denominator at
        its floor, a link whose slope can be 0, no weight on fn. Holds for class indices.
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


def value_and_slope(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The value of any loss, and its derivative by the logits, of their shape."""
    if traced(logits):
        slope, value = torch.func.grad_and_value(loss)(logits, target)
        return value, slope
    with torch.enable_grad():  # torch.func would not take every autograd.Function
        x = logits.detach().requires_grad_()
        value = loss(x, target)
        [slope] = torch.autograd.grad(value, x)
    return value.detach(), slope


def check_inputs(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> None:
    """Raise ValueError if a logit is NaN or infinite, or a label of the target outside [0, C).

    Reads the data, so on a GPU it waits for them; there losses don't call it by themselves.
    """
    for what, bad in (("NaN", logits.isnan()), ("infinite", logits.isinf())):
        if bad.any():
            count = f"{int(bad.sum())} of {logits.numel()}"
            raise ValueError(f"logits: {count} are {what}, none is allowed")
    if target.ndim == logits.ndim:
        if target.is_floating_point() and target.isnan().any():
            raise ValueError("target: holds NaN, none is allowed")
        return
    target = target.long()  # PyTorch finds no smallest one of some types
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
    settings = {name: getattr(loss, name) for name in loss._settings}
    stack = Dice(**settings | {"link": "1-d", "reduction": "mean"}).stack
    with torch.no_grad():
        g, value = torch.func.grad_and_value(lambda x: stack(x, target)[0])(wide(logits.detach()))
        sums = stack.measure(stack.pixels(stack.activate(wide(logits)), target, dense=True))
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


def _parts(loss: nn.Module, weight: float = 1.0) -> list[tuple[float, nn.Module]]:
    """A sum's parts with their weights; any other loss is its only part."""
    if type(loss) is not Sum or _customised(loss):
        return [(weight, loss)]
    pairs = zip(loss.weights, loss.losses, strict=True)
    return [part for w, f in pairs for part in _parts(f, weight * w)]


def _customised(loss: nn.Module) -> bool:
    """Whether to call this very module gives something else than its class's `forward`."""
    hooks = (
        loss._forward_hooks,
        loss._forward_pre_hooks,
        loss._backward_hooks,
        loss._backward_pre_hooks,
    )
    return any(hooks) or "forward" in loss.__dict__


def _sharing(loss: nn.Module) -> tuple | None:
    """Losses with equal answers share their rows; None has its own.

    A subclass may compute anything, so only the classes themselves share.
    """
    if _customised(loss):
        return None
    if type(loss) is Dice:
        batch = loss.over in ("batch", "global") and loss.intersection == "product"
        return (loss.ignore_index,) if batch and loss.activation == "softmax" else None
    plain = type(loss) is CrossEntropy and loss.settings.plain
    return (loss.ignore_index,) if plain else None


def _checked(loss: Any, logits: Tensor, target: Tensor, ignore_index: int | None) -> Tensor:
    """The value; bad data is explained where a look is cheap: in eager mode, on the CPU."""
    if logits.device.type != "cpu" or traced(logits) or traced(target):
        return loss(logits, target)
    index = (*logits.shape[:1], *logits.shape[2:])
    if target.shape == index and target.numel() and logits.ndim > 1 < logits.shape[1]:
        if not isinstance(loss, Stack) or loss.dense(logits, target):
            low, high = torch.aminmax(target if target.dtype in _ORDERED else target.long())
            if low < 0 or high >= logits.shape[1]:
                check_inputs(logits, target, ignore_index)
    try:
        value = loss(logits, target)
    except RuntimeError:  # indexing looks by itself
        check_inputs(logits, target, ignore_index)
        raise
    if value.isnan():
        check_inputs(logits, target, ignore_index)
    return value


# The types of labels of which PyTorch finds the smallest and largest.
_ORDERED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _choice(name: str, value: Any, *allowed: str) -> Any:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):  # "off" and "no" would count as true
        raise ValueError(f"{name}={value!r}: allowed are true and false")
    return value


def _index(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise ValueError(f"{name}={value!r}: allowed is a whole number, or None")
    return None if value is None else int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(name: str, value: Any, high: float = math.inf) -> float:
    if not _is_number(value) or not 0 <= value <= high or math.isinf(value):
        upto = "at least 0" if math.isinf(high) else f"from 0 to {high:g}"
        raise ValueError(f"{name}={value!r}: allowed is a number {upto}")
    return float(value)


def _per_class(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name}={value!r}: allowed is one number per class")
    return tuple(_number(f"{name}[{c}]", v) for c, v in enumerate(value))


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _per_class(name, value)
    return _number(name, value)
