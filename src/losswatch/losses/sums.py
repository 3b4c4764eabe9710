"""The table of sums behind the losses of `losswatch.losses`: values, gradients and rows.

A batch-summed loss depends on the logits only through a small table of sums (per class: sum of y,
p, y*p and p**exponent, and the log-likelihood). So a set of losses shares one softmax and one
table, and the gradient of every loss is a short combination of the same few rows (`Stack.rows`).

logits -> `Stack.activate` -> `Stack.pixels` -> `Stack.measure` (sums) -> `Stack.evaluate` (values
and their derivatives by the sums) -> `Stack.pullback` (one gradient) or `Stack.rows` (all).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from losswatch.losses import CrossEntropy, Dice

# smooth_dr is at least TINY: a class with neither pixels nor probability gives 0 / TINY = 0 and
# finite gradients, not NaN. -log(d) and (1 - d)**power, or their slopes, are infinite at 0, so
# their arguments stop at NEAR.
TINY = 1e-20
NEAR = 1e-12
ONCE = "second derivatives: a loss's gradient is written out, and cannot be differentiated again"


class Likelihood(NamedTuple):
    """The settings of a cross entropy; equal ones are computed once."""

    clip: float | None
    weight: tuple[float, ...] | None
    label_smoothing: float
    ignore_index: int | None
    count_ignored: bool

    @property
    def plain(self) -> bool:
        """Whether a pixel contributes through p of its own class alone, all pixels alike."""
        return self.weight is None and not self.label_smoothing and not self.count_ignored


class Pixels(NamedTuple):
    p: Tensor  # [N, C, *space]
    y: Any  # [N, C, *space], or None: use `label`
    label: Tensor  # [N, 1, *space] indices, 0 where ignored
    valid: Any  # [N, 1, *space] 0 or 1, or None: all count
    own: Any  # [N, 1, *space] p of the label, 0 where ignored; None where nothing asks for it
    hard: bool  # y is 0 or 1
    py: Tensor | None = None  # p·y, if known


class Sums(NamedTuple):
    tp: Tensor  # [*groups, C]
    counted: Tensor | None  # pixels, [*groups], or None: all
    powers: Sequence[Tensor]  # Σ p**exponent, [*groups, C] per exponent
    labels: Sequence[Tensor]  # Σ y**exponent, one for all if y is 0 or 1


class Stack(nn.Module):
    """K Dice losses, then Z cross entropies, of equal activation, `over` and ignore_index.

    "batch" and "global" Dice losses may be mixed. All Dice losses are computed at once on
    [*groups, K, C], where groups is () for batch sums, [N] per sample, [N, *space[:-1]] per row.
    """

    knobs: Tensor
    weights: Tensor  # [Z, C], of the cross entropies
    masks: Tensor  # [exponents, K, 1]

    def __init__(self, dices: Sequence[Dice], ces: Sequence[CrossEntropy]) -> None:
        super().__init__()
        self.dices, self.size = len(dices), len(dices) + len(ces)
        self.ces = [c.settings for c in ces]
        self.plain = all(c.plain for c in self.ces)
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
        self.zero, self.skip = (any(d.absent == name for d in dices) for name in ("zero", "skip"))
        self.floors = any(d.floor for d in dices)
        self.steady = [_steady(d) for d in dices]

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
                d.weight or 1.0, float(d.include_background), *divisor,
                2 - 2 * d.alpha - 2 * d.beta, 2 * d.alpha, 2 * d.beta, d.smooth_nr,
                _at_least(TINY, d.smooth_dr), d.floor or -math.inf, float(d.link != "-d"), d.power,
            )  # fmt: skip
            flags = (d.link == "-log", d.link == "power", d.joint, d.absent == "zero",
                     d.absent == "skip", d.over == "global")  # fmt: skip
            row = (*knobs, *map(float, flags))
            table.append([x if isinstance(x, tuple) else (x,) * (self.classes or 1) for x in row])
        weights = [c.weight or (1.0,) * (self.classes or 1) for c in self.ces]
        self.exponent_of = [self.exponents.index(d.exponent) for d in dices]
        masks = torch.tensor(self.exponent_of) == torch.arange(len(self.exponents))[:, None]
        # The bits of float64 as integers: .to(device) takes them along, half() doesn't round them.
        for name, rows in (("knobs", table), ("weights", weights)):
            bits = torch.tensor(rows, dtype=torch.float64).view(torch.int64)
            self.register_buffer(name, bits, persistent=False)
        self.register_buffer("masks", masks[..., None], persistent=False)
        self.ready: dict[tuple, tuple[Tensor, ...]] = {}  # what `_settings` gave

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Values [K + Z]."""
        if not torch.compiler.is_compiling() and _grad_levels(logits) > 1:
            raise NotImplementedError(ONCE)
        return _Evaluate.apply(logits, target, self)[0]

    # -- pixels and sums ---------------------------------------------------------------------------

    def activate(self, x: Tensor) -> Tensor:
        if self.activation == "softmax":
            if x.shape[1] != 2 or traced(x):
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
    ) -> Pixels:
        """What the losses read of p and target; y and own may be known from before."""
        if target.ndim == p.ndim:
            return Pixels(p, target.to(p.dtype), target, None, None, False)
        label, valid = target.long().unsqueeze(1), None
        if self.ignore_index is not None:
            counted = label.ne(self.ignore_index)
            label, valid = torch.where(counted, label, 0), counted.to(p.dtype)
        if not dense:
            return Pixels(p, None, label, valid, p.gather(1, label) if own is None else own, True)
        py = None
        if y is None:
            y = one_hot(label, p)
            y = y if valid is None else y * valid
        if own is None and self.ces and self.plain:  # a compiler fuses this better than indexing
            py = p * y
            own = py[:, :1] + py[:, 1:] if p.shape[1] == 2 else py.sum(1, keepdim=True)
        return Pixels(p, y, label, valid, own, True, py)

    def measure(self, pixels: Pixels) -> Sums:
        p, y, label, valid, own, hard, py = pixels
        if p.ndim == 2:  # no space: one pixel per sample
            p = p.unsqueeze(-1)
            valid, y, py = (None if x is None else x.unsqueeze(-1) for x in (valid, y, py))
        space = tuple(range(2, p.ndim))
        axes = {"row": space[-1:], "sample": space}.get(self.over, (0, *space))

        def total(t: Tensor, axes: tuple[int, ...] = axes) -> Tensor:
            """[N, C, *space] to [*groups, C]."""
            t = t.sum(axes) if axes else t
            return t.movedim(1, -1) if self.over == "row" else t

        if y is not None:
            tp = total(torch.minimum(p, y) if self.minimum else p * y if py is None else py)
            labels = [total(y**e if e != 1 else y) for e in ([1] if hard else self.exponents)]
        else:
            # Row by row: scattering adds one by one, and float32 can't add a million that way.
            one = torch.ones_like(own) if valid is None else valid
            own = own if valid is None else own * valid
            t = label.squeeze(1)
            rows = p.new_zeros(*t.shape[:-1], p.shape[1])
            added = (rows.scatter_add(-1, t, x.squeeze(1)).movedim(-1, 1) for x in (own, one))
            tp, count = (total(x, axes[:-1]) for x in added)
            labels = [count]
        p = p if valid is None else p * valid
        powers = []
        for exponent in self.exponents:
            if exponent == 2 and not traced(p):
                # Row by row for the same reason; reads p once and writes no p².
                powers.append(total(torch.linalg.vector_norm(p, dim=-1).square(), axes[:-1]))
            else:
                powers.append(total(p if exponent == 1 else p**exponent))
        counted = None if valid is None else total(valid).squeeze(-1)
        return Sums(tp, counted, powers, labels)

    # -- values and their derivatives by the sums --------------------------------------------------

    def evaluate(self, logits: Tensor, target: Tensor, dense: bool) -> tuple:
        """Pixels; values [K+Z]; their derivatives a by tp, b by the power [*groups, K, C], e by
        minus the likelihood [Z].
        """
        x = wide(logits)
        logp = x.log_softmax(1) if self.logs else None
        pixels = self.pixels(self.activate(x) if logp is None else logp.exp(), target, dense)
        none = x.new_zeros(0)
        local = everywhere = self.measure(pixels) if self.dices else Sums(none, None, [], [])
        pixels = pixels._replace(py=None)  # as large as the logits, and done with
        ce = [-self._likelihood(pixels, logp, settings) for settings in self.ces]
        norm: list[Any] = [self._weight_sum(pixels, settings) for settings in self.ces]
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
            if isinstance(norm[0], Tensor):  # then all are
                e = torch.stack(norm)
                e = (e > 0) / e.clamp_min(TINY)
            else:
                e = total.new_full((len(ce),), 1 / norm[0] if norm[0] else 0)
            values.append(total * e)
            e = e * world if world > 1 else e
        value = values[0] if len(values) == 1 else torch.cat(values)
        if x.numel() == 0 and world == 1:  # no pixel counts, as where all are ignored
            value, a, b, e = (torch.zeros_like(t) for t in (value, a, b, e))
        return pixels, value, a, b, e

    def _gather(self, local: Sums, ce: list[Tensor], norm: list):
        """Sums over all ranks, in one all-reduce."""
        parts = [] if self.grouped or not self.dices else [local.tp, *local.powers, *local.labels]
        if parts and local.counted is not None:
            parts.append(local.counted)
        dices = len(parts)
        parts += ce
        for n, c in zip(norm, ce, strict=True):
            parts.append(n if isinstance(n, Tensor) else c.new_full((), n))
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
            local = Sums(parts[0], counted, powers, labels)
        return local, ce, norm

    def _settings(self, like: Tensor, classes: int) -> tuple[Tensor, ...]:
        """The knobs, then what keeps a class (0 or 1), its weight, and that over what the mean
        divides by; all [K, C] or [K, 1].

        Kept, for to make such small tensors at each call takes as long as a pass over an image.
        """
        key = (like.dtype, like.device, classes)
        if not traced(like) and key in self.ready:
            return self.ready[key]
        columns = self.knobs.view(torch.float64).to(like.dtype).unbind(1)
        weight, background, plus, times, *knobs = columns
        keep = F.pad(background[:, :1], (0, classes - 1), value=1.0)
        kept = weight * keep
        settings = (*knobs, keep, kept, kept / torch.add(plus, times, alpha=classes))
        if not traced(like):
            self.ready[key] = settings
        return settings

    def _dice(self, local: Sums, everywhere: Sums, world: int, classes: int):
        (own, alpha, beta, smooth_nr, smooth_dr, floor, one, power, log, powered, joint, zero, skip,
         every, keep, kept, w) = self._settings(local.tp, classes)  # fmt: skip

        def each(tables: Sequence[Tensor]) -> Tensor:
            """[*groups, C] per exponent to [*groups, K, C]."""
            if len(tables) == 1:
                return tables[0].unsqueeze(-2)
            return torch.stack([tables[i] for i in self.exponent_of], -2)

        def stacked(sums: Sums):
            count = None if sums.counted is None else sums.counted[..., None, None]
            return sums.tp.unsqueeze(-2), each(sums.labels), each(sums.powers), count

        tp, ys, ps, count = stacked(local)
        if everywhere is not local:
            pairs = zip(stacked(everywhere), (tp, ys, ps, count), strict=True)
            tp, ys, ps, count = (
                None if m is None else torch.where(every > 0, g, m) for g, m in pairs
            )
        if self.joint:
            tp, ys, ps = (
                torch.where(joint > 0, (s * keep).sum(-1, keepdim=True), s) for s in (tp, ys, ps)
            )
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

    def _likelihood(self, pixels: Pixels, logp: Any, settings: Likelihood) -> Tensor:
        """Σ y log p of the softened target."""
        p, y, label, valid, own, hard, _ = pixels
        clip = settings.clip
        if not (hard and self.plain):
            q = self._soften(pixels, settings)
            log = logp if clip is None else p.clamp(clip, 1 - clip).log()
            return _total(torch.where(q > 0, q * log, 0.0))
        if clip is not None:
            log = own.clamp(clip, 1 - clip)
            log = log.log() if traced(log) else log.log_()
        elif y is not None and traced(logp):
            log = torch.where(y > 0, logp, 0.0)
        else:
            log = logp.gather(1, label)
        return _total(log if valid is None else log * valid)

    def _weight_sum(self, pixels: Pixels, settings: Likelihood) -> Tensor | float:
        """What the cross entropy is divided by."""
        p, y, _, valid, _, _, _ = pixels
        if settings.count_ignored or (settings.weight is None and valid is None):
            return p.numel() / p.shape[1]
        if settings.weight is None:
            return valid.sum()
        return (y * self._weight(settings, p)).sum()

    def _soften(self, pixels: Pixels, settings: Likelihood) -> Tensor:
        """The target with label smoothing and class weights, dense."""
        p, y, _, valid, _, _, _ = pixels
        smoothing = settings.label_smoothing
        if smoothing:
            y = (1 - smoothing) * y + smoothing / p.shape[1]
            y = y if valid is None else y * valid
        return y if settings.weight is None else y * self._weight(settings, p)

    def _weight(self, settings: Likelihood, p: Tensor) -> Tensor:
        """The class weights, [C, 1, ...]."""
        weight = self.weights.view(torch.float64)[self.ces.index(settings)]
        return _shaped(weight.to(p.dtype), p)

    # -- gradients ---------------------------------------------------------------------------------

    def pullback(
        self,
        pixels: Pixels,
        a: Tensor | None,
        powers: Mapping[float, Tensor],
        ces: Sequence[tuple[Likelihood, Tensor]],
    ) -> Tensor:
        """Gradient by the logits from the derivatives by the sums.

        a is by tp, `powers` by Σ p**exponent ([*groups, C] each); for pairs (settings, c) in `ces`,
        c is by minus the likelihood.

        Big tensors are few and reused: in large images allocating one costs more than filling it.
        """
        p, y, label, valid, own, hard, _ = pixels
        softmax = self.activation == "softmax"
        if softmax and p.shape[1] == 2 and y is not None:
            if traced(p):
                return _antisymmetric([self._up(pixels, a, powers, ces)])[:, 0]
            both = torch.empty_like(p)
            torch.neg(self._up(pixels, a, powers, ces, out=both[:, 1]), out=both[:, 0])
            return both
        q: Any = None  # by p
        later: list[tuple[Likelihood, Tensor]] = list(ces)
        for exponent, b in powers.items():
            b = self._spread(exponent * b, p)
            if exponent == 1:
                q = b if q is None else q + b
            else:
                power = self._power(p, exponent - 1)
                q = b * power if q is None else _addcmul(q, b, power)
        if a is not None:
            a = self._spread(a, p)
            q = q if valid is None else q * valid
            if y is not None:
                q = _addcmul(q, a, self._hit(p, y))
            else:
                if self.grouped:
                    w = a.expand_as(p).gather(1, label)
                else:
                    w = a.flatten().index_select(0, label.flatten()).view(label.shape)
                for settings, c in ces:
                    if settings.clip is not None:  # saves a pass over the classes
                        w = w - c * _unclipped(own, settings.clip) / own.clamp_min(settings.clip)
                later = [(settings, c) for settings, c in ces if settings.clip is None]
                w = w if valid is None else w * valid
                q = q if q.shape == p.shape else q.expand_as(p).clone()
                q = q.scatter_add_(1, label, w)
                del w  # before as much as all logits is taken
            if softmax:
                q = torch._softmax_backward_data(q, p, 1, p.dtype)
            elif self.activation == "sigmoid":
                q = q * p * (1 - p)
            else:
                q = q.expand_as(p)
        for settings, c in later:
            if y is not None:
                row = c * self._ce_row(pixels, settings)
                q = row if q is None else q + row
                continue
            mine = c.expand_as(own) if settings.clip is None else c * _unclipped(own, settings.clip)
            mine = mine if valid is None else mine * valid
            q = p * mine if q is None else _addcmul(q, p, mine)
            q = q.scatter_add_(1, label, -mine)
        return q

    def _hit(self, p: Tensor, y: Tensor) -> Tensor:
        """Derivative of tp's terms by p."""
        return 0.5 * (1 - torch.sign(p - y)) if self.minimum else y

    def _power(self, p: Tensor, exponent: float) -> Tensor:
        """Finite at 0, where an activation's derivative takes it to 0 anyway."""
        if exponent == 1:
            return p
        return (p if self.activation == "none" else p.clamp_min(1e-30)) ** exponent

    def _up(
        self,
        pixels: Pixels,
        a: Tensor | None,
        powers: Mapping[float, Tensor],
        ces: Sequence[tuple[Likelihood, Tensor]],
        out: Tensor | None = None,
    ) -> Tensor:
        """`pullback` for the second of two softmax logits, [N, *space]; the first's is minus it."""
        p, y, _, valid, own, _, _ = pixels
        p0, p1 = p.unbind(1)
        up: Any = None
        if a is not None:
            hit = self._hit(p, y)
            a0, a1 = self._each(a, p)
            up = _addcmul(torch.mul(hit[:, 1], a1, out=out), hit[:, 0], a0, value=-1)
            for exponent, b in powers.items():
                b0, b1 = self._each(exponent * b, p)
                if exponent == 1:
                    up = up.add_(b1 - b0) if not traced(up) else up + (b1 - b0)
                    continue
                for p_c, b_c in ((p0, -b0), (p1, b1)):
                    up = _addcmul(up, self._power(p_c, exponent - 1), b_c)
            for factor in (p0, p1) if valid is None else (p0, p1, valid[:, 0]):
                up = up * factor if traced(up) else up.mul_(factor)
        for settings, c in ces:
            row = self._ce_row(pixels, settings)
            up = torch.mul(c, row, out=out) if up is None else _addcmul(up, c, row)
        return up

    def _ce_row(self, pixels: Pixels, settings: Likelihood) -> Tensor:
        """Derivative of minus the likelihood by the logits, of two by the second one."""
        field = self._ce_field(pixels, settings)
        if pixels.p.shape[1] == 2:
            (f0, f1), (p0, p1) = field.unbind(1), pixels.p.unbind(1)
            return _addcmul(f0 * p1, f1, p0, value=-1)
        return torch.addcmul(-field, pixels.p, field.sum(1, keepdim=True))

    def _by_exponent(self, b: Tensor, used: Collection[int]) -> dict[float, Tensor]:
        """b with 0 for all losses but those of the exponent, for the exponents of these numbers."""
        if len(self.exponents) == 1:
            return {self.exponents[0]: b}
        return {self.exponents[i]: b * self.masks[i] for i in sorted(used)}

    def _spread(self, t: Tensor, p: Tensor) -> Tensor:
        """[*groups, C] to something that broadcasts with [N, C, *space]."""
        if self.over == "row":
            return t.movedim(-1, 1).unsqueeze(-1)
        t = t if self.over == "sample" else t.unsqueeze(0)
        return t.view(*t.shape, *(1,) * (p.ndim - 2))

    def _each(self, t: Tensor, p: Tensor) -> Sequence[Any]:
        """[*groups, C] by class, to multiply [N, *space] with; numbers where reading is free."""
        if self.grouped or traced(t) or not t.is_cpu:
            return self._spread(t, p).unbind(1)
        return t.tolist()

    def _ce_field(self, pixels: Pixels, settings: Likelihood) -> Tensor:
        """The softened target where clipping leaves a gradient, which is p Σ field - field."""
        p, y, _, _, own, hard, _ = pixels
        clip = settings.clip
        field = self._soften(pixels, settings)
        if clip is None:
            return field
        if hard and self.plain:
            return field * _unclipped(own, clip)
        return field * _unclipped(p, clip)

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
        # tp of class 1, which every loss keeps.
        return (1 if self.background or classes == 2 else 0) if self.steady[k] else None

    def rows(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values [K + Z], rows [N, M, C, *space], coefficients [K + Z, M]."""
        _check_shapes(self, logits, target)
        classes = logits.shape[1]
        alone = self.basis(classes) > self.size or target.ndim == logits.ndim
        dense = not alone or self.dense(logits, target)
        pixels, values, a, b, e = self.evaluate(logits, target, dense)
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
            rows, columns = spell(pixels, a, self._by_exponent(b, range(len(self.exponents))))
        top = torch.stack(columns, 1) if columns else values.new_zeros(0, 0)
        for settings in self.ces:
            row = self._ce_row(pixels, settings)
            rows.append(row if classes == 2 else row.unsqueeze(1))
        if self.ces:
            own = F.pad(torch.diag(e), (len(columns), 0))
            top = torch.cat([F.pad(top, (0, len(self.ces))), own]) if columns else own
        if classes > 2:
            return values, torch.cat(rows, 1), top
        return values, _antisymmetric(rows), top

    def _two_class_rows(self, pixels: Pixels, a: Tensor, powers: dict[float, Tensor]):
        """Rows of Σ y_c p_c and Σ p_c**exponent for the second logit, and coefficients' columns.

        With v = p0·p1, a rising second logit and falling first one move Σ y_1 p_1 by y_1·v, Σ y_0
        p_0 by -y_0·v and Σ p_1 by v, their difference. Squared, p_1 gives 2p_1·v = v + (p_1 -
        p_0)·v and p_0 -v + (p_1 - p_0)·v. Rows of disjoint support keep float32 from cancelling.
        """
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
                steep = exponent * v
                rows += [-steep * self._power(p0, exponent - 1)]
                rows += [steep * self._power(p1, exponent - 1)]
                columns += [b0, b1]
        return rows, columns

    def _many_class_rows(self, pixels: Pixels, a: Tensor, powers: dict[float, Tensor]):
        """As above for C classes; Σ_c Σ p_c is fixed, so that C - 1 rows serve the Σ p_c."""
        p, y, _, valid, _, _, _ = pixels
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
    """Values of a `Stack` of logits and target, with the gradient in closed form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, target, stack):
        _check_shapes(stack, logits, target)
        pixels, values, *slopes = stack.evaluate(logits, target, stack.dense(logits, target))
        none = logits.new_zeros(0)
        y = none if pixels.y is None or not pixels.hard else pixels.y
        own = none if pixels.own is None or not stack.ces else pixels.own
        return values, pixels.p, y, own, *slopes

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
        # In a backward pass gradients are enabled by create_graph=True, and by torch.func always.
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            raise NotImplementedError(ONCE)
        target, p, y, own, a, b, e = ctx.saved_tensors
        stack = ctx.stack
        pixels = stack.pixels(p, target, stack.dense(p, target), y if y.numel() else None, own)
        # Only what the losses in use need: often one is trained and the others watched.
        used = [p.numel() > 0] * stack.size
        if g.device.type == "cpu" and not traced(g):
            used = [use and share != 0 for use, share in zip(used, g.tolist(), strict=True)]
        share, count = g[:, None], stack.dices
        powers = {}
        if any(used[:count]):
            present = {i for i, use in zip(stack.exponent_of, used, strict=False) if use}
            powers = {
                x: t.sum(-2) for x, t in stack._by_exponent(share[:count] * b, present).items()
            }
        a = (share[:count] * a).sum(-2) if powers else None
        pairs = []
        if any(used[count:]):
            each = zip(stack.ces, (g[count:] * e).unbind(), used[count:], strict=True)
            pairs = [(settings, c) for settings, c, use in each if use]
        if not powers and not pairs:
            return torch.zeros_like(p, dtype=ctx.dtype), None, None
        return stack.pullback(pixels, a, powers, pairs).to(ctx.dtype), None, None


_Evaluate.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    _Evaluate.forward
)  # else apply builds it at every call


# --------------------------------------------------------------------------------------------------


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def traced(x: Tensor) -> bool:
    """Whether a compiler, a tracer or a torch.func transform stands between us and the numbers."""
    if torch.compiler.is_compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack()
    return modes > 0 or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _grad_levels(x: Tensor) -> int:
    """How many of the torch.func transforms around us differentiate by x."""
    functorch, levels = torch._C._functorch, 0
    while functorch.is_functorch_wrapped_tensor(x):
        levels += functorch.is_gradtrackingtensor(x) and x.requires_grad
        x = functorch.get_unwrapped(x)
    return levels


def _addcmul(q: Tensor, x: Tensor, y: Tensor | float, value: float = 1) -> Tensor:
    """q + value·x·y, into q where it has the size and nobody traces it."""
    if not isinstance(y, Tensor):
        return q.add_(x, alpha=value * y)
    if traced(q) or q.numel() < max(x.numel(), y.numel()):
        return torch.addcmul(q, x, y, value=value)
    return q.addcmul_(x, y, value=value)


def _total(x: Tensor) -> Tensor:
    """The sum of all; rows first for a compiler, whose own order loses two digits more."""
    return x.sum(-1).sum() if traced(x) else x.sum()


def _unclipped(p: Tensor, clip: float) -> Tensor:
    if traced(p):  # no comparison, as in one_hot
        return 1 - (p - p.clamp(clip, 1 - clip)).sign().abs()
    return (p == p.clamp(clip, 1 - clip)).to(p.dtype)


def _antisymmetric(rows: Sequence[Tensor]) -> Tensor:
    """[N, M, 2, *space] of M rows: what moves the second logit up moves the first down as much."""
    if traced(rows[0]):
        up = torch.stack(list(rows), 1)
        return torch.stack([-up, up], 2)
    n, *space = rows[0].shape
    both = rows[0].new_empty(n, len(rows), 2, *space)
    torch.neg(torch.stack(list(rows), 1, out=both[:, :, 1]), out=both[:, :, 0])
    return both


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def one_hot(label: Tensor, logits: Tensor) -> Tensor:
    """Labels [N, 1, *space] as 0 and 1 [N, C, *space] of the logits' type, at least float32."""
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if traced(label):  # no comparison: compilers would keep its bits, slow to read on a CPU
        classes = torch.arange(logits.shape[1], dtype=kind, device=label.device)
        return (1 - (label.to(kind) - _shaped(classes, logits)).abs()).clamp_min(0)
    if logits.shape[1] == 2:  # half the work
        one = torch.empty(logits.shape, dtype=kind, device=label.device)
        torch.sub(1, one[:, 1:].copy_(label), out=one[:, :1])
        return one
    return (label == _shaped(torch.arange(logits.shape[1], device=label.device), logits)).to(kind)


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    """[..., C] to [..., C, 1, ...], one 1 per spatial axis."""
    return values.view(*values.shape, *(1,) * (like.ndim - 2))


def _at_least(low: float, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
    return tuple(max(low, v) for v in value) if isinstance(value, tuple) else max(low, value)


def _steady(d: Dice) -> bool:
    """Whether tp's coefficient, w (2 - (2 - 2 beta) d) / den or further from 0, stays away from 0.

    So d must stay at most 1, which wants fp and fn that can't be negative, or, up to exponent 2,
    of equal weight; and a beta well above 0.
    """
    fixed = d.absent == "smooth" and d.link in ("1-d", "-d") and d.ignore_index is None
    weighty = not d.floor and not (d.weight and min(d.weight) == 0)
    lists = [x if isinstance(x, tuple) else (x,) for x in (d.smooth_nr, d.smooth_dr)]
    below = max(lists[0]) <= min(lists[1]) or all(map(float.__le__, *lists))
    below &= d.exponent <= (2 if d.alpha == d.beta else 1)
    return fixed and weighty and below and d.beta >= 0.05


def _check_shapes(stack: Stack, logits: Tensor, target: Tensor) -> None:
    seen, wanted = tuple(target.shape), tuple(logits.shape)
    if logits.ndim < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits: {logits.dtype} {wanted}, allowed is floating point [N, C, *space]"
        )
    if stack.classes is not None and wanted[1] != stack.classes:
        raise ValueError(f"{stack.demand}, but logits {wanted} have {wanted[1]}")
    if stack.over == "row" and logits.ndim < 3:
        raise ValueError(f"logits: {wanted} have no rows, over='row' needs [N, C, *space]")
    if wanted[1] == 1 and stack.activation == "softmax":
        other = "Dice(activation='sigmoid')" if stack.dices else "torch.nn.BCEWithLogitsLoss()"
        raise ValueError(
            f"logits: {wanted} have one channel, whose softmax is 1 everywhere; the loss for it is "
            f"{other}, with a target of that shape"
        )
    if wanted[1] == 1 and not stack.background:
        raise ValueError(
            f"logits: {wanted} have one channel, and include_background=False would leave none"
        )
    if target.is_complex():
        raise ValueError(f"target: {target.dtype} {seen}, allowed are integers or real labels")
    if seen == wanted:
        if stack.ignore_index is not None:
            raise ValueError(f"target: {seen} is one-hot or soft, ignore_index needs class indices")
        if target.requires_grad:
            raise ValueError("target: it requires a gradient, which no loss here gives; detach it")
    elif seen != (wanted[0], *wanted[2:]) or wanted[1] == 1:
        index = "" if wanted[1] == 1 else f"class indices {(wanted[0], *wanted[2:])} or "
        raise ValueError(f"target: shape {seen}, allowed are {index}labels {wanted}")
    elif target.is_floating_point():
        raise ValueError(f"target: {target.dtype} {seen}, class indices must be integers")
