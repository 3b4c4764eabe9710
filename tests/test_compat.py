"""Each private name that losswatch.compat uses: these fail when a new version moves one."""

import subprocess
import sys

import hydra
import pytest
from conftest import ROOT
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext

from losswatch import compat
from losswatch.train import config


def test_it_imports_no_slow_library():
    """Hydra's start imports this file."""
    code = (
        "import sys, losswatch.compat; "
        "print({'torch', 'pytorch_lightning', 'hydra'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- Hydra ---------------------------------------------------------------------------------------


@pytest.fixture
def multirun(tmp_path):
    """The config of a sweep, as Hydra gives it to callbacks, sweepers and launchers."""
    config.register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        given = ["experiment=smoke", f"hydra.sweep.dir='{tmp_path}'"]
        cfg = hydra.compose("config", given, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        yield cfg


def basic_sweeper(multirun):
    """Hydra's own, as it constructs it."""
    context = HydraContext(compat.config_loader(), compat.no_callbacks())
    return Plugins.instance().instantiate_sweeper(
        hydra_context=context, task_function=lambda _: None, config=multirun
    )


def test_split_grid(multirun):
    """As the sweeper that Hydra constructs does it."""
    overrides = ["theta=0.5,[0.3,0.6]", "loss=dice", "seed=range(0,2)", "+note='a,b'"]
    runs = compat.split_grid(overrides)
    assert runs == [
        [f"theta={theta}", "loss=dice", f"seed={seed}", "+note='a,b'"]
        for theta in ("0.5", "[0.3,0.6]")
        for seed in (0, 1)
    ]
    sweeper = basic_sweeper(multirun)
    sweeper.launcher = launched = Launched()
    with compat.skip_validation(lambda: True):
        sweeper.sweep(overrides)
    assert launched.runs == runs


class Launched:
    """A launcher that notes what it is to launch."""

    def launch(self, job_overrides, initial_job_idx):
        self.runs = job_overrides
        return []


@pytest.mark.parametrize("is_checked", [True, False])
def test_skip_validation(multirun, is_checked):
    """Of the class that Hydra loads, while it is open and the runs are checked."""
    sweeper = basic_sweeper(multirun)
    wrong = [["loss=dise"]]
    with compat.skip_validation(lambda: is_checked):
        if is_checked:
            sweeper.validate_batch_is_legal(wrong)
        else:
            with pytest.raises(hydra.errors.MissingConfigException):
                sweeper.validate_batch_is_legal(wrong)
    with pytest.raises(hydra.errors.MissingConfigException):
        sweeper.validate_batch_is_legal(wrong)


def test_config_loader(multirun):
    loader = compat.config_loader()
    run = loader.load_sweep_config(multirun, ["loss=cce", "seed=3"])
    assert run.seed == 3 and run.hydra.runtime.choices.loss == "cce"
    assert list(run.hydra.overrides.task) == ["loss=cce", "seed=3"]
    assert {"cce", "dice"} <= set(loader.get_group_options("loss", config_name="config"))
    [folder] = [s.path for s in loader.get_sources() if s.scheme() == "file"]
    assert folder == str(ROOT / "conf")


def test_no_callbacks():
    callbacks = compat.no_callbacks()
    assert callbacks.callbacks == []
    callbacks.on_job_start(config=None, task_function=None)


def test_job_error(capsys):
    error = OSError(28, "No space left on device")
    job = JobReturn(status=JobStatus.FAILED)
    job.return_value = error
    assert compat.job_error(job) is error and capsys.readouterr() == ("", "")
    with pytest.raises(OSError):
        _ = job.return_value
    assert capsys.readouterr().err.startswith("Error executing job")


@pytest.mark.parametrize("override", ["loss=null", "model=3", "optimizer=null"])
def test_not_a_choice(multirun, override):
    with pytest.raises(ValueError) as raised:
        hydra.compose("config", [override])
    assert str(raised.value).startswith(compat.NOT_A_CHOICE)
