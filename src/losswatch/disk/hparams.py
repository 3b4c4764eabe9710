"""A run's row of TensorBoard's HParams tab: what was swept, and the last value of each metric."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from losswatch.text import parse_overrides

METRICS = [f"{stage}/{name}" for stage in ("val", "test") for name in ("accuracy", "dice", "iou")]
# The overrides behind the columns that every run has.
BEHIND = {
    "loss": ["loss"],
    "theta": ["theta"],
    "model": ["model", "model.batch_norm"],
    "optimizer": ["optimizer"],
    "lr": ["optimizer.lr"],
    "seed": ["seed"],
}


def add_hparams(writer: SummaryWriter, cfg: DictConfig, loss: str, folder: Path) -> None:
    """Write the row of the run in `folder`.

    The tab shows five settings without a click, and first those that are marked as different. These
    are what was swept. The config in `result.json` has all settings.
    """
    model = cfg.model._target_.split(".")[-1]
    row = {
        "loss": loss,
        "theta": float(cfg.theta) if isinstance(cfg.theta, float) else str(cfg.theta),
        "model": f"{model} BN" if cfg.model.get("batch_norm") else model,
        "optimizer": cfg.optimizer._target_.split(".")[-1],
        "lr": float(cfg.optimizer.lr),
        "seed": cfg.seed,
    }
    changed = swept(folder)
    differ = {name for name, keys in BEHIND.items() if any(key in changed for key in keys)}
    for key in changed.keys() - {key for keys in BEHIND.values() for key in keys}:
        value = OmegaConf.select(cfg, key)
        row[key] = value if type(value) in (int, float) else changed[key]
        differ.add(key)
    infos, *others = hparams(row, dict.fromkeys(METRICS, 0.0))
    plugin_data = infos.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in differ
    plugin_data.content = content.SerializeToString()
    assert writer.file_writer is not None
    for summary in (infos, *others):
        writer.file_writer.add_summary(summary)


def swept(folder: Path) -> dict[str, str]:
    """The overrides of a run that are not those of all runs of its sweep; of a single run, all.

    They are read from the files that Hydra has written when the run starts.
    """
    try:
        own = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except OSError:  # `hydra.output_subdir=null`
        return {}
    files = (parent / "multirun.yaml" for parent in folder.absolute().parents)
    sweep = next(filter(Path.exists, files), None)
    common = _overrides_of_all(sweep, sweep.stat().st_mtime) if sweep else frozenset()
    changed = parse_overrides(override for override in own if override not in common)
    return {key: value for key, value in changed.items() if key != "resume"}


@functools.lru_cache(maxsize=1)  # reading it takes longer than all else that is done for a row
def _overrides_of_all(sweep: Path, changed: float) -> frozenset[str]:
    """The command's overrides, from a sweep's `multirun.yaml` as of the time of its last change."""
    return frozenset(OmegaConf.select(OmegaConf.load(sweep), "hydra.overrides.task") or ())
