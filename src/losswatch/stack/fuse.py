"""Runs trained as one: their parameters stacked, one step for all, each with its own numbers.

One run is a stack of one; that is how `compile=true` trains it.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from losswatch.data.random import TEST, TRAIN, VAL, ThresholdedImages, draw
from losswatch.events.encode import write_scalars
from losswatch.losses import LossSet
from losswatch.nets.cpu import fast_on_cpu, onednn
from losswatch.stack.step import (
    NotStackable,
    compiled,
    make_gradient,
    optimizer_rule,
    splitter,
    trained_parameters,
)
from losswatch.train import resume
from losswatch.train.build import make_data, make_net, make_optimizer
from losswatch.train.callbacks import EventLog, Images, Progress, log_images, open_log
from losswatch.train.evaluation import metrics, tally
from losswatch.train.trial import try_step
from losswatch.watch.probe import tags

log = logging.getLogger(__name__)

BLOCK = 500  # steps between two writes, at most
SAVE_SECONDS = 10  # between checkpoints, at least; with a hundred members each takes a while
# Members whose step is one call, at most: more share the cost of calling it, and fall out of cache.
CHUNK = 9


@dataclass
class Member:
    """One run of a stack."""

    folder: Path
    net: nn.Module  # holds the initial weights, and the trained ones in the end
    data: ThresholdedImages
    trained: str
    optimizer: torch.optim.Optimizer  # of `net`; its kind and numbers count, it never steps
    logger: EventLog
    config: dict[str, Any]  # kept in its checkpoints
    start: int = 0  # steps done by an earlier attempt; net and optimizer hold its state
    notice: str | None = None  # what of that attempt is damaged or missing
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # why it counts as failed
    seconds: float = 0.0  # its share of the stack's time

    def result(self) -> dict[str, float]:
        """The final metrics.

        Raises:
            FloatingPointError: something became NaN or infinite; says what and when.
        """
        if self.error:
            raise FloatingPointError(self.error)
        return self.metrics


@dataclass
class Failure:
    """A run that could not be trained in its stack."""

    error: Exception
    notice: str | None = None
    seconds: float = 0.0

    def result(self) -> dict[str, float]:
        raise self.error


# Runs that have been trained or have failed, by folder, until train.py writes their results.
FINISHED: dict[Path, Member | Failure] = {}


def make_member(cfg: DictConfig, trained: str, folder: Path) -> Member:
    """A run, in the state of its newest checkpoint where its folder holds one."""
    net = make_net(cfg)
    optimizer = make_optimizer(cfg)(list(trained_parameters(net).values()))
    start = resume.take_up(folder, below=cfg.trainer.max_steps)
    logger = open_log(cfg, trained, folder, start.events)
    member = Member(
        folder, net, make_data(cfg), trained, optimizer, logger, resume.plain(cfg), start.step
    )
    member.notice = start.notice
    if start.path:
        resume.load_net(net, start.content)
        optimizer.load_state_dict(start.content["optimizer_states"][0])
    return member


class Blocks:
    """The steps from `first` up to `last`, without it, in blocks: (first, last) of each."""

    def __init__(self, first: int, last: int, block: int) -> None:
        self.first, self.last, self.block = first, last, block

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.block)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for i in range(self.first, self.last, self.block):
            yield i, min(i + self.block, self.last)


def _moment(member: Member, name: str) -> Tensor:
    """[P], what the optimiser keeps of each parameter; 0 before its first step."""
    state = member.optimizer.state
    kept = [(state.get(p, {}).get(name), p) for p in trained_parameters(member.net).values()]
    return torch.cat([torch.zeros_like(p).flatten() if m is None else m.flatten() for m, p in kept])


def block_size(val_check_interval: int) -> int:
    """Steps a block: the largest divisor of the validation interval that is at most BLOCK.

    >>> block_size(250), block_size(2000), block_size(7)
    (250, 500, 7)
    """
    return max(n for n in range(1, BLOCK + 1) if val_check_interval % n == 0)


class StackedModule(pl.LightningModule):
    """Trains R runs at once; all but `Member` is common to them.

    A training batch is a block of steps, taken without returning to Lightning in between.

    Args:
        members: R runs of one architecture, image shape, kind of optimiser and number of classes,
            all at the same step.
        losses: the losses watched.
        every_n_steps, cosines: what `Probe` takes; 0 observes nothing.
        compile: compile the step; without, torch.vmap runs it eagerly.

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
        check_traits(members, losses)
        self.every_n_steps, self.compiled = every_n_steps, compile
        self.net = copy.deepcopy(members[0].net)
        names = trained_parameters(self.net)
        rule, first_numbers, self.moment_names = optimizer_rule(members[0].optimizer)
        self.tags = tags(losses.names, cosines)
        data = members[0].data
        self.shape = (data.batch_size, 1, *data.space)

        states = [m.net.state_dict() for m in self.members]
        flat = torch.stack([
            torch.cat([state[name].flatten() for name in names]) for state in states
        ])  # fmt: skip
        # A state: parameters [R, P], and what is not trained, and the optimiser's moments.
        self.flat = flat
        self.rest = {
            name: torch.stack([state[name] for state in states])
            for name in states[0] if name not in names
        }  # fmt: skip
        self.moments = tuple(
            torch.stack([_moment(m, name) for m in self.members]) for name in self.moment_names
        )

        def column(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)

        rules = [optimizer_rule(m.optimizer)[1] for m in self.members]
        self.rates = {key: column([numbers[key] for numbers in rules]) for key in first_numbers}
        datas = [m.data for m in self.members]
        self.numbers = {
            "seed": torch.tensor([d.seed for d in datas]),
            "thresholds": torch.stack([d.thresholds for d in datas]),
            "low": column([d.low for d in datas]),
            "high": column([d.high for d in datas]),
            "trained": column(
                [[float(n == m.trained) for n in losses.names] for m in self.members]
            ),
        }
        ready: Callable[..., Any] = compiled if compile else lambda function: function
        self.update = ready(vmap(rule, in_dims=(0, 0, 0, None, 0)))
        self.gradient = {
            observed: ready(
                vmap(
                    make_gradient(self.net, losses, self.shape, observed=observed, cosines=cosines),
                    in_dims=(0, 0, 0, None),
                )
            )
            for observed in (True, False)
        }
        self.saved = time.monotonic()

    # -- the state, in chunks ----------------------------------------------------------------------

    def configure_optimizers(self) -> None:
        """None: the step holds the optimiser's rule."""

    def on_fit_start(self) -> None:
        self.losses.to(self.device)
        self.net.to(self.device)
        count = len(self.members)
        pieces = -(-count // CHUNK) if self.device.type == "cpu" else 1
        self.chunk = -(-count // pieces)
        # All chunks have one shape, for which the step is compiled; the last one repeats a member.
        index = torch.arange(pieces * self.chunk).clamp_max(count - 1)
        tensors = (self.flat, self.rest, self.moments, self.numbers, self.rates)
        self.chunks = [
            tree_map(lambda t, i=part: t[i].to(self.device), tensors)
            for part in index.split(self.chunk)
        ]
        self._try()

    def _try(self) -> None:
        """See that torch.func can map the step over runs, and compile it where it is to be.

        The ordinary step of these runs has been tried before, so what fails here is not theirs.

        Raises:
            NotStackable: it cannot.
        """
        parameters, buffers, _, numbers, _ = self.chunks[0]
        step = torch.zeros((), dtype=torch.int64, device=self.device)
        kinds = {True} if self.every_n_steps == 1 else {True, False}
        try:
            for observed in kinds if self.every_n_steps else {False}:
                self.gradient[observed](parameters, buffers, numbers, step)
            self.evaluate(VAL, 1)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "DefaultCPUAllocator" in str(error):  # out of memory, too
                raise
            what = "the compiler cannot compile" if self.compiled else "torch.func cannot map"
            why = " ".join(str(error).split()).split(". ")[0][:200]
            raise NotStackable(f"{what} them over runs: {type(error).__name__}: {why}") from error

    def training_step(self, batch: tuple[int, int], batch_idx: int) -> None:
        first, last = batch
        steps = torch.arange(first, last, device=self.device).unbind()
        watched = [
            s for s in range(first, last) if self.every_n_steps and s % self.every_n_steps == 0
        ]
        for i, (parameters, buffers, moments, numbers, rates) in enumerate(self.chunks):
            seen = []
            for number, step in zip(range(first, last), steps, strict=True):
                observed = bool(self.every_n_steps) and number % self.every_n_steps == 0
                gradient, buffers, values = self.gradient[observed](
                    parameters, buffers, numbers, step
                )
                parameters, moments = self.update(parameters, gradient, moments, step, rates)
                if observed:
                    seen.append(values)
            self.chunks[i] = (parameters, buffers, moments, numbers, rates)
            if seen:
                self._write(i, np.array(watched), torch.stack(seen, dim=1).cpu().numpy())
            finite = parameters.isfinite().all(dim=1).tolist()
            for member, good in zip(self._chunk_members(i), finite, strict=False):
                if not good:  # all that tells where nothing is observed
                    self._fail(member, "a weight is not finite", last - 1)
        # Lightning counts the steps of its own optimisers; these are ours.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.total.ready += last - first
        progress.total.completed += last - first

    def _chunk_members(self, chunk: int) -> list[Member]:
        return self.members[chunk * self.chunk : (chunk + 1) * self.chunk]

    def _write(self, chunk: int, steps: np.ndarray, values: np.ndarray) -> None:
        for member, block in zip(self._chunk_members(chunk), values, strict=False):
            tags = [f"{kind}/{member.trained}" for kind in ("loss", "grad_norm")]
            own = block[:, [self.tags.index(tag) for tag in tags]]
            for row, column in np.argwhere(~np.isfinite(own))[:1]:
                self._fail(member, f"{tags[column]} is {own[row, column]}", steps[row])
            write_scalars(member.logger.experiment, self.tags, steps, block)

    def _fail(self, member: Member, what: str, step: int) -> None:
        if member.error is None:
            member.error = f"trained with {member.trained}, step {step}: {what}"
            log.warning("%s: %s", member.folder.name, member.error)

    def save(self) -> None:
        """Give each member its weights and its optimiser's state, and write its checkpoint.

        One that has failed keeps its last good one.
        """
        split, done = splitter(self.net), self.trainer.global_step
        loops = _loops(done)
        adam = self.moment_names != ["momentum_buffer"]
        for i, (flat, rest, moments, *_) in enumerate(self.chunks):
            for k, member in enumerate(self._chunk_members(i)):
                if member.error:
                    continue
                state = {name: b[k] for name, b in rest.items()} | split(flat[k])
                member.net.load_state_dict(state)
                if adam or member.optimizer.param_groups[0]["momentum"]:
                    named = [split(m[k].clone()) for m in moments]
                    for name, p in trained_parameters(member.net).items():
                        kept = {n: m[name] for n, m in zip(self.moment_names, named, strict=True)}
                        if adam:
                            kept["step"] = torch.tensor(float(done))
                        member.optimizer.state[p] = kept
                save_checkpoint(member, self.losses, done, loops)
        self.saved = time.monotonic()

    # -- validation --------------------------------------------------------------------------------

    def evaluate(self, split: int, size: int) -> list[dict[str, float]]:
        """Metrics and losses of each member on `size` fixed images of its own."""
        batch = self.members[0].data.eval_batch_size
        split_flat = splitter(self.net)

        def one(parameters: Tensor, buffers: Any, numbers: Any, step: Tensor, count: int) -> Any:
            shape = (count, *self.shape[1:])
            image, label = draw(numbers, split, step, shape)
            logits = functional_call(self.net, (split_flat(parameters), buffers), (image,))
            return tally(logits, label, self.losses)

        results = []
        self.net.eval()
        for parameters, buffers, _, numbers, _ in self.chunks:
            total = None
            for i in range(-(-size // batch)):
                count = min(batch, size - i * batch)
                step = torch.full((), i, device=self.device)
                with onednn(True):  # together the members are a wide net
                    found = vmap(one, in_dims=(0, 0, 0, None, None))(
                        parameters, buffers, numbers, step, count
                    )
                total = total.plus(found) if total else found
            assert total is not None
            table = {n: v.tolist() for n, v in metrics(total, self.losses.names).items()}
            results += [{n: v[i] for n, v in table.items()} for i in range(len(parameters))]
        self.net.train()
        return results[: len(self.members)]

    def show_images(self) -> None:
        """What callbacks.Images logs, once: stacks are for runs by the hundred."""
        data, split = self.members[0].data, splitter(self.net)
        shape, first = (min(Images.COUNT, data.val_size), *self.shape[1:]), torch.tensor(0)
        self.net.eval()
        for i, (flat, rest, _, numbers, _) in enumerate(self.chunks):
            for k, member in enumerate(self._chunk_members(i)):
                own = {name: value[k] for name, value in numbers.items()}
                image, label = draw(own, VAL, first.to(self.device), shape)
                state = split(flat[k]) | {name: b[k] for name, b in rest.items()}
                logits = functional_call(self.net, state, (image,))
                log_images(member.logger, image, label, logits, self.trainer.global_step)
        self.net.train()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.report("val", VAL, self.members[0].data.val_size)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def report(self, stage: str, split: int, size: int) -> None:
        """Evaluate all members, and write down what came out."""
        step = np.array([self.trainer.global_step])
        for member, found in zip(self.members, self.evaluate(split, size), strict=True):
            scalars = {f"{stage}/{name}": value for name, value in found.items()}
            member.metrics |= scalars
            values = np.array([list(scalars.values())])
            write_scalars(member.logger.experiment, list(scalars), step, values)
        accuracies = [m.metrics[f"{stage}/accuracy"] for m in self.members]
        # For the progress bar; `log` is only for use inside Lightning's loops.
        self.trainer.callback_metrics[f"{stage}/accuracy"] = torch.tensor(accuracies).mean()


def _loops(step: int) -> dict[str, Any]:
    """The state of Lightning's loops after `step` steps of an ordinary run."""
    bare = pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    loops = bare.fit_loop.state_dict()
    for when in ("total", "current"):
        progress = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        progress["step"][when] = dict.fromkeys(("ready", "completed"), step)
        batches = loops["epoch_loop.batch_progress"]
        batches[when] = dict.fromkeys(("ready", "started", "processed", "completed"), step)
        loops["epoch_progress"][when] |= {"ready": 1, "started": 1}
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": step}
    return loops


def save_checkpoint(member: Member, losses: LossSet, step: int, loops: dict[str, Any]) -> None:
    """The checkpoint that Lightning would have written, had the run been trained alone."""
    trained = losses.losses[losses.names.index(member.trained)]
    parts = {"net": member.net, "losses": losses, "loss": trained}  # of SegmentationModule
    state = {f"{k}.{n}": t.cpu() for k, part in parts.items() for n, t in part.state_dict().items()}
    checkpoint = {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": state,
        "loops": {"fit_loop": loops},
        "callbacks": {},
        "optimizer_states": [member.optimizer.state_dict()],
        "lr_schedulers": [],
        "losswatch": member.logger.record(member.config),
    }
    resume.save(checkpoint, resume.checkpoint_path(member.folder, step))


def check_options(trainer: Mapping[str, Any]) -> None:
    """See that runs with these Trainer options can be trained as a stack.

    Raises:
        NotStackable: they cannot.
    """
    needed = {
        "precision": "32-true",
        "gradient_clip_val": None,
        "accumulate_grad_batches": 1,
        "devices": 1,
        "num_nodes": 1,
        "max_time": None,  # of each run
    }
    for key, value in needed.items():
        given = trainer.get(key, value)
        if str(given) not in (str(value), "32"):
            raise NotStackable(f"trainer.{key}={given} needs the ordinary step")


def check_traits(members: Sequence[Member], losses: LossSet) -> None:
    """See that the members are pure functions of what is stacked.

    Raises:
        NotStackable: they are not; says what of them is in the way.
    """
    net, data = copy.deepcopy(members[0].net), members[0].data
    named = list(net.named_parameters(remove_duplicate=False))
    if len(named) > len(list(net.parameters())):
        raise NotStackable("the network shares a parameter between layers")
    if any(p.is_complex() for p in net.parameters()):
        raise NotStackable("the network has complex parameters")
    for name in {m.trained for m in members}:
        if any(True for _ in losses.losses[losses.names.index(name)].parameters()):
            raise NotStackable(f"loss {name} has parameters of its own to train")
    batch = data.draw(TRAIN, 0, data.batch_size)
    traits = try_step(
        net, losses, members[0].trained, torch.optim.SGD, batch, len(data.thresholds) + 1
    )
    for what in traits.random:
        raise NotStackable(f"{_named(what)} draws random numbers")
    for what in traits.stateful:
        raise NotStackable(f"{_named(what)} keeps a state of its own")


def _named(what: str) -> str:
    return "the network" if what == "model" else f"loss {what}"


@contextmanager
def _closed_on_failure(members: Sequence[Member]) -> Iterator[None]:
    """Close the event files: what goes on after a failure cuts them to the last checkpoint."""
    try:
        yield
    except BaseException:
        for member in members:
            member.logger.close()
        raise


def fit(
    members: Sequence[Member],
    losses: LossSet,
    trainer_options: Mapping[str, Any],
    **options: Any,
) -> None:
    """Train the members, validate and test them; results are in each.

    Args:
        members, losses, options: of `StackedModule`.
        trainer_options: of pytorch_lightning.Trainer; steps are steps of each run.

    Raises:
        NotStackable: they cannot be trained as a stack.
    """
    with _closed_on_failure(members):
        if len({member.start for member in members}) > 1:
            raise NotStackable("the runs are at different steps")
        begin = time.perf_counter()
        module = StackedModule(members, losses, **options)
        steps, interval = trainer_options["max_steps"], trainer_options["val_check_interval"]
        block = block_size(interval)
        trainer = pl.Trainer(
            **{**trainer_options, "val_check_interval": interval // block},
            logger=False,
            callbacks=[Progress(None)] if trainer_options["enable_progress_bar"] else [],
            max_epochs=1,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        first = members[0].start
        done = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        done.ready = done.completed = first
        blocks = Blocks(first, steps, block)
        with fast_on_cpu(module.net):
            trainer.fit(module, blocks, range(1))  # type: ignore[arg-type]
        if trainer.global_step < steps:
            raise RuntimeError(f"training ended at step {trainer.global_step} of {steps}")
        if steps % interval:
            module.report("val", VAL, members[0].data.val_size)  # the final weights, too
        module.save()
        module.show_images()
        module.report("test", TEST, members[0].data.test_size)
        for member in members:
            member.logger.close()
            member.seconds = (time.perf_counter() - begin) / len(members)
