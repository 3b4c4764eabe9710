"""One ordinary run: Lightning's Trainer trains it, or tests the network of a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from losswatch import compat
from losswatch.config.loss_files import loss_nodes
from losswatch.config.settings import flat, plain
from losswatch.data.folder import FolderImages
from losswatch.data.form import Form
from losswatch.data.modules import has_test, is_ours
from losswatch.data.random import ThresholdedImages
from losswatch.disk.checkpoint import data_of, load_loss, load_net, step_of
from losswatch.disk.checkpoint_files import AtomicCheckpoints, find
from losswatch.disk.event_log import EventLog, log_survey, open_log
from losswatch.disk.result import Reached
from losswatch.disk.resume import find_start, log_resume
from losswatch.run.build import (
    describe_data,
    make_callbacks,
    make_data,
    make_loggers,
    make_losses,
    make_net,
    make_optimizer,
    make_scheduler,
    make_unlabelled,
    trainer_options,
)
from losswatch.run.callbacks import (
    Checkpoints,
    Images,
    Predictions,
    Progress,
    why_ended_early,
)
from losswatch.run.epoch_loader import repeat
from losswatch.run.module import SegmentationModule
from losswatch.run.process import run_process
from losswatch.run.swept import swept
from losswatch.run.sync_batch_norm import LayerSync
from losswatch.text import nearby
from losswatch.watch.lightning import Watch

log = logging.getLogger(__name__)


def train(cfg: DictConfig, trained: str, folder: Path) -> Reached:
    """Train one run in `folder`, from its newest checkpoint if there is one.

    Args:
        cfg: its config.
        trained: the name of the trained loss.
        folder: where it writes everything.
    """
    start = find_start(folder)
    log_resume(start.notice, start.step)
    data, form = make_data(cfg), describe_data(cfg)
    net = make_net(cfg, form)
    with run_process(net, cfg.threads, cfg.seed):
        module = _make_module(cfg, trained, net, data, form)
        if not is_ours(data):
            repeat(data, cfg.seed)
        checkpoints = Checkpoints(folder, plain(cfg), _about(data, form))
        with open_log(plain(cfg), trained, folder, start.sizes, swept(folder)) as logger:
            if isinstance(data, FolderImages) and not start.step and compat.process_rank() == 0:
                log_survey(logger, data.survey)
            trainer = _make_trainer(cfg, module, logger, checkpoints)
            trainer.fit(module, data, ckpt_path=start.path, weights_only=True)
            steps = trainer.global_step
            if early := why_ended_early(trainer):
                log.info(
                    "early stopping after %d of %d steps: %s", steps, cfg.trainer.max_steps, early
                )
            is_done = steps >= cfg.trainer.max_steps or early is not None
            if is_done and checkpoints.validated != steps:  # validate the final weights, too
                trainer.validate(module, data, verbose=False)
            metrics = checkpoints.metrics | _metrics(trainer)
            if is_done:
                checkpoints.save(trainer)
                if has_test(data):
                    trainer.test(module, data, verbose=False)
                    metrics |= _metrics(trainer)
    return Reached(steps, metrics, is_done)


def test(cfg: DictConfig, trained: str, folder: Path) -> Reached:
    """Test the network in `cfg.checkpoint`; nothing is trained.

    Args and returns as of `train`.
    """
    content, data, form = find(cfg.checkpoint), make_data(cfg), describe_data(cfg)
    net = make_net(cfg, form)
    load_net(net, content)
    with run_process(net, cfg.threads, cfg.seed):
        module = _make_module(cfg, trained, net, data, form)
        load_loss(module.loss, content)
        with EventLog(str(folder)) as logger:
            trainer = _make_tester(cfg, folder, logger)
            if isinstance(data, FolderImages):
                cases = data.layout.cases["test"]
                predictions = Predictions(folder, form, data.values, cases)
                trainer.callbacks.append(predictions)  # type: ignore[attr-defined]
            trainer.test(module, data, verbose=False)
        return Reached(step_of(content), _metrics(trainer))


def predict(cfg: DictConfig, trained: str, folder: Path) -> Reached:
    """Predict the masks of images without labels, by the network in `cfg.checkpoint`.

    Args and returns as of `train`; there are no metrics.
    """
    content = find(cfg.checkpoint)
    form, values = data_of(content)
    data = make_unlabelled(cfg, form)
    net = make_net(cfg, form)
    load_net(net, content)
    with run_process(net, cfg.threads, cfg.seed):
        module = _make_module(cfg, trained, net, data, form)
        trainer = _make_tester(cfg, folder, False)
        trainer.callbacks.append(Predictions(folder, form, values, data.cases))  # type: ignore
        trainer.predict(module, data, return_predictions=False)
    return Reached(step_of(content), {})


PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def _options(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The options of the run's Trainer. A profiler writes its table into the run's folder."""
    options = trainer_options(cfg)
    if (name := options["profiler"]) in PROFILERS:
        options["profiler"] = PROFILERS[name](dirpath=folder, filename="profile")
        log.info("the profile goes to %s", nearby(folder / "*-profile.txt"))
    return options


def _make_tester(cfg: DictConfig, folder: Path, logger: EventLog | bool) -> pl.Trainer:
    return pl.Trainer(
        **_options(cfg, folder) | {"enable_progress_bar": False},
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=cfg.mode == "predict",  # for a test each rank takes its own share
    )


def _make_module(
    cfg: DictConfig, trained: str, net: Any, data: pl.LightningDataModule, form: Form
) -> SegmentationModule:
    losses = make_losses(loss_nodes(cfg, trained), form)
    own = None if isinstance(data, ThresholdedImages) else form
    infer = getattr(data, "infer", None)
    return SegmentationModule(
        net, losses, trained, make_optimizer(cfg), own, infer, make_scheduler(cfg)
    )


def _about(data: pl.LightningDataModule, form: Form) -> dict[str, Any]:
    """What checkpoints hold of the data: what prediction needs."""
    values = getattr(data, "values", [])
    return dataclasses.asdict(form) | {"classes": list(form.classes), "values": values}


def _make_trainer(
    cfg: DictConfig, module: SegmentationModule, logger: EventLog, checkpoints: Checkpoints
) -> pl.Trainer:
    folder = checkpoints.folder
    options = _options(cfg, folder)
    options["max_epochs"] = 1  # the whole training is one epoch
    # Lightning counts batches.
    options["val_check_interval"] *= options["accumulate_grad_batches"]
    if cfg.callbacks:  # Lightning's write every 50 steps otherwise
        options.setdefault("log_every_n_steps", 1)
    # In this order: the state of the user's checkpoint callbacks is to be in ours.
    callbacks = [Images(together=module.is_random), *make_callbacks(cfg, folder), checkpoints]
    watch = (
        Watch(
            module.losses,
            "loss",
            **cfg.probe,
            activation=module.activation,
            ignore_index=module.ignore_index,
            strict=True,
        )  # fmt: skip
        if cfg.probe.every_n_steps
        else None
    )
    if watch:
        callbacks.insert(0, watch)
    if options["enable_progress_bar"]:
        callbacks.append(Progress(watch))
    loggers = make_loggers(cfg, folder)
    for other in loggers:
        other.log_hyperparams(dict(flat(plain(cfg))))
    plugins: list[Any] = [AtomicCheckpoints(folder)]
    if options["sync_batchnorm"]:
        plugins.append(LayerSync())
    return pl.Trainer(
        **options,
        logger=[logger, *loggers],
        callbacks=callbacks,
        plugins=plugins,
        use_distributed_sampler=False,  # each rank draws its own share of a batch
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
