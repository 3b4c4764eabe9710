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

import pandas as pd
import pyte
import pytest
from conftest import ENVIRONMENT, ROOT
from rich.console import Console

from losswatch import terminal
from losswatch.report.tables import summary_table
from losswatch.sweep.counting import collected

ARTICLE = ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square")


def watch(*args, cwd, interrupt_at=None):
    """Run train.py in a terminal of 80 columns: the exit status, and each screen it showed.

    Args:
        interrupt_at: a pattern; Ctrl-C is typed once the screen shows it.
    """
    screen = pyte.Screen(80, 50)
    stream, decoder = pyte.Stream(screen), codecs.getincrementaldecoder("utf-8")("replace")
    above, below = pty.openpty()
    os.set_blocking(above, False)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args], cwd=cwd, start_new_session=True,
        stdin=below, stdout=below, stderr=below,
        env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "80", "LINES": "50"},
    )  # fmt: skip
    os.close(below)
    screens, deadline = [], time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            select.select([above], [], [], 1)
            try:
                data = os.read(above, 1 << 16)
            except BlockingIOError:
                continue
            except OSError:  # the program has ended
                break
            if not data:
                break
            stream.feed(decoder.decode(data))
            screens.append([line.rstrip() for line in screen.display if line.strip()])
            if interrupt_at and re.search(interrupt_at, "\n".join(screens[-1])):
                interrupt_at = None
                os.killpg(process.pid, signal.SIGINT)
        return process.wait(10), screens
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(above)


BAR = r"step [\d,]+ of {} [━╸╺]+ (\d\d:\d\d|--:--) left"


def test_a_run(tmp_path):
    """Step, time, accuracy and all five losses, unbroken; nothing of it stays."""
    status, screens = watch(
        "experiment=smoke", "trainer.max_steps=600", "trainer.val_check_interval=100", cwd=tmp_path
    )
    assert status == 0
    bars = [s for s in screens if any(re.match(BAR.format(600), line) for line in s)]
    assert len(bars) > 3
    line, losses = bars[-1][-2:]
    assert re.fullmatch(BAR.format(600) + r"  accuracy 0\.\d{3}", line)
    assert re.fullmatch("  ".join(rf"{name} \d+\.\d{{3}}" for name in ARTICLE), losses)
    first, *last = screens[-1]
    assert first == "run: experiment=smoke trainer.max_steps=600 trainer.val_check_interval=100"
    assert re.fullmatch(r"val accuracy 0\.\d{4} in [\d.]+ s: outputs/.*", "".join(last))


@pytest.mark.slow
def test_a_fused_sweep_with_two_processes(tmp_path):
    """One bar over both, from the first steps on, which a line of a process does not break."""
    status, screens = watch(
        "-m", "experiment=smoke", "hydra/launcher=fused", "hydra.launcher.workers=2",
        "loss=dice,cce", "trainer.max_steps=1000", "trainer.val_check_interval=500",
        "hydra.sweep.dir=s", cwd=tmp_path,
    )  # fmt: skip
    assert status == 0
    steps = [
        int(found[1].replace(",", ""))
        for screen in screens
        if (found := re.search(r"^step ([\d,]+) of 2,000 ", "\n".join(screen), re.MULTILINE))
    ]
    assert len(set(steps)) > 3 and steps == sorted(steps) and 0 < min(filter(None, steps)) < 500
    shown = screens[-1]
    assert shown[:2] == [
        "2 runs; table and runs go to s", "fused: 2 runs in 2 groups of up to 1, 2 at once"
    ]  # fmt: skip
    assert not any(line.startswith("step ") or " left" in line for line in shown)
    assert sum(line.startswith("val accuracy") for line in shown) == 2
    assert "Browse   tensorboard --logdir s" in shown


def test_interrupted(tmp_path):
    """The bar goes, the table comes, and how to go on."""
    command = ["-m", "experiment=smoke", "loss=dice,cce", "trainer.max_steps=5000"]
    status, screens = watch(*command, cwd=tmp_path, interrupt_at="step [2-9][0-9] of")
    assert status == 130
    [folder] = tmp_path.glob("outputs/*")
    text = "\n".join(screens[-1])
    assert not re.search("^step|left|Warning|Traceback", text, re.MULTILINE)
    assert text.endswith("losswatch: interrupted")
    command = f"Resume   python {ROOT / 'train.py'} {' '.join(command)} hydra.sweep.dir=outputs/"
    assert command + folder.name in text.replace("\n", "").replace("losswatch: ", " ")
    assert re.search(r"^dice .* unfinished  interrupted$", text, re.MULTILINE)


def test_the_estimate_is_said_once(capsys, monkeypatch):
    """After the first seconds of the first run: half a run of four has taken 10 of 80 s."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(terminal, "expected", 4)
    for _ in range(2):
        with terminal.steps(200) as steps:
            for _ in range(100):
                now += 0.1
                steps.advance(1)
    assert capsys.readouterr().err == "4 runs take about 80 seconds\n"
    assert terminal.expected == 0


def test_steps_within_a_larger_bar():
    """Of a resumed part, the steps done before count, too."""
    whole = terminal.Bar(100, 0, 0, 0)
    with terminal.part_of(whole), terminal.steps(50, done=20) as part:
        part.advance(5)
    assert part is whole and whole.progress.tasks[0].completed + whole.waiting == 25
    with terminal.steps(10) as alone:
        assert alone is not whole


def test_processes_count_together():
    seen = []
    steps = terminal.Steps()
    steps.advance = seen.append
    count = "import sys; from losswatch.sweep.counting import Counted; " + (
        "counted = Counted(sys.argv[1], int(sys.argv[2])); [counted.advance(3) for _ in range(100)]"
    )
    with collected(steps, 2) as file:
        for index in range(2):
            subprocess.run([sys.executable, "-c", count, str(file), str(index)], check=True)
        time.sleep(3 * terminal.REDRAW_SECONDS)
    assert sum(seen) == 600
    assert not file.exists()


@pytest.mark.parametrize("width, left_out", [(80, "optimiser, BN, IoU"), (120, None)])
def test_a_table_fits_its_terminal(width, left_out):
    """No header or number is broken; what is left out is said."""
    runs = pd.DataFrame({
        "run": list("ab"), "loss": ["dice_fg_square", "cce"], "theta": 0.5, "optimizer": "adam",
        "lr": [0.001, 0.01], "model": ["unet", "convnet"], "batch_norm": True, "seed": [0, 1],
        "accuracy": 0.98765, "dice": 0.5, "iou": 0.5, "seconds": 12.34, "status": "done",
        "error": None,
    })  # fmt: skip
    console = Console(width=width, color_system=None)
    with console.capture() as printed:
        console.print(summary_table(runs, width))
    lines = [line.rstrip() for line in printed.get().splitlines()]
    assert all(len(line) <= width for line in lines)
    assert ("optimiser" in lines[0]) == (not left_out)
    for word in ("loss", "θ", "lr", "model", "seed", "accuracy", "status"):
        assert word in lines[0].split()
    row = next(line for line in lines if line.startswith("dice_fg_square "))
    assert row.split()[-1] == "done" and "0.9877" in row
    assert lines[4:] == ([f"Left out for want of width: {left_out}"] if left_out else [])
