"""The atlas: closed forms, scores, rankings; that its sweeps are allowed; the whole command."""

import subprocess
import sys
from itertools import product

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, ROOT, run_python, slow
from scipy.integrate import quad
from scipy.stats import friedmanchisquare
from torch import nn

from landscape import bayes, disputes, first_step, foreseen, outcomes
from landscape.bayes import Noise, Spread, slope_on_empty
from landscape.starts import at_class_share
from landscape.sweeps import all_sweeps
from losswatch import Dice, load_loss
from losswatch.config.quoting import quoted
from losswatch.disk.result import Result
from losswatch.run.build import make_data, make_net

TASKS = [Noise(theta, tau) for theta, tau in product([0.3, 0.95], [0.02, 0.2])]


# --- Closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_volume_and_dice_are_integrals_of_eta(task):
    def integral(a):
        return quad(task.eta, a, 1, epsabs=1e-12, points=[max(a, task.theta)])[0]

    assert task.volume == pytest.approx(integral(0), abs=1e-9)
    for a in (0.0, 0.4, 0.96):
        found, background = integral(a), a - (integral(0) - integral(a))
        assert task.dice(a) == pytest.approx(2 * found / (1 - a + integral(0)), abs=1e-9)
        assert task.background_dice(a) == pytest.approx(2 * background / (a + 1 - integral(0)))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_soft_dice_cuts_at_half_of_the_best_dice(task):
    """Nordström et al. 2023. And no soft answer is better than the best cut."""
    a = task.best("dice_fg")
    best = float(task.dice(a))
    assert float(task.eta(a)) == pytest.approx(best / 2, abs=1e-5)
    u = (np.arange(20_000) + 0.5) / 20_000
    eta, rng = task.eta(u), np.random.default_rng(0)
    for _ in range(20):
        s = np.clip((eta > best / 2) + rng.normal(0, rng.uniform(0, 0.5), u.shape), 0, 1)
        assert 2 * (s * eta).sum() / (s.sum() + eta.sum()) <= best + 1e-4
    assert task.predicted_volume("dice_fg") == pytest.approx(1 - a)
    assert task.predicted_volume("cce") == task.volume


def test_both_classes_alike_have_no_volume_bias():
    assert Noise(0.5, 0.1).predicted_volume("dice") == pytest.approx(0.5, abs=1e-4)
    assert Noise(0.5, 0.1).predicted_volume("dice_fg") > 0.51


@pytest.mark.parametrize(
    "over, batch, smooth",
    [("sample", 1, 1e-5), ("batch", 4, 100.0), slow("sample", 1, 100.0), slow("batch", 4, 1e-5)],
)
def test_best_volume_of_unequal_images_is_that_of_the_loss_itself(over, batch, smooth):
    """The losses of losswatch on random images; each batch of images is looked at by itself."""
    task, pixels = Spread(0.9, 0.2, 256, batch), 256
    rng = np.random.default_rng(1)
    u = torch.tensor(rng.random((1600, batch, pixels)))
    theta = torch.tensor(rng.uniform(0.7, 1.1, (1600, batch, 1)))
    loss = Dice(over=over, include_background=False, smooth_nr=smooth, smooth_dr=smooth)

    def mean(v):
        sure = 40 * ((u > 1 - v).double() - 0.5)
        logits = torch.stack([-sure, sure], 2)
        return float(torch.vmap(loss)(logits, (u > theta).long()).mean())

    best = task.best_volume(smooth)
    assert 0.05 < best < 0.25
    assert mean(best) == pytest.approx(1 - task.dice(best, smooth), abs=0.02)
    assert mean(best) <= min(mean(best - 0.05), mean(best + 0.05))


@pytest.fixture
def few_images(monkeypatch):
    """The simulation draws a tenth of its images."""
    monkeypatch.setattr(bayes, "IMAGES", bayes.IMAGES // 10)


def test_without_smoothing_pressure_nothing_is_predicted_where_all_images_are_empty(few_images):
    assert Spread(1.5, 0.2, 256).best_volume(1e-3) == 0


@pytest.mark.parametrize("smooth", [1e-5, 1.0, 50.0])
def test_the_slope_on_an_empty_image_is_that_of_the_loss(smooth):
    loss = Dice(activation="none", over="sample", include_background=False, smooth_nr=smooth,
                smooth_dr=smooth)  # fmt: skip
    p = torch.full((1, 1, 16, 16), 0.03, dtype=torch.float64, requires_grad=True)
    loss(torch.cat([1 - p, p], 1), torch.zeros(1, 16, 16, dtype=torch.long)).backward()
    assert slope_on_empty(0.03, smooth, 256) == pytest.approx(float(p.grad.sum()), rel=1e-4)


# --- Foreseen at step 0 --------------------------------------------------------------------------


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    return u, (u[:, 0] > 0.3).long()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)).double()


def test_the_response_is_minus_jacobian_times_its_transpose_times_g(batch):
    """Against the Jacobian, row by row."""
    image, label = batch
    model, loss = net(), load_loss("dice_fg")
    found = first_step.first_step(model, loss, image, label)

    names = dict(model.named_parameters())
    jacobian = torch.autograd.functional.jacobian(
        lambda *w: torch.func.functional_call(model, dict(zip(names, w, strict=True)), (image,)),
        tuple(p.detach() for p in names.values()),
    )
    logits = model(image).detach().requires_grad_()
    [g] = torch.autograd.grad(loss(logits, label), logits)
    rows = torch.cat([part.reshape(g.numel(), -1) for part in jacobian], 1)
    down = -(rows.T @ g.flatten())
    common = g.mean([0, 2, 3], keepdim=True).expand_as(g).flatten()
    y = nn.functional.one_hot(label, 2).movedim(-1, 1).double()
    apart = (y - y.mean([0, 2, 3], keepdim=True)).flatten()
    strength = [(v @ rows @ rows.T @ v) / (v @ v) for v in (common, apart)]
    assert found["gain"] == pytest.approx(float(strength[0] / strength[1]))
    moves = {"pull": -g.flatten(), "response": rows @ down, "adam": rows @ down.sign()}
    for name, move in moves.items():
        z = move.view(2, 2, 16)
        difference = (z[:, 1] - z[:, 0]).flatten()
        up = label.flatten().bool()
        alike = difference.mean().abs()
        # Of two classes the quotient is the mean move over the move apart, weighted by y - mean y.
        apart = (difference * (up.double() - up.double().mean())).mean()
        wanted = min(float(alike / apart) / 2, 1e6) if apart > 0 else 1e6
        assert found[name] == pytest.approx(wanted, rel=1e-4), name


def test_the_distance_of_known_best_constants(batch):
    image, label = batch
    y = nn.functional.one_hot(label, 2).movedim(-1, 1).double()
    share = float(label.double().mean())
    assert first_step.slope_at_best_constant(load_loss("dice_fg"), y, label) < 1e-6  # p = 1
    found = first_step.slope_at_best_constant(load_loss("cce"), y, label)
    assert found == pytest.approx(share * (1 - share), abs=0.03)  # on a grid of logits


def test_a_move_apart_in_the_wrong_direction_is_the_largest_score():
    y = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert first_step._quotient(-y, y) == first_step.LARGEST


def test_a_run_is_foreseen_from_its_own_first_batch_and_weights(compose, tmp_path):
    """Against the network and the batch that train.py makes."""
    small = ["data.image_size=8", "data.batch_size=2", "model=convnet", "seed=4"]
    for name, own in {"a": ["loss=dice_fg", "theta=0.05"], "b": ["loss=cce", "theta=0.3"]}.items():
        plan = compose(*small, *own).plan(tmp_path / name)
        (tmp_path / name).mkdir(exist_ok=True)
        config = plan.settings.as_config()
        Result(run=name, status="unfinished", config=config).write(tmp_path / name)
        image, label = make_data(plan.settings).first_batch()
        loss = load_loss(own[0].removeprefix("loss="))
        wanted = first_step.first_step(make_net(plan).double(), loss, image.double(), label)
        assert first_step.of_run(tmp_path / name) == pytest.approx(wanted)
    with joblib.parallel_config(backend="sequential"):  # processes would import PyTorch again
        found = first_step.foresee(tmp_path, pd.DataFrame({"run": ["b", "a"]}, index=[7, 3]))
    assert list(found.index) == [7, 3] and found.loc[3, "distance"] > 10 > found.loc[7, "distance"]


@pytest.mark.parametrize("seed", range(3))
def test_auc_counts_pairs(seed):
    rng = np.random.default_rng(seed)
    score, happened = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in score[happened] for b in score[~happened]]
    assert foreseen.auc(score, happened) == pytest.approx(np.mean(pairs))


def test_interval_of_the_area_draws_cells_not_runs():
    """Cells that are all alike inside carry no more than their number of observations."""
    rng = np.random.default_rng(0)
    cell = np.repeat(np.arange(12), 10)
    score = rng.normal(size=12)[cell]
    happened = (score + rng.normal(size=12)[cell]) > 0
    by_cell = foreseen.auc_interval(score, happened, cell)
    by_run = foreseen.auc_interval(score, happened, np.arange(120))
    assert by_cell.value == by_run.value
    assert by_cell.high - by_cell.low > 1.5 * (by_run.high - by_run.low)


def test_threshold_and_logistic_curve():
    score = np.array([0.0, 1, 2, 3, 4, 5])
    happened = np.array([False, False, False, True, True, True])
    assert foreseen.best_threshold(score, happened) == 2.5
    offset, slope = foreseen.logistic(score, happened)
    assert slope > 0 and -offset / slope == pytest.approx(2.5, abs=0.05)
    rng = np.random.default_rng(0)  # a known curve is found again, and its mean is the share
    x = rng.normal(size=20_000)
    so = rng.random(len(x)) < 1 / (1 + np.exp(-(0.5 + 2 * x)))
    offset, slope = foreseen.logistic(x, so)
    assert (offset, slope) == (pytest.approx(0.5, abs=0.1), pytest.approx(2, abs=0.1))
    assert np.mean(1 / (1 + np.exp(-(offset + slope * x)))) == pytest.approx(so.mean(), abs=1e-3)


def test_the_halves_are_a_chessboard():
    runs = pd.DataFrame(list(product(["a", "b", "c"], [0.1, 0.5], range(2))),
                        columns=["loss", "theta", "seed"])  # fmt: skip
    first = foreseen.is_first_half(runs)
    assert first.groupby([runs["loss"], runs["theta"]]).nunique().eq(1).all()
    halves = first.groupby([runs["loss"], runs["theta"]]).first().unstack()
    assert halves.to_numpy().tolist() == [[True, False], [False, True], [True, False]]


# --- How trainings end ---------------------------------------------------------------------------


def test_kendalls_w():
    """Without ties m(n - 1)W is Friedman's statistic (scipy)."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 4)) + np.arange(4)
    w, p = outcomes.kendall_w(values)
    statistic, wanted = friedmanchisquare(*values.T)
    assert (5 * 3 * w, p) == (pytest.approx(statistic), pytest.approx(wanted))
    tied = np.array([[1.0, 1, 2, 3], [1, 2, 2, 3], [3, 1, 1, 1]])
    statistic, wanted = friedmanchisquare(*tied.T)
    assert 3 * 3 * outcomes.kendall_w(tied)[0] == pytest.approx(statistic)
    assert outcomes.kendall_w(np.array([[1.0, 2, 3]] * 4))[0] == 1


def frame(**columns):
    return pd.DataFrame(columns)


def test_a_ranking_names_the_worst_case():
    runs = frame(model="convnet", batch_norm=[False] * 4, theta=[0.05, 0.05, 0.5, 0.5],
                 loss=["a", "b"] * 2, dice=[0.2, 0.9, 0.99, 0.98])  # fmt: skip
    table, concordance = outcomes.ranking(runs)
    row = table.set_index("loss").loc["a"]
    assert row["worst Dice"] == "0.200" and row["best in"] == "1 of 2"
    assert row["where"] == "convnet, no batch norm, 95 % foreground"
    assert concordance["conditions"] == 2 and concordance["w"] == 0


def test_ways_are_compared_by_pairs_of_seeds():
    cells = [
        {"loss": loss, "theta": 0.8, "data.noise": 0.1, "seed": seed, "dice_test": test,
         "dice_best": best, "soft": 0.2127, "volume": 0.2}
        for seed in range(3)
        for loss, test, best in [("cce", 0.6 + seed / 10, 0.65 + seed / 10 + seed / 1000),
                                 ("dice_fg", 0.65 + seed / 10, float("nan"))]
    ]  # fmt: skip
    runs = pd.DataFrame(cells)
    [row] = disputes.thresholds(runs).to_dict("records")
    assert row["soft - half"].value == pytest.approx(0.05)
    assert disputes.side(row["soft - half"]) == 1 and disputes.side(row["soft - best"]) == 0
    table = disputes.volumes(runs).set_index("loss")
    assert table.loc["cce", "holds"] and not table.loc["dice_fg", "holds"]  # wanted: 0.2587


def test_runs_that_end_at_one_class_are_counted_and_left_out_of_volumes(few_images):
    runs = frame(loss="dice_fg", theta=0.5, **{"data.noise": 0.2}, volume=[0.59, 0.6, 1.0])
    [row] = disputes.volumes(runs).to_dict("records")
    assert (row["runs"], row["constant"], row["holds"]) == (3, 1, True)  # wanted: 0.5956
    assert row["measured"].value == pytest.approx(0.595)
    where = {"loss.over": "sample", "loss.smooth_nr": 1e-5}
    runs = frame(**where, volume=[0.17, 0.0], volume_empty=[0.172, 0.0])
    [row] = disputes.empty_images(runs).to_dict("records")
    assert (row["runs"], row["constant"], row["holds"]) == (2, 1, True)  # wanted: 0.167
    assert row["measured"].value == pytest.approx(0.172)
    alone = disputes.empty_images(frame(**where, volume=[0.0], volume_empty=[0.0]))
    assert not alone["holds"].any() and alone["measured"][0].text() == "–"


# --- The command ---------------------------------------------------------------------------------


def test_first_answer_is_the_class_share():
    first = at_class_share(0.05, in_channels=1, num_classes=2)
    zero = first(torch.zeros(1, 1, 5, 5)).softmax(1)
    assert torch.allclose(zero[0, 1], torch.full((5, 5), 0.95), atol=1e-6)


@pytest.mark.parametrize("sweep", all_sweeps(), ids=lambda sweep: sweep.name)
def test_each_sweep_is_allowed(sweep, compose, tmp_path):
    """The first and the last run of each sweep can be planned.

    Of a remedy only the first: all remedies sweep the same θ and seeds, also the one named "none".
    """
    if "warm-up-with" in sweep.name:
        pytest.skip("needs the runs of the warm-up")
    for end in (0, -1) if sweep.name == "remedies/none" or "remedies" not in sweep.name else (0,):
        chosen = {key: [values[end]] for key, values in sweep.swept.items()}
        one = type(sweep)(sweep.name, sweep.fixed, chosen, sweep.steps)
        folder = tmp_path / str(end)
        folder.mkdir()
        plan = compose(*map(quoted, one.overrides(str(tmp_path)))).plan(folder)
        assert plan.steps == sweep.steps
    assert sweep.quick().count < sweep.count


@pytest.mark.slow
def test_the_command_makes_the_report_from_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "atlas.py"), "--quick"]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
                         timeout=4 * PATIENCE)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    out = tmp_path / "outputs" / "atlas_quick"
    report = (out / "report.md").read_text(encoding="utf-8")
    for name in ("collapse", "remedies", "forecast", "volume", "thresholds", "empty"):
        assert f"figures/{name}.png" in report and (out / "figures" / f"{name}.png").exists()
    table = pd.read_csv(out / "summary.csv")
    counted = [sweep.quick().count for sweep in all_sweeps() if sweep.name != "warm-up"]
    assert len(table) == sum(counted)
    again = subprocess.run([*command, "--no-train"], cwd=tmp_path, env=ENVIRONMENT,
                           capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    assert again.returncode == 0 and report == (out / "report.md").read_text(encoding="utf-8")


def test_no_runs_are_one_line(tmp_path):
    run = run_python(str(ROOT / "scripts" / "atlas.py"), "--no-train", cwd=tmp_path, status=2)
    assert "Traceback" not in run.stderr
    assert "no such folder" in run.stderr.strip().splitlines()[-1]
