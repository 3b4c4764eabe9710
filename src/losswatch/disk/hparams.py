"""A run's row of TensorBoard's HParams tab: what was swept, and the last value of each metric."""

from __future__ import annotations

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from losswatch.config.settings import Settings, flatten_keys

TAGS = [f"{stage}/{name}" for stage in ("val", "test") for name in ("dice", "iou", "accuracy")]
# The keys that each column of every run depends on.
BEHIND = {
    "loss": ["loss"],
    "theta": ["theta"],
    "model": ["model", "model.batch_norm"],
    "optimizer": ["optimizer"],
    "lr": ["optimizer.lr"],
    "seed": ["seed"],
}


def add_hparams(writer: SummaryWriter, settings: Settings) -> None:
    """Write the row of a run.

    The tab shows five settings without a click, those marked as different first. Here the settings
    that were swept are marked. The config in `result.json` has all settings.
    """
    model, theta = settings.model["_target_"].split(".")[-1], settings.theta
    row = {
        "loss": settings.trained,
        "theta": float(theta) if isinstance(theta, float) else str(theta),
        "model": f"{model} BN" if settings.model.get("batch_norm") else model,
        "optimizer": settings.optimizer["_target_"].split(".")[-1],
        "lr": float(settings.optimizer["lr"]),
        "seed": settings.seed,
    }
    changed, values = settings.job.swept, dict(flatten_keys(settings.as_config()))
    differ = {name for name, keys in BEHIND.items() if any(key in changed for key in keys)}
    for key in changed.keys() - {key for keys in BEHIND.values() for key in keys}:
        value = values.get(key)
        row[key] = value if type(value) in (int, float) else changed[key]
        differ.add(key)
    infos, *others = hparams(row, dict.fromkeys(TAGS, 0.0))
    plugin_data = infos.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in differ
    plugin_data.content = content.SerializeToString()
    assert writer.file_writer is not None
    for summary in (infos, *others):
        writer.file_writer.add_summary(summary)
