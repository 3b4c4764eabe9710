"""A run's row of TensorBoard's HParams tab: what was swept, and the last value of each metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from losswatch.config.settings import flat

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


def add_hparams(
    writer: SummaryWriter, config: Mapping[str, Any], loss: str, swept: Mapping[str, str]
) -> None:
    """Write a run's row.

    The tab shows five settings without a click, and first those that are marked as different. These
    are what was swept. The config in `result.json` has all settings.

    Args:
        writer: of the run's event file.
        config: of the run, as plain data.
        loss: the name of the trained loss.
        swept: the overrides in which the runs of the sweep differ, by key; of a single run, all.
    """
    theta, model, optimizer = config["theta"], config["model"], config["optimizer"]
    kind = model["_target_"].split(".")[-1]
    row = {
        "loss": loss,
        "theta": theta if isinstance(theta, float) else str(theta),
        "model": f"{kind} BN" if model.get("batch_norm") else kind,
        "optimizer": optimizer["_target_"].split(".")[-1],
        "lr": float(optimizer["lr"]),
        "seed": config["seed"],
    }
    differ = {name for name, keys in BEHIND.items() if any(key in swept for key in keys)}
    values = dict(flat(config))
    for key in swept.keys() - {key for keys in BEHIND.values() for key in keys}:
        value = values.get(key)
        row[key] = value if type(value) in (int, float) else swept[key]
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
