"""Trains, validates and tests a stack of runs. One run compiled is a stack of one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytorch_lightning as pl

from losswatch import compat, terminal
from losswatch.data.random import TEST, VAL
from losswatch.disk.resume import log_resume
from losswatch.losses import LossSet
from losswatch.run.build import make_losses
from losswatch.run.plan import Plan
from losswatch.run.process import run_process
from losswatch.run.train import Reached
from losswatch.stack.limits import check_plan
from losswatch.stack.member import Member, make_member
from losswatch.stack.module import StackedModule
from losswatch.stack.refusal import NotStackable

BLOCK = 500  # steps between two writes, at most


class Blocks:
    """The steps from `first` to `last` (not included), in blocks: (first, last) of each block."""

    def __init__(self, first: int, last: int, block: int) -> None:
        self.first, self.last, self.block = first, last, block

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.block)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for i in range(self.first, self.last, self.block):
            yield i, min(i + self.block, self.last)


def block_size(val_check_interval: int) -> int:
    """Steps of a block: the largest divisor of the validation interval that is at most BLOCK.

    >>> block_size(250), block_size(2000), block_size(7)
    (250, 500, 7)
    """
    return max(n for n in range(1, BLOCK + 1) if val_check_interval % n == 0)


def train_compiled(plan: Plan) -> Reached:
    """Train one run by a compiled step.

    Raises:
        NotStackable: the run needs the ordinary step.
    """
    check_plan(plan)
    member = make_member(plan)
    log_resume(member.notice, member.start)
    fit([member], make_losses(plan), plan)
    return Reached(plan.steps, member.result())


def fit(members: Sequence[Member], losses: LossSet, plan: Plan) -> None:
    """Train, validate and test the members; the results are in them.

    Args:
        members, losses: see `StackedModule`.
        plan: of one of the members. All of them have the same options of Lightning's Trainer (steps
            count for each run), threads, probe, and `compile`.

    Raises:
        NotStackable: the members cannot be trained as a stack.
    """
    settings, options, steps = plan.settings, plan.options, plan.steps
    # The logs are closed after an error, too. The next attempt cuts them to the last checkpoint.
    with ExitStack() as logs, run_process(members[0].net, plan.threads):
        for member in members:
            logs.enter_context(member.logger)
        if len({member.start for member in members}) > 1:
            raise NotStackable("the runs are at different steps")
        begin = time.perf_counter()
        interval = options["val_check_interval"]
        module = StackedModule(
            members, losses, compile=settings.compile, **dataclasses.asdict(settings.probe)
        )
        block = block_size(interval)
        trainer = pl.Trainer(
            **{
                **options,
                "val_check_interval": interval // block,
                "enable_progress_bar": False,  # `terminal.progress_bar` below
            },
            logger=False,
            max_epochs=1,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        first = members[0].start
        compat.count_steps(trainer, first)
        count, is_shown = len(members), options["enable_progress_bar"]
        with terminal.progress_bar(count * steps, count * first, is_shown) as module.shown:
            trainer.fit(module, Blocks(first, steps, block), range(1))  # type: ignore[arg-type]
        if trainer.global_step < steps:
            raise RuntimeError(f"training ended at step {trainer.global_step} of {steps}")
        if steps % interval:
            module.report("val", VAL, members[0].data.val_size)  # of the final weights, too
        module.show_images()
        module.save()
        module.report("test", TEST, members[0].data.test_size)
        for member in members:
            member.seconds = (time.perf_counter() - begin) / len(members)
