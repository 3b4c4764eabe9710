"""Each finding, from a record that shows it, and silence where the record only comes near.

The record of a healthy training is written out below; a row of the table changes a few numbers.
Whole trainings with one disease are in `test_patients.py`.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from losswatch import Observer, list_losses
from losswatch.doctor.findings import MOST, RULES, diagnose
from losswatch.doctor.history import History

STEPS = np.arange(0, 120, 10)
T = len(STEPS)
FALLING = np.linspace(1, 0.2, T)
ON = np.ones(T)


def healthy(**options):
    """Two classes, 20 % foreground, trained with a Dice of somebody else; cce and dice watched."""
    numbers = {
        "loss/own": 0.8 * FALLING, "loss/cce": 0.7 * FALLING, "loss/dice": 0.5 * FALLING,
        "grad_norm/own": 0.5 * FALLING, "grad_norm/cce": FALLING, "grad_norm/dice": 0.5 * FALLING,
        "grad_cosine/own~cce": 0.9 * ON, "grad_cosine/own~dice": 0.95 * ON,
        "grad_cosine/cce~dice": 0.9 * ON,
        "body/moved": np.r_[np.nan, 0.1 * ON[1:]], "body/statistics_moved": np.r_[np.nan, ON[1:]],
        "body/batches": 1.0 + STEPS, "body/momentum": 0.1 * ON,
    }  # fmt: skip
    answers = {
        "perfect": 0, "perfect_half": 1e-4, "perfect_quarter": 0.02, "opposite": 1,
        "opposite_half": 0.999, "background": 1, "constant": 0.67, "constant_share": 0.999,
    }  # fmt: skip
    numbers |= {f"answer/{k}": np.r_[v, np.full(T - 1, np.nan)] for k, v in answers.items()}
    signs = {
        "out_min": -3, "out_max": 3, "out_sum": 2, "out_length": 2, "out_centre": 0.5, "zeros": 0,
        "bits": 32, "ends_in": 0, "multilabel": 0, "label_min": 0, "label_max": 1, "label_sum": 1,
        "images": 8, "pixels": 1024, "counted": 1, "empty": 0, "slope": 0.1, "saturated": 0.1,
        "spread": 0.3,
        "wrong": 0.1, "pull": 1, "pull_empty": 0, "pull_ignored": 0, "pull_absent": 0,
        "apart": 0.1, "shift": 0, "label/0": 0.8, "label/1": 0.2, "hard/0": 0.8, "hard/1": 0.2,
        "soft/0": 0.8, "soft/1": 0.2, "alike/0": -0.02, "alike/1": 0.02,
    }  # fmt: skip
    numbers |= {f"sign/{name}.0": v * ON for name, v in signs.items()}
    return History(STEPS, numbers, {"cce": "ce", "dice": "dice", "own": "own"}, "own", **options)


def changed(changes, **options):
    """The healthy record with other numbers: one number for all steps, or one for each."""
    record = healthy(**options)
    answers = {k: np.r_[v, np.full(T - 1, np.nan)] for k, v in changes.items() if "answer/" in k}
    others = {k: v * ON for k, v in changes.items() if "answer/" not in k}
    return replace(record, numbers={**record.numbers, **others, **answers})


LATE = (STEPS >= 40).astype(float)  # 1 from step 40 on
BACKGROUND = {"sign/hard/0.0": np.where(LATE, 1, 0.8), "sign/hard/1.0": np.where(LATE, 0, 0.2)}
COLLAPSE = BACKGROUND | {"loss/own": 0.6, "answer/constant": 0.6}

# name of the finding, its step, the numbers that show it, options of the record
SICK = {
    "labels of 255": ("labels-outside", 0, {"sign/label_max.0": 255}, {}),
    "a label of -1 later": ("labels-outside", 40, {"sign/label_min.0": -LATE}, {}),
    "labels divided twice": ("labels-outside", 0, {"sign/label_max.0": 1 / 255}, {}),
    "regions in a softmax": ("labels-overlap", 0, {"sign/label_sum.0": 2}, {}),
    "nothing labelled": ("no-foreground", 0, {"sign/label/0.0": 1, "sign/label/1.0": 0}, {}),
    "softmax by the graph": (
        "activation-twice", 0,
        {"sign/out_min.0": 0.1, "sign/out_max.0": 0.9, "sign/out_sum.0": 0, "sign/ends_in.0": 1},
        {},
    ),
    "a sigmoid by its range": (
        "activation-twice", 0,
        {"sign/out_min.0": 0.1, "sign/out_max.0": 0.9, "sign/out_sum.0": 0.7},
        {"activation": "sigmoid"},
    ),
    "a softmax of probabilities": (
        "activation-twice", 0,
        {"sign/out_min.0": 0.1, "sign/out_max.0": 0.9, "sign/out_sum.0": 0, "sign/shift.0": 0},
        {"activation": "none"},
    ),
    "negative log-likelihood of logits": (
        "activation-missing", 0,
        {"answer/perfect": -10, "answer/perfect_half": -5, "answer/opposite": 10}, {},
    ),
    "Dice of logits": (
        "activation-missing", 0,
        {"answer/perfect": 1.25, "answer/perfect_half": 1.26, "answer/perfect_quarter": 1.27},
        {"activation": "sigmoid"},
    ),
    "never negative": ("output-limited", 0, {"sign/out_min.0": 0, "sign/zeros.0": 0.4}, {}),
    "length one": ("output-limited", 0, {"sign/out_length.0": 1e-6}, {}),
    "centred": ("output-limited", 0, {"sign/out_centre.0": 1e-6}, {}),
    "a tanh": ("output-limited", 0, {"sign/ends_in.0": 4}, {}),
    "sums of half precision": (
        "half-precision", 40,
        {"sign/bits.0": 16, "loss/own": np.where(LATE, np.nan, 0.5)}, {},
    ),
    "a loss alone": ("not-finite", 40, {"loss/own": np.where(LATE, np.inf, 0.5)}, {}),
    "the output": ("not-finite", 40, {"sign/out_max.0": np.where(LATE, np.nan, 3)}, {}),
    "no gradient": ("dead-term", 0, {"grad_norm/own": 0}, {}),
    "ignored in the mean": (
        "ignored-counted", 0,
        {"sign/counted.0": 0.03, "loss/own": 0.03 * 0.7 * FALLING, "grad_cosine/own~cce": 1},
        {"ignore_index": 255},
    ),
    "ignored as background": (
        "ignored-counted", 0, {"sign/counted.0": 0.5, "sign/pull_ignored.0": 0.2},
        {"ignore_index": 255},
    ),
    "wrong sign": (
        "opposed", 0,
        {"answer/perfect": 1, "answer/perfect_half": 1, "answer/perfect_quarter": 0.9,
         "answer/opposite": 0, "sign/apart.0": -0.1},
        {},
    ),
    "against both": (
        "opposed", 0,
        {"sign/apart.0": -0.1, "grad_cosine/own~cce": -0.9, "grad_cosine/own~dice": -0.8}, {},
    ),
    "empty images": ("empty-masks", 0, {"sign/empty.0": 0.5, "sign/pull_empty.0": 0}, {}),
    "perfect is not enough": (
        "off-direction", 0,
        {"answer/perfect": 0.75, "answer/perfect_half": 0.75, "answer/perfect_quarter": 0.76}, {},
    ),
    "each image against every mask": (
        "off-direction", 0,
        {"answer/perfect": 0.53, "answer/perfect_half": 0.53, "answer/perfect_quarter": 0.54}, {},
    ),
    "elsewhere": (
        "off-direction", 0,
        {"grad_cosine/own~cce": 0.1, "grad_cosine/own~dice": 0.2,
         "loss/cce": 1.4 - 0.7 * FALLING, "loss/dice": 1 - 0.5 * FALLING}, {},
    ),
    "drowned": (
        "smoothing", 0,
        {"answer/background": 0.05, "grad_norm/own": 0.05 * FALLING}, {},
    ),
    "a sum": ("scale", 0, {"grad_norm/own": 8192 * FALLING}, {}),
    "a thirtieth": ("scale", 0, {"grad_norm/own": 0.5 / 30 * FALLING}, {}),
    "below a Dice": ("out-of-range", 0, {"loss/own": -2}, {}),
    "no step": (
        "frozen", 0, {"body/moved": np.r_[np.nan, 1e-6 * ON[1:]], "loss/own": 0.8}, {},
    ),
    "grows": ("diverges", 40, {"loss/own": 0.8 + 100 * LATE}, {}),
    "replaced": ("diverges", 40, {"body/moved": 0.1 + LATE}, {}),
    "statistics stand": ("mode-gap", 0, {"body/statistics_moved": np.r_[np.nan, 0 * ON[1:]]}, {}),
    "statistics crawl": ("mode-gap", 0, {"body/momentum": 1e-3}, {}),
    "statistics of one batch": ("mode-gap", 0, {"body/momentum": 0.99}, {}),
    "background": (
        "collapsed", 40, COLLAPSE, {},
    ),
    "no slope": ("saturated", 40, {"sign/saturated.0": LATE, "sign/wrong.0": 0.2}, {}),
    "stands still": (
        "floor", 0, {"loss/own": 0.79, "grad_norm/own": np.r_[0.5, 0.01 * ON[1:]]}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", SICK)
def test_the_record_of_a_disease_is_named_first(row):
    name, step, changes, options = SICK[row]
    [first, *_] = diagnose(changed(changes, **options))
    assert (first.name, first.step) == (name, step), first
    for text in (first.text, first.remedy):
        assert text.endswith(".") and "\n" not in text and "nan" not in text
    assert first.line().startswith(f"{name} (step {step}): ")


# The numbers of healthy trainings that come nearest to a finding.
NEAR = {
    "healthy": ({}, {}),
    "one channel": ({}, {"activation": "sigmoid"}),
    # The probabilities differ between the classes, though all are below 1/2.
    "one class, but a loss better than of any constant": (
        BACKGROUND | {"loss/own": np.linspace(0.6, 0.2, T), "answer/constant": 0.6}, {},
    ),
    "small outputs": ({"sign/out_min.0": -0.99, "sign/out_max.0": 0.99}, {}),
    "probabilities, and a loss that reads them": (
        {"sign/out_min.0": 0, "sign/out_max.0": 1, "sign/out_sum.0": 0, "sign/shift.0": 0.5},
        {"activation": "none"},
    ),
    "the first output of a small head": ({"sign/out_min.0": np.r_[0.1, -ON[1:]]}, {}),
    "regions, each with a sigmoid": ({"sign/label_sum.0": 2}, {"activation": "sigmoid"}),
    "soft labels": ({"sign/label_max.0": 0.6}, {"activation": "sigmoid"}),
    "a first batch without foreground": (
        {
            "sign/label/0.0": np.r_[1, 0.8 * ON[1:]], "sign/label/1.0": np.r_[0, 0.2 * ON[1:]],
            "grad_norm/own": np.r_[1e-9, 0.5 * FALLING[1:]], "answer/perfect": 0.9,
            "answer/perfect_half": 0.7, "answer/perfect_quarter": 0.6, "answer/constant": 0.6,
        }, {},
    ),
    "some batches without foreground": (
        {"sign/label/1.0": 0.2 * LATE, "sign/label/0.0": 1 - 0.2 * LATE}, {},
    ),
    "label smoothing": (
        {"answer/perfect": 1.0, "answer/perfect_half": 0.5, "answer/perfect_quarter": 0.26,
         "answer/opposite": 19, "answer/constant": 0.69}, {},
    ),
    "a Dice of 1 - d without a link": (
        {"loss/own": -0.9 * (1.2 - FALLING), "answer/perfect": -1, "answer/perfect_half": -1,
         "answer/perfect_quarter": -0.9, "answer/opposite": 0, "answer/constant": -0.33}, {},
    ),
    "ignored pixels left out": ({"sign/counted.0": 0.1}, {"ignore_index": 255}),
    "empty images in a batch sum": ({"sign/empty.0": 0.5, "sign/pull_empty.0": 0.4}, {}),
    "opposed to one preset at first": ({"grad_cosine/own~cce": np.r_[-0.5, 0.9 * ON[1:]]}, {}),
    "class weights": ({"grad_norm/own": 5 * FALLING}, {}),
    "strong class weights": ({"grad_cosine/own~cce": 0.1, "grad_cosine/own~dice": 0.2}, {}),
    "a tenth of Dice": ({"grad_norm/own": 0.05 * FALLING}, {}),
    "small steps": ({"body/moved": np.r_[np.nan, 1e-4 * ON[1:]]}, {}),
    "group norm": ({"body/statistics_moved": np.nan, "body/momentum": np.nan}, {}),
    "converged": (
        {"sign/saturated.0": 1, "sign/wrong.0": 1e-3, "grad_norm/own": 0.5 * FALLING**4}, {},
    ),
    "one class for a while": (
        {"sign/hard/0.0": np.where(LATE, 0.8, 1), "sign/hard/1.0": np.where(LATE, 0.2, 0)}, {},
    ),
    "nothing known": (
        {name: np.nan for name in healthy().numbers}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", NEAR)
def test_a_healthy_record_has_no_finding(row):
    changes, options = NEAR[row]
    assert diagnose(changed(changes, **options)) == []


def test_without_a_trained_loss_the_rest_is_said():
    assert diagnose(replace(healthy(), trained=None)) == []
    sick = changed({"sign/label_max.0": 255, "grad_norm/own": 0})
    names = [finding.name for finding in diagnose(replace(sick, trained=None))]
    assert names == ["labels-outside", "dead-term"]


def test_an_observation_that_failed_tells_what_its_labels_are():
    nothing = changed({name: np.nan for name in healthy().numbers})
    errors = ((3, "target: holds NaN, none is allowed"),)
    [finding] = diagnose(replace(nothing, errors=errors))
    assert (finding.name, finding.step) == ("labels-outside", 3)


def test_a_first_batch_without_foreground_is_told_if_it_is_no_small_one():
    record = changed({"sign/label/0.0": 1, "sign/label/1.0": 0})
    one = {k: v[:1] for k, v in record.numbers.items()}
    [finding] = diagnose(replace(record, steps=STEPS[:1], numbers=one, is_over=False))
    assert finding.name == "no-foreground" and "None of the 8 images" in finding.text
    small = one | {"sign/images.0": 2 * ON[:1]}
    assert diagnose(replace(record, steps=STEPS[:1], numbers=small, is_over=False)) == []


def test_labels_without_a_background_channel_are_told_by_the_refusal():
    net = nn.Conv2d(1, 2, 1)
    observer = Observer(["cce"], net)
    labels = torch.zeros(1, 2, 4, 4)
    labels[:, 1, :2] = 1  # nothing stands for the background
    with pytest.raises(ValueError, match="do not add to 1"):
        observer(net(torch.rand(1, 1, 4, 4)), labels)
    [finding] = observer.findings()
    assert finding.name == "labels-overlap" and "less than 1" in finding.text


def test_heads():
    two = {name.replace(".0", ".1"): x for name, x in healthy().numbers.items() if "sign/" in name}
    values = {f"loss/{n}.{h}": healthy().numbers[f"loss/{n}"] for n in ("cce", "dice")
              for h in (0, 1)}  # fmt: skip
    base = replace(healthy(), trained=None, heads=2, numbers=healthy().numbers | two | values)
    assert diagnose(base) == []
    lost = replace(base, numbers={**base.numbers, "sign/empty.1": 0.6 * ON})
    assert [finding.name for finding in diagnose(lost)] == ["head-labels"]
    idle = replace(base, numbers={**base.numbers, "loss/cce.1": 0.7 * ON})
    assert [finding.name for finding in diagnose(idle)] == ["head-idle"]


def test_terms():
    terms = {"loss/a": FALLING, "loss/b": FALLING, "grad_norm/a": ON, "grad_norm/b": ON}
    kinds = {**healthy().kinds, "a": "own", "b": "own"}

    def of(cosine, with_a):
        pairs = {"grad_cosine/a~b": cosine * ON, "grad_cosine/own~a": with_a * ON}
        numbers = healthy().numbers | terms | pairs
        record = replace(healthy(), numbers=numbers, kinds=kinds, terms=("a", "b"))
        return [finding.name for finding in diagnose(record)]

    assert of(0.3, 0.9) == []
    assert of(0.3, 0.999999) == ["terms-unbalanced"]
    assert of(0.99, 0.999999) == []  # both pull the same way
    assert of(-0.8, 0.6) == ["terms-opposed"]


def test_three_classes_of_which_images_lack_some():
    more = {f"sign/{n}/2.0": 0.1 * ON for n in ("label", "hard", "soft", "alike")}
    base = replace(healthy(), classes=3, numbers={**healthy().numbers, **more})
    assert diagnose(base) == []
    answers = {f"answer/perfect{end}": 0.6 * ON for end in ("", "_half", "_quarter")}
    sick = {**base.numbers, **answers, "sign/pull_absent.0": 0.4 * ON}
    assert diagnose(replace(base, numbers=sick))[0].name == "absent-class"


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", list_losses())
def test_a_first_batch_of_one_class_is_no_reason_to_blame_a_loss(name, label):
    torch.manual_seed(0)
    net = nn.Conv2d(1, 2, 3, padding=1)
    observer = Observer(list(dict.fromkeys(["cce", "dice", name])), net, trained=name)
    observer(net(torch.rand(2, 1, 16, 16)), torch.full((2, 16, 16), label))
    assert observer.findings() == []


def test_a_collapse_is_foreseen_at_the_first_batch_and_not_repeated_at_the_end():
    start = {
        "body/momentum": np.nan,  # no batch norm
        "sign/alike/1.0": 0.5,
        "sign/alike/0.0": -0.5,
        "sign/apart.0": 0.01,
        "answer/constant_share": 1 - 1e-7,
    }
    record = changed(start)
    one = replace(record, steps=STEPS[:1], numbers={k: v[:1] for k, v in record.numbers.items()},
                  is_over=False)  # fmt: skip
    [finding] = diagnose(one)
    assert finding.name == "collapse-ahead" and "foreground" in finding.text
    assert diagnose(record) == []


def test_before_the_end_only_what_is_certain_is_said():
    record = changed(COLLAPSE, counts_steps=True)  # 70 steps
    assert diagnose(record) == diagnose(replace(record, is_over=False)) == []
    longer = replace(record, steps=3 * STEPS)
    assert [f.name for f in diagnose(longer)] == ["collapsed"]
    assert diagnose(replace(longer, is_over=False)) == []
    assert [f.name for f in diagnose(replace(record, steps=10 * STEPS, is_over=False))] == [
        "collapsed"
    ]
    assert [f.name for f in diagnose(changed(COLLAPSE))] == ["collapsed"]  # counts unknown steps


def test_batch_norm_is_no_remedy_for_a_network_that_has_it():
    [with_norm] = diagnose(changed(COLLAPSE))
    [without] = diagnose(changed(COLLAPSE | {"body/momentum": np.nan}))
    assert "batch norm" in without.remedy and "batch norm" not in with_norm.remedy


def test_at_most_three_are_named_in_the_order_of_the_rules():
    everything = {}
    for _, _, changes, options in SICK.values():
        everything |= {} if options else changes
    found = diagnose(changed(everything))
    assert len(found) == MOST and len({finding.name for finding in found}) == MOST
    order = [rule(changed(everything)) for rule in RULES]
    assert found[0] == next(finding for finding in order if finding)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_no_record_raises_an_error_or_a_warning(seed):
    """Numbers that are missing, infinite, 0 or of another order, at any observation."""
    draw = np.random.default_rng(seed)
    base = changed(SICK[draw.choice(list(SICK))][2])
    count = int(draw.integers(1, T + 1))
    odd = np.array([np.nan, np.inf, -np.inf, 0, 1, 1e-30, 1e30, -1])
    numbers = {}
    for name, values in base.numbers.items():
        spoilt = draw.random(T) < draw.choice([0, 0.1, 1])
        numbers[name] = np.where(spoilt, draw.choice(odd, T), values)[:count]
    options = {
        "trained": draw.choice([None, "own", "cce"]),
        "terms": ("dice", "cce") if draw.random() < 0.5 else (),
        "activation": str(draw.choice(["softmax", "sigmoid", "none"])),
        "ignore_index": draw.choice([None, 255]),
        "heads": int(draw.integers(1, 3)),
        "classes": int(draw.integers(2, 4)),
        "is_over": bool(draw.random() < 0.5),
    }
    record = replace(base, steps=STEPS[:count], numbers=numbers, **options)
    for finding in diagnose(record):
        assert finding.step in STEPS and finding.text.endswith(".")


def test_no_observation_no_finding():
    empty = History(np.array([], int), {}, {}, None)
    assert diagnose(empty) == []
