"""Nothing is done twice: what a run, a sweep and a resumed run make, compose, check and load."""

import os
from collections import Counter

import pytest
from conftest import ENVIRONMENT, PATIENCE, ROOT, SERVER, run_folders, run_train

# Notes each call of these in a line of `calls`, with the process, and then runs train.py.
COUNTING = f"""
import functools, importlib, os, runpy, sys

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
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUN = ["experiment=smoke", "trainer.max_steps=20", "trainer.val_check_interval=10"]


@pytest.fixture
def calls(tmp_path):
    """calls(*arguments) -> how often each function was called in that command."""
    (tmp_path / "counting.py").write_text(COUNTING)

    def run(*arguments):
        (tmp_path / "calls").unlink(missing_ok=True)
        process = SERVER.start("counting.py", *arguments, *RUN, cwd=tmp_path)
        process.wait(PATIENCE)
        done = process.result()
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "calls").read_text().splitlines()
        names = (line.split()[1].split(":") for line in lines)
        return Counter(name[-1] if name[-1] != "__init__" else name[-2] for name in names)

    return run


def test_a_fresh_run(calls):
    """Network, losses and optimiser for the tried step and the training; the data once.

    Hydra composes the config twice, and the files of all watched losses are in a third one.
    """
    found = calls()
    assert found["load_configuration"] == 3
    assert found["ConvNet"] == found["CrossEntropy"] == found["Adam"] == 2
    assert found["ThresholdedImages"] == 1
    assert found["read"] == found["plan"] == found["write"] == 1 and not found["load"]


@pytest.mark.parametrize(
    "launcher, images",
    [
        (["hydra/launcher=basic"], 4),
        # A process makes its own images: a plan is sent to it without them.
        (["hydra.launcher.workers=2", "hydra.launcher.max_members=1"], 4 + 4),
    ],
)
def test_a_sweep(calls, launcher, images):
    """Each run is composed once, read once and planned once; runs that begin alike try one step."""
    found = calls("-m", "loss=dice,cce", "seed=0,1", *launcher)
    assert found["load_sweep_config"] == found["read"] == found["plan"] == found["write"] == 4
    assert found["ThresholdedImages"] == images
    assert found["ConvNet"] == found["CrossEntropy"] == found["Adam"] == 4 + 2


def test_a_fused_sweep(calls):
    found = calls(
        "-m", "seed=0,1,2", "hydra/launcher=fused", "hydra.launcher.workers=1"
    )  # fmt: skip
    assert found["load_sweep_config"] == found["read"] == found["plan"] == found["write"] == 3
    assert found["ThresholdedImages"] == 3 and found["CrossEntropy"] == 2
    assert found["ConvNet"] == found["Adam"] == 3 + 1


def test_a_resumed_run(calls, tmp_path):
    """Its weights are loaded once."""
    calls("hydra.run.dir=run")
    (tmp_path / "run" / "result.json").unlink()
    assert calls("resume=run")["load"] == 1


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


@pytest.mark.filterwarnings("ignore")
def test_processes_of_a_launcher_are_told_what_was_found(tmp_path):
    """One process reads the data through and tries the steps; the others train."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("_target_: own.Data\n")
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
