"""One ordinary run: Lightning's Trainer trains it, or tests the network of a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch import nn

from losswatch import compat
from losswatch.config.settings import flatten_keys
from losswatch.data.folder import FolderImages
from losswatch.data.form import Form
from losswatch.data.modules import has_test, is_ours
from losswatch.data.random import ThresholdedImages
from losswatch.disk.checkpoint import data_of, load_loss_state, load_net, step_of
from losswatch.disk.checkpoint_files import AtomicCheckpoints
from losswatch.disk.event_log import EventLog, log_survey, open_log
from losswatch.disk.growing_files import rewind
from losswatch.disk.resume import find_start, log_resume
from losswatch.run.build import (
    make_callbacks,
    make_data,
    make_loggers,
    make_losses,
    make_net,
    make_optimizer,
    make_scheduler,
)
from losswatch.run.callbacks import (
    Checkpoints,
    Images,
    Predictions,
    Progress,
    why_ended_early,
)
from losswatch.run.epoch_loader import use_epoch_loader
from losswatch.run.module import SegmentationModule
from losswatch.run.plan import Plan
from losswatch.run.process import run_process
from losswatch.text import nearby
from losswatch.watch.lightning import Watch

log = logging.getLogger(__name__)


class Reached(NamedTuple):
    """What training or testing has reached."""

    steps: int  # done in all
    metrics: dict[str, float]  # of the last validation and of the test
    is_done: bool = True  # if False, the run can be resumed


def train(plan: Plan) -> Reached:
    """Train one run, from its newest checkpoint if there is one."""
    settings, folder = plan.settings, plan.folder
    start = find_start(folder)
    log_resume(start.notice, start.step)
    data, net = plan.data or make_data(settings), make_net(plan)
    with run_process(net, plan.threads, settings.seed):
        module = _make_module(plan, net, data)
        if not is_ours(data):
            use_epoch_loader(data, settings.seed)
        checkpoints = Checkpoints(folder, settings.as_record(), _about(data, plan.form))
        with open_log(settings, start.sizes) as logger:
            if isinstance(data, FolderImages) and not start.step and compat.process_rank() == 0:
                log_survey(logger, data.survey)
            trainer = _make_trainer(plan, module, logger, checkpoints)
            trainer.fit(module, data, ckpt_path=start.path, weights_only=True)
            steps = trainer.global_step
            if early := why_ended_early(trainer):
                log.info("early stopping after %d of %d steps: %s", steps, plan.steps, early)
            is_done = steps >= plan.steps or early is not None
            if is_done and checkpoints.validated != steps:  # validate the final weights, too
                trainer.validate(module, data, verbose=False)
            metrics = checkpoints.metrics | _metrics(trainer)
            if is_done:
                checkpoints.save(trainer)
                if has_test(data):
                    trainer.test(module, data, verbose=False)
                    metrics |= _metrics(trainer)
    return Reached(steps, metrics, is_done)


def test(plan: Plan) -> Reached:
    """Test the network of `plan.checkpoint`; nothing is trained."""
    content, settings, net = plan.checkpoint, plan.settings, make_net(plan)
    data = plan.data or make_data(settings)
    assert content is not None
    load_net(net, content)
    with run_process(net, plan.threads, settings.seed):
        module = _make_module(plan, net, data)
        load_loss_state(module.loss, content)
        if compat.process_rank() == 0:
            rewind(plan.folder, {})  # a test that was cut off leaves a part of its log
        with EventLog(str(plan.folder)) as logger:
            trainer = _make_tester(plan, logger)
            if isinstance(data, FolderImages):
                cases = data.layout.cases["test"]
                predictions = Predictions(plan.folder, plan.form, data.values, cases)
                trainer.callbacks.append(predictions)  # type: ignore[attr-defined]
            trainer.test(module, data, verbose=False)
        return Reached(step_of(content), _metrics(trainer))


def predict(plan: Plan) -> Reached:
    """Predict the masks of images without labels, by the network of `plan.checkpoint`.

    There are no metrics.
    """
    content, settings, net = plan.checkpoint, plan.settings, make_net(plan)
    assert content is not None
    data: Any = plan.data  # `Planner.plan` has made them
    _, values = data_of(content)
    load_net(net, content)
    with run_process(net, plan.threads, settings.seed):
        module = _make_module(plan, net, data)
        trainer = _make_tester(plan, False)
        masks = Predictions(plan.folder, plan.form, values, data.cases)
        trainer.callbacks.append(masks)  # type: ignore[attr-defined]
        trainer.predict(module, data, return_predictions=False)
    return Reached(step_of(content), {})


PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def _options(plan: Plan) -> dict[str, Any]:
    """The options of the run's Trainer. A profiler writes its table into the run's folder."""
    options = dict(plan.options)
    if (name := options["profiler"]) in PROFILERS:
        options["profiler"] = PROFILERS[name](dirpath=plan.folder, filename="profile")
        log.info("the profile goes to %s", nearby(plan.folder / "*-profile.txt"))
    return options


def _make_tester(plan: Plan, logger: EventLog | bool) -> pl.Trainer:
    return pl.Trainer(
        **_options(plan) | {"enable_progress_bar": False},
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        # In a test each rank takes its own share by itself.
        use_distributed_sampler=plan.settings.mode == "predict",
    )


def _make_module(plan: Plan, net: nn.Module, data: pl.LightningDataModule) -> SegmentationModule:
    settings = plan.settings
    return SegmentationModule(
        net,
        make_losses(plan),
        settings.trained,
        make_optimizer(settings),
        None if isinstance(data, ThresholdedImages) else plan.form,
        getattr(data, "infer", None),
        make_scheduler(settings),
    )


def _about(data: pl.LightningDataModule, form: Form) -> dict[str, Any]:
    """What prediction must know of the data; checkpoints hold it."""
    values = getattr(data, "values", [])
    return dataclasses.asdict(form) | {"classes": list(form.classes), "values": values}


def _make_trainer(
    plan: Plan, module: SegmentationModule, logger: EventLog, checkpoints: Checkpoints
) -> pl.Trainer:
    settings, options = plan.settings, _options(plan)
    options["max_epochs"] = 1  # the whole training is one epoch
    # Lightning counts batches.
    options["val_check_interval"] *= options["accumulate_grad_batches"]
    if settings.callbacks:  # by default Lightning's callbacks log every 50 steps
        options.setdefault("log_every_n_steps", 1)
    # The callback that saves checkpoints comes last: they then hold the state of all others.
    callbacks = [Images(together=module.is_random), *make_callbacks(plan), checkpoints]
    watch = None
    if settings.probe.every_n_steps:
        watch = Watch(
            module.losses,
            "loss",
            every_n_steps=settings.probe.every_n_steps,
            cosines=settings.probe.cosines,
            activation=module.activation,
            ignore_index=module.ignore_index,
            strict=True,
            diagnose=True,
        )
        callbacks.insert(0, watch)
    if options["enable_progress_bar"]:
        callbacks.append(Progress(watch))
    loggers = make_loggers(plan)
    for other in loggers:
        other.log_hyperparams(dict(flatten_keys(settings.as_config())))
    return pl.Trainer(
        **options,
        logger=[logger, *loggers],
        callbacks=callbacks,
        plugins=[AtomicCheckpoints(plan.folder)],
        use_distributed_sampler=False,  # each rank draws its own share of a batch
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
