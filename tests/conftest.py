"""Shared by test files: composed configs, small runs in this process, train.py in a new one.

Everything writes to temporary folders.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import gc
import json
import locale
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

# One thread a process, before torch is imported: pytest-xdist starts as many as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Compile in the process itself: processes that only compile would import torch once more each.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import hydra
import pytest
import pytorch_lightning as pl
import torch
from forks import ForkServer
from lightning_fabric.utilities import registry
from omegaconf import DictConfig, OmegaConf

from losswatch.command import Command, Facts
from losswatch.config import schema
from losswatch.config.quoting import quoted
from losswatch.config.settings import Job, Settings
from losswatch.config.sources import Sources
from losswatch.data.form import Form
from losswatch.data.random import ThresholdedImages
from losswatch.disk.checkpoint_files import settings_to_keep
from losswatch.disk.event_log import EventLog
from losswatch.losses import LossSet
from losswatch.nets import ConvNet, UNet
from losswatch.presets import load_loss
from losswatch.run import build
from losswatch.run.module import SegmentationModule
from losswatch.run.plan import Plan
from losswatch.run.planner import Planner
from losswatch.sweep.exit import verdict
from losswatch.watch import record
from losswatch.watch.lightning import Watch

# Lightning looks through all installed packages for each Trainer, which takes most of its time.
registry.entry_points = functools.cache(registry.entry_points)

# A shell switches Ctrl-C off for what it starts with `&`, and child processes inherit that. Tests
# send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Seconds after which a test takes a process to hang. How long it needs depends on what else the
# machine does.
PATIENCE = 600

ROOT = Path(__file__).parents[1]


def slow(*values):
    """A case of a parametrised test that repeats a behaviour: it runs with `-m slow` alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


ARTICLE = ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square")


# --- Devices -------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The CPU and the GPU: also a value of `trainer.accelerator`."""
    if request.param == "cuda":  # as exact as the CPU, and the same twice
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return request.param


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")


@pytest.fixture(autouse=True)
def locale_of_python():
    """SimpleITK sets the locale "C" when a test writes DICOM; text would then be ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    yield
    locale.setlocale(locale.LC_CTYPE, before)


def pytest_collection_finish():
    """A garbage collection would look at every object of every import, hundreds of times."""
    gc.collect()
    gc.freeze()


# --- Configs -------------------------------------------------------------------------------------


@dataclass
class Composed:
    """A composed config, and what train.py makes of it."""

    cfg: DictConfig  # with the section `hydra`
    planner: Planner
    folder: Path  # of the run, where a test names none

    def settings(self, folder=None, is_sweep=False, recall=settings_to_keep, steps=None):
        job = Job.read(self.cfg.hydra, folder or self.folder)
        job = dataclasses.replace(job, is_sweep=is_sweep)
        return Settings.read(self.cfg, job, self.planner.sources, recall, steps)

    def plan(self, folder=None, is_sweep=False) -> Plan:
        read = functools.partial(self.settings, folder, is_sweep)
        return self.planner.plan(read(), read)


@functools.cache
def sources() -> Sources:
    """The files of conf, each composed once in all tests."""
    return Sources()


KEPT = (str(ROOT / "conf") + os.sep, os.path.dirname(hydra.__file__) + os.sep)
load_yaml = OmegaConf.load


@functools.cache
def pickled_yaml(path: str) -> bytes:
    return pickle.dumps(load_yaml(path))


def load_once(file):
    """Hydra reads 14 files for each config. A process reads those of Hydra and of conf once."""
    path = str(getattr(file, "name", file))
    return pickle.loads(pickled_yaml(path)) if path.startswith(KEPT) else load_yaml(file)


@functools.cache
def pickled_config(overrides: tuple[str, ...], cwd: str) -> bytes:
    """Hydra composes a config in a tenth of a second, and many tests ask for the same one."""
    cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    OmegaConf.set_readonly(cfg.hydra, None)
    return pickle.dumps(cfg)


@pytest.fixture
def compose(tmp_path, monkeypatch):
    """compose("loss=dice", ...) -> Composed, without a process of its own."""
    schema.register()
    monkeypatch.setattr(OmegaConf, "load", load_once)

    def make(*overrides: str) -> Composed:
        cfg = pickle.loads(pickled_config(overrides, os.getcwd()))
        return Composed(cfg, Planner(sources()), tmp_path / "composed")

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        yield make


@pytest.fixture
def refusal(compose):
    """refusal("loss=dise") -> the line with which the command refuses these settings."""

    def refuse(*overrides: str) -> str:
        given = {quoted(override): override for override in overrides}
        with pytest.raises(Exception) as raised:  # noqa: B017 - `verdict` knows which are meant
            compose(*given).plan()
        known = verdict(raised.value, Command(Facts()), given)
        assert known, f"a bug: {raised.value!r}"
        line, status = known
        assert status == 2 and "\n" not in line and "http" not in line
        return line

    return refuse


def make_losses(nodes: dict[str, dict], form: Form) -> LossSet:
    """The losses that these nodes describe, for data of a form, as train.py makes them."""
    settings = SimpleNamespace(losses=nodes)
    plan = SimpleNamespace(settings=settings, form=form, filled=lambda node: node)
    return build.make_losses(plan)


# --- Runs in this process ------------------------------------------------------------------------


def load_losses(*names, **own):
    """Losses of conf/loss by name, and further ones by keyword, as a LossSet."""
    return LossSet({name: load_loss(name) for name in names} | own)


@pytest.fixture
def make_run(tmp_path):
    """A small run, built as train.py builds one but from plain arguments.

    make_run(...) -> namespace of module, data, trainer, folder and fit(); the probe is off unless
    given. Keywords of Trainer go through.
    """

    def make(
        net="convnet", batch_norm=False, classes=2, losses=None, trained="dice", probe=None,
        callbacks=(), steps=4, seed=0, optimizer=None, data=None, folder="run", validate=True,
        **trainer,
    ):  # fmt: skip
        torch.manual_seed(seed)
        kind = {"convnet": ConvNet, "unet": lambda *a, **k: UNet(*a, widths=(2, 3, 4), **k)}[net]
        module = SegmentationModule(
            net=kind(1, classes, batch_norm=batch_norm),
            losses=losses or load_losses(*ARTICLE),
            trained=trained,
            optimizer=optimizer or (lambda p: torch.optim.Adam(p, lr=1e-2)),
        )
        thresholds = [(i + 1) / classes for i in range(classes - 1)]
        images = ThresholdedImages(
            thresholds,
            seed=seed,
            **{"image_size": 8, "batch_size": 3, "val_size": 3, "test_size": 3} | (data or {}),
        )
        options = {"max_steps": steps, "max_epochs": 1, "accelerator": "cpu"} | trainer
        options["log_every_n_steps"] = 1  # Lightning warns if it is longer than the run
        fitter = pl.Trainer(
            logger=EventLog(str(tmp_path / folder)),
            callbacks=[*([probe(module.losses)] if probe else []), *callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if validate else 0,
            use_distributed_sampler=False,
            **options,
        )

        def fit(**options):
            fitter.fit(module, images, **options)
            fitter.logger.close()
            return module

        return SimpleNamespace(
            module=module, data=images, trainer=fitter, folder=tmp_path / folder, fit=fit
        )

    return make


@pytest.fixture
def observed(monkeypatch):
    """All observations, unrounded: a list of vectors in the order of `watched_tags`."""
    seen = []
    as_row = record.as_row

    def remember(*args):
        seen.append(as_row(*args))
        return seen[-1]

    monkeypatch.setattr(record, "as_row", remember)
    return seen


def probe(every_n_steps=1, cosines=False):
    """Of `make_run`: how the run is watched, as train.py watches it."""
    options = {"every_n_steps": every_n_steps, "cosines": cosines, "strict": True}
    return lambda losses: Watch(losses, "loss", **options)


# --- train.py in a process of its own ------------------------------------------------------------

ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "default"}


SERVER = ForkServer(ENVIRONMENT)
READ_AT_START = re.compile("PYTHON(?!PATH$)|OMP_|MKL_|TORCH").match


def run_train(*args: str, cwd: Path, **options):
    """`python train.py ...` as a user would, its outputs in `cwd`; see `run_python`."""
    return run_python(str(ROOT / "train.py"), *args, cwd=cwd, **options)


def run_python(*command: str, cwd: Path, status: int | None = 0, fresh: bool = False, **options):
    """`python FILE ...` as a user would; checks the exit status.

    In a forked process (forks.py); in a fresh one where that is asked for, where options are
    given, or variables that are read when Python starts or imports packages.
    """
    env = options.pop("env", ENVIRONMENT)
    changed = {k: env.get(k) for k in {**env, **ENVIRONMENT} if env.get(k) != ENVIRONMENT.get(k)}
    if not (fresh or options or any(map(READ_AT_START, changed))):
        fork = SERVER.start(*command, cwd=cwd, env=changed)
        try:
            fork.wait(PATIENCE)
        finally:
            fork.kill()
            done = fork.result()
    else:
        options = {"stdin": subprocess.DEVNULL} | options
        done = subprocess.run(
            [sys.executable, *command],
            cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE, **options,
        )  # fmt: skip
    if status is not None and done.returncode != status:
        pytest.fail(f"exit status {done.returncode}, not {status}\n{done.stdout}\n{done.stderr}")
    return done


def run_script(lines: str, *args: str, cwd: Path):
    """train.py after some lines of Python, whatever its exit status; see `run_python`."""
    program = f"import runpy, sys\nsys.argv[0] = {str(ROOT / 'train.py')!r}\n"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    (cwd / "script.py").write_text(lines + program)
    return run_python("script.py", *args, cwd=cwd, status=None)


def signal_at(number: int, batch: int) -> str:
    """Lines for `run_script`: the process sends itself a signal after so many batches."""
    return (
        "import os\n"
        "from losswatch.run.callbacks import Images\n"
        "def on_train_batch_end(self, trainer, module, outputs, batch, index):\n"
        f"    if index + 1 == {batch}:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "Images.on_train_batch_end = on_train_batch_end\n"
    )


def run_folders(cwd: Path) -> dict[str, Path]:
    """The runs below `cwd`/outputs by name."""
    return {
        file.parents[1].name: file.parents[1] for file in cwd.glob("outputs/*/*/.hydra/config.yaml")
    }


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def made_once(tmp_path_factory, make):
    """What make(folder) returns, made by the first process of a test run that asks for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, kept = root / make.__name__, root / f"{make.__name__}.pickle"
    with (root / f"{make.__name__}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            folder.mkdir()
            kept.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(kept.read_bytes())


def smoke_run(cwd):
    done = run_train("experiment=smoke", "seed=3", "probe.cosines=true", cwd=cwd, fresh=True)
    [folder] = run_folders(cwd).values()
    return SimpleNamespace(cwd=cwd, folder=folder, done=done, result=read_result(folder))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One real run that tests may only read: its folder, output and result."""
    return made_once(tmp_path_factory, smoke_run)


def six_runs(cwd):
    command = ["-m", "experiment=smoke", "loss=dice,cce", "theta=0.05,0.5,0.95"]
    done = run_train(*command, "hydra/launcher=basic", cwd=cwd, fresh=True)
    [folder] = (cwd / "outputs").iterdir()
    return SimpleNamespace(folder=folder, done=done, runs=run_folders(cwd))


@pytest.fixture(scope="session")
def six(tmp_path_factory):
    """One real sweep of six runs by the basic launcher, which tests may only read."""
    return made_once(tmp_path_factory, six_runs)
