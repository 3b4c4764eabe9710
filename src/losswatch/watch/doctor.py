"""Keeps what the findings need, on the device of the network, until somebody asks for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from losswatch.doctor.history import ANSWER, BODY, SIGN, History
from losswatch.events.tags import FINDINGS, GRAD_NORM, LOSS, watched_tags
from losswatch.losses import CrossEntropy, Dice, Sum
from losswatch.losses.pixels import wide
from losswatch.losses.ranks import only_this_rank
from losswatch.text import reason
from losswatch.watch.answers import ANSWERS, ask
from losswatch.watch.outputs import WatchedLosses, input_kind, is_same
from losswatch.watch.record import as_row
from losswatch.watch.signs import classes_of, read_labels, read_signs, sign_names

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from losswatch.doctor.findings import Finding

log = logging.getLogger(__name__)

REPORTED = "the reported loss"  # the name of what `Observer.report` tells
BODIES = (
    "moved",  # how far the weights are from those of the observation before, relative to their size
    "statistics_moved",  # the same for batch norm's statistics
    "batches",  # how many batches the statistics have seen
    "momentum",  # the smallest momentum of a batch norm in training mode
)


class Doctor:
    """Takes the signs of the first observations, and later of those ten steps apart.

    Reading the signs costs as much as a few losses. Where every step is observed, one in ten of
    them is enough for what the findings say.

    Args:
        watched: the observed losses.
        trained: the name of the one that trains; None: unknown.
    """

    FEW, APART, MOST = 20, 10, 1000
    SAMPLE = 2048  # weights of each parameter whose movement is followed

    def __init__(
        self, watched: WatchedLosses, trained: str | None = None, is_on: bool = True
    ) -> None:
        self.watched, self.trained, self.is_on = watched, trained, is_on
        self.loss = None if trained is None else watched.losses[trained]
        self.value: Tensor | None = None  # of the trained loss, with its graph, if it was called
        self.begin()

    def begin(self) -> None:
        """Forget everything: a training starts."""
        self.count = 0  # of observations so far
        self.step: int | None = None  # of the training; None: unknown, observations are counted
        self.looked = -self.APART  # the step of the last look
        self.apart = self.APART
        self.tags: list[str] = []
        self.kept: list[tuple[int, Tensor]] = []
        self.errors: list[tuple[int, str]] = []
        self.reported: list[tuple[int, Tensor]] = []
        self.signs: list[Tensor] = []
        self.answers: Tensor | None = None
        self.classes = 2
        self.weights: Tensor | None = None
        self.statistics: Tensor | None = None
        self.fresh: list[tuple[int, Tensor]] = []  # not drained yet
        self.said: dict[str, Finding] = {}
        self.is_due = self.is_on

    def see_trained(
        self, name: str | None, loss: nn.Module | None, value: Tensor | None = None
    ) -> None:
        """Learn which loss trains at this observation.

        Args:
            name: of a watched loss, or another name; None: unknown.
            loss: its module (output, target) -> scalar; None if it is a function.
            value: a scalar that the training has computed, with its graph.
        """
        self.trained = name
        self.value = value if self.is_due else None
        self.loss = self.watched.losses.get(name or "", loss) if name else None
        self.signs = []

    def start(self) -> None:
        """Start an observation, and decide whether its signs are read."""
        step = self.count if self.step is None else self.step
        is_early = self.count < self.FEW
        self.is_due = self.is_on and (is_early or step - self.looked >= self.apart)
        self.signs = []
        self.answers = self.value = None

    def look(
        self, output: Tensor, target: Tensor, slope: Tensor | None, is_first: bool = False
    ) -> None:
        """Read the signs of one output of the network; an error leaves them NaN.

        Args:
            output, target: see `Observer`.
            slope: see `signs.read_signs`.
            is_first: ask the trained loss about known answers, too.
        """
        index, activation = self.watched.ignore_index, self.watched.activation
        self.classes = classes_of(output)
        names = sign_names(self.classes)
        try:
            if slope is None and self.value is not None:
                [slope] = torch.autograd.grad(
                    self.value, output, retain_graph=True, allow_unused=True
                )
            found = read_signs(output, target, slope, activation, index)
        except Exception:  # somebody else's training goes on
            found = torch.full((len(names),), torch.nan, device=output.device)
        self.signs.append(found)
        if is_first and self.loss is not None:
            self.answers = self._ask(output, target)

    @torch.no_grad()
    def _ask(self, output: Tensor, target: Tensor) -> Tensor | None:
        loss, index = self.loss, self.watched.ignore_index
        assert loss is not None

        def value(answer: Tensor, target: Tensor) -> Tensor:
            return self.watched.value(loss, answer, target).mean()

        try:
            _, _, y = read_labels(target, wide(output), index)
            kind = "none" if self.watched.activation == "none" else "logits"
            with only_this_rank():  # if it failed on one rank alone, the others would wait
                return ask(value, output, target, y, kind)
        except Exception:
            return None

    def fail(self, step: int, error: Exception, output: Any, target: Any) -> None:
        """Note that a batch could not be observed, and what its labels show nevertheless."""
        self.errors = [*self.errors, (step, reason(error))][:10]
        if isinstance(output, Tensor) and isinstance(target, Tensor) and not self.signs:
            self.look(output, target, None)

    def give_up(self, error: Exception, output: Any, target: Any, names: Sequence[str]) -> None:
        """Note the batch after which nothing is watched any more. Never raises an error."""
        if not self.is_on or self.step is None:
            return
        try:
            self.is_due = True
            output, target = (x[0] if isinstance(x, list | tuple) else x for x in (output, target))
            self.fail(self.step, error, output, target)
            self.keep(self.step, names, None, [], [])
        except Exception as further:
            log.debug("losswatch: no findings: %s", reason(further))

    def report(self, loss: Tensor) -> None:
        """Note the value that trains at the newest observation."""
        if self.kept and self.is_due:
            self.reported = [*self.reported[-self.MOST :], (self.kept[-1][0], loss.detach())]

    def keep(
        self,
        step: int,
        names: Sequence[str],
        seen: tuple[Tensor, Tensor, Tensor] | None,
        parameters: Sequence[Tensor],
        modules: Sequence[nn.Module],
    ) -> None:
        """End an observation.

        Args:
            step: of the training.
            names: of the K observed losses.
            seen: values [K], norms [K] and cosines [K, K]; None if they could not be observed.
            parameters: of the network.
            modules: of the network.
        """
        self.count += 1
        self.value = None  # releases the graph of this step
        if not self.is_due or not self.signs:
            return
        device = self.signs[0].device
        if seen is None:
            one = torch.full((len(names),), torch.nan, device=device)
            seen = one, one, one.outer(one)
        answers = self.answers
        if answers is None:
            answers = torch.full((len(ANSWERS),), torch.nan, device=device)
        body = self._body(parameters, modules, device)
        row = torch.cat([as_row(*seen).float(), *self.signs, answers, body])
        tags = self._tags(names, len(self.signs))
        if not self.tags or len(tags) > len(self.tags):
            self.tags = tags
            self.kept = [(s, r) for s, r in self.kept if len(r) == len(tags)]
        if len(tags) == len(self.tags):
            self.looked = step
            self.kept.append((step, row))
            self.fresh = [*self.fresh[-self.MOST :], (step, row)]  # nobody may drain them
        if len(self.kept) > self.MOST:
            self.kept = self.kept[: self.FEW] + self.kept[self.FEW :: 2]
            self.apart *= 2

    def _tags(self, names: Sequence[str], heads: int) -> list[str]:
        return [
            *watched_tags(names, cosines=True),
            *(f"{SIGN}{n}.{h}" for h in range(heads) for n in sign_names(self.classes)),
            *(f"{ANSWER}{name}" for name in ANSWERS),
            *(f"{BODY}{name}" for name in BODIES),
        ]

    @torch.no_grad()
    def _body(
        self, parameters: Sequence[Tensor], modules: Sequence[nn.Module], device: torch.device
    ) -> Tensor:
        nothing = torch.full((), torch.nan, device=device)
        try:
            moved, self.weights = _moved(self.weights, [self._sample(p) for p in parameters])
            norms: list[Any] = [
                m for m in modules if m.training and getattr(m, "running_mean", None) is not None
            ]
            shifted, self.statistics = _moved(
                self.statistics,
                [x for m in norms for x in (m.running_mean, m.running_var) if x is not None],
            )
            tracked = [c for m in norms if (c := m.num_batches_tracked) is not None]
            batches = torch.stack(tracked).amax().float() if tracked else nothing
            momenta = [m.momentum for m in norms if m.momentum is not None]
            momentum = nothing.new_full((), min(momenta)) if momenta else nothing
            row = [nothing if x is None else x for x in (moved, shifted)] + [batches, momentum]
            return torch.stack([x.to(device=device, dtype=torch.float32) for x in row])
        except Exception:
            return nothing.expand(len(BODIES))

    def _sample(self, p: Tensor) -> Tensor:
        flat = p.detach().flatten()
        flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
        return flat if len(flat) < 2 * self.SAMPLE else flat[:: len(flat) // self.SAMPLE]

    # -- what was seen -----------------------------------------------------------------------------

    def history(self) -> History:
        """All that was kept, read from the device."""
        rows = [row for _, row in self.kept]
        table = torch.stack(rows).double().cpu().numpy() if rows else torch.empty(0, 0).numpy()
        import numpy as np  # imported late: `from losswatch import Watch` needs only PyTorch

        losses, trained = dict(self.watched.losses), self.trained
        numbers = {tag: table[:, i] for i, tag in enumerate(self.tags)} if rows else {}
        if self.reported and trained is None:
            trained, told = REPORTED, dict(self.reported)
            nothing = torch.tensor(torch.nan)
            values = [float(told.get(step, nothing)) for step, _ in self.kept]
            numbers[f"{LOSS}{REPORTED}"] = np.array(values)
        heads = sum(tag.startswith(f"{SIGN}out_min.") for tag in self.tags)
        return History(
            steps=np.array([step for step, _ in self.kept], int),
            numbers=numbers,
            kinds={name: kind_of(loss) for name, loss in losses.items()}
            | ({trained: "own"} if trained and trained not in losses else {}),
            trained=trained,
            terms=terms_of(losses, trained),
            activation=self.watched.activation,
            ignore_index=self.watched.ignore_index,
            heads=max(1, heads),
            classes=self.classes,
            errors=tuple(self.errors),
            counts_steps=self.step is not None,
        )

    def drain(self) -> tuple[list[str], list[int], Tensor | None]:
        """The tags, steps [B] and numbers [B, tags] kept since the last call.

        Without values and norms, which the curves hold. The numbers are on their device; None
        before the first.
        """
        first = sum(tag.startswith((LOSS, GRAD_NORM)) for tag in self.tags)
        fresh = [(step, row[first:]) for step, row in self.fresh if len(row) == len(self.tags)]
        self.fresh = []
        none = self.kept[-1][1].new_empty(0, len(self.tags) - first) if self.kept else None
        rows = torch.stack([row for _, row in fresh]) if fresh else none
        return self.tags[first:], [step for step, _ in fresh], rows

    def findings(self, is_over: bool = True) -> list[Finding]:
        """What is wrong, at most three, the cause before its consequences.

        Args:
            is_over: whether the training has ended. Before that, only what is certain is said.
        """
        from losswatch.doctor.findings import diagnose

        return diagnose(replace(self.history(), is_over=is_over))

    def news(self) -> list[Finding]:
        """The findings that were not said before. Never raises an error."""
        try:
            found = [f for f in self.findings(is_over=False) if f.name not in self.said]
        except Exception as error:
            log.debug("losswatch: no findings: %s", reason(error))
            return []
        self.said |= {finding.name: finding for finding in found}
        return found

    def say(self, writers: Sequence[SummaryWriter]) -> None:
        """Say the findings that are new: in the log, and in TensorBoard as a text.

        The text holds those said before as well, a paragraph each, at the step of the last look:
        TensorBoard drops a text when one of an earlier or the same step follows.

        A writer that fails, as on a full disk, does not end the training.
        """
        news = self.news() if self.is_on else []
        for finding in news:
            log.warning("losswatch: %s", finding.line())
        try:
            for writer in writers if news else ():
                text = "\n\n".join(finding.line() for finding in self.said.values())
                writer.add_text(FINDINGS, text, self.kept[-1][0])
        except Exception as error:
            log.warning("losswatch: findings are not in TensorBoard: %s", reason(error))


def _moved(before: Tensor | None, now: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """How far numbers have moved relative to their size, and the numbers as one vector."""
    if not now:
        return None, None
    vector = torch.cat([x.detach().flatten() for x in now]).float()
    if before is None or before.shape != vector.shape:
        return None, vector
    size = torch.linalg.vector_norm(vector).clamp_min(1e-30)
    return torch.linalg.vector_norm(vector - before) / size, vector


def kind_of(loss: nn.Module) -> str:
    """What a watched loss is good for as a yardstick; see `History.kinds`."""
    if input_kind(loss) == "given":
        return "own"
    if type(loss) is CrossEntropy:
        return "ce"
    if type(loss) is Dice and loss.exponent == 1 and loss.link in ("1-d", "-d"):
        return "dice" if loss.include_background else "dice_fg"
    return "other"


def terms_of(losses: dict[str, nn.Module], trained: str | None) -> tuple[str, ...]:
    """The watched losses that the trained one is a sum of: its own parts, or all foreign ones."""
    if trained not in losses:
        return tuple(name for name, loss in losses.items() if input_kind(loss) == "given")
    whole = losses[trained]
    if type(whole) is Sum:
        return tuple(
            name for name, loss in losses.items() if any(is_same(p, loss) for p in whole.losses)
        )
    if input_kind(whole) != "given":
        return ()
    foreign = [name for name, loss in losses.items() if input_kind(loss) == "given"]
    return tuple(name for name in foreign if name != trained)
