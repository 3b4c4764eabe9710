"""Forked runs of train.py: the slow imports are done once, not once a run.

A fresh `python train.py` needs six seconds of CPU time to import torch, Lightning, losswatch and
what they import. The server below imports them once and forks for each run, so a run begins at
once. The child process runs train.py as `__main__`.

What a forked run cannot show: warnings while packages are imported, imports that need one another,
whatever Python or these packages read from the environment when they start, and what Python says
of objects, such as open files, that are left when it takes its modules apart. The fixtures `smoke`
and `six`, which are no forks, show all this.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class ForkServer:
    """Starts the server at the first run, and ends it with this process.

    Args:
        env: environment of the server, and so of its runs.
    """

    def __init__(self, env: Mapping[str, str]):
        self.env = env
        self.process: subprocess.Popen | None = None

    def start(
        self,
        *args: str,
        cwd: Path,
        env: Mapping[str, str | None] | None = None,
        streams: Sequence[str] = (os.devnull, "stdout", "stderr"),
    ) -> Fork:
        """Start a program in `cwd`; it leads a session of its own. One runs at a time.

        Args:
            args: the Python file, and its arguments. Where they name MONAI or a folder of images,
                the server imports MONAI first, and keeps it.
            env: variables to set once the child process has begun; None: to remove.
            streams: paths of stdin, stdout and stderr, within a new folder unless they are
                absolute.
        """
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__], env=self.env, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            atexit.register(self.process.communicate)  # closes its stdin, which ends it
        return Fork(self.process, args, cwd, dict(env or {}), streams)


class Fork:
    """A program that the server runs, like a `subprocess.Popen`."""

    def __init__(
        self,
        server: subprocess.Popen,
        args: tuple[str, ...],
        cwd: Path,
        env: dict[str, str | None],
        streams: Sequence[str],
    ):
        self.server, self.args = server, args
        self.output = tempfile.mkdtemp()
        self.returncode: int | None = None
        streams = [os.path.join(self.output, path) for path in streams]
        request = {"args": args, "cwd": str(cwd.absolute()), "env": env, "streams": streams}
        server.stdin.write(json.dumps(request) + "\n")
        self.pid = int(server.stdout.readline())

    def wait(self, timeout: float) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            # The server writes a line at a time, so none waits in a buffer.
            if not select.select([self.server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(list(self.args), timeout)
            self.returncode = int(self.server.stdout.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self, group: bool = True) -> None:
        """Kill it, and all that it has started or not, and wait for its end."""
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended
                (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
            self.wait(timeout=60)

    def result(self) -> subprocess.CompletedProcess:
        """The exit status and the output of a program that has ended; to be asked for once.

        Of streams that went elsewhere the output is None.
        """
        files = (Path(self.output, name) for name in ("stdout", "stderr"))
        stdout, stderr = (f.read_text(encoding="utf-8") if f.exists() else None for f in files)
        shutil.rmtree(self.output)
        return subprocess.CompletedProcess(list(self.args), self.returncode, stdout, stderr)


def serve() -> dict:
    """Answer each request with a process id and an exit status; in the child, return it."""
    for line in sys.stdin:
        request = json.loads(line)
        if any("monai" in arg or arg == "data=folder" for arg in request["args"]):
            importlib.import_module("monai")
            gc.freeze()
        if not (pid := os.fork()):
            os.setsid()
            print(os.getpid(), flush=True)
            return request
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


def become(request: dict) -> None:
    """Give this process the arguments, the folder, the environment and the streams of a request."""
    os.chdir(request["cwd"])
    for name, value in request["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    for descriptor, path in enumerate(request["streams"]):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = request["args"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))


if __name__ == "__main__":
    import runpy

    # What train.py imports, most of it through these.
    import hydra.main  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import pydantic.type_adapter  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import rich.console  # noqa: F401
    import tensorboard.plugins.hparams.metadata  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchmetrics.segmentation  # noqa: F401
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.plugins import Plugins
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from omegaconf import OmegaConf
    from PIL import Image

    import losswatch.report.figures
    import losswatch.report.words
    import losswatch.run.planner
    import losswatch.sweep.callback
    import losswatch.sweep.launch
    import losswatch.task  # noqa: F401

    # Hydra imports all plugins when it starts, the first picture needs fonts, and the first
    # override of a kind its parser's tables.
    Plugins.instance()
    Image.preinit()
    FigureCanvasAgg(figure := Figure())
    figure.text(0, 0, "$1$")
    figure.canvas.draw()
    given = ["a=1", "a.b=c,d", "+a.b='c d'", "a=[b,0.5]", "hydra/a=b", "hydra.run.dir=/a/b-c"]
    OverridesParser.create().parse_overrides(given)
    OmegaConf.to_container(
        OmegaConf.create({"a": "${b}/${.b}", "b": "${oc.env:HOME}"}), resolve=True
    )
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page of this process
    become(serve())
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stopped:
        if not isinstance(stopped.code, int | None):
            raise
        status = stopped.code or 0
    # The end of an interpreter, but for taking all modules apart, which needs 0.3 seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)
