"""The layout of TensorBoard's custom charts: all losses in one, all gradient norms in another."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars

from losswatch.events.tags import GRAD_COSINE, GRAD_NORM, LOSS


def add_charts(writer: SummaryWriter, cosines: bool) -> None:
    """Write the layout; a chart of cosines belongs to it if they are observed."""
    charts = {
        "values of all losses": ["Multiline", [f"^{LOSS}"]],
        "gradient norms of all losses": ["Multiline", [f"^{GRAD_NORM}"]],
        "validation": ["Multiline", ["^val/(accuracy|dice|iou)$"]],
    }
    if cosines:
        charts["cosines of the losses' gradients"] = ["Multiline", [f"^{GRAD_COSINE}"]]
    assert writer.file_writer is not None
    writer.file_writer.add_summary(custom_scalars({"losswatch": charts}))
