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
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from losswatch import config as schema
from losswatch.sweep import stop

log = logging.getLogger("losswatch")
schema.register()


def train(cfg: DictConfig, trained: str, files: dict[str, Path], folder: Path) -> dict[str, float]:
    """Train one run in `folder`; return its final metrics."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import ModelCheckpoint
    from torch._dynamo.exc import TorchDynamoException

    from losswatch import build, callbacks, fuse
    from losswatch.module import SegmentationModule
    from losswatch.probe import Probe

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # The images are made, not loaded: workers have nothing to hide.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", ".*configure_optimizers.*returned `None`.*")
    # Softmax saturates in time, and its denormal gradients are 1.4 to 35 times as slow on a CPU.
    torch.set_flush_denormal(True)

    data, net = build.make_data(cfg), build.make_net(cfg)
    losses = build.make_losses(cfg, trained, files)
    optimizer = hydra.utils.instantiate(cfg.optimizer, _partial_=True, _convert_="all")
    options = build.trainer_options(cfg)
    logger = callbacks.EventLog(str(folder))
    callbacks.add_charts(logger, cosines=cfg.probe.cosines)
    callbacks.add_hparams(logger, cfg, trained)

    if cfg.compile:
        try:
            if why := fuse.obstacle(options):
                raise NotImplementedError(f"{why} needs the ordinary step")
            member = fuse.Member(net, data, trained, optimizer(net.parameters()), logger)
            fuse.fit([member], losses, options, [callbacks.Progress(None)], **cfg.probe)
            logger.close()
            return member.metrics
        except (NotImplementedError, TorchDynamoException) as error:
            log.warning("not compiled: %s", " ".join(str(error).split())[:200])

    module = SegmentationModule(
        net, losses, trained, optimizer, num_classes=len(schema.thresholds(cfg.theta)) + 1
    )
    probe = Probe(**cfg.probe) if cfg.probe.every_n_steps else None
    watchers = [
        ModelCheckpoint(folder / "checkpoints", filename="{step}"),
        callbacks.Images(),
        callbacks.Progress(probe),
    ]
    trainer = pl.Trainer(
        **options,
        logger=logger,
        callbacks=[probe, *watchers] if probe else watchers,
        # One epoch is the whole training; every rank draws its own share of a batch.
        max_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, data, verbose=False)
    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    logger.close()
    return metrics


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Check, train, and write down how it went; the returned accuracy is for sweepers."""
    from losswatch import build
    from losswatch.report import read_scalars
    from losswatch.result import write_result
    from losswatch.study import plot_curves

    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    trained = job.runtime.choices.loss
    files = build.loss_files(job.runtime.config_sources)
    try:
        build.check(cfg, trained, files)
    except schema.ConfigError as error:
        stop(str(error))

    groups = ("loss", "model", "optimizer")
    result = {
        "run": folder.name,
        "status": "failed",
        "error": None,
        "overrides": list(job.overrides.task),
        "choices": {group: job.runtime.choices[group] for group in groups},
        "config": OmegaConf.to_container(cfg, resolve=True),
        "steps": cfg.trainer.max_steps,
    }
    start = time.perf_counter()
    try:
        metrics = train(cfg, trained, files, folder)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.error("failed: %s (traceback in %s)", result["error"], folder / f"{job.job.name}.log")
        log.debug(traceback.format_exc())
        write_result(folder, result | {"seconds": time.perf_counter() - start})
        if job.mode.name == "RUN":
            raise SystemExit(1) from error
        return float("nan")
    seconds = time.perf_counter() - start
    write_result(folder, result | {"status": "done", "seconds": seconds, "metrics": metrics})
    plot_curves(read_scalars(folder), folder / "curves.png", title=folder.name, trained=trained)
    log.info("val accuracy %.4f in %.1f s: %s", metrics["val/accuracy"], seconds, folder)
    return metrics["val/accuracy"]


if __name__ == "__main__":
    main()
