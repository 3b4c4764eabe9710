"""report.html: what it holds; that it escapes, and loads nothing."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT, run_python
from written import FINDING, write_result, write_run

from losswatch.board.page import write_page
from losswatch.report.runs import all_losses, read_runs
from losswatch.report.style import loss_looks

pytest.importorskip("plotly")

CURVES = {"loss/cce": [1.0, 0.5], "grad_norm/cce": [2.0, 1.0], "loss/dice": [0.9, 0.8]}


def page_of(folder):
    """The page alone, without the figures that scripts/report.py draws."""
    runs = read_runs(folder)
    return write_page(folder, runs, [], {}, loss_looks(all_losses(runs))).read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    sweep = tmp_path_factory.mktemp("page") / "sweep <i>"
    for theta in (0.05, 0.5):
        for loss in ("cce", "dice", "<img src=x onerror=alert(1)>"):
            for seed in (0, 1):
                folder = sweep / f"theta={theta},loss={loss[:4]},seed={seed}"
                write_run(folder, CURVES, loss, theta=theta, seed=seed, findings=[FINDING])
    write_result(sweep / "other", "dice", status="failed")
    done = run_python(str(ROOT / "scripts/report.py"), str(sweep), cwd=sweep)
    assert str(sweep / "report.html") in done.stdout
    return (sweep / "report.html").read_text()


def without_scripts(page):
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_the_page_holds_runs_words_comparison_and_figures(page):
    text = without_scripts(page)
    assert "<h1>sweep &lt;i&gt;</h1>" in text
    assert text.count("<td>done</td>") == 12 and text.count("<td>failed</td>") == 1
    assert "theta=0.05,loss=cce,seed=1" in text and "Losses, pair by pair" in text
    assert "All is one class." in text  # of the findings
    assert "No certain difference in Dice" in text or "end with equal Dice" in text


def test_the_figure_is_drawn_of_the_runs_that_are_done(page):
    [figures] = re.findall(r"^const figures = (.*);$", page, flags=re.MULTILINE)
    figures = json.loads(figures)
    assert len(figures) == 1
    titles = [note["text"] for note in figures[0]["layout"]["annotations"]]
    titles = [title for title in titles if "trained with" in title]
    assert len(titles) == 6 and all("mean and range of 2 runs" in title for title in titles)
    assert [("cce" in t, "0.05" in t) for t in titles[:4:3]] == [(True, True), (True, False)]


def test_text_of_runs_is_escaped_and_nothing_is_loaded(page):
    text = without_scripts(page)
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "<img" not in text and "<i>" not in text
    assert not re.search(r"(?:src|href)=[\"']", text) and "default-src 'none'" in text
    data = page[page.index("const figures") :]
    assert "<img" not in data and data.count("</script>") == 1


def test_more_than_six_trainings_are_in_parts(tmp_path):
    for i in range(13):
        write_run(tmp_path / f"theta={i / 20}", CURVES, "dice", theta=i / 20)
    page = page_of(tmp_path)
    assert re.findall(r"<option.*?>(\d of 3)", page) == ["1 of 3", "2 of 3", "3 of 3"]
    [figures] = re.findall(r"^const figures = (.*);$", page, flags=re.MULTILINE)
    assert figures.count("trained with dice") == 13


def test_parts_of_one_setting_are_told_apart(tmp_path):
    for loss in "abcdefgh":
        write_run(tmp_path / f"loss={loss}", CURVES, loss, theta=0.25)
    labels = re.findall(r"<option.*?>(.*?)</option>", page_of(tmp_path))
    assert labels == [
        "1 of 2: θ = 0.25 (75 % foreground): a, b, c, d, e, f",
        "2 of 2: θ = 0.25 (75 % foreground): g, h",
    ]


def test_runs_without_curves_or_without_a_number(tmp_path):
    write_result(tmp_path / "a", "dice")
    assert "<td>done</td>" in page_of(tmp_path)
    write_run(tmp_path / "b", {"loss/cce": [np.nan], "grad_norm/cce": [np.inf]}, "cce")
    assert "trained with cce" in page_of(tmp_path)


def test_without_plotly_one_line_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", CURVES, "dice")
    monkeypatch.setattr("losswatch.board.page.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "scripts/report.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == 'no report.html: Plotly is missing; pip install "losswatch[board]"'
    assert (tmp_path / "report.md").exists() and not (tmp_path / "report.html").exists()
