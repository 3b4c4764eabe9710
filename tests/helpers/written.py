"""Runs that are written, not trained: for the tests of the tab and of report.html."""

import json
import time

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from losswatch.disk.curves import Curves


def write_record(folder, curves, dice=()):
    """A run's own record. `curves`: values by tag, at steps 0, 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.array(list(curves.values()), np.float64).T
    record = Curves(folder)
    record.append(list(curves), np.arange(len(values)), values)
    for step, value in dice:
        record.add_metrics(step, {"val/dice": value})


def write_events(folder, curves):
    """An event file, by TensorBoard's own writer."""
    writer = EventFileWriter(str(folder))
    for tag, values in curves.items():
        for step, value in enumerate(values):
            event = Event(step=step, wall_time=time.time())
            event.summary.value.add(tag=tag, simple_value=value)
            writer.add_event(event)
    writer.close()


def write_result(folder, loss, theta=0.5, seed=0, status="done", findings=()):
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "status": status,
        "seconds": 1.0,
        "overrides": [f"loss={loss}", f"theta={theta}", f"seed={seed}"],
        "choices": {"loss": loss, "model": "unet", "optimizer": "adam"},
        "config": {"theta": theta, "seed": seed},
        "metrics": {"val/dice": 0.5, "val/iou": 0.4, "val/accuracy": 0.6},
        "findings": list(findings),
    }
    (folder / "result.json").write_text(json.dumps(parts))


def write_run(folder, curves, loss, **result):
    """A run of losswatch: record, event file and result."""
    write_record(folder, curves)
    write_events(folder, curves)
    write_result(folder, loss, **result)
    return folder


FINDING = {"name": "collapsed", "step": 3, "text": "All is one class.", "remedy": "Weights."}
