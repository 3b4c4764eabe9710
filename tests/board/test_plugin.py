"""The answers of the tab's server, from TensorBoard's own reader of event files.

Against what was written. `test_browser.py` looks at the tab itself.
"""

import json
import os
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
from boards import SAMPLES, Board, curves_of
from tensorboard import default
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client
from written import FINDING, write_events, write_record, write_result, write_run

from losswatch.board.plugin import LossesPlugin

pytest.importorskip("plotly")


def curves(length=5, scale=1.0, names=("cce", "dice")):
    values = (scale * np.arange(1.0, length + 1)).tolist()
    return {f"{kind}/{name}": values for kind in ("loss", "grad_norm") for name in names}


# --- What is shown first --------------------------------------------------------------------------


def test_tensorboard_finds_the_plugin():
    assert LossesPlugin in default.get_dynamic_plugins()
    plugin = LossesPlugin(TBContext())
    assert plugin.frontend_metadata().tab_name == "Losses" and not plugin.is_active()
    page = Client(plugin.get_plugin_apps()["/index.js"]).get("/index.js")
    assert page.mimetype == "text/javascript" and "export async function render" in page.text
    assert f'"./plotly.js?{version("plotly")}"' in page.text
    script = Client(plugin.get_plugin_apps()["/plotly.js"]).get("/plotly.js")
    assert script.status_code == 200 and "Plotly" in script.text[-(10**6) :] + script.text[: 10**6]


def test_the_newest_sweep_comes_first_with_what_was_swept(tmp_path):
    for sweep, thetas in (("a", (0.5,)), ("b", (0.05, 0.5))):
        for theta in thetas:
            for loss in ("dice", "cce"):
                folder = tmp_path / sweep / f"loss={loss},theta={theta}"
                write_run(folder, curves(), loss, theta=theta)
    board = Board(tmp_path)
    assert board.plugin.is_active()
    answer = board.get("figure")
    assert answer["sweeps"] == ["b", "a"] and answer["sweep"] == "b"
    assert answer["menus"] == {"loss": ["cce", "dice"], "theta": ["0.05", "0.5"]}
    assert board.titles() == [
        f"<b>trained with {loss}</b><br>θ = {theta} ({share} % foreground)"
        for theta, share in ((0.05, 95), (0.5, 50))
        for loss in ("cce", "dice")
    ]
    assert len(board.titles(sweep="*")) == 4  # runs of a are repeated in b
    assert len(board.titles(sweep="a")) == 2
    assert board.titles(**{"set.theta": "0.5", "set.loss": "dice"}) == board.titles()[3:]
    assert board.titles(runs="loss=(cce|x),.*5$") == board.titles()[::2]
    [note] = board.get("figure", runs="nothing")["notes"]
    assert note == "No run is chosen by this expression and these menus."


def test_at_most_six_columns_and_the_others_are_named(tmp_path):
    for i in range(8):
        write_run(tmp_path / f"theta={i / 10}", curves(), "dice", theta=i / 10)
    board = Board(tmp_path)
    answer = board.get("figure")
    assert answer["figure"]["layout"]["grid"]["columns"] == 6
    assert answer["notes"] == [
        "The first 6 of 8 trainings are shown, 2 are not: choose them by a menu, or by an "
        "expression on the names of runs."
    ]
    assert "0.7" in board.titles(**{"set.theta": "0.7"})[0]


def test_seeds_are_one_column_with_the_findings_of_all(tmp_path):
    for seed in (0, 1):
        write_run(
            tmp_path / f"seed={seed}", curves(scale=1 + 2 * seed), "cce", seed=seed,
            findings=[FINDING],
        )  # fmt: skip
    figure = Board(tmp_path).get("figure")["figure"]
    assert figure["layout"]["grid"]["columns"] == 1
    assert curves_of(figure, row="y2")["dice"][1] == [2, 4, 6, 8, 10]
    assert [note["text"] for note in figure["layout"]["annotations"]][1:] == ["collapsed"]


# --- Curves ---------------------------------------------------------------------------------------


def test_a_runs_own_record_is_read_whole(tmp_path):
    values = np.sin(np.arange(900.0)).astype(np.float32).tolist()
    values[333] = 77.0  # a spike that TensorBoard's sample of 50 would show by chance alone
    write_run(tmp_path / "a", {"loss/cce": values}, "cce")
    answer = Board(tmp_path).get("figure")
    assert answer["notes"] == []
    steps, shown = curves_of(answer["figure"])["cce"]
    assert (steps, shown) == (list(range(900)), values)
    assert (
        len(
            curves_of(Board(tmp_path).get("figure", **{"from": 100, "to": 109})["figure"])["cce"][0]
        )
        == 10
    )


def test_as_many_points_as_pixels_show_and_no_spike_vanishes(tmp_path):
    values = np.sin(np.arange(3000.0)).astype(np.float32)
    values[[333, 1666]] = 77.0, -77.0
    for theta in (0.05, 0.5):
        write_run(tmp_path / f"theta={theta}", {"loss/cce": values.tolist()}, "cce", theta=theta)
    board = Board(tmp_path)
    versions = set()
    for width, most in ((400, 400), (600, 600), (5000, 1000), (0, 100)):  # of two columns
        answer = board.get("figure", width=width)
        versions.add(answer["version"])
        steps, shown = curves_of(answer["figure"])["cce"]
        assert 0.9 * most < len(steps) <= most
        assert max(shown) == 77 and min(shown) == -77
    assert len(versions) == 4


def test_a_training_that_someone_else_wrote_is_shown_from_tensorboards_sample(tmp_path):
    write_events(tmp_path / "logs/version_0", curves(200))
    write_events(tmp_path / "logs/version_1", curves(20))
    board = Board(tmp_path)
    answer = board.get("figure")
    assert answer["notes"] == [
        "TensorBoard keeps 50 random points of each curve, so that spikes may be missing: "
        "logs/version_0"
    ]
    assert board.titles() == [
        f"the trained loss is not known<br>logs/version_{i}" for i in range(2)
    ]
    steps, shown = curves_of(answer["figure"])["dice"]
    assert len(steps) == SAMPLES and shown == [step + 1 for step in steps]
    assert curves_of(answer["figure"], "x2")["dice"] == [list(range(20)), list(range(1, 21))]
    assert answer["menus"] == {}


def test_new_data_change_the_version_and_nothing_else_does(tmp_path):
    write_record(tmp_path / "own", curves(5))
    write_events(tmp_path / "own", curves(5))
    write_events(tmp_path / "foreign", curves(5))
    board = Board(tmp_path)
    first = board.get("figure")
    same = {"version": first["version"], "sweeps": ["."], "sweep": ".", "menus": {}}
    assert board.get("figure", version=first["version"]) == same
    write_record(tmp_path / "own", curves(8))
    second = board.get("figure", version=first["version"])
    assert len(curves_of(second["figure"], "x2")["cce"][0]) == 5 + 3  # steps 0 to 4 again, then 3
    write_events(tmp_path / "foreign", curves(9))
    board.reload()
    third = board.get("figure", version=second["version"])
    assert third["version"] != second["version"]
    write_result(tmp_path / "own", "cce", findings=[FINDING])
    fourth = board.get("figure", version=third["version"])
    assert "trained with cce" in str(fourth["figure"]["layout"]["annotations"])
    assert board.get("figure", log="1", version=fourth["version"])["figure"]


def test_a_run_that_is_deleted_while_it_is_shown(tmp_path):
    write_run(tmp_path / "a", curves(), "cce")
    board = Board(tmp_path)
    board.get("figure")
    shutil.rmtree(tmp_path / "a")
    assert curves_of(board.get("figure")["figure"])["cce"][1] == [1, 2, 3, 4, 5]


def test_findings_that_a_training_told_tensorboard(tmp_path):
    """Of somebody's training: whatever they are written as, at their step with their text."""
    folder = tmp_path / "mine"
    write_events(folder, curves())
    board = Board(tmp_path)
    first = board.get("figure")
    with SummaryWriter(folder) as writer:
        writer.add_text("findings", "floor (step 4): It <b>stands</b>. Wait.\n\nnothing known", 4)
        writer.add_text("findings", "scale (step 1): Large.\n\nfloor (step 2): Low. Wait.", 4)
    board.reload()
    assert board.get("figure", version=first["version"])["figure"] is not None
    assert board.marks() == [
        ("scale", 1, "step 1: Large."),
        ("floor", 2, "step 2: Low. Wait."),
    ]
    with SummaryWriter(folder) as writer:
        writer.add_text("findings", "a-<b> (step 3): No name.\n\nfrozen (step 3): <i>Still</i>.", 5)
    board.reload()
    assert board.marks()[-1] == ("frozen", 3, "step 3: &lt;i&gt;Still&lt;/i&gt;.")
    assert len(board.marks()) == 3


# --- Bad input ------------------------------------------------------------------------------------


def test_an_empty_folder_and_one_without_our_tags(tmp_path):
    for folder in ("empty", "foreign"):
        (tmp_path / folder).mkdir()
    write_events(tmp_path / "foreign/run", {"train/loss": [1.0], "losses": [2.0]})
    for folder in ("empty", "foreign"):
        board = Board(tmp_path / folder)
        assert not board.plugin.is_active()
        answer = board.get("figure")
        assert answer.pop("version")
        assert answer == {
            "sweeps": [], "sweep": "*", "menus": {}, "figure": None,
            "notes": ["No run has curves loss/<name> or grad_norm/<name> (yet)."],
        }  # fmt: skip


@pytest.mark.parametrize(
    "values", [[1.0], [np.nan, 1.0, np.inf, -np.inf, 2.0], [np.nan] * 3, [3e38, -3e38]]
)
@pytest.mark.parametrize("has_record", [True, False])
def test_one_step_and_values_that_are_no_numbers(tmp_path, values, has_record):
    written = {"loss/cce": values, "grad_norm/cce": values, "loss/dice": [0.5] * len(values)}
    write_events(tmp_path / "a", written)
    if has_record:
        write_record(tmp_path / "a", written)
    steps, shown = curves_of(Board(tmp_path).get("figure", log="1")["figure"], row="y2")["cce"]
    wanted = [v if np.isfinite(v) else np.nan for v in np.float32(values)]
    np.testing.assert_array_equal(shown, wanted)
    assert steps == list(range(len(values)))


def test_losses_that_only_some_runs_have_and_odd_tags(tmp_path):
    odd = "a~b/<script>é %{x}\n"
    write_run(tmp_path / "a", curves(names=("cce",)), "cce")
    write_run(tmp_path / "b", curves(names=(odd, "dice.0")), odd)
    figure = Board(tmp_path).get("figure")["figure"]
    assert set(curves_of(figure)) == {"cce"}
    assert set(curves_of(figure, "x2")) == {"a~b/&lt;script&gt;é %{x}�", "dice.0"}


def test_26_losses(tmp_path):
    names = [f"loss_{i}" for i in range(26)]
    write_run(tmp_path / "a", curves(names=names), "loss_3")
    shown = list(curves_of(Board(tmp_path).get("figure")["figure"]))
    assert sorted(shown) == sorted(names) and shown[-1] == "loss_3"  # above the others


@pytest.mark.parametrize(
    "query, error",
    [
        ({"runs": "("}, "runs: not a regular expression"),
        ({"smooth": "x"}, "smooth, width, from and to must be numbers"),
        ({"width": "1e3"}, "smooth, width, from and to must be numbers"),
        ({"from": "a"}, "smooth, width, from and to must be numbers"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, query, error):
    write_run(tmp_path / "a", curves(), "cce")
    line = Board(tmp_path).get("figure", status=400, **query)["error"]
    assert line.startswith(error) and "\n" not in line


@pytest.mark.filterwarnings("ignore")
def test_any_other_error_is_one_line_too(tmp_path, monkeypatch):
    write_run(tmp_path / "a", curves(), "cce")
    board = Board(tmp_path)
    monkeypatch.setattr("losswatch.board.plugin.draw", lambda *_, **__: 1 / 0)
    assert board.get("figure", status=500)["error"] == "ZeroDivisionError: division by zero"


def test_without_plotly_the_tab_says_how_to_install_it(tmp_path, monkeypatch):
    write_run(tmp_path / "a", curves(), "cce")
    board = Board(tmp_path)
    monkeypatch.setattr("losswatch.board.page.find_spec", lambda name: None)
    error = board.get("figure", status=400)["error"]
    assert error == 'Plotly is missing: pip install "losswatch[board]"'


def test_damaged_files_of_a_run(tmp_path):
    write_run(tmp_path / "a", curves(), "cce")
    (tmp_path / "a/result.json").write_text("{")
    (tmp_path / "a/curves.json").write_text("[]]")
    (tmp_path / "a/metrics.jsonl").write_text("nothing\n")
    assert Board(tmp_path).get("figure")["figure"] is not None


# --- Outside the log folder -----------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    """A run outside the log folder, whose record differs from the events inside."""
    folder = tmp_path / "secret/run"
    write_record(folder, curves(scale=1000))
    write_result(folder, "secret")
    return SimpleNamespace(folder=folder, logdir=tmp_path / "logs")


@pytest.mark.parametrize("linked", ["curves.f32", "curves.json", "result.json", "metrics.jsonl"])
def test_a_link_in_a_run_is_not_followed(secret, linked):
    run = secret.logdir / "a"
    write_run(run, curves(), "cce")
    (run / linked).unlink(missing_ok=True)
    (run / linked).symlink_to(secret.folder / linked)
    figure = Board(secret.logdir).get("figure")["figure"]
    assert curves_of(figure)["cce"][1] == [1, 2, 3, 4, 5]  # from the events
    assert "secret" not in json.dumps(figure)


def test_a_link_to_a_run_is_not_followed(secret):
    write_events(secret.folder, curves())
    secret.logdir.mkdir()
    (secret.logdir / "a").symlink_to(secret.folder, target_is_directory=True)
    figure = Board(secret.logdir).get("figure")["figure"]
    assert curves_of(figure)["cce"][1] == [1, 2, 3, 4, 5]
    assert "secret" not in json.dumps(figure)


@pytest.mark.parametrize("name", ["../secret/run", "a/../../secret/run", "/etc", "\0", "x" * 5000])
def test_a_run_whose_name_leads_outside(secret, name):
    secret.logdir.mkdir()
    (secret.logdir / "a").mkdir()
    logs = LossesPlugin(TBContext(logdir=os.fspath(secret.logdir))).logs
    assert logs.folder(name) is None
    assert logs.folder(str(secret.logdir / "a")) == secret.logdir / "a"
