"""One ordinary run: Lightning's Trainer trains it, or tests the network of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from losswatch.train.build import (
    make_data,
    make_losses,
    make_net,
    make_optimizer,
    trainer_options,
)
from losswatch.train.callbacks import Checkpoints, Images, Progress
from losswatch.train.checkpoints import AtomicCheckpoints, find
from losswatch.train.content import load_loss, load_net, step_of
from losswatch.train.eventlog import EventLog, open_log
from losswatch.train.folder import announce, take_up
from losswatch.train.module import SegmentationModule
from losswatch.train.presets import loss_nodes
from losswatch.train.process import run_process
from losswatch.train.settings import plain
from losswatch.train.sync_batch_norm import LayerSync
from losswatch.watch.lightning import Watch


def train(cfg: DictConfig, trained: str, folder: Path) -> tuple[int, dict[str, float]]:
    """Train one run in `folder`, from its newest checkpoint if there is one.

    Args:
        cfg: its config.
        trained: the name of the trained loss.
        folder: where it writes everything.

    Returns:
        the number of steps that are done, and the metrics then.
    """
    start = take_up(folder, below=cfg.trainer.max_steps)
    announce(start.notice, start.step)
    net = make_net(cfg)
    with run_process(net, cfg.threads, cfg.seed):
        module = _make_module(cfg, trained, net)
        checkpoints = Checkpoints(folder, plain(cfg), start.random)
        logger = open_log(cfg, trained, folder, start.events)
        trainer = _make_trainer(cfg, module, logger, checkpoints)
        data = make_data(cfg)
        trainer.fit(module, data, ckpt_path=start.path, weights_only=True)
        steps, options = trainer.global_step, trainer_options(cfg)
        is_done = steps >= options["max_steps"]
        if is_done and steps % options["val_check_interval"]:  # validate the final weights, too
            trainer.validate(module, data, verbose=False)
        metrics = _metrics(trainer)
        if is_done:
            checkpoints.save(trainer)
            trainer.test(module, data, verbose=False)
            metrics |= _metrics(trainer)
        logger.close()
    return steps, metrics


def test(cfg: DictConfig, trained: str, folder: Path) -> tuple[int, dict[str, float]]:
    """Test the network in `cfg.checkpoint`; nothing is trained.

    Args and returns as of `train`.
    """
    content = find(cfg.checkpoint)
    net = make_net(cfg)
    load_net(net, content)
    with run_process(net, cfg.threads, cfg.seed):
        module = _make_module(cfg, trained, net)
        load_loss(module.loss, content)
        logger = EventLog(str(folder))
        trainer = pl.Trainer(
            **trainer_options(cfg) | {"enable_progress_bar": False},
            logger=logger,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.test(module, make_data(cfg), verbose=False)
        logger.close()
        return step_of(content), _metrics(trainer)


def _make_module(cfg: DictConfig, trained: str, net: Any) -> SegmentationModule:
    losses = make_losses(loss_nodes(cfg, trained))
    return SegmentationModule(net, losses, trained, make_optimizer(cfg))


def _make_trainer(
    cfg: DictConfig, module: SegmentationModule, logger: EventLog, checkpoints: Checkpoints
) -> pl.Trainer:
    options = trainer_options(cfg)
    callbacks: list[pl.Callback] = [checkpoints, Images()]
    watch = (
        Watch(module.losses, "loss", **cfg.probe, strict=True) if cfg.probe.every_n_steps else None
    )
    if watch:
        callbacks.insert(0, watch)
    if options["enable_progress_bar"]:
        callbacks.append(Progress(watch))
    plugins: list[Any] = [AtomicCheckpoints()]
    if options["sync_batchnorm"]:
        plugins.append(LayerSync())
    return pl.Trainer(
        **options,
        logger=logger,
        callbacks=callbacks,
        plugins=plugins,
        max_epochs=1,  # the whole training is one epoch
        use_distributed_sampler=False,  # each rank draws its own share of a batch
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
