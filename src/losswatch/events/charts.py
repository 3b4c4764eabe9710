"""The layout of TensorBoard's custom charts: all losses in one, all gradient norms in another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from losswatch.events.tags import GRAD_COSINE, GRAD_NORM, LOSS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def add_charts(writer: SummaryWriter, *, cosines: bool, validation: bool = False) -> None:
    """Write the layout, with a chart of cosines and one of losswatch's own metrics where asked."""
    # Imported late: `from losswatch import Watch` needs nothing but PyTorch.
    from torch.utils.tensorboard.summary import custom_scalars

    charts = {
        "values of all losses": ["Multiline", [f"^{LOSS}"]],
        "gradient norms of all losses": ["Multiline", [f"^{GRAD_NORM}"]],
    }
    if validation:
        charts["validation"] = ["Multiline", ["^val/(dice|iou|accuracy)$"]]
    if cosines:
        charts["cosines of the losses' gradients"] = ["Multiline", [f"^{GRAD_COSINE}"]]
    assert writer.file_writer is not None
    writer.file_writer.add_summary(custom_scalars({"losswatch": charts}))
