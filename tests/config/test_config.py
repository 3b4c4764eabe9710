"""The schema, its ranges, and the names of run folders."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from losswatch.config import names
from losswatch.config.errors import ConfigError
from losswatch.config.names import constant_keys, run_name
from losswatch.config.ranges import thresholds

# --- What passes; what is refused is in test_refused.py -----------------------------------------

GOOD = [
    "",
    "theta=1e-12",
    "theta=0.9999998",
    "theta=[0.3,0.6]",
    "theta=[0.5]",
    "model=convnet data.image_size=1",
    "model.widths=[4] data.image_size=33",
    "data.dims=3 data.image_size=8",
    "data.low=1 data.high=0",
    "optimizer=sgd optimizer.momentum=0.9 optimizer.nesterov=true",
    "optimizer=adamw",
    "optimizer.lr=1",
    "watch=[dice]",
    "loss=dice_monai watch=[cce]",
    "probe.every_n_steps=0",
    "experiment=smoke",
    "seed=9223372036854775807",
]


@pytest.mark.parametrize("overrides", GOOD)
def test_good_input_passes(compose, overrides):
    compose(*overrides.split()).plan()


def test_a_schedule_is_as_long_as_the_epochs(compose):
    plan = compose("data.batches=3", "trainer.max_epochs=4", "scheduler=cosine").plan()
    assert (plan.steps, plan.settings.scheduler["T_max"]) == (12, 12)


def test_every_loss_of_conf_passes_with_two_classes(compose):
    names = compose().planner.sources.losses
    assert {"cce", "dice", "dice_fg", "dice_square", "dice_fg_square"} <= set(names)
    compose(f"watch=[{','.join(names)}]").plan()


def apart(values):
    return sorted({round(v * 2**22): v for v in values}.values())


@given(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=6).map(apart))
def test_thresholds(values):
    assert thresholds(values) == values
    assert thresholds(values[0]) == [values[0]]
    if len(values) > 1:
        with pytest.raises(ConfigError, match="increasing"):
            thresholds(values[::-1])


# --- Names of run folders ------------------------------------------------------------------------

keys = st.from_regex(r"[+~]{0,2}[a-z_]+([./][a-z_]+)*", fullmatch=True)
values = st.one_of(
    st.floats().map(str),
    st.text(max_size=30),
    st.text(max_size=400),
    st.lists(st.floats(0, 1), max_size=4).map(lambda v: "[" + ",".join(map(str, v)) + "]"),
    st.text().map(lambda text: f"'{text}'"),
)
override_sets = st.lists(st.builds("{}={}".format, keys, values), max_size=6, unique=True)


@settings(max_examples=40, deadline=None)
@given(override_sets, override_sets)
@example(["a=1", "b=2"], ["a=1,b=2"])
@example(["a=1", "a=2"], ["a=1,a=2"])
@example(["data.num_workers=0"], ["data.num_workers=2"])
@example(["trainer.accelerator=cpu"], [])
@example(["hydration=1"], ["hydration=2"])
@example(["note=a b"], ["note=a_b"])
@example(["note=a/b"], ["note=a:b"])
@example(["x=" + "1" * 400], ["x=" + "1" * 401])
@example(["x=[1,2]"], ["x=[1", "2]"])
@example(["x='[1'", "y=2]"], ["x='[1',y=2]"])
def test_run_names_are_unique_and_safe(one, other):
    a, b = run_name(one), run_name(other)
    assert (a == b) == (sorted(one) == sorted(other))
    for name in (a, b):
        assert 0 < len(name.encode()) <= 255 - len("events.out.tfevents")
        assert not set(name) & set("/\\\0\n:*?\"<>|'") and name.isprintable()
        assert name not in (".", "..")


def test_run_names_are_readable():
    assert run_name(["theta=0.05", "loss=dice"]) == "loss=dice,theta=0.05"
    assert run_name(["theta=[0.3,0.6]", "loss=dice"]) == "loss=dice,theta=[0.3,0.6]"
    # What TensorBoard's lists show of a name is its beginning.
    overrides = ["data.low=0", "experiment=smoke", "seed=1", "theta=0.05", "loss.alpha=0.3"]
    assert run_name(overrides) == "loss.alpha=0.3,theta=0.05,seed=1,data.low=0,experiment=smoke"
    assert run_name([]) == "default"
    long = [f"data.image_size={i}" for i in range(30)]
    assert re.fullmatch(r"data\.image_size=0,.*-[0-9a-f]{8}", run_name(long))


# The overrides of a command, the parameters of its sweeper, and what names leave out.
COMMANDS = {
    "lists": (["model=unet", "loss=dice,cce", "seed=range(2)"], {}, {"model"}),
    "a list is one value": (["watch=[cce,dice]", "theta=[0.3,0.6],[0.2,0.5]"], {}, {"watch"}),
    "choice": (["theta=choice(0.1)", "+trainer.max_time=null"], {}, {"trainer.max_time"}),
    "glob": (["loss=glob(dice*)", "~scheduler"], {}, {"scheduler"}),
    "interval": (["optimizer.lr=interval(0.1,1)", "theta=0.3"], {}, {"theta"}),
    "one combination": (["loss=dice", "seed=0"], {}, set()),
    "the last counts": (["loss=dice,cce", "seed=0,1", "seed=3"], {}, {"seed"}),
    "a search": (["theta=0.9"], {"optimizer.lr": "tag(log,interval(1e-4,1))"}, {"theta"}),
    "a sweeper": (["theta=0.9"], {"seed": "0,1", "compile": True}, {"theta", "compile"}),
    "the command wins": (["seed=3", "++loss.alpha=1,2"], {"seed": "0,1"}, {"seed"}),
    "test": (["mode=test", "checkpoint='a/x','a/y=1,2'"], {}, {"mode", "checkpoint"}),
    "two sweeps": (["mode=test", "checkpoint='a/x','b/x'"], {}, {"mode"}),
    "files": (["mode=test", "checkpoint='a/1.ckpt','a/2.ckpt'"], {}, {"mode", "checkpoint"}),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_what_is_not_swept_is_left_out_of_names(case):
    command, params, wanted = COMMANDS[case]
    hydra = {"sweeper": {"params": params or None}, "overrides": {"task": command}}
    assert set(constant_keys(OmegaConf.create(hydra))) == wanted


def test_names_of_a_sweep():
    given = ["++loss.alpha=1", "+trainer.max_time=null", "seed=1", "loss=dice", "model=unet"]
    constants = ["loss", "trainer.max_time", "model"]
    assert run_name(given, constants) == "loss.alpha=1,seed=1"


def test_names_of_tests():
    """They begin with the run's name. Runs of one name in two sweeps get different names."""
    given = ["mode=test", "checkpoint='outputs/a/loss=dice,theta=[0.3,0.6]'"]
    assert run_name(given) == "test_loss=dice,theta=[0.3,0.6]"
    assert run_name([*given, "theta=0.9"], ["mode", "checkpoint"]).endswith("0.6],theta=0.9")
    file = f"{given[1][:-1]}/checkpoints/step=20.ckpt'"
    assert run_name(["mode=predict", file]) == "predict_loss=dice,theta=[0.3,0.6],step=20"
    names = {run_name(["mode=test", f"checkpoint={sweep}/x"], ["mode"]) for sweep in ("a", "b")}
    assert len(names) == 2 and all(re.fullmatch("test_x-[0-9a-f]{8}", name) for name in names)
    odd = {run_name(["mode=test", f"checkpoint='{name}'"]) for name in ("a b", "a:b", "a_b")}
    assert len(odd) == 3
    long = run_name(["mode=test", f"checkpoint={'x' * 200}"])
    assert len(long) <= 150 and long.startswith("test_xxx")


def test_two_sweeps_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Frozen(names.datetime):
        @classmethod
        def now(cls):
            return cls(2024, 1, 2, 3, 4, 5)

    monkeypatch.setattr(names, "datetime", Frozen)
    claimed = [names.sweep_name.__wrapped__() for _ in range(3)]
    assert claimed == ["2024-01-02_03-04-05" + end for end in ("", "-2", "-3")]
    assert all((tmp_path / "outputs" / name).is_dir() for name in claimed)
