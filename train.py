"""losswatch: train a segmentation network with one loss, watch them all.

    python train.py                                             one run with conf/config.yaml
    python train.py loss=cce theta=0.05 optimizer.lr=3e-4       one run, some of it changed
    python train.py -m loss=dice,cce theta=0.05,0.5,0.95        a sweep: six runs, and their table
    python train.py --help                                      all groups and keys
    tensorboard --logdir outputs                                browse the curves

A run leaves TensorBoard events, checkpoints/, curves.png, its config (.hydra/), its log and
result.json in outputs/<sweep>/<run>/.
"""

import logging
import time
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from losswatch import config as schema
from losswatch.sweep import clear_errors, stop

log = logging.getLogger("losswatch")
schema.register()


def train(cfg: DictConfig, trained: str, files: dict[str, Path], folder: Path) -> dict[str, float]:
    """Train one run in `folder`; return its final metrics."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    from losswatch import build, callbacks, fuse
    from losswatch.module import SegmentationModule
    from losswatch.networks import fast_on_cpu
    from losswatch.probe import Probe
    from losswatch.sync import LayerSync

    build.quieten()
    losses = build.make_losses(cfg, trained, files)
    options = build.trainer_options(cfg)
    if cfg.compile:
        try:
            if why := fuse.obstacle(options):
                raise NotImplementedError(f"{why} needs the ordinary step")
            member = fuse.make_member(cfg, trained, folder)
            fuse.fit([member], losses, options, **cfg.probe)
            return member.result()
        except RuntimeError as error:  # of torch.vmap's, Dynamo's and the compiler's too
            log.warning("not compiled: %s", " ".join(str(error).split())[:200])

    data, net, optimizer = build.make_data(cfg), build.make_net(cfg), build.make_optimizer(cfg)
    logger = callbacks.open_log(cfg, trained, folder)
    module = SegmentationModule(
        net, losses, trained, optimizer, num_classes=len(schema.thresholds(cfg.theta)) + 1
    )
    probe = Probe(**cfg.probe) if cfg.probe.every_n_steps else None
    checkpoint = ModelCheckpoint(folder / "checkpoints", filename="{step}")
    watchers = [checkpoint, callbacks.Images()]
    if options["enable_progress_bar"]:
        watchers.append(callbacks.Progress(probe))
    trainer = pl.Trainer(
        **options,
        plugins=[LayerSync()] if options.get("sync_batchnorm") else None,
        logger=logger,
        callbacks=[probe, *watchers] if probe else watchers,
        # One epoch is the whole training; every rank draws its own share of a batch.
        max_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    with fast_on_cpu(net):
        trainer.fit(module, data)
    if options["max_steps"] % options["val_check_interval"]:  # the final weights, too
        trainer.validate(module, data, verbose=False)
        trainer.save_checkpoint(folder / "checkpoints" / f"step={trainer.global_step}.ckpt")
        if trainer.is_global_zero:
            Path(checkpoint.best_model_path).unlink()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, data, verbose=False)
    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    logger.close()
    return metrics


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Check, train, and write down how it went; the returned accuracy is for sweepers."""
    from pytorch_lightning.utilities import rank_zero_only

    from losswatch import build, fuse
    from losswatch.report import read_scalars
    from losswatch.result import write_result
    from losswatch.study import plot_curves

    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    trained = job.runtime.choices.get("loss") or ""  # check says what is wrong with that
    files = build.loss_files(job.runtime.config_sources)
    try:
        build.check(cfg, trained, files, multirun=job.mode == RunMode.MULTIRUN)
    except schema.ConfigError as error:
        stop(str(error))

    groups = ("loss", "model", "optimizer")
    result = {
        "run": folder.name,
        "status": "failed",
        "error": None,
        "overrides": list(job.overrides.task),
        "choices": {group: job.runtime.choices.get(group) for group in groups},
        "config": OmegaConf.to_container(cfg, resolve=True),
        "steps": cfg.trainer.max_steps,
    }
    # Lightning starts this program again for each further device. Those processes train along, and
    # leave it to the first to say how it went, unless they are the ones that fail.
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if not first:
        logging.disable(logging.WARNING)
    start = time.perf_counter()
    try:
        # The fused launcher trains its runs first, and has each finished here like any other.
        fused = fuse.FINISHED.pop(folder, None)
        metrics = fused.result() if fused else train(cfg, trained, files, folder)
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
    accuracy = metrics.get("val/accuracy", float("nan"))
    if not first:
        return accuracy
    seconds = fused.seconds if fused else time.perf_counter() - start
    write_result(folder, result | {"status": "done", "seconds": seconds, "metrics": metrics})
    plot_curves(read_scalars(folder), folder / "curves.png", title=folder.name, trained=trained)
    log.info("val accuracy %.4f in %.1f s: %s", accuracy, seconds, folder)
    return accuracy


if __name__ == "__main__":
    with clear_errors():
        main()
