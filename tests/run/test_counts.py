"""Nothing is done twice: what a run, a sweep and a resumed run make, compose, check and load."""

import os
import pickle
from collections import Counter
from functools import partial

import pytest
from conftest import ENVIRONMENT, run_folders, run_script, run_train

from losswatch.command import Command, Facts
from losswatch.config.settings import Job
from losswatch.task import train

# Notes each call of these in a line of `calls`, with the process.
COUNTING = """
import functools, importlib, os

def count(place):
    module, owner, name = place.split(":")
    owner = getattr(importlib.import_module(module), owner)
    original = getattr(owner, name)

    @functools.wraps(original)
    def counted(*args, **options):
        with open("calls", "a") as file:
            print(os.getpid(), place, file=file)
        return original(*args, **options)

    is_bound = isinstance(owner.__dict__.get(name), classmethod)
    setattr(owner, name, staticmethod(counted) if is_bound else counted)

for place in (
    "losswatch.nets:ConvNet:__init__",
    "losswatch.losses:CrossEntropy:__init__",  # one in each set of losses
    "torch.optim:Adam:__init__",
    "losswatch.data.random:ThresholdedImages:__init__",
    "losswatch.config.settings:Settings:read",
    "losswatch.run.planner:Planner:plan",
    "losswatch.disk.result:Result:write",
    "hydra._internal.config_loader_impl:ConfigLoaderImpl:load_sweep_config",
    "hydra._internal.config_loader_impl:ConfigLoaderImpl:load_configuration",
):
    count(place)
import torch
load = torch.load
def counted(*args, **options):
    with open("calls", "a") as file:
        print(os.getpid(), "torch:load", file=file)
    return load(*args, **options)
torch.load = counted
"""
RUN = ["experiment=smoke", "trainer.max_steps=2", "trainer.val_check_interval=1"]
UNOBSERVED = "probe.every_n_steps=0"  # so no curves are drawn, which takes a fifth of a run


@pytest.fixture
def calls(tmp_path):
    """calls(*arguments) -> how often each function was called in that command."""

    def run(*arguments):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = run_script(COUNTING, *arguments, *RUN, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "calls").read_text().splitlines()
        names = (line.split()[1].split(":") for line in lines)
        return Counter(name[-1] if name[-1] != "__init__" else name[-2] for name in names)

    return run


def test_a_fresh_run_and_a_resumed_one(calls, tmp_path):
    """Network, losses and optimiser for the tried step and the training; the data once.

    Hydra composes the config twice, and the files of all watched losses are in a third one. The
    weights of a resumed run are loaded once.
    """
    found = calls("hydra.run.dir=run")
    assert found["load_configuration"] == 3
    assert found["ConvNet"] == found["CrossEntropy"] == found["Adam"] == 2
    assert found["ThresholdedImages"] == 1
    assert found["read"] == found["plan"] == found["write"] == 1 and not found["load"]
    (tmp_path / "run" / "result.json").unlink()
    assert calls("resume=run")["load"] == 1


def test_a_sweep(calls):
    """Each run is composed once, read once and planned once. These runs begin differently."""
    found = calls("-m", "loss=dice,cce", "hydra/launcher=basic", UNOBSERVED)
    assert found["load_sweep_config"] == found["read"] == found["plan"] == found["write"] == 2
    assert found["ThresholdedImages"] == 2
    assert found["ConvNet"] == found["CrossEntropy"] == found["Adam"] == 2 + 2


def test_a_sweep_of_several_processes(calls):
    """A process makes its own images: a plan is sent to it without them.

    Runs that begin alike try one step.
    """
    launcher = ["hydra.launcher.workers=2", "hydra.launcher.max_members=1"]
    found = calls("-m", "seed=0,1", *launcher, UNOBSERVED)
    assert found["load_sweep_config"] == found["read"] == found["plan"] == found["write"] == 2
    assert found["ThresholdedImages"] == 2 + 2
    assert found["ConvNet"] == found["CrossEntropy"] == found["Adam"] == 2 + 1


def test_a_fused_sweep(calls):
    found = calls("-m", "seed=0,1", "hydra/launcher=fused", "hydra.launcher.workers=1")
    assert found["load_sweep_config"] == found["read"] == found["plan"] == found["write"] == 2
    assert found["ThresholdedImages"] == 2 and found["CrossEntropy"] == 2
    assert found["ConvNet"] == found["Adam"] == 2 + 1


OWN = """
import os
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from losswatch.nets import ConvNet

def note(what):
    with open(os.environ["CALLS"], "a") as file:
        print(os.getpid(), what, file=file)

class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        note("data")

    def train_dataloader(self):
        note("loader")
        images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(list(zip(images, (images[:, 0] > 0.5).long())), batch_size=4)

    val_dataloader = train_dataloader

class Net(ConvNet):
    def __init__(self, **options):
        super().__init__(**options)
        note("net")
"""


def write_own(folder):
    """A network and data of the user's, which note in a file that they are made."""
    (folder / "own.py").write_text(OWN)
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "mine.yaml").write_text("_target_: own.Data\n")


def test_a_process_is_told_what_was_found(tmp_path, compose, monkeypatch):
    """One process reads the data through and tries the steps; another one gets its command."""
    write_own(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr("losswatch.command.silence_logging", lambda: None)

    def plan(command, seed):
        cfg = compose(
            f"hydra.searchpath=['{tmp_path}/conf']", *RUN[1:], "model=convnet",
            "model._target_=own.Net", "data=mine", f"seed={seed}",
        ).cfg  # fmt: skip
        job = Job.read(cfg.hydra, tmp_path / f"{seed}")
        read = partial(command.read, cfg, job)
        return command.planner(job).plan(read(), read)

    def counted():
        return Counter(line.split()[1] for line in (tmp_path / "calls").read_text().splitlines())

    first = Command(Facts())
    for seed in (0, 1):
        plan(first, seed)
    first.begin_sweep(tmp_path, {})
    before = counted()
    assert before["net"] == 1  # the tried step serves both seeds
    other = pickle.loads(pickle.dumps(first))
    assert other is not first
    for seed in (0, 1):
        planned = plan(other, seed)
        assert counted() == before + Counter(net=seed, data=seed, loader=2 * seed)
        planned.folder.mkdir()
        train(planned)
    # Each run makes its network and its data, and one loader each to train and to validate.
    assert counted() == before + Counter(net=2, data=2, loader=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_of_a_launcher_are_told_what_was_found(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    write_own(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run_train(
        "-m", "--config-dir", "conf", *RUN[1:], "model=convnet", "model._target_=own.Net",
        "data=mine", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": path, "CALLS": str(tmp_path / "calls")},
    )  # fmt: skip
    assert len(run_folders(tmp_path)) == 2
    lines = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    first = lines[0][0]
    launching = Counter(what for process, what in lines if process == first)
    workers = Counter(what for process, what in lines if process != first)
    assert launching["net"] == 1  # the tried step serves both seeds
    # Each run makes its network and its data, and one loader each to train and to validate.
    assert (workers["net"], workers["data"], workers["loader"]) == (2, 2, 4)
