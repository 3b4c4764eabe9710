"""What a terminal of 80 columns shows: a real one, read by a terminal emulator."""

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import pyte
import pytest
from conftest import PATIENCE, ROOT, SERVER
from PIL import Image
from rich.console import Console

from losswatch import terminal
from losswatch.report.tables import summary_table
from losswatch.sweep.counting import collected

ARTICLE = ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square")


def watch(*args, cwd, interrupt_at=None, columns=80, stdout=None, env=None):
    """Run train.py in a terminal: the exit status, and each screen it showed.

    Args:
        interrupt_at: a pattern; Ctrl-C is typed once the screen shows it.
        stdout: a file instead of the terminal.
        env: further variables.
    """
    screen = pyte.Screen(columns, 50)
    stream, decoder = pyte.Stream(screen), codecs.getincrementaldecoder("utf-8")("replace")
    above, below = pty.openpty()
    os.set_blocking(above, False)
    shown = os.ttyname(below)
    process = SERVER.start(
        str(ROOT / "train.py"), *args, cwd=cwd, streams=[shown, str(stdout or shown), shown],
        env={"TERM": "xterm", "COLUMNS": str(columns), "LINES": "50"} | (env or {}),
    )  # fmt: skip
    screens, deadline, ended = [], time.monotonic() + PATIENCE, False
    try:
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                ended = process.wait(0) is not None
            select.select([above], [], [], 0.05)
            try:
                data = os.read(above, 1 << 16)
            except BlockingIOError:
                if ended:
                    break
                continue
            stream.feed(decoder.decode(data))
            screens.append([line.rstrip() for line in screen.display if line.strip()])
            if interrupt_at and re.search(interrupt_at, "\n".join(screens[-1])):
                interrupt_at = None
                time.sleep(terminal.REDRAW_SECONDS / 2)  # not in the middle of drawing
                os.killpg(process.pid, signal.SIGINT)
        assert ended
        return process.returncode, screens
    finally:
        process.kill()
        process.result()
        os.close(below)
        os.close(above)


BAR = r"step [\d,]+ of {} [━╸╺]+ (\d\d:\d\d|--:--) left"


def test_a_run(tmp_path):
    """Step, time, Dice and all five losses, unbroken; nothing of it stays."""
    status, screens = watch(
        "experiment=smoke", "trainer.max_steps=300", "trainer.val_check_interval=50", cwd=tmp_path
    )
    assert status == 0
    bars = [s for s in screens if any(re.match(BAR.format(300), line) for line in s)]
    # A screen may have been read while its lines were drawn.
    bars = [s for s in bars if not re.match(BAR.format(300), s[-1])]
    assert len(bars) > 3
    line, losses = bars[-1][-2:]
    assert re.fullmatch(BAR.format(300) + r"  Dice 0\.\d{3}", line)
    assert re.fullmatch("  ".join(rf"{name} \d+\.\d{{3}}" for name in ARTICLE), losses)
    first, *last = screens[-1]
    assert first == "run: experiment=smoke trainer.max_steps=300 trainer.val_check_interval=50"
    scores = r"val Dice 0\.\d{4}, IoU 0\.\d{4}, (accuracy 0\.\d{4}|constant: \w+)"
    assert re.fullmatch(scores + r" in [\d.]+ s: outputs/.*", "".join(last))


@pytest.mark.slow
def test_a_fused_sweep_with_two_processes(tmp_path):
    """One bar over both, from the first steps on, which a line of a process does not break."""
    status, screens = watch(
        "-m", "experiment=smoke", "hydra/launcher=fused", "hydra.launcher.workers=2",
        "trainer.max_steps=800,1200", "trainer.val_check_interval=400", "hydra.sweep.dir=s",
        cwd=tmp_path,
    )  # fmt: skip
    assert status == 0
    steps = [
        int(found[1].replace(",", ""))
        for screen in screens
        if (found := re.search(r"^step ([\d,]+) of 2,000 ", "\n".join(screen), re.MULTILINE))
    ]
    assert len(set(steps)) > 3 and steps == sorted(steps) and 0 < min(filter(None, steps)) < 500
    assert any(screen[-1] == "checking 2 runs" for screen in screens)
    shown = screens[-1]
    assert "".join(shown[:3]).startswith(
        "2 runs; table and runs go to s"
        "training 2 stacks of up to 1 run, 2 at once (they differ in trainer.max_steps; a run by "
        "itself is rounded differently)"
    )
    assert not any(line.startswith("step ") or " left" in line for line in shown)
    assert sum(line.startswith("val Dice") for line in shown) == 2
    assert "Browse   tensorboard --logdir s" in shown


@pytest.mark.slow
def test_a_bar_of_the_images_that_are_looked_at(tmp_path):
    """It appears where they take more than a moment, and leaves nothing."""
    array = np.random.default_rng(0).integers(0, 2, (2000, 2000, 3), np.uint8)
    for i in range(40):
        for kind, stored in (("images", array), ("masks", array[..., 0])):
            (tmp_path / "a" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored).save(tmp_path / "a" / kind / f"{i}.png", compress_level=1)
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    status, screens = watch(
        "data=folder", "data.root=a", "data.classes={a:0}", cwd=tmp_path, env=cache
    )
    bars = [re.search(r"(\d+) of 40  images looked at", "\n".join(screen)) for screen in screens]
    counts = [int(found[1]) for found in bars if found]
    assert len(set(counts)) > 1 and counts == sorted(counts)
    assert status == 2 and "images looked at" not in "\n".join(screens[-1])


@pytest.mark.parametrize("launcher", ["auto", "basic"])
def test_interrupted(tmp_path, launcher):
    """The bar goes, the table comes, and how to go on."""
    command = ["-m", "experiment=smoke", "loss=dice,cce", "trainer.max_steps=5000"]
    command.append(f"hydra/launcher={launcher}")
    status, screens = watch(*command, cwd=tmp_path, interrupt_at=r"step [1-9][\d,]* of")
    assert status == 130
    [folder] = tmp_path.glob("outputs/*")
    text = "\n".join(screens[-1])
    assert not re.search("^step|left|Warning|Traceback", text, re.MULTILINE)
    assert text.endswith("losswatch: interrupted")
    command = f"Resume   python {ROOT / 'train.py'} {' '.join(command)} hydra.sweep.dir=outputs/"
    assert command + folder.name in text.replace("\n", "").replace("losswatch: ", " ")
    assert re.search(r"^dice .* unfinished +interrupted$", text, re.MULTILINE)


NOISY = """
import logging
import time
import pytorch_lightning as pl

class Noisy(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        print("at [/x] [bold] ... ", end="", flush=True)
        print("step", trainer.global_step)
        logging.getLogger("other").warning("no number: %d", "a")
        logging.getLogger("other").warning("after step %d%s", trainer.global_step, " more" * 9)
        time.sleep(0.25)  # the bar is drawn at each step
"""


def test_a_callback_that_prints(tmp_path):
    """What it prints goes where it belongs, as it is; a bad log message does not end the run.

    Lines stay above the bar, which has several lines and is drawn anew below each of them. A line
    that is wider than the terminal is not broken into two.
    """
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "mine" / "callbacks").mkdir(parents=True)
    (tmp_path / "mine" / "callbacks" / "noisy.yaml").write_text("noisy: {_target_: noisy.Noisy}")
    status, screens = watch(
        "--config-dir", "mine", "experiment=smoke", "callbacks=noisy", "trainer.max_steps=5",
        cwd=tmp_path, columns=40, stdout=tmp_path / "out", env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert status == 0
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines == [f"at [/x] [bold] ... step {i}" for i in range(1, 6)]
    bars = [line for screen in screens for line in screen if line.startswith("step ")]
    assert bars and all(re.fullmatch(r"step \d of 5 [-:\d]+ left( .*)?", bar) for bar in bars)
    assert any(re.match("cce 0", line) for screen in screens for line in screen)
    said = "".join(line.ljust(40) for line in screens[-1])
    for i in range(1, 6):
        assert f"after step {i}{' more' * 9}  " in said


# --- One bar -------------------------------------------------------------------------------------


def test_steps_within_a_larger_bar():
    """What was done before is no part of it; steps of a part that fails are taken back."""

    def state():
        task = whole.progress.tasks[0]
        return task.completed + whole.waiting, task.total

    whole = terminal.Bar(100)
    with terminal.part_of(whole), terminal.progress_bar(50, done=20) as part:
        part.advance(5)
    assert state() == (5, 80)
    with (
        pytest.raises(MemoryError),
        terminal.part_of(whole),
        terminal.progress_bar(50, done=3) as part,
    ):
        part.advance(7)
        raise MemoryError
    assert state() == (5, 80)
    with terminal.progress_bar(10) as alone:
        assert isinstance(alone, terminal.Bar)


@pytest.mark.parametrize("method", ["start", "update", "stop"])
def test_a_terminal_that_closes_ends_nothing(monkeypatch, method):
    def closed(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(terminal, "_redraws", lambda: True)
    bar = terminal.Bar(10)
    monkeypatch.setattr(bar.live, method, closed)
    with bar:
        bar.advance(1)
    assert not bar.is_shown


@pytest.mark.parametrize("term, clear", [("xterm", "\r\x1b[K"), ("dumb", "")])
def test_a_line_takes_the_place_of_a_bar(capsys, monkeypatch, term, clear):
    """Of another process. A dumb terminal has none, and shows control characters."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal.say("a line")
    assert capsys.readouterr().err == f"{clear}a line\n"


def test_processes_count_together():
    """Also the last steps; a process that replaces a killed one begins anew."""
    bar = terminal.Bar(1000)
    count = "import sys; from losswatch.sweep.counting import Counted; " + (
        "counted = Counted(sys.argv[1], int(sys.argv[2])); counted.skip(10); "
        "[counted.advance(3) for _ in range(100)]"
    )
    with collected(bar, 2) as file:
        for index in (0, 1, 0):
            subprocess.run([sys.executable, "-c", count, str(file), str(index)], check=True)
    task = bar.progress.tasks[0]
    assert (task.completed + bar.waiting, task.total) == (600, 980)
    assert not file.exists()


@pytest.mark.parametrize(
    "width, failed, left_out",
    [(80, False, "optimiser, BN, seconds"), (120, False, None),
     (80, True, "optimiser, BN, seconds, accuracy, IoU"), (130, True, None)],
)  # fmt: skip
def test_a_table_fits_its_terminal(width, failed, left_out):
    """No word is broken but those of an error; what is left out is said."""
    runs = pd.DataFrame({
        "run": list("ab"), "loss": ["dice_fg_square", "cce"], "theta": 0.5, "optimizer": "adam",
        "lr": [0.001, 0.01], "model": ["unet", "convnet"], "batch_norm": True, "seed": [0, 1],
        "dice": 0.98765, "iou": 0.5, "accuracy": 0.5, "seconds": 12.34,
        "status": ["done", "unfinished"], "verdict": None, "findings": None,
        "error": [None, "too long a line" * failed or None],
    })  # fmt: skip
    console = Console(width=width, color_system=None)
    with console.capture() as printed:
        console.print(summary_table(runs, width))
    lines = [line.rstrip() for line in printed.get().splitlines()]
    assert all(len(line) <= width for line in lines)
    assert ("optimiser" in lines[0]) == (not left_out)
    for word in ("loss", "θ", "lr", "model", "seed", "Dice", "status"):
        assert word in lines[0].split()
    first, second = (
        next(li for li in lines if li.startswith(f"{n} ")) for n in ("dice_fg_square", "cce")
    )
    assert "done" in first.split() and "0.9877" in first.split()
    assert "unfinished" in second.split() and "convnet" in second.split()
    shown = [line for line in lines if line.startswith("Left out")]
    assert shown == ([f"Left out (too wide): {left_out}"] if left_out else [])
