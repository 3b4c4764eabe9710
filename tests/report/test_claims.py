"""Measures, intervals and verdicts of the study's claims; the script and the notebook."""

import json
import os
import re
import shutil
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, ROOT

import reproduce
from common import intervals
from losswatch.disk.curves import Curves
from losswatch.losses import Dice
from study import claims, measures, report, saturation, symmetry


def write_run(folder, steps=3000):
    """A run whose CCE is 0.7, but 1.4 at steps 100 to 200, and whose norms rise with the step."""
    index = np.arange(steps)
    cce = 0.7 + 0.7 * ((index >= 100) & (index <= 200))
    values = np.stack([cce, 1 + index, 5.0 + index, 9.0 + index], 1)
    tags = ["loss/cce", "grad_norm/cce", "grad_norm/dice_fg", "grad_norm/dice"]
    folder.mkdir(parents=True, exist_ok=True)
    record = Curves(folder)
    record.append(tags, index, values)
    for step in range(0, steps, 250):
        record.add_metrics(step, {"val/accuracy": step / 10_000})
    return index


def test_measures_of_a_run(tmp_path):
    write_run(tmp_path)
    found = measures.measure(tmp_path)
    assert found["late/cce"] == pytest.approx(np.mean(1 + np.arange(2700, 3000)))
    assert found["first/cce"] == pytest.approx(0.7) and found["peak/cce"] == pytest.approx(1.4)
    assert found["first_norm/cce"] == pytest.approx(3.5)  # of steps 0 to 5
    assert found["peak_norm/cce"] == pytest.approx(np.mean(1 + np.arange(994, 1000)))
    # The window is at most 2 % of the steps: 61 of them, of which 31 lie within the run at step 0.
    assert found["quiet/norm"] == pytest.approx(5 + np.mean(np.arange(31)))
    assert found["quiet/cce"] == pytest.approx(0.7)
    assert found["climb/accuracy"] == pytest.approx(0.1)


def test_a_short_run_has_no_climb_and_an_empty_one_nothing(tmp_path):
    write_run(tmp_path / "short", steps=300)
    assert np.isnan(measures.measure(tmp_path / "short")["climb/accuracy"])
    (tmp_path / "empty").mkdir()
    assert measures.measure(tmp_path / "empty") == {}


@pytest.mark.parametrize("count", [0, 1, 7, 10])
def test_wilsons_ends_are_where_the_score_test_just_rejects(count):
    share, low, high = intervals.share_interval(count, 10)
    assert share == count / 10
    z = 1.959963984540054  # the normal distribution's quantile at 0.975
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / 10, abs=1e-12)
    assert 0 <= low <= share <= high + 1e-12 and high <= 1


def test_intervals_of_means_and_ratios():
    values = np.random.default_rng(0).normal(size=10)
    mean, low, high = intervals.mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert high - mean == pytest.approx(2.262157 * values.std(ddof=1) / 10**0.5)  # t of 9 degrees
    ratio = intervals.ratio_interval(pd.Series([2.0, 8.0, 5.0], [0, 1, 9]), pd.Series([1.0, 2.0]))
    assert ratio.value == pytest.approx(8**0.5)  # the ratios of seeds 0 and 1 are 2 and 4


def test_the_pulls_are_dicefgs_gradient():
    loss = Dice(include_background=False)
    for theta, p in ((0.05, 0.5), (0.5, 0.5), (0.95, 0.2)):
        target = (torch.arange(400) >= 400 * theta).long().reshape(1, 20, 20)
        difference = torch.full((1, 20, 20), np.log(p / (1 - p)), dtype=torch.float64)
        difference.requires_grad_()
        loss(torch.stack([0 * difference, difference], 1), target).backward()
        gradient = difference.grad
        centred = target - target.double().mean()
        assert -gradient.sum().item() == pytest.approx(saturation.pull_alike(theta, p), rel=1e-5)
        apart = -(gradient * centred).sum().item()
        assert apart == pytest.approx(saturation.pull_apart(theta, p), rel=1e-5)


def grid(**changes) -> pd.DataFrame:
    """Runs in which every claim holds. `changes` maps a column to a function of the row."""
    rows = []
    for loss in ("cce", "dice_fg", "dice"):
        for theta in (0.05, 0.5, 0.95):
            for normed in (False, True):
                for optimizer in ("adam", "sgd"):
                    for seed in range(4):
                        fails = loss == "dice_fg" and theta == 0.05 and not normed
                        shot = loss == "dice_fg" and theta == 0.5
                        row = {
                            "loss": loss, "theta": theta, "batch_norm": normed, "seed": seed,
                            "optimizer": optimizer,
                            "accuracy": 0.95 if optimizer == "sgd" or fails
                            else 0.99 + 0.005 * normed + seed / 1e4 * (1 + normed),
                            "first/cce": 0.7, "peak/cce": 2.0 if shot else 0.7,
                            "first_norm/cce": 0.3, "peak_norm/cce": 3.0 if shot else 0.4,
                        }  # fmt: skip
                        for name in ("cce", "dice", "dice_fg"):
                            row[f"late/{name}"] = (0.5 if theta == 0.05 else 1.0) + seed / 100
                        rows.append(row | {k: f(row) for k, f in changes.items()})
    return pd.DataFrame(rows)


def verdicts(runs) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in claims.judge(runs)}


def test_verdicts_follow_the_runs():
    assert verdicts(grid()) == dict.fromkeys(["C1", "C2", "C3", "C4", "C5"], "holds")

    def accuracy(of):
        return lambda row: 0.99 if of(row) else row["accuracy"]

    one_sgd = grid(accuracy=accuracy(lambda r: r["optimizer"] == "sgd" and r["seed"] == 0))
    assert verdicts(one_sgd)["C1"] == "does not hold"  # 25 %
    rescued = grid(accuracy=accuracy(lambda r: r["optimizer"] == "adam"))
    assert verdicts(rescued)["C2"] == "does not hold"
    assert verdicts(rescued)["C3"] == "holds partly"  # all converge, but no cell is better
    small = grid(**{"peak/cce": lambda r: 0.8 if r["seed"] == 0 else r["peak/cce"]})
    assert verdicts(small)["C4"] == "holds partly"
    flat = grid(**{"late/dice": lambda r: 1.0 + (r["seed"] % 2 == (r["theta"] == 0.05)) / 10})
    assert verdicts(flat)["C5"] == "holds partly"  # CCE's ratio is still below 1
    assert verdicts(grid()[lambda r: r["optimizer"] == "sgd"]) == {"C1": "holds"}


def test_the_published_report_is_what_the_published_measures_give():
    """Text and numbers; the measures in summary.csv are rounded, so a last digit may differ."""
    folder = ROOT / "outputs/article"
    published = (folder / "report.md").read_text(encoding="utf-8")
    runs = pd.read_csv(folder / "summary.csv")
    sweeps = {name: runs[runs["sweep"] == name] for name in runs["sweep"].unique()}
    images = published.split("## Curves\n\n")[1].rstrip("\n").split("\n\n### ")
    images = [images[0], *(f"### {image}" for image in images[1:])]
    rendered = report.render(sweeps, symmetry.range_cells(sweeps), images)

    number = re.compile(r"\d+(?:\.\d+)?(?:e[-+]\d+)?")
    assert number.sub("#", rendered) == number.sub("#", published)
    pairs = list(zip(number.findall(rendered), number.findall(published), strict=True))
    different = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    assert len(pairs) > 1000 and len(different) <= 3
    for ours, theirs in different:
        last_digit = 10.0 ** -len(theirs.partition(".")[2])
        assert float(ours) == pytest.approx(float(theirs), abs=1.01 * last_digit)


def test_the_reports_runs_are_done_and_the_others_are_named(tmp_path, monkeypatch, capsys):
    for loss in ("cce", "dice", "dice_fg"):
        for status in ("done", "failed"):
            folder = tmp_path / f"runs/article/{loss},{status}"
            write_run(folder, steps=60)
            result = {
                "status": status,
                "choices": {"loss": loss, "model": "convnet", "optimizer": "adam"},
                "config": {"theta": 0.5, "seed": 0, "model": {"batch_norm": False}},
                "metrics": {"val/accuracy": 0.9 if status == "done" else 0.1},
            }
            (folder / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "plot_sweeps", lambda *_: {})
    command = ["reproduce.py", "--no-train", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", command)
    with joblib.parallel_config("threading"):
        assert reproduce.main() == 0
    names = ", ".join(f"article/{loss},failed (failed)" for loss in ("cce", "dice", "dice_fg"))
    line = f"Left out, because they are not done: {names}"
    assert capsys.readouterr().out.splitlines() == [line, str(tmp_path / "report.md")]
    page = (tmp_path / "report.md").read_text()
    assert page.count(f"\n{line}.\n") == 1 and "There are 3 runs" in page and "0.1000" not in page
    assert len(pd.read_csv(tmp_path / "summary.csv")) == 3


@pytest.mark.slow
def test_reproduce_trains_reports_and_does_not_train_again(tmp_path):
    command = [
        sys.executable, ROOT / "scripts/reproduce.py", "--quick", "--runs", "runs", "--out", "out",
        "trainer.max_steps=40", "trainer.val_check_interval=20", "compile=false", "seed=0,1",
        "theta=0.05,0.5", "data.val_size=4", "data.test_size=4", "data.eval_batch_size=4",
        "trainer.enable_progress_bar=false",
    ]  # fmt: skip
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True}
    first = subprocess.run(command, **options)
    assert first.returncode == 0, first.stderr
    assert re.search(r"^training \d+ stacks? of up to \d+ runs", first.stderr, re.MULTILINE)
    text = (tmp_path / "out/report.md").read_text()
    assert "| C2 |" in text and "| C4 |" in text and "| C1 |" not in text
    assert "0 of 10 (0 %, 0 to 28 %) of the others" in text  # in 40 steps nothing converges
    assert len(pd.read_csv(tmp_path / "out/summary.csv")) == 12
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "out" / line.split("](")[1][:-1]).is_file()
    shutil.rmtree(tmp_path / "out")
    again = subprocess.run(command, **options)
    assert again.returncode == 0 and "fused" not in again.stderr
    assert (tmp_path / "out/report.md").read_text() == text
    nothing = subprocess.run([*command[:2], "--no-train", "--runs", "none"], **options)
    assert nothing.returncode == 2 and nothing.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_notebook_runs_and_is_stored_without_outputs(smoke, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    path = ROOT / "scripts/explore.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    sweep = tmp_path / "sweep"
    shutil.copytree(smoke.folder, sweep / smoke.folder.name)
    before = {file: file.stat().st_mtime_ns for file in sweep.rglob("*")}
    monkeypatch.setenv("LOSSWATCH_SWEEP", str(sweep))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), *sys.path]))
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=PATIENCE, resources=resources).execute()
    shown = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(shown) == 2  # the sweep's figure and the comparison
    assert {file: file.stat().st_mtime_ns for file in sweep.rglob("*")} == before
    [folder] = set(tmp_path.iterdir()) - {sweep}
    assert folder.name.startswith("explore_")
    assert (folder / "dice_square/result.json").is_file()


def test_the_notebook_finds_the_sweep_that_was_started_last(tmp_path, monkeypatch):
    pytest.importorskip("IPython")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "scripts/explore.ipynb", as_version=4)
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for hour, name in enumerate(["tuned", "2026-01-01_12-00-00", "baseline", "watch"]):
        file = tmp_path / "outputs" / name / "multirun.yaml"
        file.parent.mkdir(parents=True)
        if name != "watch":  # a folder that is no sweep
            file.touch()
            os.utime(file, (3600 * hour, 3600 * hour))
    (tmp_path / "scripts").mkdir()
    monkeypatch.chdir(tmp_path / "scripts")
    monkeypatch.delenv("LOSSWATCH_SWEEP", raising=False)
    names: dict = {}
    exec(first, names)
    assert names["sweep"] == tmp_path / "outputs" / "baseline"
    assert names["into"].parent == tmp_path / "outputs" and not names["into"].exists()
