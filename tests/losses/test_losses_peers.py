"""Other libraries' losses: values collected from four of them, and MONAI itself as an oracle."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losswatch.losses import CrossEntropy, Dice, Sum

CASES = json.loads((Path(__file__).parent / "peer_cases.json").read_text())["cases"]


def dice_of(case):
    """The peer's settings in our words."""
    given = case["params"]
    average = given.get("average", "")
    knobs = dict(
        activation=given["activation"] if given["activation"] in ("softmax", "sigmoid") else "none",
        include_background=given.get("include_background", True),
        exponent=2 if given.get("squared_pred") else 1,
        smooth_nr=given.get("smooth_nr", 0),
        smooth_dr=given.get("smooth_dr", given.get("eps_denominator", 0)),
        floor=given.get("denominator_floor", 0),
        over="batch" if given.get("batch") else "sample",
        joint=average.startswith("micro"),
        absent={"zero_loss": "zero", "skip": "skip", None: "smooth"}[given.get("empty")],
        intersection="minimum" if given.get("soft_label") else "product",
        weight_normalised=given.get("weight_normalised", False),
        ignore_index=given.get("ignore_index"),
    )
    if given.get("jaccard"):
        knobs |= dict(alpha=1, beta=1)
    weight = given.get("weight")
    if weight and case["loss"] == "dice":
        knobs["weight"] = weight
    elif weight and len(weight) > 1:  # MONAI's may leave out the background
        knobs["weight"] = weight if knobs["include_background"] else [0, *weight[1:]]
    if given.get("reduction") == "sum":
        knobs["reduction"] = "sum"
    return Dice(**knobs)


def run(case):
    given = case["params"]
    logits = torch.tensor(case["input"], dtype=torch.float64)
    target = torch.tensor(case["target"])
    target = target.long() if case["target_kind"] == "index" else target.double()
    if case["loss"] == "ce":
        loss = CrossEntropy(
            clip=None, label_smoothing=given["label_smoothing"], ignore_index=given["ignore_index"],
            count_ignored=True,
        )  # fmt: skip
        return loss(logits, target)
    dice = dice_of(case)
    if case["loss"] == "dice+ce":
        weight = given.get("weight")
        if logits.shape[1] == 1:
            pos_weight = torch.tensor(weight, dtype=torch.float64)
            ce = torch.nn.BCEWithLogitsLoss(pos_weight=pos_weight)
        else:
            ce = CrossEntropy(clip=None, weight=weight)
        return Sum([dice, ce], weights=[given["lambda_dice"], given["lambda_ce"]])(logits, target)
    # Activations of MONAI's that make no probabilities: apply them before.
    if given["activation"] == "tanh":
        logits = logits.tanh()
    elif given["activation"] == "log_softmax":
        logits = logits.log_softmax(1)
    if given.get("reduction") == "none":  # [N, C] values: one sample and class at a time
        hot = torch.nn.functional.one_hot(target, logits.shape[1]).movedim(-1, 1).double()
        pairs = zip(logits.flatten(0, 1), hot.flatten(0, 1), strict=True)
        return torch.stack([dice(x[None, None], y[None, None]) for x, y in pairs])
    value = dice(logits, target)
    return 1 - value if case["loss"] == "dice_score" else value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_peer_case(case):
    expected = torch.tensor(case["expected"], dtype=torch.float64)
    assert torch.allclose(run(case), expected, rtol=0, atol=case["tol"])


def gradient(loss, logits, target):
    x = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(x, target), x)[0]


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_monai_is_the_oracle(data):
    losses = pytest.importorskip("monai.losses")

    def one(*values):
        return data.draw(st.sampled_from(values))

    classes = one(2, 3, 5)
    background, batch, squared, jaccard = (one(True, False) for _ in range(4))
    activation, soft, reduction = one("softmax", "sigmoid"), one(True, False), one("mean", "sum")
    nr, dr = one(0, 1e-5, 1), one(1e-5, 1)
    weight = one(None, [1.0 + c for c in range(classes if background else classes - 1)])
    peer = losses.DiceLoss(
        include_background=background,
        softmax=activation == "softmax", sigmoid=activation == "sigmoid",
        squared_pred=squared, jaccard=jaccard, smooth_nr=nr, smooth_dr=dr, batch=batch,
        weight=weight, reduction=reduction, soft_label=soft,
    )  # fmt: skip
    if weight and not background:
        weight = [0.0, *weight]
    ours = Dice(
        activation=activation, include_background=background, exponent=2 if squared else 1,
        alpha=1 if jaccard else 0.5, beta=1 if jaccard else 0.5, smooth_nr=nr, smooth_dr=dr,
        over="batch" if batch else "sample", weight=weight, reduction=reduction,
        intersection="minimum" if soft and not squared else "product",
    )  # fmt: skip
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    space = one((4, 5), (3, 2, 4))
    logits = torch.randn(3, classes, *space, generator=g, dtype=torch.float64)
    if soft:
        target = torch.rand(3, classes, *space, generator=g, dtype=torch.float64)
        hot = target
    else:
        target = torch.randint(0, classes, (3, *space), generator=g)
        hot = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).double()
    assert ours(logits, target).item() == pytest.approx(peer(logits, hot).item(), abs=1e-6)
    assert torch.allclose(gradient(ours, logits, target), gradient(peer, logits, hot), atol=1e-7)


@pytest.mark.parametrize("squared", [False, True])
def test_monai_dice_ce(squared):
    losses = pytest.importorskip("monai.losses")
    peer = losses.DiceCELoss(softmax=True, to_onehot_y=True, squared_pred=squared, lambda_ce=0.5)
    knobs = dict(over="sample", smooth_nr=1e-5, smooth_dr=1e-5, exponent=2 if squared else 1)
    ours = Sum([Dice(**knobs), CrossEntropy(clip=None)], weights=[1, 0.5])
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 5, 6))
    assert ours(logits, target).item() == pytest.approx(
        peer(logits, target[:, None]).item(), abs=1e-6
    )
    expected = gradient(peer, logits, target[:, None])
    assert torch.allclose(gradient(ours, logits, target), expected, atol=1e-7)
