"""Private and internal names of other packages, each with what it is used for.

tests/test_compat.py fails when a new version of a package moves one of them.

The module itself imports none of these packages: reading event files and drawing reports must not
wait for torch to be imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


# --- TensorBoard ---------------------------------------------------------------------------------


def event_file(writer: SummaryWriter) -> Any:
    """TensorBoard's file object behind a `SummaryWriter`: `write(bytes)`, `flush()`, `filename`.

    Used for writing a whole block of encoded events at once, and for setting `filename` (bytes)
    after the file was renamed. TensorBoard opens the file anew by this name for each write. Its
    public interface takes one event at a time and cannot rename the file.
    """
    assert writer.file_writer is not None
    return writer.file_writer.event_writer._async_writer._writer._writer


def event_file_path(writer: SummaryWriter) -> Path:
    """The path at which a `SummaryWriter` began its event file; it chooses the file's name itself.

    Used for finding the file in order to rename it.
    """
    assert writer.file_writer is not None
    return Path(writer.file_writer.event_writer._file_name)
