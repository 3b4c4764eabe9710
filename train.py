"""losswatch: train a segmentation network with one loss, watch them all.

    python train.py                                             one run with conf/config.yaml
    python train.py loss=cce theta=0.05 optimizer.lr=3e-4       one run, some of it changed
    python train.py -m loss=dice,cce theta=0.05,0.5,0.95        a sweep: six runs, and their table
    python train.py mode=test checkpoint=outputs/<sweep>/<run>  its test metrics, nothing trained
    python train.py --help                                      all groups and keys
    tensorboard --logdir outputs                                browse the curves

A run leaves TensorBoard events, checkpoints/, curves.png, its config (.hydra/), its log and
result.json in outputs/<sweep>/<run>/.
"""

import logging
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from losswatch.sweep.exit import clear_errors, open_streams, stop
from losswatch.train import config as schema
from losswatch.train.names import quoted

log = logging.getLogger("losswatch")
schema.register()


def train(cfg: DictConfig, trained: str, folder: Path) -> tuple[int, dict[str, float]]:
    """Train one run in `folder`; return the number of steps that are done, and its metrics then."""
    import pytorch_lightning as pl

    from losswatch.nets.cpu import fast_on_cpu
    from losswatch.stack import fuse
    from losswatch.stack.step import NotStackable
    from losswatch.train import build, callbacks, randomness, resume
    from losswatch.train.module import SegmentationModule
    from losswatch.train.sync import LayerSync
    from losswatch.watch.probe import Probe

    build.quieten()
    losses = build.make_losses(build.loss_nodes(cfg, trained))
    options = build.trainer_options(cfg)
    if cfg.compile:
        try:
            fuse.check_options(options)
            member = fuse.make_member(cfg, trained, folder)
            if member.notice:
                log.warning("%s", member.notice)
            if member.start:
                log.info("resumed from step %d", member.start)
            fuse.fit([member], losses, options, **cfg.probe)
            return options["max_steps"], member.result()
        except NotStackable as error:
            log.warning("not compiled: %s", error)

    start = resume.take_up(folder, below=cfg.trainer.max_steps)
    if start.notice:
        log.warning("%s", start.notice)
    if start.path:
        log.info("resumed from step %d", start.step)
    data, net, optimizer = build.make_data(cfg), build.make_net(cfg), build.make_optimizer(cfg)
    logger = callbacks.open_log(cfg, trained, folder, start.events)
    module = SegmentationModule(net, losses, trained, optimizer)
    probe = Probe(**cfg.probe) if cfg.probe.every_n_steps else None
    checkpoints = callbacks.Checkpoints(folder, resume.plain(cfg), start.random)
    watchers = [checkpoints, callbacks.Images()]
    if options["enable_progress_bar"]:
        watchers.append(callbacks.Progress(probe))
    plugins: list[Any] = [resume.AtomicCheckpoints()]
    if options["sync_batchnorm"]:
        plugins.append(LayerSync())
    trainer = pl.Trainer(
        **options,
        logger=logger,
        callbacks=[probe, *watchers] if probe else watchers,
        plugins=plugins,
        # One epoch is the whole training; every rank draws its own share of a batch.
        max_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    randomness.seed_everything(cfg.seed)
    with fast_on_cpu(net):
        trainer.fit(module, data, ckpt_path=start.path, weights_only=True)
    steps = trainer.global_step
    is_done = steps >= options["max_steps"]
    if is_done and steps % options["val_check_interval"]:  # the final weights, too
        trainer.validate(module, data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if is_done:
        checkpoints.save(trainer)
        trainer.test(module, data, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    logger.close()
    return steps, metrics


def test(cfg: DictConfig, trained: str, folder: Path) -> tuple[int, dict[str, float]]:
    """The steps and the test metrics of the net in `cfg.checkpoint`; nothing is trained."""
    import pytorch_lightning as pl

    from losswatch.nets.cpu import fast_on_cpu
    from losswatch.train import build, callbacks, randomness, resume
    from losswatch.train.module import SegmentationModule

    build.quieten()
    net, checkpoint = build.make_net(cfg), resume.find(cfg.checkpoint)
    losses = build.make_losses(build.loss_nodes(cfg, trained))
    resume.load_net(net, checkpoint)
    resume.load_loss(losses.losses[losses.names.index(trained)], checkpoint)
    module = SegmentationModule(net, losses, trained, build.make_optimizer(cfg))
    logger = callbacks.EventLog(str(folder))
    trainer = pl.Trainer(
        **{**build.trainer_options(cfg), "enable_progress_bar": False},
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    randomness.seed_everything(cfg.seed)
    with fast_on_cpu(net):
        trainer.test(module, build.make_data(cfg), verbose=False)
    logger.close()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return checkpoint["global_step"], metrics


def attempt(cfg: DictConfig, trained: str, folder: Path, first: bool) -> float | None:
    """Train or test, and write down how it went; `first` of the processes of this run."""
    from losswatch.events.series import read_scalars
    from losswatch.report.figures import plot_curves
    from losswatch.stack import fuse
    from losswatch.train import build, resume
    from losswatch.train.result import write_result

    job = HydraConfig.get()
    groups = ("loss", "model", "optimizer")
    result: dict[str, Any] = {
        "run": folder.name,
        "status": "failed",
        "error": None,
        "overrides": list(job.overrides.task),
        "choices": {group: job.runtime.choices.get(group) for group in groups},
        "config": resume.plain(cfg),
        "steps": None,
    }
    # The others leave it to the first to say how it went, unless they are the ones that fail.
    if not first:
        logging.disable(logging.WARNING)
    start = time.perf_counter()
    try:
        # The fused launcher trains its runs first, and has each finished here like any other.
        fused = fuse.FINISHED.pop(folder, None)
        work = train if cfg.mode == "train" else test
        if fused:
            if fused.notice:
                log.warning("%s", fused.notice)
            steps, metrics = cfg.trainer.max_steps, fused.result()
        else:
            if job.mode == RunMode.MULTIRUN:
                build.check(cfg, trained, multirun=True)
            steps, metrics = work(cfg, trained, folder)
        if first and cfg.mode == "train":
            curves = folder / "curves.png"
            plot_curves(read_scalars(folder), curves, title=folder.name, trained=trained)
    except BaseException as error:
        # On Ctrl-C Lightning shuts down in order, and then exits.
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result["error"] = "interrupted" if interrupted else said
        if first:
            write_result(folder, result | {"seconds": time.perf_counter() - start})
        if interrupted:
            raise KeyboardInterrupt from error
        logging.disable(logging.NOTSET)
        log.error("failed: %s (traceback in %s)", said, folder / f"{job.job.name}.log")
        log.debug(traceback.format_exc())
        if job.mode == RunMode.RUN:
            raise SystemExit(1) from error
        return None  # to a sweeper that searches: no score
    stage = "val" if cfg.mode == "train" else "test"
    accuracy = metrics.get(f"{stage}/accuracy", float("nan"))
    if not first:
        return accuracy
    seconds = fused.seconds if fused else time.perf_counter() - start
    result |= {"steps": steps, "seconds": seconds, "metrics": metrics}
    if cfg.mode == "train" and steps < cfg.trainer.max_steps:
        what = f"after {steps} of {cfg.trainer.max_steps} steps"
        write_result(folder, result | {"status": "stopped", "error": what})
        log.warning("stopped %s, to be resumed: %s", what, folder)
        if job.mode == RunMode.RUN:
            raise SystemExit(1)
        return None
    # In this order: a run that is done has its picture, one that is not has checkpoints to go on.
    write_result(folder, result | {"status": "done"})
    if cfg.mode == "train":
        resume.finish(folder, steps)
    log.info("%s accuracy %.4f in %.1f s: %s", stage, accuracy, seconds, folder)
    return accuracy


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Check, and train what is not done before; the returned accuracy is for sweepers."""
    import torch
    from pytorch_lightning.utilities import rank_zero_only

    from losswatch.train import build, resume

    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    trained = job.runtime.choices.get("loss") or ""  # check says what is wrong with that
    try:
        if cfg.checkpoint is not None:
            given = [override.split("=")[0].lstrip("+~") for override in job.overrides.task]
            checkpoint = resume.find(cfg.checkpoint)
            resume.adopt(cfg, checkpoint, given)
        if job.mode == RunMode.RUN:  # in a sweep it is the run that fails, in `attempt`
            build.check(cfg, trained)
        if cfg.checkpoint is not None:
            resume.load_net(build.make_net(cfg), checkpoint)
        resume.check_folder(folder, cfg)
    except schema.ConfigError as error:
        stop(str(error))
    if earlier := resume.finished(folder):
        return skip(earlier, folder)

    # Lightning starts this program again for each further device; those processes train along.
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    try:
        with resume.hold(folder) if first else nullcontext():
            # Another process may have ended the run, or begun another one here, before it let go.
            resume.check_folder(folder, cfg)
            if earlier := resume.finished(folder):
                return skip(earlier, folder)
            torch.set_num_threads(cfg.threads)
            return attempt(cfg, trained, folder, first)
    except schema.ConfigError as error:
        if job.mode == RunMode.RUN:
            stop(str(error))
        log.error("%s", error)  # since the sweep began: its other runs go on
        return None


def skip(result: dict[str, Any], folder: Path) -> float:
    """Say that the run is done; return its accuracy."""
    log.info("done before, skipped: %s", folder)
    accuracy = result["metrics"].get("val/accuracy")
    return float("nan") if accuracy is None else accuracy


if __name__ == "__main__":
    open_streams()
    sys.argv = [quoted(argument) for argument in sys.argv]
    with clear_errors():
        main()
