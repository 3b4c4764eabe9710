"""Curves as TensorBoard reads them, and whether two runs are equal bit for bit."""

import pandas as pd
import torch
from conftest import read_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from losswatch.disk.checkpoint_files import newest
from losswatch.disk.curves import read_curves


def read_tensorboard(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def events_of(folder):
    """The run's curves, as TensorBoard reads them."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def assert_same_training(folder, wanted, events=True):
    """Equal bit for bit: curves as the report and TensorBoard read them, weights, moments.

    `events`: whether the event files are to be equal, too.
    """
    curves, reference = read_curves(folder), read_curves(wanted)
    pd.testing.assert_frame_equal(curves[reference.columns], reference, check_exact=True)
    seen = []
    for each in (folder, wanted):
        read = events_of(each)
        tags = sorted(t for t in read.Tags()["scalars"] if not t.startswith("test/"))
        seen.append({t: [(e.step, e.value) for e in read.Scalars(t) if e.step] for t in tags})
    assert seen[0] == seen[1] or not events
    (name, state), (other_name, other_state) = newest(folder), newest(wanted)
    assert name.name == other_name.name
    for key, weight in other_state["state_dict"].items():
        assert torch.equal(state["state_dict"][key], weight), key
    moments, reference = (s["optimizer_states"][0]["state"] for s in (state, other_state))
    for i, kept in reference.items():
        assert all(torch.equal(moments[i][n], value) for n, value in kept.items())


def assert_same(folder, wanted):
    """The metrics are equal, too."""
    assert_same_training(folder, wanted)
    result, other = read_result(folder), read_result(wanted)
    assert result["status"] == other["status"] == "done"
    assert result["metrics"] == other["metrics"]
