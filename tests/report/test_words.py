"""What a sweep shows in sentences, and the power calculation behind the seeds that they suggest."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, stats

from losswatch.report.compare import compare_losses
from losswatch.report.words import POWER, detectable, in_words, power, spread_of


def frame(*rows, **shared):
    """Rows of `read_runs`: (loss, theta, seed, Dice), and a verdict if there is a fifth part."""
    runs = pd.DataFrame([(*row, None)[:5] for row in rows])
    runs.columns = ["loss", "theta", "seed", "dice", "verdict"]
    runs = runs.assign(iou=0.5, accuracy=0.9, seconds=1.0, status="done", **shared)
    runs["run"] = [f"run{i}" for i in runs.index]
    columns = ["run", "loss", "theta", "seed", "dice", "iou", "accuracy", "seconds", "status"]
    return runs[[*columns, "verdict"]].assign(findings=None, error=None)


def pairs(differences, theta=0.5):
    """cce, and dice that is above it by these differences, a seed each."""
    return [
        (loss, theta, seed, 0.8 + seed / 100 + gain)
        for seed, difference in enumerate(differences)
        for loss, gain in (("cce", 0), ("dice", difference))
    ]


# --- Power ----------------------------------------------------------------------------------------


def found(number, effect, alpha, trials=40_000):
    """The share of simulated experiments in which scipy's paired t test finds the difference."""
    rng = np.random.default_rng(number)
    before = rng.normal(size=(trials, number))
    after = before + rng.normal(effect, 1, size=(trials, number))
    t, p = stats.ttest_rel(after, before, axis=1)
    return np.mean((p < alpha) & (t > 0))


@pytest.mark.parametrize(
    "number, effect, alpha",
    [(2, 8, 0.05), (3, 2, 0.05), (3, 5, 0.05 / 6), (5, 1.7, 0.05), (10, 1, 0.05), (10, 0, 0.05)],
)
def test_power_is_that_of_simulated_experiments(number, effect, alpha):
    share = found(number, effect, alpha)
    error = np.sqrt(share * (1 - share) / 40_000)
    assert power(number, effect, alpha) == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize("effect, alpha", [(1, 0.05), (20, 0.05), (200, 0.05 / 18), (3, 0.2)])
def test_power_of_two_pairs_by_an_integral(effect, alpha):
    """With two values t = u / |v|: u is their sum by √2, v their difference by √2, both normal."""
    critical = 1 / np.tan(np.pi * alpha / 2)  # of Cauchy's distribution
    both = lambda v: stats.norm.pdf(v) * stats.norm.cdf(2**0.5 * effect - critical * v)  # noqa: E731
    wanted, _ = integrate.quad(both, 0, 10, points=[2**0.5 * effect / critical], limit=200)
    assert power(2, effect, alpha) == pytest.approx(2 * wanted, abs=1e-6)


def test_what_so_many_pairs_show():
    for number, alpha in itertools.product((2, 3, 5, 10, 50), (0.05, 0.05 / 36)):
        size = detectable(number, 0.02, alpha)
        assert power(number, size / 0.02, alpha) == pytest.approx(POWER)
        assert detectable(number, 0.04, alpha) == pytest.approx(2 * size)
    # R: power.t.test(n=10, power=0.8, type="paired") has delta = 0.9961.
    assert detectable(10, 1.0, 0.05) == pytest.approx(0.9961, abs=1e-3)


def test_the_spread_is_pooled_over_conditions():
    """By hand: the mean of the variances, weighted by their degrees of freedom."""
    few, more = [0.01, 0.03], [0.02, 0.05, -0.04, 0.01]
    same = [0.0, 0.0, 0.0]  # both losses end at one constant: it says nothing of the others
    rows = [*pairs(few, 0.1), *pairs(more, 0.2), *pairs(same, 0.3)]
    wanted = (1 * np.var(few, ddof=1) + 3 * np.var(more, ddof=1)) / 4
    assert spread_of(compare_losses(frame(*rows))) == pytest.approx(wanted**0.5)
    assert spread_of(compare_losses(frame(*pairs(same)))) == 0


# --- Constant runs --------------------------------------------------------------------------------

STUCK = "constant: foreground"


def test_constant_runs_come_first():
    rows = [
        *(("dice_fg", 0.05, seed, 0.48, STUCK) for seed in range(3)),
        *(("dice_fg", 0.5, seed, 0.9 - seed / 9) for seed in range(3)),
        *(("cce", theta, seed, 0.8 + seed / 50) for theta in (0.05, 0.5) for seed in range(3)),
    ]
    sentence = "loss=dice_fg predicts foreground everywhere at theta=0.05, in 3 of 3 seeds."
    assert in_words(frame(*rows))[0] == sentence
    rows[0] = ("dice_fg", 0.05, 0, 0.8, "diverges")
    assert in_words(frame(*rows))[0] == sentence.replace("3 of 3", "2 of 3")


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ([("dice", 0.5, 0, 0.4, STUCK)], "loss=dice predicts foreground everywhere."),
        ([("dice", theta, 0, 0.4, STUCK) for theta in (0.1, 0.2)],
         "loss=dice predicts foreground everywhere at theta=0.1, theta=0.2."),
        ([("dice", theta / 10, 0, 0.4, STUCK) for theta in range(1, 7)],
         "loss=dice predicts foreground everywhere at theta=0.1, theta=0.2, theta=0.3 and 3 more "
         "settings."),
        ([(loss, 0.5, 0, 0.4, "constant: class_2") for loss in ("dice", "cce")],
         "loss=cce,dice predict class_2 everywhere."),
    ],
)  # fmt: skip
def test_where_runs_are_constant(rows, sentence):
    assert in_words(frame(*rows))[0] == sentence


# --- Differences ----------------------------------------------------------------------------------


def test_few_seeds_and_how_many_would_do():
    """Two differences with a standard deviation of 0.00566: five seeds show 0.01, four do not."""
    assert in_words(frame(*pairs([0.005, -0.003]))) == [
        "No certain difference in Dice in 1 comparison: 2 seeds are few; seed=0,1,2,3,4 would show "
        "one of 0.01."
    ]
    effect = 0.01 / np.std([0.005, -0.003], ddof=1)
    assert found(4, effect, 0.05) < POWER < found(5, effect, 0.05)


def test_many_comparisons_need_more_seeds():
    """Six of them are tested at 0.05 / 6, as Holm tests the smallest p."""
    rows = [row for i in range(6) for row in pairs([0.005, -0.003], i / 10)]
    [sentence] = in_words(frame(*rows))
    assert sentence == (
        "No certain difference in Dice in 6 comparisons: 2 seeds are few; "
        "seed=0,1,2,3,4,5,6,7 would show one of 0.01."
    )
    effect = 0.01 / np.std([0.005, -0.003], ddof=1)
    assert found(7, effect, 0.05 / 6) < POWER < found(8, effect, 0.05 / 6)


def test_if_ten_seeds_would_not_show_a_hundredth():
    """Then what they would show. The largest difference is said, with its interval."""
    largest, outlook = in_words(frame(*pairs([0.1, -0.02])))
    # By hand: t(1 degree of freedom) = 12.7062, standard error 0.06; t = 2/3, p = 0.626.
    assert largest == "dice is above cce by 0.0400 ± 0.7624 Dice (2 seeds, p = 0.626)."
    size = float(outlook.split()[-1].rstrip("."))
    assert outlook.endswith(f"seed=0,1,2,3,4,5,6,7,8,9 would show one of {size:g}.")
    spread = np.std([0.1, -0.02], ddof=1)
    assert found(10, (size - 0.01) / spread, 0.05) < POWER <= found(10, size / spread, 0.05) + 0.01


def test_seeds_that_would_have_shown_it():
    steps = 0.001 * np.array([1, -1, 1, -1, 0.5, -0.5])
    [sentence] = in_words(frame(*pairs(steps)))
    size = float(sentence.split()[-1].rstrip("."))
    assert sentence == (
        f"No certain difference in Dice in 1 comparison: 6 seeds would have shown one of {size:g}."
    )
    assert found(6, size / steps.std(ddof=1), 0.05) == pytest.approx(POWER, abs=0.03)


def test_differences_that_are_certain():
    sure = [0.2, 0.21, 0.22]
    assert in_words(frame(*pairs(sure))) == [
        # t = 0.21 / (0.01 / √3) = 36.37, two-sided p with 2 degrees of freedom; t(0.975) = 4.3027.
        "dice is above cce by 0.2100 ± 0.0248 Dice (3 seeds, p < 0.001)."
    ]
    rows = pairs(sure, 0.1) + pairs([-0.3, -0.33, -0.36], 0.2) + pairs([0.01, -0.02, 0], 0.3)
    header, *largest, rest = in_words(frame(*rows))
    assert header == "2 of 3 comparisons show a difference in Dice (p < 0.05 by Holm). The largest:"
    p = [stats.ttest_1samp(x, 0).pvalue for x in (sure, [-0.3, -0.33, -0.36])]
    assert max(p) * 2 < 0.01 and min(p) * 3 > 0.001
    assert largest == [
        f"cce is above dice by 0.3300 ± 0.0745 Dice at theta=0.2 (3 seeds, p = {2 * p[1]:.3f}).",
        f"dice is above cce by 0.2100 ± 0.0248 Dice at theta=0.1 (3 seeds, p = {3 * p[0]:.3f}).",
    ]
    assert rest.startswith("No certain difference in Dice in the other 1 of 3 comparisons: 3 seeds")


def test_a_difference_to_a_constant_run_is_no_news():
    """Of the largest differences those between losses that learn come first."""
    rows = pairs([0.05, 0.052, 0.048])
    rows += [("dice_fg", 0.5, seed, 0.1 + seed / 100, STUCK) for seed in range(3)]
    assert [s.split(" Dice")[0] for s in in_words(frame(*rows))[2:4]] == [
        "dice is above cce by 0.0500 ± 0.0050", "dice is above dice_fg by 0.7500 ± 0.0050"
    ]  # fmt: skip


def test_one_seed():
    rows = [("cce", 0.5, 7, 0.8), ("dice", 0.5, 7, 0.83)]
    assert in_words(frame(*rows)) == [
        "dice is above cce by 0.0300 Dice (1 seed).",
        "One seed shows no certainty; seed=7,0,1 would.",
    ]


def test_equal_runs():
    [sentence] = in_words(frame(*pairs([0, 0])))
    assert sentence.endswith("in Dice in 1 comparison: all seeds end with equal Dice.")


def test_nothing_to_say():
    assert in_words(frame(("dice", 0.5, 0, 0.9), ("dice", 0.5, 1, 0.91))) == []
    assert in_words(frame(*pairs([0.1, 0.2])).assign(status="failed")) == []
    assert in_words(frame(("dice", 0.5, 0, np.nan), ("cce", 0.5, 0, 0.9))) == []


def test_runs_that_are_not_done_do_not_count():
    runs = frame(*pairs([0.2, 0.21, 0.22]), ("dice", 0.5, 3, 0.1), ("cce", 0.5, 3, 0.9))
    runs.loc[6:, "status"] = "unfinished"
    assert in_words(runs) == in_words(frame(*pairs([0.2, 0.21, 0.22])))


def test_any_sweep_has_at_most_six_sentences():
    rng = np.random.default_rng(0)
    for _ in range(30):
        losses = [f"loss_{i}" for i in range(rng.integers(1, 6))]
        thetas, seeds = range(rng.integers(1, 5)), range(rng.integers(1, 5))
        spread = 10.0 ** rng.integers(-4, 0)
        rows = [
            (loss, theta, seed, rng.normal(i * 0.05, spread),
             f"constant: class_{rng.integers(3)}" if rng.random() < 0.3 else None)
            for i, loss in enumerate(losses) for theta in thetas for seed in seeds
        ]  # fmt: skip
        sentences = in_words(frame(*rows))
        assert len(sentences) <= 6 and all(s[-1] in ".:" for s in sentences)
