"""TensorBoard on a folder, and what its tab Losses answers: for tests of the tab's server."""

import base64
import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from losswatch.board.plugin import LossesPlugin

SAMPLES = 50


class Board:
    """TensorBoard on a folder, without its server."""

    def __init__(self, logdir):
        self.logdir = logdir
        self.multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": SAMPLES})
        data = MultiplexerDataProvider(self.multiplexer, str(logdir))
        context = TBContext(
            data_provider=data, logdir=str(logdir), sampling_hints={"scalars": SAMPLES}
        )
        self.plugin = LossesPlugin(context)
        self.reload()

    def reload(self):
        self.multiplexer.AddRunsFromDirectory(str(self.logdir))
        self.multiplexer.Reload()

    def get(self, route, status=200, **query):
        client = Client(self.plugin.get_plugin_apps()[f"/{route}"])
        answer = client.get(f"/{route}", query_string=query)
        assert answer.status_code == status, answer.text
        content = json.loads(answer.text, parse_constant=pytest.fail)
        assert ("error" in content) == (status != 200)
        return content

    def titles(self, **query):
        figure = self.get("figure", **query)["figure"]
        notes = figure["layout"]["annotations"] if figure else []
        return [note["text"] for note in notes if "domain" in note["xref"]]

    def marks(self, column="x", **query):
        """The findings that are marked in a column: (name, step, text)."""
        layout = self.get("figure", **query)["figure"]["layout"]
        found = [note for note in layout["annotations"] if note["xref"] == column]
        lines = [shape["x0"] for shape in layout["shapes"] if shape["xref"] == column]
        assert lines == [note["x"] for note in found]
        return [(note["text"], note["x"], note["hovertext"].replace("<br>", " ")) for note in found]


def curves_of(figure, column="x", row="y"):
    """The curves of a column and a row, by name."""
    return {
        trace["name"]: [numbers(trace["x"]), numbers(trace["y"])]
        for trace in figure["data"]
        if (trace["xaxis"], trace["yaxis"]) == (column, row) and trace.get("hoverinfo") != "skip"
    }


def numbers(packed):
    return np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"]).tolist()
