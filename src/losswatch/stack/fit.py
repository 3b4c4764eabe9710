"""Trains, validates and tests a stack of runs. One run compiled is a stack of one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from losswatch import compat, terminal
from losswatch.config.loss_files import loss_nodes
from losswatch.data.random import TEST, VAL
from losswatch.disk.result import Reached
from losswatch.disk.resume import log_resume
from losswatch.losses import LossSet
from losswatch.run.build import make_losses, trainer_options
from losswatch.run.process import run_process
from losswatch.stack.limits import check_config
from losswatch.stack.member import Member, make_member
from losswatch.stack.module import StackedModule
from losswatch.stack.refusal import NotStackable

BLOCK = 500  # steps between two writes, at most


class Blocks:
    """The steps from `first` up to `last`, without it, in blocks: (first, last) of each."""

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


def train_compiled(cfg: DictConfig, trained: str, folder: Path) -> Reached:
    """Train one run by a compiled step.

    Raises:
        NotStackable: it needs the ordinary step.
    """
    options = trainer_options(cfg)
    check_config(cfg)
    member = make_member(cfg, trained, folder)
    log_resume(member.notice, member.start)
    losses = make_losses(loss_nodes(cfg, trained), member.data.form)
    fit([member], losses, options, threads=cfg.threads, **cfg.probe)
    return Reached(options["max_steps"], member.result())


def fit(
    members: Sequence[Member],
    losses: LossSet,
    trainer_options: Mapping[str, Any],
    threads: int | None = None,
    **options: Any,
) -> None:
    """Train, validate and test the members; the results are in them.

    Args:
        members, losses, options: of `StackedModule`.
        trainer_options: of pytorch_lightning.Trainer; steps are those of each run.
        threads: CPU threads; None leaves their number as it is.

    Raises:
        NotStackable: they cannot be trained as a stack.
    """
    # After an error, too: the next attempt cuts the event files to the last checkpoint.
    with ExitStack() as logs, run_process(members[0].net, threads):
        for member in members:
            logs.enter_context(member.logger)
        if len({member.start for member in members}) > 1:
            raise NotStackable("the runs are at different steps")
        begin = time.perf_counter()
        steps, interval = trainer_options["max_steps"], trainer_options["val_check_interval"]
        module = StackedModule(members, losses, **options)
        block = block_size(interval)
        trainer = pl.Trainer(
            **{
                **trainer_options,
                "val_check_interval": interval // block,
                "enable_progress_bar": False,  # `terminal.steps` below
            },
            logger=False,
            max_epochs=1,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        first = members[0].start
        compat.count_steps(trainer, first)
        count, is_shown = len(members), trainer_options["enable_progress_bar"]
        with terminal.steps(count * steps, count * first, is_shown=is_shown) as module.shown:
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
