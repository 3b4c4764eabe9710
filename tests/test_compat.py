"""Private and internal names of other packages are where losswatch.compat looks for them."""

import os

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from losswatch import compat


def test_tensorboards_event_file_can_be_written_to_and_renamed(tmp_path):
    with SummaryWriter(tmp_path, filename_suffix=".end") as writer:
        [path] = tmp_path.iterdir()
        assert compat.event_file_path(writer) == path
        file = compat.event_file(writer)
        assert os.fsdecode(file.filename) == str(path)

        writer.add_scalar("before", 1.0, 0)
        writer.flush()
        size = path.stat().st_size
        file.write(path.read_bytes())  # all records once more, between two ordinary writes
        file.flush()
        assert path.stat().st_size == 2 * size

        moved = path.rename(tmp_path / "moved")
        file.filename = os.fsencode(moved)
        writer.add_scalar("after", 2.0, 1)
    assert list(tmp_path.iterdir()) == [moved]
    events = list(EventFileLoader(str(moved)).Load())
    tags = [value.tag for event in events for value in event.summary.value]
    assert tags == ["before", "before", "after"]
