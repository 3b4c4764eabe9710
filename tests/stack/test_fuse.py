"""Runs trained as one stack equal the same runs trained one by one, as train.py trains them."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import ARTICLE, probe, slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from losswatch.compat import traced
from losswatch.disk.checkpoint_files import newest
from losswatch.disk.curves import read_curves
from losswatch.disk.event_log import EventLog
from losswatch.events.tags import watched_tags
from losswatch.losses import LossSet
from losswatch.nets.cpu import fast_on_cpu
from losswatch.run.build import make_losses, make_net, make_optimizer
from losswatch.run.module import SegmentationModule
from losswatch.run.process import quiet
from losswatch.stack import fit as stack_fit
from losswatch.stack import module as stack_module
from losswatch.stack.compile import compiled
from losswatch.stack.fit import block_size, fit
from losswatch.stack.limits import check_plan
from losswatch.stack.member import make_member
from losswatch.stack.refusal import NotStackable
from losswatch.task import train

# Smaller than in conf/.
SMALL = [
    "experiment=smoke", "data.image_size=8", "data.val_size=5", "data.test_size=3",
    "data.eval_batch_size=3", "trainer.accelerator=cpu", "trainer.max_steps=20",
]  # fmt: skip
# The runs of one stack, which differ in all that may differ.
GRID = [
    ["loss=dice", "theta=0.3", "seed=0", "optimizer.lr=3e-3"],
    ["loss=cce", "theta=0.5", "seed=1", "optimizer.lr=1e-2", "data.low=1", "data.high=-1"],
    ["loss=dice_square", "theta=0.95", "seed=2", "optimizer.lr=1e-3", "data.high=3"],
    ["loss=dice", "theta=0.7", "seed=3", "data.noise=0.1", "data.theta_spread=0.2"],
]


@pytest.fixture
def both(compose, tmp_path):
    """both(*common) -> the runs of GRID trained as a stack and alone, with their results.

    `alone=False` leaves the latter out.
    """

    def make(*common, grid=GRID, alone=True, name="fused", compile=False):
        composed = [compose(*SMALL, *common, *own, "compile=false") for own in grid]
        composed = [replace(one, planner=composed[0].planner) for one in composed]
        members, plans, folders = [], [], []
        for i, one in enumerate(composed):
            folder = tmp_path / name / str(i)
            folder.mkdir(parents=True)
            plan = one.plan(folder)
            plans.append(replace(plan, settings=replace(plan.settings, compile=compile)))
            members.append(make_member(plans[-1]))
        initial = [{n: t.clone() for n, t in member.net.state_dict().items()} for member in members]
        random = torch.get_rng_state()
        fit(members, make_losses(plans[0]), plans[0])
        assert torch.equal(torch.get_rng_state(), random)
        wanted = []
        for i, one in enumerate(composed if alone else []):
            folder = tmp_path / f"{name} alone" / str(i)
            folder.mkdir(parents=True)
            folders.append(folder)
            wanted.append(train(one.plan(folder)).metrics)
        return SimpleNamespace(
            composed=composed, members=members, initial=initial, folders=folders, wanted=wanted
        )

    return make


def checkpoint(folder):
    file, content = newest(folder)
    return file.name, content


def assert_same_runs(runs, late=1e-3):
    """Curves agree to 1e-5 over ten steps; all curves, metrics and weights agree to `late`."""
    for member, folder, wanted in zip(runs.members, runs.folders, runs.wanted, strict=True):
        assert member.error is None
        got, reference = read_curves(member.folder), read_curves(folder)
        assert set(got.columns) == set(reference.columns)
        reference = reference[got.columns]
        assert list(got.index) == list(reference.index)
        np.testing.assert_array_equal(got.isna(), reference.isna())
        watched = [c for c in got.columns if c.startswith(("loss/", "grad_norm/", "grad_cosine/"))]
        np.testing.assert_allclose(
            got.loc[:9, watched], reference.loc[:9, watched], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(got[watched], reference[watched], rtol=late, atol=late)
        # Rounding may move a pixel at the border to the other class.
        pixels = 2.5 / (3 * 64)
        assert member.metrics.keys() == wanted.keys() == member.result().keys()
        for tag, value in wanted.items():
            near = late if "/loss/" in tag else pixels
            assert member.metrics[tag] == pytest.approx(value, abs=near), tag
        (name, saved), (plain_name, plain) = checkpoint(member.folder), checkpoint(folder)
        assert name == plain_name == f"step={reference.index[-1]}.ckpt"
        assert saved["state_dict"].keys() == plain["state_dict"].keys()
        for key, value in plain["state_dict"].items():
            torch.testing.assert_close(saved["state_dict"][key], value, rtol=late, atol=late)
        [optimizer], [plain_optimizer] = saved["optimizer_states"], plain["optimizer_states"]
        assert optimizer["param_groups"] == plain_optimizer["param_groups"]
        assert optimizer["state"].keys() == plain_optimizer["state"].keys()
        for key, state in plain_optimizer["state"].items():
            kept = {n: v for n, v in state.items() if v is not None}
            assert optimizer["state"][key].keys() == kept.keys()
            for moment, value in kept.items():
                torch.testing.assert_close(
                    optimizer["state"][key][moment], value, rtol=late, atol=late
                )
        assert saved["global_step"] == plain["global_step"]


@pytest.mark.parametrize(
    "net, batch_norm, optimizer",
    [
        ("convnet", "false", "adam"), ("convnet", "true", "sgd"), ("unet", "true", "adam"),
        slow("convnet", "false", "sgd"), slow("convnet", "true", "adam"),
        slow("unet", "false", "adam"), slow("unet", "false", "sgd"), slow("unet", "true", "sgd"),
    ],
)  # fmt: skip
def test_equals_runs_trained_alone(both, device, net, batch_norm, optimizer):
    grid = GRID if (net, optimizer) == ("convnet", "adam") else GRID[:2]
    own = ["model.widths=[2,3]"] if net == "unet" else []
    own += ["optimizer.momentum=0.9"] if optimizer == "sgd" else []
    runs = both(
        f"model={net}", f"model.batch_norm={batch_norm}", f"optimizer={optimizer}", *own,
        "probe.cosines=true", f"trainer.accelerator={device}", grid=grid,
    )  # fmt: skip
    assert_same_runs(runs)
    # The initial weights are equal bit for bit, and each run has images of its own.
    for one, initial in zip(runs.composed, runs.initial, strict=True):
        for name, value in make_net(one.plan()).state_dict().items():
            assert torch.equal(initial[name], value)
    first = [read_curves(m.folder).loc[0, "loss/cce"] for m in runs.members]
    assert len(set(first)) == len(grid)


def test_plain_sgd_keeps_no_moments(both):
    assert_same_runs(both("optimizer=sgd", grid=GRID[:2]))


@pytest.mark.slow
def test_adamw(both):
    assert_same_runs(both("optimizer=adamw", "optimizer.weight_decay=0.3", grid=GRID[:2]))


def test_three_classes_and_a_foreign_loss(both):
    grid = [["theta=[0.3,0.6]"], ["theta=[0.1,0.2]", "seed=3"]]
    assert_same_runs(both("watch=[cce,dice]", "loss=dice_monai", grid=grid))


def test_volumes(both):
    grid = [["seed=0"], ["seed=1", "loss=cce"]]
    assert_same_runs(both("data.dims=3", "data.image_size=4", grid=grid))


@pytest.mark.parametrize(
    "steps, interval, every",
    [
        (14, 4, 3), (9, 4, 0), (1, 1, 1),
        slow(13, 5, 1), slow(12, 12, 1), slow(7, 100, 1), slow(10, 5, 3),
    ],
)  # fmt: skip
def test_intervals(both, steps, interval, every):
    """Blocks that end early, validations that do not fall on the end, steps not observed."""
    runs = both(
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={interval}",
        f"probe.every_n_steps={every}", grid=GRID[:2],
    )  # fmt: skip
    assert_same_runs(runs)
    frame = read_curves(runs.members[0].folder)
    seen = list(frame["loss/dice"].dropna().index) if every else []
    assert seen == (list(range(0, steps, every)) if every else [])
    assert ("loss/dice" in frame) == bool(every)
    validated = sorted({*range(interval, steps + 1, interval), steps})
    assert list(frame["val/accuracy"].dropna().index) == validated


@pytest.mark.parametrize("interval", [1, 7, 499, 500, 501, 1000, 1009, 2000])
def test_block_size(interval):
    size = block_size(interval)
    assert interval % size == 0 and 1 <= size <= stack_fit.BLOCK
    assert all(interval % n for n in range(size + 1, stack_fit.BLOCK + 1))


@pytest.mark.parametrize("block", [slow(1), 5, slow(10)])
def test_blocks_change_nothing(both, monkeypatch, block):
    runs = both(alone=False, grid=GRID[:2])
    monkeypatch.setattr(stack_fit, "BLOCK", block)
    others = both(alone=False, name="blocks", grid=GRID[:2])
    for a, b in zip(runs.members, others.members, strict=True):
        assert read_curves(a.folder).equals(read_curves(b.folder))
        assert a.metrics == b.metrics


def test_chunks_change_nothing_but_rounding(both, monkeypatch):
    """Members in several chunks, of which the last one is not full."""
    monkeypatch.setattr(stack_module, "CHUNK", 2)
    assert_same_runs(both(grid=GRID[:3]))


def test_observing_changes_nothing_but_rounding(both):
    runs = both("probe.every_n_steps=1", alone=False, grid=GRID[:2])
    others = both("probe.every_n_steps=0", alone=False, name="blind", grid=GRID[:2])
    for a, b in zip(runs.members, others.members, strict=True):
        for key, value in checkpoint(a.folder)[1]["state_dict"].items():
            torch.testing.assert_close(
                checkpoint(b.folder)[1]["state_dict"][key], value, rtol=1e-4, atol=1e-5
            )


def test_event_files_hold_the_same_charts(both):
    runs = both(grid=GRID[:1])
    found = []
    for folder in (runs.members[0].folder, runs.folders[0]):
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        found.append(events)
    fused, alone = found
    for kind in ("scalars", "tensors"):
        assert sorted(fused.Tags()[kind]) == sorted(alone.Tags()[kind])
    assert fused.SummaryMetadata("_hparams_/experiment") == alone.SummaryMetadata(
        "_hparams_/experiment"
    )
    assert sorted(p.name for p in runs.members[0].folder.iterdir() if p.is_dir()) == sorted(
        p.name for p in runs.folders[0].iterdir() if p.is_dir()
    )


def test_a_process_is_left_as_it_was(both):
    before = torch.backends.mkldnn.enabled
    both(alone=False, grid=GRID[:2])
    assert torch.backends.mkldnn.enabled == before
    assert torch.tensor(1e-40) * 1 > 0, "denormals are numbers again"


# --- Resuming a member alone ---------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", slow("sgd"), slow("sgd, momentum")])
def test_checkpoint_resumes_in_an_ordinary_run(both, tmp_path, optimizer):
    """A Trainer resumes from it and trains as from the checkpoint of the ordinary run."""
    kind, *momentum = optimizer.split(", ")
    own = ["optimizer.momentum=0.9"] if momentum else []
    runs = both(f"optimizer={kind}", "model.batch_norm=true", *own, grid=GRID[:2])
    for i, one in enumerate(runs.composed):
        ended = []
        for which, folder in (("fused", runs.members[i].folder), ("alone", runs.folders[i])):
            file, _ = newest(folder)
            state = torch.load(file, weights_only=True)
            # Lightning warns of differences in these.
            state["callbacks"] = {}
            file = tmp_path / f"{which} {i}.ckpt"
            torch.save(state, file)
            plan = one.plan()
            net = make_net(plan)
            with torch.no_grad():
                for p in net.parameters():
                    p.zero_()  # the checkpoint must replace these
            losses, settings = make_losses(plan), plan.settings
            module = SegmentationModule(net, losses, settings.trained, make_optimizer(settings))
            rest = tmp_path / "rest" / which / str(i)
            trainer = pl.Trainer(
                **plan.options | {"max_steps": 30}, logger=EventLog(str(rest)),
                callbacks=[probe()(losses)], max_epochs=2, num_sanity_val_steps=0,
                enable_checkpointing=False, enable_model_summary=False,
            )  # fmt: skip
            with quiet(), fast_on_cpu(net):
                trainer.fit(module, plan.data, ckpt_path=file, weights_only=True)
            trainer.logger.close()
            assert trainer.global_step == 30
            ended.append((read_curves(rest), module.state_dict()))
        (got, weights), (wanted, plain_weights) = ended
        assert list(wanted["loss/dice"].dropna().index) == list(range(20, 30))
        assert list(got.index) == list(wanted.index)
        np.testing.assert_allclose(got, wanted[got.columns], rtol=1e-3, atol=1e-3)
        for name, value in plain_weights.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-3)


# --- One of them fails ---------------------------------------------------------------------------


# TensorBoard converts images that are infinite.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("bad", ["optimizer.lr=1e30", slow("optimizer.lr=1e36")])
def test_a_failing_member_leaves_the_others_alone(both, caplog, bad):
    """Its error names tag and step; the others train as beside a member that does not fail."""
    grid = [GRID[0], [*GRID[1][:3], "optimizer.lr=1e-2"], GRID[2]]
    good = both(grid=grid, alone=False)
    spoiled = [own for own in grid[1] if own.split("=")[0] != bad.split("=")[0]]
    with caplog.at_level(logging.WARNING, logger="losswatch"):
        runs = both(grid=[grid[0], [*spoiled, bad], grid[2]], alone=False, name="spoiled")
    failed = runs.members[1]
    frame = read_curves(failed.folder)
    watched = frame[watched_tags(ARTICLE, cosines=False)].dropna(how="all")
    said = r"^trained with cce, step (\d+): ((?:loss|grad_norm)/cce) is (\S+)$"
    with pytest.raises(FloatingPointError, match=said) as e:
        failed.result()
    step, tag, value = re.match(said, str(e.value)).groups()
    step = int(step)
    assert str(frame.loc[step, tag]) == value and not np.isfinite(float(value))
    before = frame.loc[: step - 1, ["loss/cce", "grad_norm/cce"]] if step else watched[:0]
    assert np.isfinite(before.to_numpy()).all()
    said = [r.getMessage() for r in caplog.records if r.name.startswith("losswatch")]
    assert len(said) == 1 and str(e.value) in said[0]
    for i in (0, 2):
        a, b = good.members[i], runs.members[i]
        assert b.error is None
        assert read_curves(a.folder).equals(read_curves(b.folder))
        assert a.result() == b.result()
        saved, wanted = checkpoint(b.folder)[1], checkpoint(a.folder)[1]
        for name, weight in wanted["state_dict"].items():
            assert torch.equal(saved["state_dict"][name], weight), name


# --- What Lightning is told ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("gradient_clip_val", 1), ("accumulate_grad_batches", 2), ("precision", "bf16-mixed"),
        ("precision", "64-true"), ("devices", 2), ("num_nodes", 2),
    ],
)  # fmt: skip
def test_obstacles(compose, option, value):
    plan = compose("experiment=smoke").plan()
    check_plan(plan)
    check_plan(replace(plan, options=plan.options | {"precision": 32}))
    with pytest.raises(NotStackable, match=f"^trainer.{option}={value} needs the ordinary step$"):
        check_plan(replace(plan, options=plan.options | {option: value}))


def test_without_a_progress_bar(both):
    runs = both("trainer.enable_progress_bar=false", "trainer.max_steps=2", alone=False)
    assert all(m.result() for m in runs.members)


def test_seconds_are_shared(both):
    runs = both(alone=False, grid=GRID[:3])
    shares = {m.seconds for m in runs.members}
    assert max(shares) - min(shares) < 0.1 * max(shares) and min(shares) > 0


@pytest.mark.parametrize(
    "override, reason",
    [
        ("trainer.gradient_clip_val=1", "trainer.gradient_clip_val=1 needs the ordinary step"),
        (
            "optimizer._target_=torch.optim.RAdam",
            "RAdam is not written out for stacked runs",
        ),
    ],
)
def test_compile_falls_back(compose, tmp_path, caplog, override, reason):
    """Where compile=true is not possible, one line says so and the run is trained as ordinary."""
    metrics = []
    for choice in ("true", "false"):
        one = compose(*SMALL, override, "trainer.max_steps=3", f"compile={choice}")
        folder = tmp_path / choice
        folder.mkdir()
        metrics.append(train(one.plan(folder)))
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        assert len(list(folder.glob("checkpoints/*.ckpt"))) == 1
    assert metrics[0] == metrics[1]
    said = [r.getMessage() for r in caplog.records if r.name.startswith("losswatch")]
    assert said == [f"not compiled: {reason}"]


@pytest.mark.parametrize(
    "error, text",
    [
        (AssertionError("no such operation"), "AssertionError: no such operation"),
        (InductorError(CppCompileError(["g++"], "bad"), None), "InductorError: CppCompileError: "),
        (InvalidCxxCompiler(), "InvalidCxxCompiler: No working C"),
        (InductorError(MemoryError("none left"), None), None),
        (MemoryError("none left"), None),
        (torch.OutOfMemoryError("none left"), None),
    ],
)
def test_what_the_compiler_refuses(monkeypatch, error, text):
    """A failure of the compiler is a refusal; a lack of memory is an error of the run."""

    def broken(*_, **__):
        raise error

    monkeypatch.setattr("losswatch.stack.compile.compile_graph", broken)
    raised = NotStackable if text else type(error)
    said = f"the compiler cannot compile them over runs: {text}" if text else "none left"
    with pytest.raises(raised, match=said):
        compiled(torch.sin)(torch.ones(2))


def test_a_stack_that_cannot_be_compiled_is_refused(both, monkeypatch):
    monkeypatch.delattr("losswatch.stack.compile.compile_graph")
    with pytest.raises(NotStackable, match="compile them over runs: NameError: .*compile_graph"):
        both("watch=[dice]", alone=False, compile=True, grid=GRID[:1])


class Fussy(nn.Module):
    """A loss that raises an error when its arguments are mapped over runs."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, logits, target):
        if traced(logits):
            raise self.error
        return logits.square().mean()


@pytest.mark.parametrize(
    "error, raised, said",
    [
        (RuntimeError, NotStackable, "map them over runs: RuntimeError: boom$"),
        slow(NotImplementedError, NotStackable, "map them over runs: NotImplementedError: boom$"),
        (TypeError, TypeError, "boom"),
        slow(KeyError, KeyError, "boom"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_of_somebodys_code(both, error, raised, said, compiled, monkeypatch):
    """A RuntimeError of the first step may be torch.func's: the runs are trained one by one."""
    losses = LossSet({**dict.fromkeys(["cce", "dice"], Fussy(error("boom")))})
    monkeypatch.setattr("test_fuse.make_losses", lambda *_: losses)
    with pytest.raises(raised, match=said):
        both(alone=False, compile=compiled, grid=GRID[:2])


# --- Compiled ------------------------------------------------------------------------------------


@pytest.mark.slow
# Inductor imports a part of PyTorch that PyTorch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_stack(both):
    """There are two graphs: one for steps that are observed, and one for those between."""
    assert_same_runs(both("model.batch_norm=true", "probe.every_n_steps=2", compile=True))
