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
from browser import MISSING, Browser, wait
from conftest import ENVIRONMENT, PATIENCE, ROOT, run_python
from torch.utils.tensorboard import SummaryWriter
from written import FINDING, write_events, write_record, write_result, write_run

pytest.importorskip("plotly")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

CCE, DICE = "rgb(0, 114, 178)", "rgb(0, 158, 115)"  # losswatch.report.style, known losses
FRAME = "return document.querySelector('iframe')"
TITLES = """return [...document.querySelectorAll('#figure .annotation-text')].map(
    (text) => [...text.querySelectorAll('tspan.line')].map((line) => line.textContent).join('|')
    || text.textContent)"""
LINES = "return document.querySelector('#lines')?.innerText"
STEPS = "return document.querySelector('#figure')?.calcdata?.[0].at(-1).x"
RANGE = "return document.querySelector('#figure').layout?.xaxis.range.map(Math.round)"
# Where in the window a step of the first column stands, in the middle of a row: 0 is the highest.
PLACE = """const figure = document.querySelector('#figure'), {xaxis, _size} = figure._fullLayout;
const yaxis = figure._fullLayout[arguments[1] ? `yaxis${arguments[1] + 1}` : 'yaxis'];
const {left, top} = figure.getBoundingClientRect();
return [left + xaxis._offset + xaxis.l2p(arguments[0]), top + yaxis._offset + yaxis._length / 2]"""


def curves(length=20, scale=1.0):
    """Each curve has values of its own."""
    tags = [f"{kind}/{name}" for kind in ("grad_norm", "loss") for name in ("cce", "dice")]
    return {
        tag: [scale * (i + 1) / (step + 1) for step in range(length)] for i, tag in enumerate(tags)
    }


def start(logdir, folder, port=0):
    """A TensorBoard that reads a folder every second: its process and its address."""
    path = folder / "tensorboard.txt"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--reload_interval", "1"]
    with path.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=ENVIRONMENT, cwd=folder)

    def address():
        assert process.poll() is None, path.read_text()
        return re.search(r"http://127\.0\.0\.1:\d+/", path.read_text())

    return process, wait(address, "TensorBoard", PATIENCE)[0]


@pytest.fixture
def board(tmp_path):
    """board(folder): the address of a TensorBoard of this test's own."""
    started = []

    def begin(logdir):
        process, url = start(logdir, tmp_path)
        started.append(process)
        return url

    yield begin
    for process in started:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A log folder, into which each test writes a folder of its own; its TensorBoard's address."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "logs").mkdir()
    process, url = start(folder / "logs", folder)
    yield folder / "logs", url
    process.terminate()
    process.wait(PATIENCE)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def wait_for(url, is_so):
    """The JSON at an address, once it is as it should be."""

    def ask():
        with urllib.request.urlopen(url) as answer:
            content = json.load(answer)
        return content if is_so(content) else None

    return wait(ask, url, PATIENCE)


def wait_for_runs(url, start, number):
    """Until TensorBoard knows so many runs whose names start so."""
    tags = f"{url}data/plugin/scalars/tags"
    wait_for(tags, lambda runs: sum(name.startswith(start) for name in runs) == number)


def show(browser, url, sweep, number):
    """Open the tab, without TensorBoard around it, on a folder of so many runs."""
    wait_for_runs(url, f"{sweep}/", number)
    browser.open(f"{url}data/plugin_entry.html?name=losswatch#&p.losswatch.sweep={sweep}")
    browser.until(STEPS)


def test_the_tab_is_there_and_shows_a_column_a_training(logs, browser):
    logdir, url = logs
    for loss in ("cce", "dice"):
        folder = logdir / f"sweep/loss={loss}"
        write_record(folder, curves(), dice=[(9, 0.5), (19, 0.75)])
        write_events(folder, curves())
        write_result(folder, loss, findings=[FINDING] if loss == "cce" else [])
    write_events(logdir / "someone/version_0", curves())
    wait_for_runs(url, ("sweep/", "someone/"), 3)
    # TensorBoard's own page: the name of the tab, and that it was chosen.
    browser.open(f"{url}#losswatch&p.losswatch.sweep=sweep")
    browser.until("return document.body.innerText.toLowerCase().includes('losses')")
    browser.enter(FRAME)
    browser.until(STEPS)
    assert browser.ask(TITLES) == [
        "trained with cce|θ = 0.5 (50 % foreground)", "collapsed",
        "trained with dice|θ = 0.5 (50 % foreground)",
    ]  # fmt: skip
    low, high = browser.ask("return document.querySelector('#figure')._fullLayout.yaxis3.range")
    assert 0.4 < low < 0.5 and 0.75 < high < 0.85  # of Dice, which is 0.5 and then 0.75
    titles = "return [...document.querySelectorAll('.g-ytitle, .ytitle, .y2title, .y3title')]"
    rows = browser.ask(f"{titles}.map((x) => x.textContent)")
    assert {"gradient norm", "loss", "validation Dice"} <= {*rows}
    drawn = browser.ask("""return [...document.querySelectorAll('.js-line')]
        .filter((line) => !line.closest('.legend'))
        .map((line) => [line.style.stroke, parseFloat(line.style.strokeWidth)])""")
    for color in (CCE, DICE):  # of two columns and two rows; thick where it is trained
        assert sorted(width for other, width in drawn if other == color) == [1.3, 1.3, 2.5, 2.5]
    legend = browser.ask("""return [...document.querySelectorAll('.legend .traces')].map(
        (item) => [item.textContent, item.querySelector('.js-line').style.stroke])""")
    assert legend == [["cce", CCE], ["dice", DICE], ["validation Dice", "rgb(0, 0, 0)"]]

    browser.ask("parent.document.body.classList.add('dark-mode')")  # as TensorBoard does
    browser.until("return getComputedStyle(document.documentElement).filter.startsWith('invert')")

    show(browser, url, "someone", 1)
    assert browser.ask(TITLES) == ["the trained loss is not known|someone/version_0"]
    browser.open(f"{url}data/plugin_entry.html?name=losswatch#&p.losswatch.runs=(")
    browser.until(f"{LINES}.startsWith('runs: not a regular expression')")


def test_the_mouse_shows_all_losses_at_a_step(logs, browser):
    logdir, url = logs
    write_run(logdir / "hover/a", curves(), "cce")
    write_run(logdir / "hover/b", curves(scale=10), "dice")
    show(browser, url, "hover", 2)
    for row, wanted in (
        (0, [("cce", 1 / 8), ("dice", 2 / 8)]),
        (1, [("cce", 3 / 8), ("dice", 4 / 8)]),
    ):
        browser.drag(browser.ask(PLACE, 7, row))
        shown = browser.until("""const all = [...document.querySelectorAll('.hoverlayer text')];
            const texts = all.map((text) => text.textContent).filter((text) => text);
            return texts[0] === '7' && texts.length > 2 && texts""")
        assert shown == ["7", *(f"{name} : {value:.5g}" for name, value in wanted)]


def test_a_range_of_steps_stays_and_is_in_the_address(logs, browser):
    logdir, url = logs
    write_run(logdir / "zoom/a", curves(40), "cce")
    wait_for_runs(url, "zoom/", 1)
    browser.open(f"{url}#losswatch&p.losswatch.sweep=zoom")
    browser.enter(FRAME)
    browser.until(STEPS)
    places = [browser.ask(PLACE, step, 0) for step in (10, 30)]
    browser.drag(*places)
    hash_ = "return window.parent.location.hash"
    found = browser.until(f"{hash_}.match(/from=(\\d+).*to=(\\d+)/)")
    first, last = int(found[1]), int(found[2])
    assert abs(first - 10) <= 1 and abs(last - 30) <= 1, places
    browser.until(f"{RANGE}.join() === '{first},{last}'")
    # A refresh with new data, and the same address in another window.
    write_record(logdir / "zoom/a", {tag: [0.5] * 60 for tag in curves()})
    time.sleep(7)
    assert browser.ask(RANGE) == [first, last]
    address = browser.ask("return window.parent.location.href")
    browser.open(address)
    browser.enter(FRAME)
    browser.until(STEPS)
    assert browser.ask(RANGE) == [first, last] and browser.ask(STEPS) == last
    browser.ask("document.querySelector('#controls button').click()")
    browser.until(f"{STEPS} === 59")
    assert "from=" not in browser.ask(hash_)


def test_a_training_grows_and_others_come_and_go_while_shown(logs, browser):
    logdir, url = logs
    write_run(logdir / "live/a", curves(), "cce", status="unfinished")
    write_events(logdir / "live/b", curves())
    show(browser, url, "live", 2)
    assert browser.ask(STEPS) == 19
    write_record(logdir / "live/a", {tag: [1.0] * 31 for tag in curves()})
    browser.until(f"{STEPS} === 30")
    write_events(logdir / "live/c", curves(5))
    browser.until(f"{TITLES}.at(-1) === 'the trained loss is not known|live/c'")
    with SummaryWriter(logdir / "live/c") as writer:  # by TensorBoard's fast loader
        writer.add_text("findings", "floor (step 4): Low. Wait.\n\nscale (step 2): High. Less.", 4)
    browser.until(f"{TITLES}.slice(-2).join() === 'scale,floor'")
    shutil.rmtree(logdir / "live/a")
    shutil.rmtree(logdir / "live/c")
    browser.until(f"{TITLES}.join() === 'the trained loss is not known|live/b'")
    assert browser.ask(LINES).strip() == ""
    shutil.rmtree(logdir / "live/b")
    browser.until(f"{LINES}.startsWith('No run')")
    assert browser.ask(TITLES) == []


def test_the_server_goes_and_comes_back(tmp_path, browser):
    logdir = tmp_path / "logs"
    write_run(logdir / "sweep/a", curves(), "cce")
    process, url = start(logdir, tmp_path)
    try:
        show(browser, url, "sweep", 1)
        process.terminate()
        process.wait(PATIENCE)
        browser.until(f"{LINES} === 'TensorBoard does not answer.'")
        assert browser.ask(TITLES) != []  # what was shown last
        process, again = start(logdir, tmp_path, port=url.split(":")[-1].strip("/"))
        assert again == url
        browser.until(f"{LINES}.trim() === ''")
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.parametrize("tags", [{}, {"train/loss": [1.0, 2.0]}])
def test_a_folder_without_our_tags_has_a_line_and_no_error(tmp_path, board, browser, tags):
    (tmp_path / "logs").mkdir()
    if tags:
        write_events(tmp_path / "logs/run", tags)
    url = board(tmp_path / "logs")
    listing = wait_for(f"{url}data/plugins_listing", lambda answer: "losswatch" in answer)
    assert listing["losswatch"]["enabled"] is False
    browser.open(f"{url}data/plugin_entry.html?name=losswatch")
    line = "No run has curves loss/<name> or grad_norm/<name> (yet)."
    browser.until(f"{LINES} === '{line}'")


def test_the_page_opens_without_a_network(tmp_path, browser):
    for loss in ("cce", "dice"):
        folder = tmp_path / f"sweep/loss={loss}"
        write_record(folder, curves())
        write_result(folder, loss)
    run_python(str(ROOT / "scripts/report.py"), str(tmp_path / "sweep"), cwd=tmp_path)
    browser.open((tmp_path / "sweep/report.html").as_uri())
    browser.until(STEPS)
    assert [title.split("|")[0] for title in browser.ask(TITLES)] == [
        "trained with cce", "trained with dice",
    ]  # fmt: skip
    browser.drag(browser.ask(PLACE, 7, 1))
    browser.until("""return document.querySelector('.hoverlayer')?.textContent.includes('0.375')""")
