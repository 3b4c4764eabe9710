"""The tab and the page in headless Chromium, with a real TensorBoard on loopback.

Against the runs that were written.
"""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ENVIRONMENT, PATIENCE, ROOT, run_python
from written import FINDING, write_events, write_record, write_result

pytest.importorskip("plotly")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
]

CCE, DICE = "rgb(0, 114, 178)", "rgb(0, 158, 115)"  # losswatch.report.style, known losses


def curves(length=20):
    values = [1 / (step + 1) for step in range(length)]
    return {f"{kind}/{name}": values for kind in ("loss", "grad_norm") for name in ("cce", "dice")}


def seen(url, tmp_path, seconds=20):
    """The page as the browser has it after so many seconds of its own time."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000",
         f"--user-data-dir={tmp_path / 'profile'}", f"--virtual-time-budget={1000 * seconds}",
         "--dump-dom", url],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def texts(page):
    """What the figure's SVG says, and the lines of text above it."""
    return re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", page) + re.findall(
        r'<div id="lines"><div>([^<]+)<', page
    )


@pytest.fixture
def board(tmp_path):
    """board(folder): the address of a TensorBoard that reads it every second."""
    started = []
    path = tmp_path / "tensorboard.txt"

    def start(logdir):
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
        command += ["--port", "0", "--host", "127.0.0.1", "--reload_interval", "1"]
        with path.open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=tmp_path
            )
        started.append(process)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+/", path.read_text()):
                return found[0]
            time.sleep(0.2)
        pytest.fail(path.read_text())

    yield start
    for process in started:
        process.terminate()
        process.wait(PATIENCE)


def wait_for(url, is_so):
    """The JSON at an address, once it is as it should be."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url) as answer:
            if is_so(content := json.load(answer)):
                return content
        time.sleep(0.5)
    pytest.fail(f"{url}: {content}")


def test_the_tab_is_there_and_shows_a_column_a_training(tmp_path, board):
    logdir = tmp_path / "logs"
    for loss in ("cce", "dice"):
        folder = logdir / f"sweep/loss={loss}"
        write_record(folder, curves(), dice=[(9, 0.5), (19, 0.75)])
        write_events(folder, curves())
        write_result(folder, loss, findings=[FINDING] if loss == "cce" else [])
    write_events(logdir / "someone/version_0", curves())
    url = board(logdir)
    runs = f"{url}data/plugin/losswatch/runs?sweep=*"
    wait_for(runs, lambda answer: len(answer["runs"]) == 3)
    # TensorBoard's own page: the name of the tab, and that it was chosen.
    page = seen(f"{url}#losswatch", tmp_path)
    assert "Losses" in page and re.search(r"<iframe[^>]*plugin_entry.html\?name=losswatch", page)

    # What stands in that tab.
    tab = f"{url}data/plugin_entry.html?name=losswatch"
    page = seen(f"{tab}#&p.losswatch.sweep=sweep", tmp_path)
    found = texts(page)
    assert [t for t in found if t.startswith("trained with")] == [
        "trained with cce", "trained with dice",
    ]  # fmt: skip
    assert {"gradient norm", "loss", "validation Dice", "collapsed", "cce", "dice"} <= {*found}
    widths = {}
    for color, width in re.findall(
        r'js-line"[^>]*stroke: ([^;]+);[^>]*stroke-width: ([\d.]+)', page
    ):
        widths.setdefault(color, []).append(float(width))
    for color in (CCE, DICE):
        *drawn, of_legend = sorted(widths[color])
        assert drawn == [1.3, 1.3, 2.5, 2.5] and of_legend > 2.5
    page = seen(f"{tab}#&p.losswatch.sweep=someone", tmp_path)
    assert {"the trained loss is not known", "someone/version_0"} <= {*texts(page)}
    page = seen(f"{tab}#&p.losswatch.runs=(", tmp_path)
    assert "runs: not a regular expression" in page

    # A run grows, another is deleted: the same tab goes on.
    shutil.rmtree(logdir / "sweep/loss=dice")
    write_events(logdir / "someone/version_1", curves())
    wait_for(runs, lambda answer: any("version_1" in run["name"] for run in answer["runs"]))
    page = seen(f"{tab}#&p.losswatch.sweep=someone", tmp_path)
    assert {"someone/version_0", "someone/version_1"} <= {*texts(page)}


@pytest.mark.parametrize("tags", [{}, {"train/loss": [1.0, 2.0]}])
def test_a_folder_without_our_tags_has_a_line_and_no_error(tmp_path, board, tags):
    (tmp_path / "logs").mkdir()
    if tags:
        write_events(tmp_path / "logs/run", tags)
    url = board(tmp_path / "logs")
    listing = wait_for(f"{url}data/plugins_listing", lambda answer: "losswatch" in answer)
    assert listing["losswatch"]["enabled"] is False
    page = seen(f"{url}data/plugin_entry.html?name=losswatch", tmp_path)
    assert "No run has curves loss/&lt;name&gt; or grad_norm/&lt;name&gt; (yet)." in page


def test_the_page_opens_without_a_network(tmp_path):
    for loss in ("cce", "dice"):
        folder = tmp_path / f"sweep/loss={loss}"
        write_record(folder, curves())
        write_result(folder, loss)
    run_python(str(ROOT / "scripts/report.py"), str(tmp_path / "sweep"), cwd=tmp_path)
    page = seen((tmp_path / "sweep/report.html").as_uri(), tmp_path)
    assert {"trained with cce", "trained with dice", "gradient norm"} <= {*texts(page)}
