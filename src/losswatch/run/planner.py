"""Makes plans: looks at the data, and checks all that can be checked before the first step."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import socket
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from joblib import cpu_count
from pytorch_lightning.utilities.seed import isolate_rng

from losswatch import compat
from losswatch.checks.arguments import check_arguments
from losswatch.checks.first_step import Traits, try_step
from losswatch.checks.images import check_images
from losswatch.checks.machine import check_machine, ranks_of
from losswatch.checks.metrics import Metrics, check_callbacks
from losswatch.checks.schedule import check_scheduler
from losswatch.config.errors import ConfigError
from losswatch.config.settings import Settings
from losswatch.config.sources import Sources
from losswatch.data.folder import FolderImages
from losswatch.data.form import Form
from losswatch.data.modules import batches_per_epoch, first_batch, form_of, has_test, is_ours
from losswatch.data.survey import print_survey
from losswatch.disk.checkpoint import data_of, load_net
from losswatch.disk.checkpoint_files import find_checkpoint
from losswatch.run.build import (
    check_loggers,
    make_callbacks,
    make_data,
    make_losses,
    make_net,
    make_optimizer,
    make_scheduler,
    make_unlabelled,
)
from losswatch.run.plan import Plan
from losswatch.run.process import quiet
from losswatch.text import one_line

log = logging.getLogger(__name__)

# Floating-point operations of a layer in a forward pass that keep a CPU thread busy, by dimensions:
# two threads are then at least 1.3 times as fast as one, with the U-Net of losswatch
# (`python scripts/benchmark.py threads`). For signals of one axis nothing was measured.
FLOPS_OF_THREAD = {2: 200e6, 3: 25e6}


@dataclass(frozen=True)
class DataFacts:
    """What is known of a run's data after one look at them.

    Attributes:
        form: of the data.
        batches: their number in one pass over the training images; None if nobody can count them.
        missing: the classes of which no validation image has a pixel.
        has_test: whether there are images for a test.
    """

    form: Form
    batches: int | None
    missing: list[str]
    has_test: bool


@dataclass
class Found:
    """What has been found out once for many runs. A sweep sends it to its processes.

    Attributes:
        data: by the node of the data.
        traits: by `Settings.step_key`. They hold for the machine on which the step was tried.
        host: the name of that machine.
    """

    data: dict[str, DataFacts] = field(default_factory=dict)
    traits: dict[str, Traits] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)


class Planner:
    """Makes plans, and keeps what this process has found out for them.

    Args:
        sources: the files of losses.
        found: what another process has found out.
    """

    def __init__(self, sources: Sources, found: Found | None = None) -> None:
        self.sources = sources
        self.found = Found()
        if found:
            self.found.data |= found.data
            if found.host == self.found.host:
                self.found.traits |= found.traits
        # Only the first process of a launcher and of Lightning prints.
        self.speaks = multiprocessing.parent_process() is None and not compat.process_rank()
        self._trainers: dict[str, pl.Trainer] = {}  # by their options
        self._passed: set[str] = set()  # callbacks that were checked
        self._said: set[str] = set()  # lines that were printed

    def plan(self, settings: Settings, read: Callable[..., Settings], is_here: bool = True) -> Plan:
        """The plan of a run.

        Args:
            settings: the run's.
            read: makes the settings anew for a training of so many `steps`.
            is_here: whether the run is trained on this machine. If not, no step is tried.

        Raises:
            ConfigError: the run cannot work. The message is one line for the user.
        """
        with quiet():
            options = self._options(settings)
            ranks = 1
            if is_here:
                ranks = ranks_of(self._trainer(options, settings.job.is_sweep))
            checkpoint = (
                None if settings.checkpoint is None else find_checkpoint(settings.checkpoint)
            )
            if checkpoint is not None and settings.mode == "predict":
                form, _ = data_of(checkpoint)
                unlabelled = make_unlabelled(settings, form)
                threads = self._threads(settings, None)
                plan = Plan(settings, form, options, threads, None, unlabelled, checkpoint)
                load_net(make_net(plan), checkpoint)  # refuses another network before any work
                return plan
            facts, data = self._facts_of(settings, ranks, options)
            settings = self._of_length(settings, read, facts)
            plan = Plan(
                settings, facts.form, self._options(settings), data=data, checkpoint=checkpoint
            )
            if settings.mode == "test" and not facts.has_test:
                raise ConfigError("mode=test: the data have no images for a test")
            check_loggers(plan)
            self._check_metrics(plan, facts)
            if checkpoint is not None:
                load_net(make_net(plan), checkpoint)  # refuses another network before any work
            traits = self._find_traits(plan) if is_here else None
            # The user's own module is made again for the training. It may have its own random
            # generator, and looking at the data has drawn from that.
            kept = data if data is not None and is_ours(data) else None
            threads = self._threads(settings, traits, plan.form.dims, ranks)
            return dataclasses.replace(plan, threads=threads, traits=traits, data=kept)

    # --- Parts of a plan -------------------------------------------------------------------------

    def _options(self, settings: Settings) -> dict[str, Any]:
        """The Trainer's options, with a validation interval of at most the training's length."""
        options = dict(settings.trainer)
        options.pop("max_epochs", None)
        check_arguments("trainer", pl.Trainer, options)
        options["val_check_interval"] = min(options["val_check_interval"], options["max_steps"])
        return options

    def _trainer(self, options: dict[str, Any], is_sweep: bool) -> pl.Trainer:
        key = json.dumps([options, is_sweep], default=str)
        if key not in self._trainers:
            self._trainers[key] = check_machine(options, is_sweep)
        return self._trainers[key]

    def _facts_of(
        self, settings: Settings, ranks: int, options: dict[str, Any]
    ) -> tuple[DataFacts, pl.LightningDataModule | None]:
        """The facts of a run's data; and the images, if they had to be made.

        Raises:
            ConfigError: the images cannot be trained with.
        """
        node = {key: value for key, value in settings.data.items() if key != "seed"}
        key = json.dumps([node, ranks, options.get("limit_val_batches"),
                          options.get("limit_test_batches")], default=str)  # fmt: skip
        data = None
        if settings.is_ours or key not in self.found.data:
            data = make_data(settings)
        if key not in self.found.data and data is not None:
            with isolate_rng():
                facts = self._gather_facts(data)
                check_images(data, options, ranks)
            if isinstance(data, FolderImages) and self.speaks:
                self._show(data)
            self.found.data[key] = facts
        return self.found.data[key], data

    def _gather_facts(self, data: pl.LightningDataModule) -> DataFacts:
        """Look at the data. A data module of somebody else is read once, to its last batch.

        Raises:
            ConfigError: the images cannot be trained with.
        """
        missing = data.missing if isinstance(data, FolderImages) else []
        try:
            return DataFacts(
                form=form_of(data),
                batches=batches_per_epoch(data),
                missing=[name for split, name in missing if split == "val"],
                has_test=has_test(data),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except Exception as error:  # the user's module raised it
            raise ConfigError(
                f"data: before training, without a trainer, its batches cannot be looked at: "
                f"{one_line(error)}"
            ) from error

    def _show(self, data: FolderImages) -> None:
        """Say once how rare each class is, and which class a split lacks."""
        if (text := str(data.survey)) in self._said:
            return
        self._said.add(text)
        print_survey(data.survey, data.root)
        for split, name in data.missing:
            log.warning("no image of %s has class %s; its metrics leave the class out", split, name)

    def _of_length(
        self, settings: Settings, read: Callable[..., Settings], facts: DataFacts
    ) -> Settings:
        """The settings, with `max_steps` computed from `max_epochs` if that is given.

        From then on `max_steps` alone says how long the training is.

        Raises:
            ConfigError: nobody can count the batches of an epoch, or the training is too long.
        """
        if (epochs := settings.trainer["max_epochs"]) is None or settings.mode != "train":
            return settings
        if not facts.batches:
            raise ConfigError(
                f"trainer.max_epochs={epochs} needs training batches that can be counted, which "
                "these data do not have; set trainer.max_steps"
            )
        accumulated = settings.trainer["accumulate_grad_batches"]
        settings = read(steps=math.ceil(epochs * facts.batches / accumulated))
        length = (
            f"trainer.max_epochs={epochs} sets trainer.max_steps={settings.trainer['max_steps']}"
        )
        self._say_once(length)
        return settings

    def _check_metrics(self, plan: Plan, facts: DataFacts) -> None:
        """Check that `metric` and the callbacks use metrics that each validation computes.

        Raises:
            ConfigError: a metric is unknown, or a callback cannot work.
        """
        settings = plan.settings
        missing = facts.missing if settings.mode == "train" else []
        metrics = Metrics.of(plan.form.classes, list(settings.losses), missing)
        metrics.check(f"metric={settings.metric}", settings.metric)
        key = f"{settings.callbacks} of {metrics}"
        if settings.callbacks and key not in self._passed:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name).resolve()
                made = make_callbacks(plan, folder)
                check_callbacks(made, metrics, folder, settings.job.is_sweep)
            self._passed.add(key)

    def _threads(
        self, settings: Settings, traits: Traits | None, dims: int = 2, ranks: int = 1
    ) -> int:
        """The CPU threads of a process of a run.

        Those given; for `auto` as many as make it much faster.

        Args:
            dims: of the images.
            ranks: the number of processes.
        """
        if isinstance(settings.threads, int):
            return settings.threads
        if settings.job.is_sweep or traits is None or traits.layer_flops == math.inf:
            return 1  # the runs of a sweep share the cores
        busy = int(traits.layer_flops / FLOPS_OF_THREAD.get(dims, math.inf))
        threads = max(1, min(cpu_count() // ranks, busy))
        if threads > 1:
            self._say_once(
                f"{threads} CPU threads; threads=1 gives the numbers of a sweep to the last digit"
            )
        return threads

    def _say_once(self, line: str) -> None:
        """Log a line, for all runs of a command together."""
        if self.speaks and line not in self._said:
            self._said.add(line)
            log.info(line)

    # --- The first step --------------------------------------------------------------------------

    def _find_traits(self, plan: Plan) -> Traits:
        """What the first step shows. It is tried once for all runs that begin alike.

        Raises:
            ConfigError: the step fails.
        """
        key = plan.settings.step_key(plan.form.channels)
        if key not in self.found.traits:
            self.found.traits[key] = self._try(plan)
        return self.found.traits[key]

    def _try(self, plan: Plan) -> Traits:
        """Try a run's first step, with the share of the batch that its last rank gets.

        Raises:
            ConfigError: the step fails.
        """
        settings = plan.settings
        trainer = self._trainer(plan.options, settings.job.is_sweep)
        precision, device = trainer.strategy.precision_plugin, trainer.strategy.root_device
        try:
            with isolate_rng():
                inputs, target = first_batch(plan.data or make_data(settings), ranks_of(trainer))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except Exception as error:  # the user's module raised it
            raise ConfigError(f"data: its first batch: {one_line(error)}") from error
        net, losses = make_net(plan), make_losses(plan)
        for what, module in (("model", net), ("losses", losses)):
            try:
                precision.convert_module(module).to(device)
            except Exception as error:
                raise ConfigError(f"{what}: {one_line(error)}") from error
        batch = precision.convert_input((inputs.to(device), target.to(device)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself gives the same warnings
            traits, optimizer = try_step(
                net, losses, settings.trained, make_optimizer(settings), batch, plan.form,
                precision.forward_context(),
            )  # fmt: skip
        if make := make_scheduler(settings):
            check_scheduler(make, optimizer, plan.steps)
        return traits
