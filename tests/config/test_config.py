"""The schema, its ranges, and the names of run folders."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from losswatch.config import names
from losswatch.config.errors import ConfigError
from losswatch.config.names import run_name
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
