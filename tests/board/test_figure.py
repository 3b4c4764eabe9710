"""The figure as data, against the curves; that Plotly takes it, by its own checks."""

import base64
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from written import FINDING

from losswatch.board.figure import POINTS, Training, draw, plain, smooth, thinned
from losswatch.report.style import loss_looks

go = pytest.importorskip("plotly.graph_objects")


def curve(values, steps=None):
    return pd.Series(np.asarray(values, float), np.arange(len(values)) if steps is None else steps)


def numbers(packed):
    return np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])


def drawn(*trainings, **options):
    """The figure, checked by Plotly and as JSON without NaN."""
    figure = draw(trainings, **options)
    json.dumps(figure, allow_nan=False)
    go.Figure({part: figure[part] for part in ("data", "layout")})
    return figure


def lines(figure, **where):
    """The traces that are lines of a loss, not the edges of a range."""
    return [
        trace
        for trace in figure["data"]
        if trace.get("hoverinfo") != "skip" and all(trace[k] == v for k, v in where.items())
    ]


def two_losses(scale=1.0):
    values = scale * np.arange(1.0, 6)
    return {
        f"{kind}/{name}": curve(values * (i + 1))
        for i, kind in enumerate(("loss", "grad_norm"))
        for name in ("cce", "dice")
    }


# --- thinned --------------------------------------------------------------------------------------


@given(
    arrays(np.float64, st.integers(1, 400), elements=st.floats(-1e6, 1e6)),
    st.integers(8, 60),
)
def test_thinning_keeps_the_extremes_of_every_range(values, points):
    kept = thinned(curve(values), points)
    assert len(kept) <= points
    assert kept.index.is_monotonic_increasing and kept.index.is_unique
    np.testing.assert_array_equal(values[kept.index], kept)
    assert kept.index[0] == 0 and kept.index[-1] == len(values) - 1
    assert (kept.max(), kept.min()) == (values.max(), values.min())


def test_no_spike_of_one_step_vanishes():
    steps = np.random.default_rng(0).choice(100_000, 40, replace=False)
    values = np.zeros(100_000)
    values[steps] = 1 + np.arange(40)
    kept = thinned(curve(values))
    # Two in one of 499 ranges of 200 steps: the larger one stays.
    alone = [s for s in steps if (abs(steps - s) < 201).sum() == 1]
    assert len(alone) > 20 and set(alone) <= set(kept[kept > 0].index)
    assert kept.max() == 40 and len(kept) <= POINTS


def test_gaps_stay_and_no_number_is_made_up():
    values = np.sin(np.arange(50_000.0))
    values[777], values[30_000], values[-1] = np.nan, np.inf, -np.inf
    kept = thinned(curve(values))
    assert set(kept.index[kept.isna()]) == {777, 30_000, 49_999}
    assert len(kept) <= POINTS and kept.max() == np.nanmax(values[np.isfinite(values)])
    assert thinned(curve(np.full(5000, np.nan))).isna().all()


def test_steps_need_not_be_even():
    steps = np.array([*range(2000), 10**9])
    kept = thinned(curve(np.arange(2001.0), steps), 100)
    assert kept.loc[0] == 0 and kept.loc[10**9] == 2000 and 1999 in kept.index


def test_smoothing_is_a_centred_mean_and_leaves_gaps():
    smoothed = smooth(curve([0, 3, 6, np.nan, 5, np.inf, 7]), 3)
    np.testing.assert_array_equal(smoothed, [1.5, 3, 4.5, np.nan, 5, np.nan, 7])


# --- The figure -----------------------------------------------------------------------------------


def test_a_column_a_training_and_a_row_a_quantity():
    curves = two_losses() | {"val/dice": curve([0.5, 0.9], [2, 4])}
    figure = drawn(Training("a", "cce", [curves]), Training("b", "dice", [two_losses()]))
    assert figure["layout"]["grid"]["columns"] == 2 and figure["layout"]["grid"]["rows"] == 3
    titles = [note["text"] for note in figure["layout"]["annotations"]]
    assert titles == ["<b>trained with cce</b><br>a", "<b>trained with dice</b><br>b"]
    assert len(lines(figure)) == 9
    for column, trained in (("x", "cce"), ("x2", "dice")):
        for axis, kind, factor in (("y", "grad_norm", 2), ("y2", "loss", 1)):
            assert (
                figure["layout"][f"yaxis{axis[1:]}"]["title"]["text"]
                == {
                    "loss": "loss",
                    "grad_norm": "gradient norm",
                }[kind]
            )
            found = lines(figure, xaxis=column, yaxis=axis)
            assert {trace["name"] for trace in found} == {"cce", "dice"}
            assert found[-1]["name"] == trained  # above the others
            for trace in found:
                np.testing.assert_array_equal(numbers(trace["x"]), range(5))
                np.testing.assert_array_equal(numbers(trace["y"]), factor * np.arange(1.0, 6))
            widths = {trace["name"]: trace["line"]["width"] for trace in found}
            assert max(widths, key=widths.get) == trained and len(set(widths.values())) == 2
    [metric] = lines(figure, yaxis="y3")
    np.testing.assert_array_equal(numbers(metric["x"]), [2, 4])
    np.testing.assert_array_equal(numbers(metric["y"]), np.float32([0.5, 0.9]))
    assert metric["name"] == "validation Dice"


def test_a_loss_has_the_colour_of_the_other_figures_and_one_line_in_the_legend():
    figure = drawn(Training("a", "cce", [two_losses()]), Training("b", "dice", [two_losses()]))
    looks = loss_looks(["cce", "dice"])
    assert {t["line"]["color"] for t in lines(figure, name="dice")} == {looks["dice"]["color"]}
    legend = [t for t in figure["data"] if t["showlegend"]]
    ordered = sorted(legend, key=lambda trace: trace["legendrank"])
    assert [trace["name"] for trace in ordered] == ["cce", "dice"]
    given_looks = {"cce": looks["dice"], "dice": looks["cce"]}
    figure = drawn(Training("a", None, [two_losses()]), looks=given_looks)
    assert {t["line"]["color"] for t in lines(figure, name="cce")} == {looks["dice"]["color"]}


def test_seeds_are_their_mean_and_range():
    figure = drawn(Training("a", "cce", [two_losses(1), two_losses(2), two_losses(6)]))
    [mean] = lines(figure, name="cce", yaxis="y2")
    np.testing.assert_array_equal(numbers(mean["y"]), 3 * np.arange(1.0, 6))
    edges = [t for t in figure["data"] if t["yaxis"] == "y2" and t not in lines(figure)]
    low, high = (numbers(t["y"]) for t in edges if t["name"] == "cce")
    np.testing.assert_array_equal([low, high], [np.arange(1.0, 6), 6 * np.arange(1.0, 6)])
    assert "mean and range of 3 runs" in figure["layout"]["annotations"][0]["text"]


def test_a_mean_ends_with_the_shortest_run_and_leaves_out_what_is_no_number():
    runs = [[1.0, np.nan, 3, 4], [3.0, 5, np.inf]]
    figure = drawn(Training("a", "cce", [{"loss/cce": curve(values)} for values in runs]))
    [mean] = lines(figure)
    assert numbers(mean["x"]).tolist() == [0, 1, 2] and numbers(mean["y"]).tolist() == [2, 5, 3]


def test_cosines_are_to_the_trained_gradient():
    curves = two_losses() | {
        "loss/iou": curve([1.0]),
        "grad_cosine/cce~dice": curve([0.1]),
        "grad_cosine/cce~iou": curve([0.2]),
        "grad_cosine/dice~iou": curve([0.3]),
    }
    figure = drawn(Training("a", "dice", [curves]))
    cosines = lines(figure, yaxis="y3")
    shown = {trace["name"]: numbers(trace["y"])[0] for trace in cosines}
    assert shown == {"cce": np.float32(0.1), "iou": np.float32(0.3)}


def test_findings_are_marked_at_their_first_step():
    later = FINDING | {"step": 4}
    runs = [two_losses(), two_losses(), two_losses()]
    figure = drawn(Training("a", "cce", runs, [later, FINDING]))
    [line] = figure["layout"]["shapes"]
    assert (line["x0"], line["x1"], line["xref"]) == (3, 3, "x")
    mark = figure["layout"]["annotations"][1]
    assert mark["text"] == "collapsed" and mark["x"] == 3
    told = mark["hovertext"].replace("<br>", " ")
    assert told == "step 3: In 2 of 3 runs, first: All is one class. Weights."


def test_a_title_is_as_wide_as_its_column_and_keeps_a_setting_in_one_line():
    title = "θ = 0.05 (95 % foreground)   optimiser = adam   BN = off"
    for number, lines in ((6, title.split("   ", 1)), (1, [title])):
        figure = drawn(*[Training(title, "cce", [two_losses()])] * number)
        found = figure["layout"]["annotations"][0]["text"].split("<br>")
        assert found == ["<b>trained with cce</b>", *lines]
    figure = drawn(*[Training("a/long,name " * 30, None, [two_losses()])] * 6)
    found = figure["layout"]["annotations"][0]["text"].split("<br>")
    assert len(found) == 4 and found[-1].endswith(" ...")


def test_a_constant_validation_keeps_the_axis_of_dice():
    figure = drawn(Training("a", "cce", [two_losses() | {"val/dice": curve([0.5, 0.5])}]))
    assert figure["layout"]["yaxis3"]["autorangeoptions"] == {"clipmin": 0, "clipmax": 1.02}


def test_options():
    training = Training("a", "cce", [two_losses()])
    figure = drawn(training, log=True, window=3, steps=(1, 3))
    assert figure["layout"]["yaxis"]["type"] == "log" and "type" not in figure["layout"]["yaxis2"]
    assert figure["layout"]["xaxis"]["range"] == [1, 3]
    [trace] = lines(figure, name="dice", yaxis="y2")
    np.testing.assert_array_equal(numbers(trace["x"]), [1, 2, 3])
    np.testing.assert_array_equal(numbers(trace["y"]), [2, 3, 4])


def test_26_losses_have_26_looks_and_a_legend_that_fits():
    names = [f"loss_{i}" for i in range(26)]
    curves = {f"{kind}/{n}": curve([1.0, 2]) for n in names for kind in ("loss", "grad_norm")}
    figure = drawn(Training("a", "loss_7", [curves]))
    looks = {(t["line"]["color"], t["line"]["dash"]) for t in lines(figure, yaxis="y")}
    assert len(looks) == 26
    assert figure["layout"]["height"] >= 26 * 19 + 100  # Plotly's lines are 19 px high


def test_odd_names_are_shown_as_they_are():
    name = "<img src=x onerror=alert(1)>&\x1b"
    shown = "&lt;img src=x onerror=alert(1)&gt;&amp;�"
    figure = drawn(Training(f"θ = {name}", name, [{f"loss/{name}": curve([1.0])}]))
    assert [trace["name"] for trace in figure["data"]] == [shown]
    title = figure["layout"]["annotations"][0]["text"]
    assert shown in title and "<img" not in title
    assert plain("a~b <b>") == "a~b &lt;b&gt;"


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"val/dice": curve([0.5])},
        {"loss/cce": curve([])},
        {"loss/cce": curve([np.nan, np.inf, -np.inf])},
        {"grad_norm/cce": curve([0.0]), "loss/dice": curve([1.0])},
        {"loss/cce": curve([1.0, 2], [2**40, 2**41])},
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_little_or_bad_data(curves, number):
    figure = drawn(Training("a", "cce", [curves] * number, [FINDING]), log=True, window=11)
    assert all(len(trace["x"]["bdata"]) for trace in figure["data"])
