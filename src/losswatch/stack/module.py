"""Trains runs as one: their parameters are stacked, and one step trains all of them."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from losswatch import compat
from losswatch.data.random import TRAIN, VAL, draw
from losswatch.disk.checkpoint import add_record, make_checkpoint
from losswatch.disk.checkpoint_files import save_checkpoint
from losswatch.disk.event_log import side_by_side
from losswatch.events.tags import GRAD_NORM, LOSS, PICTURES, watched_tags
from losswatch.losses import LossSet
from losswatch.nets.cpu import onednn
from losswatch.report.diagnosis import findings_of
from losswatch.run.callbacks import Images
from losswatch.run.scores import Tally, metrics, tally
from losswatch.stack.compile import compiled
from losswatch.stack.flat_parameters import State, flatten, splitter, trained_parameters
from losswatch.stack.limits import check_traits
from losswatch.stack.member import Member
from losswatch.stack.optimizers import Rule, optimizer_rule
from losswatch.stack.refusal import NotStackable
from losswatch.stack.step import make_gradient, trained_row
from losswatch.terminal import ProgressSink, say
from losswatch.text import number_of, one_line
from losswatch.watch.doctor import Doctor
from losswatch.watch.outputs import WatchedLosses

log = logging.getLogger(__name__)

# The steps at which the doctor looks, beside the last one. A look takes about as long as a step.
FIRST_SIGNS, SIGNS_EVERY = (0, 5, 10, 20, 50), 100
SAVE_SECONDS = 10  # between checkpoints, at least; with a hundred members each takes a while
# The largest number of members whose step is one call. With more members a call costs less for
# each, but their numbers do not stay in the cache.
CHUNK = 9


class Chunk(NamedTuple):
    """The state of R members that one call of the step trains."""

    parameters: Tensor  # [R, P], the trained ones
    buffers: State  # name -> [R, ...], the parts of the network that are not trained
    moments: tuple[Tensor, ...]  # of the optimiser, [R, P] each
    numbers: State  # name -> [R, ...], see `step.make_gradient`
    rates: State  # name -> [R], the optimiser's settings


class StackedModule(pl.LightningModule):
    """Trains many runs at once. What a `Member` does not hold is the same for all of them.

    A batch for Lightning is a block of steps here.

    Args:
        members: runs of one architecture, image shape, kind of optimiser and number of classes, all
            at the same step.
        losses: the losses watched.
        every_n_steps, cosines: see `Watch`; every_n_steps=0 observes nothing.
        compile: whether to compile the step; if not, torch.vmap runs it eagerly.

    Raises:
        NotStackable: the network, the losses or the optimiser need the ordinary step.
    """

    def __init__(
        self,
        members: Sequence[Member],
        losses: LossSet,
        *,
        every_n_steps: int = 1,
        cosines: bool = False,
        compile: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.members, self.losses = list(members), losses
        self.every_n_steps = every_n_steps
        check_traits(members, losses)
        self.net = copy.deepcopy(members[0].net)
        self.tags = watched_tags(losses.names, cosines)
        data = members[0].data
        self.shape = (data.batch_size, 1, *data.space)

        rules = [optimizer_rule(member.optimizer) for member in members]
        self.moment_names = rules[0].moments
        self.initial = _stack(members, rules, losses.names)
        ready: Callable[..., Any] = compiled if compile else lambda function: function
        self.update = ready(vmap(rules[0].update, in_dims=(0, 0, 0, None, 0)))
        self.gradient = {
            observed: ready(
                vmap(
                    make_gradient(self.net, losses, self.shape, observed=observed, cosines=cosines),
                    in_dims=(0, 0, 0, None),
                )
            )
            for observed in (True, False)
        }
        watched = WatchedLosses(losses, "softmax", None)
        self.doctors = {m.folder: Doctor(watched, m.trained) for m in self.members}
        self.saved = time.monotonic()
        self.is_compiled = compile
        self.shown = ProgressSink()

    def configure_optimizers(self) -> None:
        """Give Lightning no optimiser: `update` is the optimiser."""

    # -- training ----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.losses.to(self.device)
        self.net.to(self.device)
        count = len(self.members)
        pieces = -(-count // CHUNK) if self.device.type == "cpu" else 1
        self.chunk_size = -(-count // pieces)
        # The step is compiled for one shape, so all chunks have it: the last one repeats a member.
        index = torch.arange(pieces * self.chunk_size).clamp_max(count - 1)
        self.chunks: list[Chunk] = [
            compat.tree_map(lambda t, part=part: t[part].to(self.device), self.initial)  # type: ignore[misc]
            for part in index.split(self.chunk_size)
        ]
        self._try()

    def _try(self) -> None:
        """Do everything that training does, once and on one chunk, so that the step is compiled.

        The ordinary step of these runs has been tried before. So a RuntimeError here mostly comes
        from an operation that torch.func cannot map over runs. torch.func has no error class of its
        own.

        Raises:
            NotStackable: the step raises a RuntimeError, or the compiler cannot compile the step.
            Exception: the step raises another error, or lacks memory.
        """
        if self.is_compiled:
            say(f"compiling the step of {number_of(len(self.members), 'run')}")
        chunk = self.chunks[0]
        step = torch.zeros((), dtype=torch.int64, device=self.device)
        try:
            for observed in {self._is_observed(0), self._is_observed(1)}:
                self.gradient[observed](chunk.parameters, chunk.buffers, chunk.numbers, step)
            self.evaluate(VAL, 1)
        except RuntimeError as error:
            if compat.is_out_of_memory(error):
                raise
            why = one_line(error).split(". ")[0][:200]
            raise NotStackable(f"torch.func cannot map them over runs: {why}") from error

    def _is_observed(self, step: int) -> bool:
        return bool(self.every_n_steps) and step % self.every_n_steps == 0

    def training_step(self, batch: tuple[int, int], batch_idx: int) -> None:
        first, last = batch
        numbers = range(first, last)
        steps = torch.arange(first, last, device=self.device).unbind()
        observed = np.array([number for number in numbers if self._is_observed(number)])
        for i, chunk in enumerate(self.chunks):
            parameters, buffers, moments, *_ = chunk
            members, seen = self._members_of(i), []
            for number, step in zip(numbers, steps, strict=True):
                is_observed = self._is_observed(number)
                is_last = number == self.trainer.max_steps - 1
                if is_observed and (number in FIRST_SIGNS or number % SIGNS_EVERY == 0 or is_last):
                    now = chunk._replace(parameters=parameters, buffers=buffers)
                    self._look(now, i, number, step)
                gradient, buffers, values = self.gradient[is_observed](
                    parameters, buffers, chunk.numbers, step
                )
                parameters, moments = self.update(parameters, gradient, moments, step, chunk.rates)
                if is_observed:
                    seen.append(values)
                self.shown.advance(len(members))
            self.chunks[i] = chunk._replace(parameters=parameters, buffers=buffers, moments=moments)
            if seen:
                self._write(i, observed, torch.stack(seen, dim=1))
            # Steps that are not observed have only this check.
            finite = parameters.isfinite().all(dim=1).tolist()
            for member, is_finite in zip(members, finite, strict=False):
                if not is_finite:
                    self._fail(member, "a weight is not finite", last - 1)
        compat.count_steps(self.trainer, last - first)

    @torch.no_grad()
    def _look(self, chunk: Chunk, i: int, number: int, step: Tensor) -> None:
        """Let the doctor of each member of chunk number i look at the batch of a step."""
        split = splitter(self.net)

        def look(parameters: Tensor, buffers: State, numbers: State) -> tuple[Tensor, ...]:
            image, label = draw(numbers, TRAIN, step, self.shape)
            state = split(parameters) | {name: b.clone() for name, b in buffers.items()}
            logits = functional_call(self.net, state, (image,))
            _, rows, coefficients = self.losses.rows(logits, label)
            return logits, label, trained_row(rows, coefficients, numbers["trained"])

        found = vmap(look)(chunk.parameters, chunk.buffers, chunk.numbers)
        for k, member in enumerate(self._members_of(i)):
            doctor = self.doctors[member.folder]
            logits, label, slope = (x[k] for x in found)
            doctor.step = number
            doctor.start()
            doctor.look(logits, label, slope, is_first=not doctor.tags)
            doctor.keep(number, self.losses.names, None, [chunk.parameters[k]], [])

    def _members_of(self, chunk: int) -> list[Member]:
        """The members of a chunk by its number, without the repeated one at the end."""
        return self.members[chunk * self.chunk_size : (chunk + 1) * self.chunk_size]

    def _write(self, chunk: int, steps: np.ndarray, values: Tensor) -> None:
        """Write the observations of a block, and check that they are finite.

        Args:
            values: [R, steps, tags]; read from the device together with what the doctors saw.
        """
        members = self._members_of(chunk)
        looks = [self.doctors[member.folder].drain() for member in members]
        # A resumed run may have none yet.
        none = values.new_empty(0, 0)
        signs = torch.stack([none if rows is None else rows for _, _, rows in looks])
        signs = torch.cat([signs, signs[-1:].expand(len(values) - len(signs), *signs.shape[1:])])
        both = torch.cat([values.flatten(1), signs.flatten(1)], dim=1).cpu()
        curves, seen = both.split([values[0].numel(), signs[0].numel()], dim=1)
        blocks = curves.view(values.shape).numpy()
        for k, (member, block, (tags, looked, _)) in enumerate(
            zip(members, blocks, looks, strict=False)
        ):
            names = [f"{LOSS}{member.trained}", f"{GRAD_NORM}{member.trained}"]
            own = block[:, [self.tags.index(name) for name in names]]
            for row, column in np.argwhere(~np.isfinite(own))[:1]:
                self._fail(member, f"{names[column]} is {own[row, column]}", steps[row])
            member.logger.write_curves(self.tags, steps, block)
            member.logger.write_signs(tags, looked, seen[k].view(signs.shape[1:]))
            if steps[0] == 0:
                self._speak(member)

    def _speak(self, member: Member) -> None:
        """Say what the first batch of a run shows already."""
        for finding in findings_of(member.folder, member.trained, is_over=False, looks=1):
            log.warning("%s: %s", member.folder.name, finding.line())

    def _fail(self, member: Member, what: str, step: int) -> None:
        """Mark a member as failed, unless it is. Its first error stays; the other members go on."""
        if member.error is None:
            member.error = f"trained with {member.trained}, step {step}: {what}"
            log.warning("%s: %s", member.folder.name, member.error)

    def save(self) -> None:
        """Give each member its weights and its optimiser's state, and write its checkpoint.

        A member that has failed keeps its last good checkpoint.
        """
        step = self.trainer.global_step
        loops = compat.loop_state(step)
        for i, chunk in enumerate(self.chunks):
            for k, member in enumerate(self._members_of(i)):
                if member.error:
                    continue
                self._unstack(chunk, k, member, step)
                checkpoint = make_checkpoint(
                    member.net, self.losses, member.trained, member.optimizer, step, loops
                )
                add_record(
                    checkpoint, member.record, member.logger.sizes(), metrics=dict(member.metrics)
                )
                save_checkpoint(checkpoint, member.folder)
        self.saved = time.monotonic()

    def _unstack(self, chunk: Chunk, k: int, member: Member, step: int) -> None:
        """Copy state number k of a chunk into the network and the optimiser of its member."""
        split = splitter(self.net)
        buffers = {name: buffer[k] for name, buffer in chunk.buffers.items()}
        member.net.load_state_dict(buffers | split(chunk.parameters[k]))
        is_sgd = self.moment_names == ["momentum_buffer"]
        if is_sgd and not member.optimizer.param_groups[0]["momentum"]:
            return  # without momentum torch.optim.SGD keeps no state
        moments = [split(moment[k].clone()) for moment in chunk.moments]
        for name, p in trained_parameters(member.net).items():
            kept = {n: m[name] for n, m in zip(self.moment_names, moments, strict=True)}
            if not is_sgd:
                kept["step"] = torch.tensor(float(step))
            member.optimizer.state[p] = kept

    # -- evaluation --------------------------------------------------------------------------------

    def evaluate(self, split: int, size: int) -> list[dict[str, float]]:
        """Metrics and losses of each member, each on its own `size` fixed images."""
        batch = self.members[0].data.eval_batch_size
        names = self.losses.names
        results: list[dict[str, float]] = []
        self.net.eval()
        for chunk in self.chunks:
            total = None
            for i in range(-(-size // batch)):
                found = self._evaluate_batch(chunk, split, i, min(batch, size - i * batch))
                total = total.plus(found) if total else found
            assert total is not None
            table = {name: value.tolist() for name, value in metrics(total, names).items()}
            results += [{n: v[k] for n, v in table.items()} for k in range(len(chunk.parameters))]
        self.net.train()
        return results[: len(self.members)]

    def _evaluate_batch(self, chunk: Chunk, split: int, number: int, count: int) -> Tally:
        """The sums over a batch of `count` images of each member."""
        split_parameters = splitter(self.net)
        step = torch.full((), number, device=self.device)

        def evaluate(parameters: Tensor, buffers: State, numbers: State) -> Tally:
            image, label = draw(numbers, split, step, (count, *self.shape[1:]))
            state = split_parameters(parameters) | buffers
            return tally(functional_call(self.net, state, (image,)), label, self.losses)

        with onednn(True):  # the members together are a wide network
            return vmap(evaluate)(chunk.parameters, chunk.buffers, chunk.numbers)

    def show_images(self) -> None:
        """Log the pictures of `callbacks.Images`, once: a stack may have hundreds of runs."""
        count = min(Images.COUNT, self.members[0].data.val_size)
        split, first = splitter(self.net), torch.tensor(0, device=self.device)
        self.net.eval()
        for i, chunk in enumerate(self.chunks):
            for k, member in enumerate(self._members_of(i)):
                of_member = compat.tree_map(lambda t, k=k: t[k], chunk)  # type: ignore[misc]
                image, label = draw(of_member.numbers, VAL, first, (count, *self.shape[1:]))
                state = split(of_member.parameters) | of_member.buffers
                logits = functional_call(self.net, state, (image,))
                picture = side_by_side(image, label, logits)
                member.logger.experiment.add_image(PICTURES, picture, self.trainer.global_step)
        self.net.train()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.report("val", VAL, self.members[0].data.val_size)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def report(self, stage: str, split: int, size: int) -> None:
        """Evaluate all members and write their metrics, with the tags of this stage."""
        for member, found in zip(self.members, self.evaluate(split, size), strict=True):
            scalars = {f"{stage}/{name}": value for name, value in found.items()}
            member.metrics |= scalars
            member.logger.write_metrics(self.trainer.global_step, scalars)
        scores = [member.metrics[f"{stage}/dice"] for member in self.members]
        what = "Dice" if len(scores) == 1 else "mean Dice"
        self.shown.set_text(f"{what} {np.mean(scores):.3f}")


def _stack(members: Sequence[Member], rules: Sequence[Rule], losses: Sequence[str]) -> Chunk:
    """The initial state of all members; `losses` are the names of the watched losses."""
    names = trained_parameters(members[0].net)
    states = [member.net.state_dict() for member in members]
    datas = [member.data for member in members]

    def column(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    unsure = ("noise", "theta_spread") if any(data.is_unsure for data in datas) else ()
    return Chunk(
        parameters=torch.stack([flatten(state, names) for state in states]),
        buffers={
            name: torch.stack([state[name] for state in states])
            for name in states[0]
            if name not in names
        },
        moments=tuple(
            torch.stack([_moment(member, name) for member in members]) for name in rules[0].moments
        ),
        numbers={
            "seed": torch.tensor([data.seed for data in datas]),
            "thresholds": torch.stack([data.thresholds for data in datas]),
            **{
                name: column([getattr(data, name) for data in datas])
                for name in ("low", "high", *unsure)
            },
            "trained": column([[float(n == m.trained) for n in losses] for m in members]),
        },
        rates={key: column([r.numbers[key] for r in rules]) for key in rules[0].numbers},
    )


def _moment(member: Member, name: str) -> Tensor:
    """One moment of the optimiser for all parameters, [P]; 0 before the first step."""
    state = member.optimizer.state
    kept = [(state.get(p, {}).get(name), p) for p in trained_parameters(member.net).values()]
    return torch.cat([torch.zeros_like(p).flatten() if m is None else m.flatten() for m, p in kept])
