"""Reading a sweep back from disk, its tables, comparison and figures."""

import ctypes
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from rich.console import Console

from losswatch.disk.curves import Curves, last_watched
from losswatch.report import dependence, figures
from losswatch.report.compare import compare_losses, holm
from losswatch.report.runs import KNOWN_LOSSES, all_losses, read_runs, settings, swept
from losswatch.report.style import loss_looks
from losswatch.report.tables import (
    cell_table,
    comparison_table,
    markdown_table,
    print_summary,
    summary_table,
    write_summary,
)
from losswatch.report.words import in_words
from losswatch.text import format_value

ROOT = Path(__file__).parents[2]
NAMES = ["cce", "dice_fg", "dice"]


def write_curves(run_dir: Path, steps: range, scale: float = 1.0) -> None:
    """Losses and norms at every step, the accuracy at every tenth."""
    run_dir.mkdir(parents=True, exist_ok=True)
    record = Curves(run_dir)
    tags = [f"{kind}/{name}" for name in NAMES for kind in ("loss", "grad_norm")]
    values = [[[i / (10 + step), i] for i in range(1, 1 + len(NAMES))] for step in steps]
    record.append(tags, np.array(steps), scale * np.reshape(values, (len(steps), -1)))
    for step in steps:
        if step % 10 == 0:
            record.add_metrics(step, {"val/accuracy": 1 - 0.3 / (1 + step)})
    (run_dir / "events.out.tfevents.1.host.losswatch").touch()


def write_result(run_dir: Path, loss="dice", theta=0.5, seed=0, accuracy=0.9, **changes) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {
        "status": "done",
        "error": None,
        "seconds": 12.34,
        "overrides": [f"loss={loss}", f"theta={theta}", f"seed={seed}"],
        "choices": {"loss": loss, "model": "unet", "optimizer": "adam"},
        "config": {
            "theta": theta,
            "seed": seed,
            "model": {"batch_norm": False},
            "optimizer": {"lr": 1e-3},
            "data": {"low": 0.0},
        },
        "metrics": {"val/accuracy": accuracy, "val/dice": accuracy - 0.1, "val/iou": 0.5},
    }
    (run_dir / "result.json").write_text(json.dumps(record | changes))


@pytest.fixture
def main(monkeypatch):
    """main(folder, ...): scripts/report.py in this process; its exit status."""
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "scripts/report.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(folder: Path, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", str(folder), *arguments])
        return script.main()

    return run


@pytest.fixture
def no_hang():
    """Fail a test that still runs after half a minute."""

    def interrupt(*_):
        pytest.fail("still busy after half a minute")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def text_of(table) -> str:
    console = Console(width=200, color_system="truecolor", force_terminal=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# --- read_runs, summary.csv, tables --------------------------------------------------------------


def test_a_folder_of_sweeps_is_one_and_mappings_are_told_apart(tmp_path):
    for sweep, low in (("a", 0), ("b/c", 1)):
        data = {"data": {"low": low, "high": 1 - low}}
        override = [f"data={{low:{low},high:{1 - low}}}"]
        write_result(tmp_path / sweep / "run", overrides=override, config=data)
    runs = read_runs(tmp_path)
    assert list(runs["run"]) == ["a/run", "b/c/run"]
    assert list(runs["data.low"]) == [0, 1] and list(runs["data.high"]) == [1, 0]


def test_names_in_a_list_are_joined(tmp_path):
    for name, watch in (("a", ["cce", "dice"]), ("b", ["dice"])):
        override = [f"watch=[{','.join(watch)}]"]
        write_result(tmp_path / name, overrides=override, config={"watch": watch})
    assert list(read_runs(tmp_path)["watch"]) == ["cce, dice", "dice"]


def test_runs_have_settings_results_and_status(tmp_path, caplog):
    write_result(tmp_path / "loss=dice,seed=10", seed=10)
    write_result(tmp_path / "loss=dice,seed=2", seed=2, theta=[0.3, 0.6])
    write_result(tmp_path / "bad", status="failed", error="loss is NaN", metrics=None)
    write_result(tmp_path / "moved", overrides=["data.low=-0.5"], config={"data": {"low": -0.5}})
    write_curves(tmp_path / "killed", range(2))
    hydra = tmp_path / "killed" / ".hydra"
    hydra.mkdir()
    (hydra / "config.yaml").write_text("theta: 0.95\nseed: ${other}\n")
    (hydra / "overrides.yaml").write_text("- loss=cce\n")
    (hydra / "hydra.yaml").write_text("hydra: {runtime: {choices: {loss: cce}}}\n")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"status": "done", "metr')
    (tmp_path / "figures").mkdir()  # no run

    runs = read_runs(tmp_path)
    assert list(runs["run"]) == [
        "bad", "killed", "loss=dice,seed=2", "loss=dice,seed=10", "moved", "torn",
    ]  # fmt: skip
    runs = runs.set_index("run")
    assert runs["status"].to_dict() == {
        "bad": "failed",
        "killed": "unfinished",
        "loss=dice,seed=2": "done",
        "loss=dice,seed=10": "done",
        "moved": "done",
        "torn": "unfinished",
    }
    done = runs.loc["loss=dice,seed=10"]
    assert (done["accuracy"], done["iou"], done["seconds"]) == (0.9, 0.5, 12.34)
    assert (done["loss"], done["optimizer"], done["lr"]) == ("dice", "adam", 1e-3)
    assert not done["batch_norm"]
    assert runs.loc["loss=dice,seed=2", "theta"] == "[0.3, 0.6]"
    assert runs.loc["bad", "error"] == "loss is NaN" and np.isnan(runs.loc["bad", "accuracy"])
    assert runs.loc["killed", "loss"] == "cce" and runs.loc["killed", "theta"] == 0.95
    # If one run alone overrides a key, the others show the value of their configuration.
    assert runs.loc["moved", "data.low"] == -0.5 and done["data.low"] == 0.0
    assert len(caplog.messages) == 1 and "torn" in caplog.messages[0]
    killed = read_runs(tmp_path, details=True).set_index("run").loc["killed"]
    assert killed["loss/cce"] == pytest.approx(1 / 11) and killed["grad_norm/dice"] == 3


def test_summary_round_trips_and_leaves_no_partial_file(tmp_path):
    for seed in range(3):
        write_result(tmp_path / f"seed={seed}", seed=seed, accuracy=0.1 + 0.2 * seed)
    written = write_summary(tmp_path)
    read = pd.read_csv(tmp_path / "summary.csv")
    assert written["error"].isna().all()  # None, which comes back as NaN
    empty = dict.fromkeys(["verdict", "findings", "error"], np.nan)
    pd.testing.assert_frame_equal(read, written.assign(**empty))
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["summary.csv"]


def test_summary_has_all_metrics_and_the_last_values(tmp_path):
    metrics = {
        "val/accuracy": 0.9, "val/dice": 0.8, "val/dice/nucleus": 0.7, "val/loss/dice": 0.2,
        "test/accuracy": 0.6, "test/iou": None, "lr": 1.0, "error": 2.0,
    }  # fmt: skip
    write_curves(tmp_path / "a", range(21))
    write_result(tmp_path / "a", metrics=metrics, watched=last_watched(tmp_path / "a"))
    (tmp_path / "a/curves.f32").unlink()  # not read for this
    write_result(tmp_path / "b", "cce", status="failed", metrics=None)
    runs = write_summary(tmp_path)
    cells = pd.read_csv(tmp_path / "summary.csv").set_index("run")
    assert list(cells.loc[:, "error":])[1:] == [
        "val/dice/nucleus", "val/loss/dice", "test/accuracy", "test/iou",
        *(f"{kind}/{name}" for name in NAMES for kind in ("loss", "grad_norm")),
    ]  # fmt: skip
    row = cells.loc["a"]
    assert (row["accuracy"], row["val/dice/nucleus"], row["test/accuracy"]) == (0.9, 0.7, 0.6)
    assert row["loss/dice"] == pytest.approx(3 / 30) and row["grad_norm/dice_fg"] == 2
    assert cells.loc["b", "val/dice/nucleus":].isna().all() and np.isnan(row["test/iou"])
    # They are no settings, and not in the table on the terminal.
    assert settings(runs) == settings(read_runs(tmp_path)) and swept(runs) == []
    assert len(summary_table(runs).columns) == len(summary_table(read_runs(tmp_path)).columns)
    assert all_losses(runs) == NAMES and all_losses(read_runs(tmp_path)) == ["cce", "dice"]


def test_table_names_what_was_swept_and_colours_the_status(tmp_path):
    write_result(tmp_path / "a", seed=1)
    write_result(tmp_path / "b", loss="cce", seed=2, status="failed", error="loss is NaN")
    table = summary_table(read_runs(tmp_path))
    assert [str(c.header) for c in table.columns] == [
        "loss", "θ", "optimiser", "BN", "seed", "Dice", "IoU", "accuracy", "seconds", "status",
        "error",
    ]  # fmt: skip
    text = text_of(table)
    assert "0.9000" in text and "12.3" in text and "loss is NaN" in text
    assert "\x1b[32mdone" in text and "\x1b[1;31mfailed" in text


SHARES = {"val/predicted/class_0": 0.0, "val/predicted/class_1": 1.0}


@pytest.mark.parametrize(
    "stage, shares, verdict",
    [
        ("val", {"class_0": 0.0, "class_1": 1.0}, "constant: foreground"),
        ("val", {"class_0": 1.0, "class_1": 0.0}, "constant: background"),
        ("val", {"class_0": 0.0, "class_1": 0.0, "class_2": 1.0}, "constant: class_2"),
        ("val", {"background": 0.0, "nucleus": 1.0}, "constant: nucleus"),
        ("val", {"a": 1.0, "b": 0.0, "c": 1.0}, "constant: a+c"),  # classes that overlap
        ("val", {"a": 0.0, "b": 0.0}, "constant: background"),
        ("test", {"class_0": 0.0, "class_1": 1.0}, "constant: foreground"),
        ("val", {"class_0": 0.001, "class_1": 0.999}, None),
        ("val", {"class_0": None, "class_1": None}, None),  # NaN: no pixel counts
        ("val", {}, None),  # trained by an earlier version
    ],
)
def test_a_run_that_predicts_one_class_is_named(tmp_path, stage, shares, verdict):
    """Before what the doctor found; also in mode=test, by the metrics of the test."""
    metrics = {f"{stage}/predicted/{name}": share for name, share in shares.items()}
    metrics |= {"val/predicted/class_0": 0.5} if stage == "test" else {}
    collapsed = {"name": "collapsed", "step": 3, "text": "x.", "remedy": "y."}
    for name, findings in (("well", []), ("ill", [collapsed, collapsed | {"name": "floor"}])):
        config = {"mode": "train" if stage == "val" else "test"}
        write_result(tmp_path / name, metrics=metrics, findings=findings, config=config)
    runs = write_summary(tmp_path).set_index("run")
    wanted = {"ill": verdict or "collapsed"} | ({"well": verdict} if verdict else {})
    assert runs["verdict"].dropna().to_dict() == wanted
    assert runs["findings"].dropna().to_dict() == {"ill": "collapsed floor"}
    assert "verdict" in pd.read_csv(tmp_path / "summary.csv")
    assert (verdict or "collapsed") in text_of(summary_table(runs.reset_index()))


def test_with_several_seeds_the_table_has_a_row_for_each_condition(tmp_path):
    for theta, seeds in ((0.05, 3), (0.5, 2)):
        for seed in range(seeds):
            for loss, gain in (("cce", 0.0), ("dice_fg", 0.01)):
                accuracy = 0.9 + gain + seed / 100
                dice = {"val/accuracy": accuracy, "val/dice": accuracy - 0.1, "val/iou": 0.5}
                dice |= SHARES if (loss, theta) == ("dice_fg", 0.05) else {}
                write_result(tmp_path / f"{loss},{theta},{seed}", loss, theta, seed, metrics=dice)
    error = "RuntimeError: a long story of what happened in the last step of this training"
    write_result(tmp_path / "cce,0.5,2", "cce", 0.5, 2, status="failed", error=error)
    write_curves(tmp_path / "killed", range(3))  # it says nothing of its settings
    runs = read_runs(tmp_path)
    for width in (80, 160):
        console = Console(width=width)
        with console.capture() as printed:
            print_summary(console, runs)
        table, stopped = printed.get().split("\n\n")
        head, _, *rows = (line.rstrip() for line in table.splitlines())
        assert head.split()[:4] == ["loss", "θ", "runs", "Dice"]
        cells = [row.split("  ") for row in rows]
        few = [[cell.strip() for cell in row if cell.strip()] for row in cells][:4]
        assert [row[:4] for row in few] == [
            ["cce", "0.05", "3", "0.8100 (0.8000 to 0.8200)"],
            ["cce", "0.5", "2 of 3", "0.8050 (0.8000 to 0.8100)"],
            ["dice_fg", "0.05", "3", "0.8200 (0.8100 to 0.8300)"],
            ["dice_fg", "0.5", "2", "0.8150 (0.8100 to 0.8200)"],
        ]
        verdicts = [row[-1] for row in few]
        assert verdicts == ["–", "–", "constant: foreground", "–"]
        assert max(map(len, printed.get().splitlines())) <= width
        assert " ".join(stopped.split()).startswith("Not done, so in no mean: run status error")
        assert re.search(r"(?m)^cce,0\.5,2 +failed +RuntimeError: a long", stopped)
        assert re.search(r"(?m)^killed +unfinished", stopped)
    assert "0.9050 (0.9000 to 0.9100)" in table  # with room also the accuracy and its range
    assert len(write_summary(tmp_path)) == len(pd.read_csv(tmp_path / "summary.csv")) == 12


def test_a_condition_of_which_some_runs_are_constant(tmp_path):
    for seed in range(3):
        metrics = {"val/dice": 0.5} | (SHARES if seed else {})
        write_result(tmp_path / f"{seed}", seed=seed, metrics=metrics)
    assert cell_table(read_runs(tmp_path))["verdict"].tolist() == ["2 of 3 constant: foreground"]


@pytest.mark.parametrize(
    "paths, shown",
    [
        (["s/loss=cce", "s/loss=dice"], ["loss=cce", "loss=dice"]),
        (["s1/a", "s2/a"], ["s1/a", "s2/a"]),
        (["/s/a/checkpoints/step=1.ckpt", "/s/b"], ["a/checkpoints/step=1.ckpt", "b"]),
        (["/s/a", "s/b"], ["/s/a", "s/b"]),
    ],
)
def test_checkpoints_are_named_without_what_they_share(tmp_path, paths, shown):
    """In the table and in words; summary.csv has the whole paths."""
    for i, path in enumerate(paths):
        config = {"mode": "test", "theta": 0.5, "checkpoint": path}
        shares = {f"test/predicted/class_{c}": float(c == i) for c in (0, 1)}
        overrides = ["mode=test", f"checkpoint='{path}'"]
        write_result(tmp_path / str(i), config=config, metrics=shares, overrides=overrides)
    runs = write_summary(tmp_path)
    assert runs["checkpoint"].tolist() == paths
    console = Console(width=80)
    with console.capture() as printed:
        print_summary(console, runs)
    assert [line.split()[2] for line in printed.get().splitlines()[2:4]] == shown
    assert in_words(runs) == [
        f"loss=dice predicts background everywhere at checkpoint={shown[0]}.",
        f"loss=dice predicts foreground everywhere at checkpoint={shown[1]}.",
    ]


def test_many_runs_that_are_not_done_are_counted(tmp_path):
    for seed in range(40):
        write_result(tmp_path / f"run{seed}", seed=seed, status="unfinished")
    console = Console(width=80)
    with console.capture() as printed:
        print_summary(console, read_runs(tmp_path))
    assert printed.get().count("unfinished") == 30 and "and 10 more: summary.csv" in printed.get()


@pytest.mark.parametrize("width", [80, 160])
def test_each_status_is_shown_however_many_settings_were_swept(tmp_path, width):
    names = [f"trainer.setting_number_{i}" for i in range(20)]
    for seed, status in enumerate(["done", "failed", "unfinished"]):
        overrides = [f"{name}={seed}" for name in names]
        write_result(tmp_path / f"{seed}", seed=seed, overrides=overrides, status=status)
    console = Console(width=width)
    with console.capture() as printed:
        console.print(summary_table(read_runs(tmp_path), width))
    words = printed.get().split()
    assert {"done", "failed", "unfinished", "Dice"} <= set(words)
    left_out = " ".join(words).partition("Left out (too wide): ")[2].split(", ")
    assert names[-1] in left_out and "Dice" not in left_out
    assert max(map(len, printed.get().splitlines())) <= width


def test_a_run_without_a_config_sweeps_nothing(tmp_path):
    """It was killed before it wrote one. What the others share is no column because of it."""
    common = ["loss=dice", "data.image_size=8", "trainer.max_steps=60"]
    for seed in (1, 2):
        write_result(tmp_path / f"{seed}", seed=seed, overrides=[*common, f"seed={seed}"])
    before = list(read_runs(tmp_path)), swept(read_runs(tmp_path))
    write_curves(tmp_path / "killed", range(3))
    runs = read_runs(tmp_path)
    assert list(runs["status"]) == ["done", "done", "unfinished"]
    assert (list(runs), swept(runs)) == before
    assert swept(runs) == ["seed"]


def test_a_run_whose_settings_were_refused_has_those_of_its_config(tmp_path):
    """As a search can have: its `result.json` says why, and holds no config."""
    refused = {"config": {}, "metrics": {}, "status": "failed", "error": "x"}
    for number in (1, 2):
        write_result(tmp_path / f"{number}", overrides=["optimizer.lr=-1"], **refused)
    (tmp_path / "1" / ".hydra").mkdir()
    (tmp_path / "1" / ".hydra" / "config.yaml").write_text("theta: 0.7\noptimizer: {lr: -1}\n")
    runs = read_runs(tmp_path)
    assert list(runs["status"]) == ["failed", "failed"]
    assert list(runs["error"]) == ["x", "x"]
    assert (runs["theta"][0], runs["lr"][0]) == (0.7, -1)


def test_strings_from_disk_are_shown_as_text(tmp_path):
    evil = "[red]x[/red]|<b>\x1b[2J\x1b]0;title\x07\r\nnext"
    write_result(tmp_path / "a", loss=evil, error=evil, status="failed")
    write_result(tmp_path / "b")
    runs = read_runs(tmp_path)
    text = text_of(summary_table(runs))
    assert "[red]x[/red]|<b>" in text  # not taken for markup
    assert "\x1b[2J" not in text and "\x1b]" not in text and "\x07" not in text and "\r" not in text
    row = next(line for line in markdown_table(cell_table(runs)).splitlines() if "red" in line)
    assert row.startswith(r"| \[red\]x\[/red\]\|\<b\>")
    formula = "$\\frac$ " + evil  # a broken one
    figure = figures.draw({formula: [curves().add_suffix(formula)]}, title=formula)
    figure.canvas.draw()
    runs = pd.DataFrame({formula: [1, 2], "loss": formula, "accuracy": 0.9, "dice": 0.8})
    dependence.draw(runs, formula, formula, loss_looks([formula])).canvas.draw()
    assert format_value(evil).count("\N{REPLACEMENT CHARACTER}") == 5


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "null", '"x"', "\xff", '{"config": 3}', "{}",
        '{"status": "done", "config": {"theta": ' + 10**5 * "[" + 10**5 * "]" + "}}",
    ],
    ids=lambda content: content[:60].strip(),
)  # fmt: skip
def test_any_result_file_is_survived(tmp_path, caplog, main, content):
    write_result(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_bytes(content.encode("latin-1"))
    assert main(tmp_path) == 0
    assert list(read_runs(tmp_path)["status"]) == ["done", "unfinished"]
    assert len(caplog.messages) == 2 and len(set(caplog.messages)) == 1
    assert f"{tmp_path / 'b/result.json'} cannot be read (" in caplog.messages[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"status": ["done"]},
        {"status": None},
        {"error": {"a": 1}},
        {"seconds": "12.5"},
        {"seconds": 10**400},
        {"overrides": {"loss": "dice"}},
        {"overrides": ["loss=dice", ["seed=1"], None]},
        {"choices": "dice"},
        {"choices": {"loss": 3}},
        {"config": [1, 2]},
        {"metrics": [0.9]},
        {"metrics": {"val/accuracy": "0.9"}},
        {"metrics": {"val/accuracy": True}},
        {"metrics": {"val/dice": -(10**400)}},
        {"metrics": {"val/dice/class_1": "0.9"}},
        {"watched": {"loss/dice": "0.9"}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_result_of_other_types_is_named_and_counts_as_unfinished(tmp_path, caplog, changes):
    """The odd run is shown as unfinished and changes nothing about the other runs."""
    for loss in ("dice", "cce"):
        write_result(tmp_path / loss, loss)
    before = compare_losses(read_runs(tmp_path))
    write_result(tmp_path / "odd", **changes)
    runs = write_summary(tmp_path).set_index("run")
    assert runs["status"].to_dict() == {"cce": "done", "dice": "done", "odd": "unfinished"}
    assert np.isnan(runs.loc["odd", "accuracy"])
    pd.testing.assert_frame_equal(compare_losses(runs.reset_index()), before)
    [message] = caplog.messages
    assert message.startswith(f"{tmp_path / 'odd/result.json'} cannot be read (")
    assert message.endswith("; counted as unfinished")
    assert len(message) < len(str(tmp_path)) + 300


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"theta": 10**400, "seed": -(10**400)}},
        {"metrics": {"val/accuracy": float("nan"), "val/dice": float("inf")}},
        {"error": "\ud800", "status": "\udcff", "choices": {"loss": "\ud800"}},
        {"overrides": ["\ud800=\ud801", "=", "", "a", "{:}"], "config": {"theta": "\udfff"}},
        {"config": {"theta": {"a": [1]}, "seed": [[1], None]}, "choices": {}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_odd_values_are_shown(tmp_path, main, caplog, changes):
    for loss in ("dice", "cce"):
        write_result(tmp_path / loss, loss)
    write_result(tmp_path / "odd", **changes)
    write_curves(tmp_path / "odd", range(3))
    assert main(tmp_path) == 0 and not caplog.messages
    assert len(pd.read_csv(tmp_path / "summary.csv")) == 3
    assert (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 2_000, "theta: ${a.${b}",
        "theta: !!int ''", "theta: !!bool x", "theta: !!timestamp x",
        "theta: !!python/tuple [1]", "\x00", "{", "pipe",
    ],
    ids=lambda content: content[:30],
)  # fmt: skip
def test_a_config_file_that_hydra_did_not_write_is_survived(tmp_path, caplog, no_hang, content):
    write_result(tmp_path / "a")
    config = tmp_path / "b/.hydra/config.yaml"
    config.parent.mkdir(parents=True)
    os.mkfifo(config) if content == "pipe" else config.write_text(content)
    runs = write_summary(tmp_path)
    assert list(runs["status"]) == ["done", "unfinished"]
    if content == "theta: ${a.${b}":  # ordinary text
        assert not caplog.messages and runs["theta"][1] == "${a.${b}"
    else:
        [message] = caplog.messages
        assert message.startswith(f"{tmp_path / 'b/.hydra'}: unreadable, settings left out")


def test_any_folder_name_is_shown_as_text(tmp_path, main, capsys, caplog):
    names = ["x\x1b[31m\x07", "x\ny", "[red]x[bold]", "a|b", "=1+1", " x", "x" * 255]
    write_result(tmp_path / "a")
    for name in names:
        write_result(tmp_path / name, "cce", status="failed", error="x")
    for run in ("a", *names):
        write_curves(tmp_path / run, range(3))
    assert main(tmp_path) == 0 and not caplog.messages
    [figure] = (tmp_path / "figures").iterdir()
    assert figure.stat().st_size
    shown = [
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
        for name in names
    ]
    runs = pd.read_csv(tmp_path / "summary.csv")
    assert set(runs["run"]) == {"a"} | {"'=1+1" if name == "=1+1" else name for name in shown}
    page = (tmp_path / "report.md").read_text()
    for name in shown:
        assert re.sub(r"([|\[\]])", r"\\\1", f"- {name}: failed") in page
    assert "\x1b" not in capsys.readouterr().out


def test_a_folder_name_that_is_no_text_is_named_and_left_out(tmp_path, main, caplog):
    write_result(tmp_path / "a")
    write_result(Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff\xfe")))
    assert main(tmp_path) == 0
    assert list(pd.read_csv(tmp_path / "summary.csv")["run"]) == ["a"]
    assert caplog.messages == [f"{tmp_path}/x\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}: "
                               "left out, its name is not UTF-8"]  # fmt: skip
    sweep = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    write_result(sweep / "b")
    assert main(sweep) == 0 and (sweep / "report.md").exists()


def test_links_are_not_followed(tmp_path, caplog, no_hang):
    """A link to a run would count it twice; two links to a folder above would never end."""
    sweep = tmp_path / "sweep"
    write_result(sweep / "a")
    write_result(sweep / "b", "cce")
    (sweep / "a/newest").symlink_to(".")  # links within a run do not matter
    (sweep / "loop").symlink_to("loop")
    (sweep / "dangling").symlink_to("nowhere")
    links = {"latest": "b", "up": "..", "self": ".", "also": sweep}
    for name, target in links.items():
        (sweep / name).symlink_to(target)
    for folder, prefix in ((sweep, ""), (tmp_path, "sweep/")):
        caplog.clear()
        assert list(read_runs(folder)["run"]) == [f"{prefix}a", f"{prefix}b"]
        assert set(caplog.messages) == {f"{sweep / name}: left out, a link" for name in links}
    (tmp_path / "given").symlink_to(sweep)  # the folder that is asked for may be a link
    assert len(read_runs(tmp_path / "given")) == 2


def test_nothing_is_written_through_a_link(tmp_path, main, capsys):
    sweep, elsewhere = tmp_path / "sweep", tmp_path / "elsewhere"
    write_curves(sweep / "a", range(3))
    write_result(sweep / "a")
    elsewhere.mkdir()
    for name in ("figures/losses.png", "summary.csv", "report.md"):
        file = elsewhere / Path(name).name
        file.write_text("precious")
        (sweep / name).parent.mkdir(exist_ok=True)
        (sweep / name).symlink_to(file)
    assert main(sweep) == 0
    assert (sweep / "figures/losses.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(sweep / "figures")
    (sweep / "figures").symlink_to(elsewhere)
    assert main(sweep) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"report.py: {sweep / 'figures'} is a link; figures are not written through it"
    )
    assert [file.read_text() for file in elsewhere.iterdir()] == ["precious"] * 3


def test_a_sweep_nested_deeper_than_python_recurses(tmp_path, monkeypatch):
    write_result(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        assert list(read_runs(tmp_path)["run"]) == ["a"]
    finally:  # pytest uses shutil.rmtree, which would recurse, too
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_cells_are_no_formulas_and_numbers_stay_numbers(tmp_path):
    formulas = ["=cmd|' /C calc'!A0", "+1+cmd", "-x", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"]
    for i, text in enumerate(formulas):
        write_result(tmp_path / f"{i}", text, theta=text, status=text, error=text,
                     overrides=[f"{text}={i}", f"@{i}=-x"])  # fmt: skip
    write_summary(tmp_path)
    cells = pd.read_csv(tmp_path / "summary.csv", dtype=str)
    texts = [*cells, *cells.stack().dropna()]
    assert "'=cmd|' /C calc'!A0" in texts
    assert not [text for text in texts if text.strip()[:1] in [*"=+@＝"] or text == "-x"]
    assert not {"\t", "\r", "\n"} & set("".join(texts))

    for i, low in enumerate([-0.5, -2, 1e-7]):
        write_result(tmp_path / f"n/low={low}", theta=-0.25, accuracy=-1e-9 - i, seed=-i,
                     overrides=[f"data.low={low}"], config={"theta": -0.25, "seed": -i,
                     "data": {"low": low}, "optimizer": {"lr": 1e-3}})  # fmt: skip
    written = write_summary(tmp_path / "n")
    read = pd.read_csv(tmp_path / "n/summary.csv")
    assert dict(zip(read["seed"], read["data.low"], strict=True)) == {0: -0.5, -1: -2, -2: 1e-7}
    empty = {c: np.nan for c in written if written[c].isna().all()}  # None comes back as NaN
    pd.testing.assert_frame_equal(read, written.assign(**empty))


def test_an_unfinished_run_is_not_done(tmp_path, main):
    """A run whose time was up has metrics, but of fewer steps than were asked for."""
    write_result(tmp_path / "a", "dice", accuracy=0.8)
    write_result(tmp_path / "b", "cce", accuracy=0.7)
    write_result(tmp_path / "c", "dice", accuracy=0.1, status="unfinished", error="time is up")
    runs = read_runs(tmp_path)
    assert "\x1b[33munfinished" in text_of(summary_table(runs))
    cells = cell_table(runs).set_index("loss")
    assert cells.loc["dice", "accuracy"] == "0.8000" and cells.loc["dice", "runs"] == "1 of 2"
    assert cells.loc["cce", "runs"] == "1"
    assert compare_losses(runs)["accuracy"].tolist() == [pytest.approx(-0.1)]
    assert main(tmp_path) == 0
    page = (tmp_path / "report.md").read_text()
    assert "Runs: 2 done, 1 unfinished." in page
    assert "- c: unfinished, time is up" in page


# --- compare_losses ------------------------------------------------------------------------------


def test_pairs_are_matched_on_everything_but_the_loss(tmp_path):
    # dice − cce is 0.02, 0.04, 0.06 over the matched runs. The unmatched run would change the mean.
    for i, (theta, seed) in enumerate([(0.05, 0), (0.05, 1), (0.5, 0)]):
        write_result(tmp_path / f"c{i}", "cce", theta, seed, accuracy=0.5 + 0.1 * i)
        write_result(tmp_path / f"d{i}", "dice", theta, seed, accuracy=0.52 + 0.12 * i)
    write_result(tmp_path / "unmatched", "dice", 0.95, 0, accuracy=0.0)
    write_result(tmp_path / "failed", "dice", 0.05, 0, accuracy=0.0, status="failed")
    (row,) = compare_losses(read_runs(tmp_path), pooled=True).to_dict("records")
    assert (row["loss"], row["other"], row["pairs"]) == ("cce", "dice", 3)
    assert row["accuracy"] == pytest.approx(-0.04)
    # By hand: t(2 degrees of freedom) = 4.302653, standard error 0.02 / √3.
    half = 4.302653 * 0.02 / 3**0.5
    assert row["accuracy_low"] == pytest.approx(-0.04 - half, abs=1e-6)
    assert row["dice_high"] == pytest.approx(-0.04 + half, abs=1e-6)


def opposite(tmp_path, seeds=3):
    """θ = 0.5: dice − cce is −0.2 and a little; θ = 0.95: +0.2 and a little. dice_fg lacks 0.95."""
    for theta, sign in ((0.5, -1), (0.95, 1)):
        for seed in range(seeds):
            for loss, gain in (("cce", 0), ("dice", sign * (0.2 + seed / 100)), ("dice_fg", 0.1)):
                if (loss, theta) != ("dice_fg", 0.95):
                    write_result(tmp_path / f"{loss},{theta},{seed}", loss, theta, seed,
                                 accuracy=0.5 + seed / 10 + gain)  # fmt: skip
    return read_runs(tmp_path)


def test_losses_are_compared_in_each_condition(tmp_path):
    """Differences of opposite signs are seen in each condition, and cancel in the pooled table."""
    runs = opposite(tmp_path)
    table = compare_losses(runs).set_index(["theta", "loss", "other"])
    assert list(table.index) == [
        (0.5, "cce", "dice_fg"), (0.5, "cce", "dice"), (0.5, "dice_fg", "dice"),
        (0.95, "cce", "dice"),
    ]  # fmt: skip
    assert set(table["pairs"]) == {3}
    half = 4.302653 * 0.01 / 3**0.5  # t with 2 degrees of freedom
    for theta, mean in ((0.5, 0.21), (0.95, -0.21)):
        row = table.loc[theta, "cce", "dice"]
        assert row["accuracy"] == pytest.approx(mean)
        assert row["accuracy_low"] == pytest.approx(mean - half, abs=1e-6)
        assert row["accuracy_high"] == pytest.approx(mean + half, abs=1e-6)
    # Uncorrected, by scipy; of four p-values the smallest is taken four times, and so on.
    sample = [0.2, 0.21, 0.22]
    p = [scipy.stats.ttest_1samp(x, 0).pvalue for x in (sample, sample, [0.3, 0.31, 0.32])]
    assert table.loc[(0.5, "cce", "dice_fg"), "accuracy_p"] < 1e-6  # -0.1 for each seed
    assert table.loc[(0.5, "dice_fg", "dice"), "accuracy_p"] == pytest.approx(3 * p[2])
    assert table.loc[(0.5, "cce", "dice"), "accuracy_p"] == pytest.approx(2 * p[0])
    assert table.loc[(0.95, "cce", "dice"), "accuracy_p"] == pytest.approx(2 * p[1])

    pooled = compare_losses(runs, pooled=True).set_index(["loss", "other"]).loc["cce", "dice"]
    assert pooled["pairs"] == 6 and pooled["accuracy"] == pytest.approx(0)
    assert pooled["accuracy_p"] == pytest.approx(1)
    assert pooled["accuracy_low"] < -0.2 < 0.2 < pooled["accuracy_high"]


def test_one_seed_shows_differences_and_dashes(tmp_path):
    table = compare_losses(opposite(tmp_path, seeds=1))
    assert table["accuracy_p"].isna().all() and table["accuracy_low"].isna().all()
    cells = comparison_table(table)
    assert list(cells) == ["θ", "losses", "n", "Dice ± 95 % (p)", "accuracy ± 95 % (p)"]
    assert cells["accuracy ± 95 % (p)"].tolist() == [
        "-0.1000 ± – (–)", "+0.2000 ± – (–)", "+0.3000 ± – (–)", "-0.2000 ± – (–)"
    ]  # fmt: skip


def test_equal_runs_are_no_evidence(tmp_path):
    for loss in ("cce", "dice"):
        for seed in range(3):
            write_result(tmp_path / f"{loss}{seed}", loss, seed=seed)
    (row,) = compare_losses(read_runs(tmp_path)).to_dict("records")
    assert (row["accuracy"], row["accuracy_low"], row["accuracy_high"]) == (0, 0, 0)
    assert row["accuracy_p"] == 1


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; never decreasing.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.4, 0.9]) == pytest.approx([1, 1, 1])
    # A row without a test is none of the tests.
    corrected = holm([np.nan, 0.02, np.nan, 0.03])
    assert corrected[[1, 3]] == pytest.approx([0.04, 0.04]) and np.isnan(corrected[[0, 2]]).all()
    assert len(holm([])) == 0


def test_holm_equals_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        p = rng.uniform(size=size) ** 3
        p[: size // 2] = p[size // 2 - 1]  # ties
        assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_one_pair_has_no_interval_and_one_loss_no_pairs(tmp_path):
    write_result(tmp_path / "a", "cce")
    assert compare_losses(read_runs(tmp_path)).empty
    write_result(tmp_path / "b", "dice", accuracy=0.8)
    (row,) = compare_losses(read_runs(tmp_path)).to_dict("records")
    assert row["pairs"] == 1 and row["accuracy"] == pytest.approx(0.1)
    assert np.isnan(row["accuracy_low"])
    write_result(tmp_path / "a", "cce", status="failed")
    write_result(tmp_path / "b", "dice", status="failed")
    assert compare_losses(read_runs(tmp_path)).empty


# --- Figures -------------------------------------------------------------------------------------


def curves(steps: int = 400, scale: float = 1.0) -> pd.DataFrame:
    """Scalars as `read_curves` gives them: observed every other step, validated every 50th."""
    index = pd.Index(range(steps), name="step", dtype=np.int64)
    frame = pd.DataFrame(index=index)
    for i, name in enumerate(NAMES, start=1):
        frame[f"loss/{name}"] = scale * i / (1 + index / 50)
        frame[f"grad_norm/{name}"] = scale * i
    frame[index % 2 == 1] = np.nan
    frame["val/accuracy"] = np.where(index % 50 == 0, 0.95 + index / 1e5, np.nan)
    return frame


def lines(ax) -> dict:
    return {line.get_color(): line for line in ax.get_lines()}


def test_a_figure_has_the_studys_form():
    figure = figures.draw(
        {"cce": [curves(), curves(scale=2.0)], "dice": [curves(300)]}, title="θ = 0.5", study=True
    )
    above, above2, below, below2, right, right2 = figure.axes
    assert [ax.get_title() for ax in (above, above2)] == ["trained with cce", "trained with dice"]
    assert (above.get_ylim(), below.get_ylim(), right.get_ylim()) == ((0, 4), (0, 1), (0.9, 1.012))
    assert above2.get_ylim() == (0, 4) and right2.get_ylim() == (0.9, 1.012)
    assert above.get_ylabel() == "global gradient norm" and below.get_ylabel() == "loss"
    assert right2.get_ylabel() == "validation accuracy" and below.get_xlabel() == "step"
    assert figure.get_suptitle() == "θ = 0.5"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "cce", "dice_fg", "dice", "validation accuracy", "range of 2 runs",
    ]  # fmt: skip
    # Two runs are shown as their mean with the range shaded, a single run without shading.
    looks = loss_looks(NAMES)
    cce = lines(above)[looks["cce"]["color"]]
    assert (cce.get_ydata() == 1.5).all() and list(cce.get_xdata()) == list(range(0, 400, 2))
    assert len(above.collections) == 3 and len(above2.collections) == 0
    shade = above.collections[0].get_datalim(above.transData)
    assert (shade.y0, shade.y1) == (1, 2)
    # The trained loss is the thicker line.
    assert cce.get_linewidth() > lines(above2)[looks["cce"]["color"]].get_linewidth()
    (accuracy,) = right.get_lines()
    assert list(accuracy.get_xdata()) == list(range(0, 400, 50))


def test_fitted_axes_show_everything():
    tall = curves(scale=9.0)
    tall["val/accuracy"] -= 0.9
    above, below, right = figures.draw({"cce": [tall]}).axes
    assert above.get_ylim()[0] == 0 and above.get_ylim()[1] > 27
    assert below.get_ylim()[1] > 26
    assert right.get_ylim()[0] < 0.05 and right.get_ylim()[1] == 1


def test_the_accuracy_has_no_axis_beyond_1():
    """Its line at 1 is as wide as elsewhere; on the study's axes a line outside them is cut off."""
    perfect = curves()
    perfect["val/accuracy"] = perfect["val/accuracy"].where(perfect["val/accuracy"].isna(), 1.0)
    for study, top in ((False, 1), (True, 1.012)):
        *_, right = figures.draw({"cce": [perfect]}, study=study).axes
        [line] = right.get_lines()
        assert right.get_ylim()[1] == top and line.get_clip_on() == study


def test_figures_of_ones_own_images_have_no_theta(tmp_path):
    for lr in (1e-3, 1e-2):
        config = {"theta": None, "model": {}, "optimizer": {"lr": lr}}
        write_result(tmp_path / f"{lr}", config=config)
        write_curves(tmp_path / f"{lr}", range(3))
    runs = read_runs(tmp_path)
    titles = [*figures.plot_sweep(tmp_path, runs), *dependence.plot_dependence(tmp_path, runs)]
    assert titles == [
        "optimiser = adam   lr = 0.001", "optimiser = adam   lr = 0.01", "Dice and accuracy over lr"
    ]  # fmt: skip


def test_moving_mean_is_the_studys_and_shorter_for_short_runs():
    values = np.random.default_rng(0).normal(size=10_001)
    smooth = figures.moving_mean(pd.DataFrame({"x": values}), 201)["x"]
    assert smooth[5000] == pytest.approx(values[4900:5101].mean())
    assert smooth[0] == pytest.approx(values[:101].mean())
    short = figures.moving_mean(pd.DataFrame({"x": values[:500]}), 201)["x"]
    assert short[100] == pytest.approx(values[95:106].mean())  # 11 of 500


def test_looks_are_the_same_everywhere_and_differ_within_a_figure():
    many = ["cce", "dice", "tversky", *(f"loss_{i}" for i in range(13))]
    looks = loss_looks(many)
    assert len({str(look) for look in looks.values()}) == 16
    assert looks["cce"] == loss_looks(["cce"])["cce"]
    alone = loss_looks(["tversky"])["tversky"]
    assert loss_looks(["dice", "tversky", "cce"])["tversky"] == alone
    assert alone not in loss_looks(KNOWN_LOSSES).values()


@pytest.mark.parametrize("known", [0, 1, 5])
def test_ten_losses_have_ten_colours(known):
    names = [*KNOWN_LOSSES[:known], *(f"loss_{i}" for i in range(10 - known))]
    assert len({look["color"] for look in loss_looks(names).values()}) == 10


def test_a_report_gives_a_loss_one_look_in_all_figures(tmp_path, main, monkeypatch):
    """Each θ has its own losses; two of them would have the same look in figures of their own."""
    others = [f"loss_{i}" for i in range(20)]
    looks = {name: loss_looks([name])[name]["color"] for name in others}
    first = others[0]
    second = next(n for n in others[1:] if looks[n] == looks[first])
    for theta, loss in ((0.05, first), (0.5, second)):
        write_result(tmp_path / f"{theta}", loss, theta)
        Curves(tmp_path / f"{theta}").append([f"loss/{loss}"], np.zeros(1, int), np.ones((1, 1)))
    drawn = {}

    def draw(runs, *, looks, **options):
        drawn.update({name: looks[name]["color"] for name in runs})
        return original(runs, looks=looks, **options)

    original = figures.draw
    monkeypatch.setattr(figures, "draw", draw)
    assert main(tmp_path) == 0
    assert len(drawn) == 2 and drawn[first] != drawn[second]


def test_curves_of_a_short_unvalidated_or_diverged_run(tmp_path):
    plot = tmp_path / "curves.png"
    figures.plot_curves(curves(3).drop(columns="val/accuracy"), plot, title="a run", trained="dice")
    assert plot.read_bytes().startswith(b"\x89PNG")
    plot.unlink()
    diverged = curves()
    diverged.loc[100:, :] = np.nan
    diverged.loc[90:100, "loss/cce"] = np.inf
    figures.plot_curves(diverged, plot)
    assert plot.exists()


def test_a_figure_per_combination_or_per_seed(tmp_path):
    for loss in ("cce", "dice"):
        for theta in (0.05, 0.5):
            for seed in (0, 1):
                run = tmp_path / f"loss={loss},theta={theta},seed={seed}"
                write_result(run, loss, theta, seed)
                write_curves(run, range(12))
    shutil.rmtree(tmp_path / "loss=dice,theta=0.5,seed=1")
    write_result(tmp_path / "empty", "cce", 0.95)  # failed before its first step
    runs = read_runs(tmp_path)
    paths = figures.plot_sweep(tmp_path, runs)
    assert [path.name for path in paths.values()] == ["theta=0.05.png", "theta=0.5.png"]
    assert list(paths)[0] == "θ = 0.05 (95 % foreground)   optimiser = adam   BN = off"
    assert all(path.parent == tmp_path / "figures" and path.exists() for path in paths.values())
    few = runs[(runs["theta"] == 0.05) & (runs["loss"] == "dice")]
    paths = figures.plot_sweep(tmp_path, few, seeds=True)
    assert [path.name for path in paths.values()] == ["seed=0.png", "seed=1.png"]


def test_figures_are_of_the_runs_that_are_done_and_the_others_are_named(
    tmp_path, main, monkeypatch, capsys
):
    for seed in (0, 1):
        write_result(tmp_path / f"done,{seed}", "dice", seed=seed, accuracy=0.9 + seed / 10)
        write_curves(tmp_path / f"done,{seed}", range(12), scale=1 + seed)
    write_result(tmp_path / "failed", "dice", seed=2, status="failed", error="NaN")
    write_result(tmp_path / "short", "cce", seed=0, status="unfinished", error="time is up")
    (tmp_path / "killed").mkdir()  # without result.json
    for name in ("failed", "short", "killed"):
        write_curves(tmp_path / name, range(5), scale=100)
    drawn, draw = [], figures.draw
    monkeypatch.setattr(figures, "draw", lambda *args, **o: drawn.append(draw(*args, **o)))
    monkeypatch.setattr(figures, "draw_files", lambda figure, stem, _: figure() or stem)
    assert main(tmp_path) == 0
    [figure] = drawn
    above, below, right = figure.axes
    assert above.get_title() == "trained with dice"
    line = lines(above)[loss_looks(NAMES)["cce"]["color"]]
    assert line.get_ydata().tolist() == [1.5] * 12
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-1] == "range of 2 runs"
    # Both end at 1 - 0.3 / 11, whatever result.json says.
    assert right.get_title() == "final accuracy 0.9727 (0.9727 to 0.9727)"
    shown = capsys.readouterr().out
    names = "failed (failed), killed (unfinished), short (unfinished)"
    assert shown.count(f"\nNot done, so in no mean, comparison or figure: {names}\n") == 1
    page = (tmp_path / "report.md").read_text()
    assert "Runs: 2 done, 2 unfinished, 1 failed." in page
    for name in ("failed: failed, NaN", "killed: unfinished", "short: unfinished, time is up"):
        assert page.count(f"- {name}\n") == 1

    for name in ("done,0", "done,1"):
        write_result(tmp_path / name, "dice", status="failed")
    drawn.clear()
    assert main(tmp_path) == 0 and not drawn


def test_dice_is_drawn_where_it_is_recorded():
    """The accuracy of a constant answer is high; only figures of the study show it."""
    frame = curves().assign(**{"val/dice": curves()["val/accuracy"] / 2})
    for study, name in ((False, "Dice"), (True, "accuracy")):
        *_, right = figures.draw({"cce": [frame]}, study=study).axes
        tag = f"val/{name.lower()}"
        assert right.get_ylabel() == f"validation {name}"
        assert right.get_title() == f"final {name} {frame[tag].dropna().iloc[-1]:.4f}"
        [line] = right.get_lines()
        assert line.get_ydata().tolist() == frame[tag].dropna().tolist()


def test_a_mean_ends_where_the_first_of_its_runs_ends():
    """Early stopping ends runs that are done at different steps."""
    runs = {"cce": [curves(), curves(300, scale=2.0)], "dice": [curves(200)] * 3}
    figure = figures.draw(runs)
    above, _, _, _, right, _ = figure.axes
    line = lines(above)[loss_looks(NAMES)["cce"]["color"]]
    assert line.get_xdata().tolist() == list(range(0, 300, 2)) and (line.get_ydata() == 1.5).all()
    shade = above.collections[0].get_datalim(above.transData)
    assert (shade.y0, shade.y1, shade.x1) == (1, 2, 298)
    [accuracy] = right.get_lines()
    assert accuracy.get_xdata().tolist() == list(range(0, 300, 50))
    assert right.get_title() == "final accuracy 0.9530 (0.9525 to 0.9535)"
    assert figure.legends[0].get_texts()[-1].get_text() == "range of 2 to 3 runs"


def test_a_figure_that_cannot_be_drawn_is_named(tmp_path, caplog):
    """Matplotlib has no axis for a difference that is infinite."""
    for theta in (0.05, 0.5):
        write_result(tmp_path / f"{theta}", theta=theta)
        write_curves(tmp_path / f"{theta}", range(3))
    for step, value in enumerate([1e308, -1e308], start=3):
        Curves(tmp_path / "0.5").add_metrics(step, {"loss/dice": value})
    paths = figures.plot_sweep(tmp_path, read_runs(tmp_path))
    assert [path.name for path in paths.values()] == ["theta=0.05.png"]
    [message] = caplog.messages
    assert message.startswith(f"{tmp_path / 'figures/theta=0.5.png'}: not drawn")


def test_dice_and_accuracy_over_a_swept_number(tmp_path):
    accuracy = {0.05: [0.95, 0.97], 0.5: [0.6, 0.9], 0.95: [0.5]}
    for theta, values in accuracy.items():
        for seed, value in enumerate(values):
            write_result(tmp_path / f"d{theta},{seed}", "dice", theta, seed, accuracy=value)
    write_result(tmp_path / "cce", "cce", 0.05, accuracy=0.7)
    write_result(tmp_path / "failed", "cce", 0.5, accuracy=0.1, status="failed")
    runs = read_runs(tmp_path)
    done = runs[runs["status"] == "done"]
    assert dependence.swept_number(done) == "theta"
    looks = loss_looks(["cce", "dice"])
    left, right = dependence.draw(done, "theta", "title", looks).axes
    assert [ax.get_ylabel() for ax in (left, right)] == ["validation Dice", "validation accuracy"]
    cce, dice = right.containers
    assert (cce.get_label(), dice.get_label()) == ("cce", "dice")
    line, _, (bars,) = dice.lines
    assert line.get_color() == looks["dice"]["color"]
    assert line.get_xydata() == pytest.approx(np.array([[0.05, 0.96], [0.5, 0.75], [0.95, 0.5]]))
    # By hand: t(1 degree of freedom) = 12.7062, and 12.7062 * 0.01 is beyond 1. One seed: no bar.
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx(e) for e in ([0.96 - 0.127062, 1], [0, 1], [0.5, 0.5])]
    assert cce.lines[0].get_xydata().tolist() == [[0.05, 0.7]]
    assert right.get_ylim() == (0, 1)  # all of the bars, and no accuracy that there is not
    (path,) = dependence.plot_dependence(tmp_path, runs, formats=["svg", "png"]).values()
    assert path == tmp_path / "figures/over_theta.svg" and path.with_suffix(".png").exists()


def test_the_number_that_a_figure_is_over(tmp_path):
    def number(*overrides, **columns):
        runs = pd.DataFrame({"run": "r", "loss": "dice", **columns, "dice": 0.5})
        return dependence.swept_number(runs)

    assert number(theta=[0.5, 0.5], seed=[0, 1]) is None
    assert number(theta=[0.5, 0.5], lr=[0.1, 0.2]) == "lr"
    assert number(theta=[0.5, 0.9], lr=[0.1, 0.2]) == "theta"
    assert number(lr=[0.1, 0.2], width=[8, 16]) is None  # neither is the one to choose
    assert number(theta=["[0.3, 0.6]", 0.5]) is None
    assert number(batch_norm=[True, False], lr=[0.1, np.nan]) is None


def test_a_figure_over_a_number_for_each_of_the_other_settings(tmp_path):
    for optimizer in ("adam", "sgd"):
        for lr in (1e-4, 1e-2):
            write_result(
                tmp_path / f"{optimizer}{lr}",
                choices={"loss": "dice", "optimizer": optimizer},
                config={"theta": 0.5, "optimizer": {"lr": lr}},
            )
    paths = dependence.plot_dependence(tmp_path, read_runs(tmp_path))
    assert {title: path.name for title, path in paths.items()} == {
        f"Dice and accuracy over lr   optimiser = {name}": f"over_lr,optimizer={name}.png"
        for name in ("adam", "sgd")
    }
    figure = dependence.draw(read_runs(tmp_path), "lr", "", loss_looks(["dice"]))
    assert [ax.get_xscale() for ax in figure.axes] == ["log", "log"]


# --- The script ----------------------------------------------------------------------------------


def report(*arguments, **options) -> subprocess.CompletedProcess:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "scripts/report.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        **options,
    )


def messages(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("import time")]


def test_script_reports_from_disk_without_torch(tmp_path):
    sweep = tmp_path / "my sweep"
    for loss in ("cce", "dice"):
        for seed in (0, 1):
            write_result(sweep / f"{loss},{seed}", loss, seed=seed, accuracy=0.9 + seed / 100)
            write_curves(sweep / f"{loss},{seed}", range(12))
    write_result(sweep / "failed", "dice", seed=2, status="failed", error="loss is NaN | at 3")
    done = report(sweep, "--seeds")
    assert done.returncode == 0, done.stderr
    assert "0.9100" in done.stdout and "cce − dice" in done.stdout
    assert "Pooled" not in done.stdout  # over one condition
    assert done.stdout.splitlines()[-1] == f"{sweep / 'report.md'} (3 figures)"
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    text = (sweep / "report.md").read_text()
    assert text.startswith("# my sweep\n") and "4 done, 1 failed" in text
    assert r"loss is NaN \| at 3" in text and "0.9050 (0.9000 to 0.9100)" in text
    images = [
        unquote(line.split("](")[1][:-1]) for line in text.splitlines() if line.startswith("![")
    ]
    assert len(images) == 3 and all((sweep / image).exists() for image in images)
    assert len(pd.read_csv(sweep / "summary.csv")) == 5


def test_script_compares_in_each_condition_and_then_pooled(tmp_path, main, capsys):
    sweep = tmp_path / "sweep"
    opposite(sweep)
    assert main(sweep) == 0
    printed = capsys.readouterr().out
    each, pooled = (
        printed.index(title) for title in ("Losses, pair by pair, in each", "Pooled over all")
    )
    assert "+0.2100 ± 0.0248 (" in printed[each:pooled]
    assert "0.95  cce − dice      3  -0.2100 ± 0.0248 (" in printed[each:pooled]
    assert re.search(r"cce − dice +6  [-+]0\.0000 ± 0\.2", printed[pooled:])
    tables = printed[each : printed.index("comparison.csv")]
    assert max(map(len, tables.splitlines()[:-1])) <= 80
    rows = pd.read_csv(sweep / "comparison.csv")
    assert rows["pooled"].tolist() == [False] * 4 + [True] * 3
    assert rows["theta"][:4].tolist() == [0.5, 0.5, 0.5, 0.95] and rows["theta"][4:].isna().all()
    page = (sweep / "report.md").read_text()
    assert page.index("## Losses, pair by pair, in each condition") < page.index("## Pooled over")
    assert "![Dice and accuracy over θ](figures/over_theta.png)" in page


def test_a_long_comparison_shows_the_smallest_p(tmp_path, main, capsys):
    """32 conditions, each with a larger difference than the one before, and so a smaller p."""
    for i in range(32):
        for seed in range(2):
            for loss, gain in (("cce", 0), ("dice", 1e-3 * (i + 1) + 1e-4 * seed)):
                write_result(tmp_path / f"{loss}{i},{seed}", loss, i, seed, accuracy=0.5 + gain)
    assert main(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "in each condition (30 of 32: those with the smallest p)" in printed
    shown = printed[printed.index("in each") : printed.index("Pooled")]
    assert re.findall(r"^ *(\d+)  cce − dice", shown, re.MULTILINE) == [
        str(i) for i in range(2, 32)
    ]
    assert len(pd.read_csv(tmp_path / "comparison.csv")) == 33
    assert f"{tmp_path / 'comparison.csv'} (all rows)" in printed


def test_formats_of_figures_and_the_studys_axes(tmp_path, main):
    write_result(tmp_path / "a")
    write_curves(tmp_path / "a", range(3))
    assert main(tmp_path, "--format", "pdf,svg") == 0
    assert (tmp_path / "figures/losses.pdf").read_bytes().startswith(b"%PDF")
    assert b"<svg" in (tmp_path / "figures/losses.svg").read_bytes()
    assert not (tmp_path / "figures/losses.png").exists()
    assert re.search(r"\n!\[θ = 0.5.*losses.svg", (tmp_path / "report.md").read_text())
    assert main(tmp_path, "--format", "pdf") == 0
    assert "\n[θ = 0.5" in (tmp_path / "report.md").read_text()  # a link, no image
    assert main(tmp_path) == 0
    fitted = (tmp_path / "figures/losses.png").read_bytes()
    assert main(tmp_path, "--study") == 0
    assert (tmp_path / "figures/losses.png").read_bytes() != fitted


def test_script_refuses_an_unknown_format_in_one_line(tmp_path, main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(tmp_path, "--format", "png,gif")
    assert stopped.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("argument --format: one or more of png,pdf,svg, not 'png,gif'")
    )


def test_script_refuses_a_folder_without_runs_in_one_line(tmp_path, main, capsys):
    with pytest.raises(FileNotFoundError, match="no such folder: .*none"):
        read_runs(tmp_path / "none")
    assert main(tmp_path) == 2
    assert capsys.readouterr() == ("", f"report.py: holds no runs: {tmp_path}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", [False, True])
def test_an_output_of_ascii_or_a_closed_one(tmp_path, main, monkeypatch, closed):
    write_result(tmp_path / "a")
    written = io.BytesIO()
    output = None if closed else io.TextIOWrapper(written, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(tmp_path) == 0
    assert (tmp_path / "report.md").exists()
    assert closed or b"loss |  ? |" in written.getvalue()  # θ


def test_no_html_from_disk_reaches_the_report(tmp_path, main):
    html = "<img src=x onerror=alert(1)> &lt; [a](javascript:b)"
    write_result(tmp_path / "a")
    write_result(
        tmp_path / html, html, html, html, status=html, error=html, overrides=[f"{html}={html}"]
    )
    write_curves(tmp_path / html, range(3))
    assert main(tmp_path) == 0
    page = (tmp_path / "report.md").read_text()
    assert page.count("img src=x") > 6
    assert not re.findall(r"(?<!\\)([<>&]|\]\(javascript)", page)


def test_what_may_not_be_read_is_named_and_the_rest_reported(tmp_path):
    def obey_permissions():
        """Drop the two capabilities by which root reads everything."""
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP

    for name in ("folder", "events", "good", "result"):
        write_result(tmp_path / name, seed=len(name))
        write_curves(tmp_path / name, range(3))
    secret = [tmp_path / "folder", tmp_path / "events/curves.f32"]
    secret += [tmp_path / "result/result.json"]
    for path in secret:
        path.chmod(0)
    done = report(tmp_path, preexec_fn=obey_permissions)
    secret[0].chmod(0o700)  # so that pytest can remove it
    assert done.returncode == 0
    assert [re.split(": | cannot", line)[0] for line in messages(done)] == [
        str(path) for path in (secret[0], secret[2], secret[1])
    ]
    runs = pd.read_csv(tmp_path / "summary.csv").set_index("run")
    assert runs["status"].to_dict() == {"events": "done", "good": "done", "result": "unfinished"}


def test_long_titles_are_broken():
    curves = pd.DataFrame({"loss/dice": [0.5, 0.4], "grad_norm/dice": [1.0, 0.9]})
    name = ",".join(f"optimizer.lr={i}" for i in range(12))
    figure = figures.draw({"dice": [curves]}, title=name)
    lines = figure.get_suptitle().split("\n")
    assert len(lines) > 2 and max(map(len, lines)) <= 60
    assert "".join(lines).replace(", ", ",").replace(" ", "") == name
