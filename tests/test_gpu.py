"""On a GPU: commands, and what a step waits for. Without one: what scripts/gpu.sh does."""

import os
import re
import stat
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, load_losses, probe, read_result, run_folders, run_train
from torch import nn

from benchmarks import gpu, runs, watch
from losswatch.disk.curves import read_curves
from losswatch.run.build import make_losses
from losswatch.stack.fit import fit
from losswatch.stack.member import make_member
from losswatch.task import train
from losswatch.watch.record import Record

# --- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_run_takes_the_gpu_by_itself(compose, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    train(compose("experiment=smoke").plan(tmp_path))
    assert torch.cuda.max_memory_allocated() > 0


@pytest.mark.gpu
@pytest.mark.slow
def test_the_readmes_six_runs(tmp_path):
    [command] = re.findall(r"&& python train.py (-m loss=.*)", (ROOT / "README.md").read_text())
    run_train(*command.split(), cwd=tmp_path, fresh=True)
    results = [read_result(folder) for folder in run_folders(tmp_path).values()]
    assert [result["status"] for result in results] == 6 * ["done"]
    dice = [r["metrics"]["val/dice"] for r in results if r["choices"]["loss"] == "dice"]
    assert len(dice) == 3 and min(dice) > 0.9


def repeat_twice(tmp_path, *options):
    """The curves and the weights of the same runs, trained twice by commands of their own."""
    seen = []
    for name in ("a", "b"):
        (cwd := tmp_path / name).mkdir()
        run_train(
            "-m", "trainer.deterministic=true", "trainer.max_steps=60", "loss=dice,cce",
            "trainer.val_check_interval=20", *options, cwd=cwd, fresh=True,
        )  # fmt: skip
        folders = run_folders(cwd)
        weights = {
            run: torch.load(folder / "checkpoints/step=60.ckpt", weights_only=True)["state_dict"]
            for run, folder in folders.items()
        }
        seen.append(({run: read_curves(folder) for run, folder in folders.items()}, weights))
    return seen


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["hydra/launcher=basic", "probe.cosines=true"], ["compile=true", "model=convnet"]],
    ids=["one by one", "a compiled stack"],
)
def test_a_repeat_is_identical_to_the_bit(tmp_path, options):
    (curves, weights), (curves_again, weights_again) = repeat_twice(
        tmp_path, "trainer.accelerator=cuda", *options
    )
    assert len(curves) == 2 and curves.keys() == curves_again.keys()
    for run, frame in curves.items():
        assert len(frame.filter(like="grad_norm/").dropna()) == 60
        assert frame.equals(curves_again[run])
        for name, value in weights[run].items():
            assert torch.equal(value, weights_again[run][name]), name


def synchronisations(work):
    """How often the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


@pytest.mark.gpu
def test_synchronisations_are_seen():
    x = torch.ones(2, device="cuda")
    assert synchronisations(lambda: x + 1) == 0
    assert synchronisations(lambda: [x[0].item(), x[1].item()]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["convnet", "unet"])
def test_a_step_waits_for_nothing(make_run, monkeypatch, net):
    """The numbers of a run of twice the length: in one block, so that both are written once."""
    monkeypatch.setattr(Record, "SECONDS", 1e9)

    def count(steps):
        run = make_run(
            net, batch_norm=True, probe=probe(cosines=True), steps=steps, validate=False,
            losses=load_losses("cce", "dice", "dice_monai"), accelerator="cuda",
            folder=f"{steps} steps",
        )  # fmt: skip
        return synchronisations(run.fit)

    assert count(80) == count(40) > 0


@pytest.mark.gpu
def test_a_step_of_a_stack_waits_for_nothing(compose, tmp_path):
    """Twice as many steps in as many blocks."""

    def count(steps):
        one = compose(
            "experiment=smoke", "model=convnet", "trainer.accelerator=cuda",
            f"trainer.max_steps={2 * steps}", f"trainer.val_check_interval={steps}",
        )  # fmt: skip
        plans = [one.plan(tmp_path / f"{steps} {i}") for i in range(3)]
        for plan in plans:
            plan.folder.mkdir(parents=True, exist_ok=True)
        members, losses = [make_member(plan) for plan in plans], make_losses(plans[0])
        return synchronisations(lambda: fit(members, losses, plans[0]))

    assert count(40) == count(20) > 0


# --- The script, without one ---------------------------------------------------------------------


def run_script(cwd, *folders, **variables):
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    return subprocess.run(
        [cwd / "scripts/gpu.sh"], cwd="/", env={**os.environ, **variables, "PATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def checkout(tmp_path):
    """A folder with the script alone, and the script's python replaced by a shell script."""
    script = (ROOT / "scripts/gpu.sh").read_text()
    executable(tmp_path / "scripts/gpu.sh", script)

    def imitate(python):
        executable(tmp_path / "bin/python", f"#!/usr/bin/env bash\n{python}\n")
        done = run_script(tmp_path, tmp_path / "bin")
        return done, (tmp_path / "outputs/gpu/report.md").read_text()

    return imitate


def test_without_a_gpu_it_says_so_in_one_line():
    python = os.path.dirname(sys.executable)
    done = run_script(ROOT, python, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("gpu.sh: PyTorch sees no GPU")


def test_a_part_that_fails_is_a_line_of_the_table(checkout):
    """And so are a part at its time limit and each test that failed; the others go on."""
    done, report = checkout("""
        case "$*" in
        -W*) echo "a GPU, 2 cores, torch 1.2" ;;
        *pytest*) printf 'FAILED tests/test_a.py::test_b - 1 | 2\\n1 failed, 7 passed\\n'; exit 1 ;;
        *six) echo "| six | a run | done |" ;;
        *speed) echo "| speed | a net | 3 steps/s |"; echo half; exit 124 ;;
        *watch) echo "RuntimeError: out of memory" >&2; exit 1 ;;
        esac""")
    assert done.returncode == 1
    head, _, *rows = report.splitlines()
    assert head == "a GPU, 2 cores, torch 1.2"
    assert [re.sub(r"after \d+ s", "after n s", row) for row in rows] == [
        "| part | what | result |",
        "| --- | --- | --- |",
        "| tests | FAILED | tests/test_a.py::test_b - 1 / 2 |",
        "| tests | the whole part | failed after n s: 1 failed, 7 passed |",
        "| six | a run | done |",
        "| six | the whole part | done after n s |",
        "| precision | the whole part | done after n s |",
        "| speed | a net | 3 steps/s |",
        "| speed | the whole part | stopped at its limit after n s: half |",
        "| grid | the whole part | done after n s |",
        "| watch | the whole part | failed after n s: RuntimeError: out of memory |",
        "| compiled | the whole part | done after n s |",
    ]
    assert done.stdout == report


def test_all_parts_end_within_ten_minutes(checkout):
    """If each of them takes all of its time, and ten seconds to end."""
    done, _ = checkout('[[ "$*" == -W* ]] && echo "a GPU"; exit 0')
    *limits, last = [int(n) for n in re.findall(r"at most (\d+) s", done.stderr)]
    assert done.returncode == 0 and len(limits) == 6
    assert 570 <= last <= 580  # nothing has taken time here, and the last part gets what is left
    assert last - sum(limits) > 60


def test_a_command_stops_at_its_limit(tmp_path):
    """`timeout`, as the script calls it, ends a program of Python that sleeps."""
    [call] = re.findall(r"timeout (.*) \"\$limit\"", (ROOT / "scripts/gpu.sh").read_text())
    sleeper = "import time; print('| a | row |', flush=True); time.sleep(60)"
    done = subprocess.run(
        ["timeout", *call.split(), "2", sys.executable, "-c", sleeper],
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (124, "| a | row |\n")


# --- Its parts, small and on the CPU -------------------------------------------------------------


@pytest.mark.slow
def test_rows_of_a_sweep(capfd):
    """Each run's scores; or all runs at once. A run that fails is in the table."""

    def show(seconds, table):
        gpu.each_run("p", seconds, table)
        gpu.all_runs("p", seconds, table)

    options = ["experiment=smoke", "trainer.accelerator=cpu", "optimizer.lr=1e-3,1e30"]
    with pytest.raises(SystemExit, match="ended with exit status 1"):
        gpu.sweep(*options, "model=convnet", show=show)
    rows = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"\| p \| the whole command \| \d+ s \|", rows[0])
    scores = r"dice 0\.\d+, accuracy 0\.\d+, \d+\.\d+ s"
    assert re.fullmatch(rf"\| p \| optimizer.lr=0.001 \| done: {scores} \|", rows[1])
    assert rows[2].startswith("| p | optimizer.lr=1e+30 | failed: ")
    assert re.fullmatch(
        r"\| p \| 2 runs \| 1 done: \d+\.\d s of training, \d+ s for the whole command \|", rows[3]
    )
    assert len(rows) == 4


def test_speeds_are_those_of_the_steps(monkeypatch):
    """A training of n steps takes 5 s and 0.01 s a step: 100 steps a second, whatever the guess."""
    asked = []

    def seconds_of(plan, overrides, steps):
        asked.append((tuple(overrides), steps))
        return 5 + 0.01 * steps

    monkeypatch.setattr(runs, "seconds_of", seconds_of)
    found = list(runs.speeds(["a=1"], {"x": ["b=2"], "y": []}, "cpu", seconds=2))
    assert [(way, pytest.approx(pace), load) for way, pace, load in found] == [
        ("x", 100, None), ("y", 100, None),
    ]  # fmt: skip
    steps = {way: [n for given, n in asked if ("b=2" in given) == (way == "x")] for way in "xy"}
    assert steps == {"x": [4, 4, 8, 84, 244], "y": [4, 4, 204]}
    assert all({"a=1", "trainer.accelerator=cpu"} <= {*given} for given, _ in asked)


def test_a_speed_is_measured(capsys):
    net, *_ = runs.RUNS
    gpu.speed("p", {net: ("probe off",)}, "cpu", seconds=0.01)
    assert re.fullmatch(
        rf"\| p \| {net}, probe off \| [\d,]+\.\d steps/s, utilisation unknown \|\n",
        capsys.readouterr().out,
    )


def test_utilisation_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    """Here a program of that name, which prints as nvidia-smi does and goes on."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("P", (), {"uuid": "u"}))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    executable(
        tmp_path / "bin/nvidia-smi",
        f"#!/usr/bin/env bash\necho \"$@\" > {tmp_path}/asked\nprintf '12\\n97\\n[N/A]\\n'\n"
        f"touch {tmp_path}/printed\nexec sleep 60\n",
    )
    with runs._utilisation("cuda") as seen:
        while not (tmp_path / "printed").exists():
            pass
    assert seen == [12, 97]
    assert "--id=GPU-u " in (tmp_path / "asked").read_text()


def test_watching_in_half_precision(monkeypatch, capsys):
    """Each way, and plain PyTorch, as often; the network computes in bfloat16."""
    kinds = set()

    class Net(nn.Conv2d):
        def forward(self, x):
            kinds.add((out := super().forward(x)).dtype)
            return out

    monkeypatch.setattr(watch, "unet", lambda encoder: Net(3, 2, 3, padding=1))
    gpu.watching("p", "any", 2, 8, "cpu", rounds=2)
    rows = capsys.readouterr().out.splitlines()
    assert kinds == {torch.bfloat16}
    assert [row.split(": ")[1].split(" | ")[0] for row in rows] == [
        watch.PLAIN, watch.EVERY, watch.NOT_OBSERVED, "Watch, every 50 steps (mean)",
    ]  # fmt: skip
    assert rows[0].endswith("× plain 1.00 |")


def test_a_library_that_is_missing_is_a_row(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    gpu.watching("p", "resnet50", 8, 512, "cpu", rounds=1)
    row = "smp Unet(resnet50), 8×3×512×512, bf16 | skipped: "
    assert capsys.readouterr().out.startswith(f"| p | {row}")
