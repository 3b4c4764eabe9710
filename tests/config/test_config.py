"""The schema, its ranges, and the names of run folders."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from losswatch.config import names
from losswatch.config.errors import ConfigError
from losswatch.config.names import run_name
from losswatch.config.ranges import thresholds

# --- Every bad input gets one line that names what is allowed ------------------------------------

BAD = [
    ("theta=1.5", r"theta must be a number strictly between 0 and 1.*got 1.5"),
    ("theta=0", "theta must be .* between 0 and 1.*got 0"),
    ("theta=1.0", "theta must be .* between 0 and 1.*got 1.0"),
    ("theta=-0.5", "theta must be .* between 0 and 1.*got -0.5"),
    ("theta=nan", "theta must be .* between 0 and 1.*got nan"),
    ("theta=abc", "theta must be a number.*got abc"),
    ("theta=true", "theta must be a number.*got True"),
    ("theta=null", "theta must be a number.*got None"),
    ("theta=[]", r"theta must be .* list.*got \[\]"),
    ("theta=[0.5,0.2]", r"strictly increasing list.*'theta=\[0.3,0.6\]'.*got \[0.5, 0.2\]"),
    ("theta=[0.5,0.5]", "strictly increasing list"),
    ("theta=[0.5,x]", "strictly increasing list"),
    ("theta=[0.5,[0.6]]", "strictly increasing list"),
    ("theta={a:1}", "theta must be a number"),
    ("theta=0.9999999999", "theta must leave room for each class.*got 0.9999999999"),
    ("theta=[0.5,0.50000000001]", "theta must leave room for each class"),
    ("data.batch_size=0", "data.batch_size must be a whole number of at least 1, got 0"),
    ("data.image_size=0", "data.image_size must be a whole number of at least 1, got 0"),
    ("data.val_size=0", "data.val_size must be a whole number of at least 1, got 0"),
    ("data.test_size=-1", "data.test_size must be a whole number of at least 1, got -1"),
    ("data.eval_batch_size=0", "data.eval_batch_size must be .* at least 1, got 0"),
    ("data.num_workers=-1", "data.num_workers must be a whole number of at least 0, got -1"),
    ("data.dims=4", "data.dims must be 2 or 3, got 4"),
    ("data.low=nan", "data.low must be a finite number, got nan"),
    ("data.high=-inf", "data.high must be a finite number, got -inf"),
    ("seed=-1", "seed must be a whole number of at least 0, got -1"),
    ("seed=9223372036854775808", r"seed must be less than 2\^63"),
    ("optimizer.lr=-1", "optimizer.lr must be a number greater than 0, got -1"),
    ("optimizer.lr=0", "optimizer.lr must be a number greater than 0, got 0"),
    ("optimizer.lr=x", "optimizer.lr must be a number greater than 0, got x"),
    ("optimizer.lr=inf", "optimizer.lr must be a number greater than 0, got inf"),
    ("optimizer.momentum=x optimizer=sgd", "optimizer.momentum must be a number, got 'x'"),
    ("optimizer.betas=[2,3]", "optimizer: .*betas?"),
    ("optimizer._target_=torch.optim.Atom", "optimizer._target_=torch.optim.Atom cannot be import"),
    ("probe.every_n_steps=-1", "probe.every_n_steps must be .* at least 0, got -1"),
    ("trainer.max_steps=0", "trainer.max_steps must be a whole number of at least 1, got 0"),
    ("trainer.max_steps=1.5", "trainer.max_steps must be a whole number .* got 1.5"),
    ("trainer.max_steps=true", "trainer.max_steps must be a whole number .* got True"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval must be .* at least 1, got 0"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be .* got 0"),
    ("watch=[]", r"watch must name at least one loss, got \[\]"),
    ("watch=[dise]", "watch: there is no loss 'dise'; known are .*cce.*dice"),
    ("watch=[3]", "watch: there is no loss 3; known are"),
    ("~loss", "loss must be one of .*cce.*dice"),
    ("loss=[dice,cce]", "loss must be one of .*cce.*dice"),
    ("model.widths=[]", r"model.widths must name .* at least one level, got \[\]"),
    ("model.widths=[8,-1]", "each of model.widths must be a whole number of at least 1, got -1"),
    ("model.widths=8", "model.widths must be a list, got 8"),
    ("data.image_size=33", r"divisible by 4, got \(33, 33\); change data.image_size"),
    ("model=convnet model.width=0", "model.width must be a whole number of at least 1, got 0"),
    ("model._target_=no.such.Net", "model._target_=no.such.Net cannot be imported: .*no"),
    ("model._target_=torch.nn.ReLU", "model: "),
    ("loss._target_=no.such", "loss dice._target_=no.such cannot be imported"),
    ("loss._target_=torch.nn.Identity", "loss dice: "),
    ("+loss.smooth=1", "loss dice: .*smooth"),
]


@pytest.mark.parametrize("overrides, message", BAD)
def test_bad_input_is_one_clear_line(compose, overrides, message):
    composed = compose(*overrides.split())
    with pytest.raises(ConfigError) as raised:
        composed.plan()
    assert re.search(message, str(raised.value))
    assert "\n" not in str(raised.value)


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
