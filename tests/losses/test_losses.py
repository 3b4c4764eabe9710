import copy
import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.fx.experimental.proxy_tensor
from conftest import slow
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from losswatch.losses import (
    CrossEntropy,
    Dice,
    LossSet,
    OneHotTarget,
    Sum,
    check_inputs,
)
from losswatch.presets import list_losses, load_loss

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "loss").glob("*.yaml"))
ARTICLE = ("cce", "dice", "dice_fg", "dice_square", "dice_fg_square")


def load(name, **knobs):
    config = OmegaConf.load(CONFIGS[0].with_name(f"{name}.yaml"))
    return instantiate(OmegaConf.merge(config, knobs))


def batch(n=2, c=2, space=(5, 6), dtype=torch.float64, seed=0, scale=1.5, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, *space, generator=g, dtype=dtype) * scale
    return logits.to(device), torch.randint(0, c, (n, *space), generator=g).to(device)


def one_hot(target, classes):
    return torch.nn.functional.one_hot(target, classes).movedim(-1, 1).double()


def gradient(loss, logits, target):
    x = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(x, target), x)[0]


def reference(logits, target, k):
    """The Dice family once more: float64 numpy, loops over groups and classes, nothing shared."""
    z = logits.numpy().astype(np.float64)
    if k["activation"] == "softmax":
        p = np.exp(z - z.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True)
    else:
        p = 1 / (1 + np.exp(-z)) if k["activation"] == "sigmoid" else z
    classes, t = p.shape[1], target.numpy()
    if t.ndim == p.ndim:
        y, valid = t, np.ones_like(t[:, 0])
    else:
        y = np.stack([t == c for c in range(classes)], 1).astype(float)
        valid = np.ones_like(t) if k["ignore_index"] is None else t != k["ignore_index"]
    y, valid = y * valid[:, None], valid.astype(float)
    p, y, valid = (np.moveaxis(x, 1, -1) for x in (p, y, valid[:, None]))  # channels last
    n = len(p)
    groups = {"row": p.shape[:-2], "sample": (n,)}.get(k["over"], (1,))
    p, y, valid = (x.reshape(math.prod(groups), -1, x.shape[-1]) for x in (p, y, valid))
    kept = list(range(0 if k["include_background"] else 1, classes))
    total = []
    for pg, yg, vg in zip(p, y, valid, strict=True):
        if vg.sum() == 0:
            total.append(0.0)
            continue
        terms, weights, present = [], [], []
        for cs in [kept] if k["joint"] else [[c] for c in kept]:

            def of(knob, cs=cs):
                return knob[cs[0]] if isinstance(knob, list) else knob

            pc, yc = pg[:, cs], yg[:, cs]
            pv = pc * vg
            both = np.minimum(pv, yc) if k["intersection"] == "minimum" else pv * yc
            tp = both.sum()
            fp = (pc ** k["exponent"] * vg).sum() - tp
            fn = (yc ** k["exponent"]).sum() - tp
            den = 2 * tp + 2 * k["alpha"] * fp + 2 * k["beta"] * fn + of(k["smooth_dr"])
            d = (2 * tp + of(k["smooth_nr"])) / max(den, k["floor"])
            link = {"1-d": 1 - d, "-d": -d, "-log": -math.log(max(d, 1e-12)),
                    "power": max(1 - d, 1e-12) ** k["power"]}[k["link"]]  # fmt: skip
            w = 1.0 if k["weight"] is None else k["weight"][cs[0]]
            if k["absent"] == "zero" and yc.sum() <= 0:
                link = 0
            terms.append(link)
            weights.append(w)
            present.append(yc.sum() > 0)
        terms, weights, present = map(np.array, (terms, weights, present))
        if k["absent"] == "skip":
            weights = weights * present
            total.append((weights * terms).sum() / max(weights.sum(), 1e-20))
        elif k["reduction"] == "sum":
            total.append((weights * terms).sum())
        elif k["weight_normalised"] and k["weight"] is not None:
            total.append((weights * terms).sum() / weights.sum())
        else:
            total.append((weights * terms).mean())
    return np.sum(total) if k["reduction"] == "sum" else np.mean(total)


DEFAULT = dict(
    activation="softmax", include_background=True, exponent=1, alpha=0.5, beta=0.5, smooth_nr=1e-7,
    smooth_dr=1e-7, floor=0, over="global", joint=False, link="1-d", power=1, weight=None,
    weight_normalised=False, reduction="mean", absent="smooth", intersection="product",
    ignore_index=None,
)  # fmt: skip


@st.composite
def knobs(draw, classes):
    def one(*values):
        return draw(st.sampled_from(values))

    k = dict(DEFAULT)
    k |= dict(
        activation=one("softmax", "softmax", "sigmoid"),
        include_background=one(True, False),
        exponent=one(1, 1, 2, 0.5, 3),
        alpha=one(0.5, 1, 0.3),
        beta=one(0.5, 1, 0.7),
        over=one("row", "sample", "batch", "global"),
        link=one("1-d", "1-d", "-d", "-log", "power"),
        power=one(0.75, 2),
        joint=one(False, False, True),
        ignore_index=one(None, 255, 1),
        floor=one(0, 1e-7, 30.0),
        smooth_nr=one(0.1, 1e-5),
        smooth_dr=one(0.1, 1.0),
    )
    if not k["joint"]:
        k["weight"] = one(None, [0.2 + 0.5 * c for c in range(classes)])
        k["weight_normalised"] = one(False, True)
        k["absent"] = one("smooth", "zero", "skip")
        if one(True, False):
            k["smooth_dr"] = [0.3 + c for c in range(classes)]
    if k["absent"] != "skip":
        k["reduction"] = one("mean", "mean", "sum")
    return k


@pytest.mark.parametrize("classes", [2, 4])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_knobs_match_the_reference(classes, data):
    k = data.draw(knobs(classes))
    seed = data.draw(st.integers(0, 99))
    logits, target = batch(c=classes, space=(3, 4), seed=seed)
    if seed % 3 == 0:
        target[0] = 0  # classes absent
    if k["ignore_index"] is not None:
        target[:, 0] = k["ignore_index"]
    loss = Dice(**k)
    x = logits.requires_grad_()
    value = loss(x, target)
    assert value.item() == pytest.approx(reference(logits.detach(), target, k), abs=1e-11)
    # Finite differences along one random direction.
    step = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    (g,) = torch.autograd.grad(value, x)
    ends = [loss(logits.detach() + s * 1e-6 * step, target).item() for s in (1, -1)]
    assert (g * step).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("intersection", ["product", "minimum"])
@pytest.mark.parametrize("over", ["row", "sample", "global"])
@pytest.mark.parametrize("activation, exponent", [("softmax", 1), ("sigmoid", 2), ("none", 1.5)])
def test_soft_targets_match_the_reference(intersection, over, activation, exponent):
    g = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 4, 5, generator=g, dtype=torch.float64)
    target = torch.rand(2, 3, 4, 5, generator=g, dtype=torch.float64)
    k = DEFAULT | dict(
        intersection=intersection, over=over, activation=activation, exponent=exponent
    )
    loss = Dice(**k)
    assert loss(p, target).item() == pytest.approx(reference(p, target, k), abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (p.requires_grad_(),))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_documented_and_has_the_right_gradient(device, path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "_target_: losswatch.losses." in text
    loss = instantiate(OmegaConf.load(path)).to(device)
    logits, target = batch(space=(3, 4), device=device)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits.requires_grad_(),))
    hot = one_hot(target, 2)
    assert loss(logits, hot).item() == pytest.approx(loss(logits, target).item(), abs=1e-12)
    deep, label = batch(space=(2, 3, 2), device=device)  # 3-D
    assert loss(deep, label).item() == pytest.approx(
        loss(deep, one_hot(label, 2)).item(), abs=1e-12
    )
    assert torch.equal(gradient(loss, deep, label).isfinite(), torch.ones_like(deep).bool())


# -- the source texts ------------------------------------------------------------------------------


def test_article_losses_as_its_formulas(device):
    logits, target = batch(device=device)
    p, y = logits.softmax(1), one_hot(target, 2)
    eps, axes = 1e-7, (0, 2, 3)
    cce = -(y * p.clamp(eps, 1 - eps).log()).sum(1).mean()
    assert load("cce")(logits, target).item() == pytest.approx(cce.item(), abs=1e-14)
    for name in ARTICLE[1:]:
        a, b = (p[:, 1:], y[:, 1:]) if "fg" in name else (p, y)
        top = 2 * (a * b).sum(axes) + eps
        a, b = (a**2, b**2) if "square" in name else (a, b)
        expected = 1 - (top / (a.sum(axes) + b.sum(axes) + eps)).mean()
        assert load(name)(logits, target).item() == pytest.approx(expected.item(), abs=1e-14)


def test_one_wrong_pixel_in_an_empty_mask():
    p, y = torch.zeros(1, 1, 128, 128), torch.zeros(1, 1, 128, 128)
    p[0, 0, 0, 0] = 1
    small = load("dice_smooth_small", activation="none")
    assert small(p, y).item() == pytest.approx(0.99999, abs=1e-6)
    large = load("dice_smooth100", activation="none")
    assert large(p, y).item() == pytest.approx(0.009900987, abs=1e-7)
    negative = load("dice_negative", activation="none")
    assert negative(p, y).item() == pytest.approx(-0.990099, abs=1e-6)
    log = load("dice_log", activation="none")
    assert log(p, y).item() == pytest.approx(-math.log(0.990099), abs=1e-6)


def test_the_questions_functions():
    rng = np.random.default_rng(0)
    p, y = rng.random((2, 1, 4, 4)), (rng.random((2, 1, 4, 4)) > 0.5).astype(float)
    tp, tt = torch.from_numpy(p), torch.from_numpy(y)
    s = 1e-6
    flat = 1 - (2 * (p * y).sum() + s) / (y.sum() + p.sum() + s)
    assert load("dice_flat", activation="none")(tp, tt).item() == pytest.approx(flat, abs=1e-12)
    rows = 1 - (2 * (p * y).sum(-1) + s) / ((y**2).sum(-1) + (p**2).sum(-1) + s)
    row = load("dice_row", activation="none")
    assert row(tp, tt).item() == pytest.approx(rows.mean(), abs=1e-12)
    q = 1 / (1 + np.exp(-p))
    sigmoid = 1 - 2 * (y * q).sum() / (y + q).sum()
    assert load("dice_sigmoid")(tp, tt).item() == pytest.approx(sigmoid, abs=1e-12)
    for gamma in (1, 2, 1.5):
        expected = 1 - (2 * (p * y).sum() + s) / ((p**gamma).sum() + (y**gamma).sum() + s)
        loss = load("dice_gamma", activation="none", exponent=gamma)
        assert loss(tp, tt).item() == pytest.approx(expected, abs=1e-12)


def test_the_answers_multi_label_sum():
    logits, target = batch()
    p, y = logits.softmax(1), one_hot(target, 2)
    total = 0.0
    for c, s in enumerate((1, 100)):
        total -= (2 * (p * y)[:, c].sum() + s) / (y[:, c].sum() + p[:, c].sum() + s)
    assert load("dice_multilabel")(logits, target).item() == pytest.approx(total.item(), abs=1e-12)


# -- cross entropy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("ignore", [None, 255, 0])
@pytest.mark.parametrize("clip", [None, 1e-7])
def test_cross_entropy_equals_torch(device, classes, weight, smoothing, ignore, clip):
    logits, target = batch(c=classes, device=device)
    if ignore is not None:
        target[0, :2] = ignore
    w = [0.5 + c for c in range(classes)] if weight else None
    loss = CrossEntropy(clip=clip, weight=w, label_smoothing=smoothing, ignore_index=ignore)
    other = torch.nn.CrossEntropyLoss(
        weight=None if w is None else torch.tensor(w).double(), label_smoothing=smoothing,
        ignore_index=-100 if ignore is None else ignore,
    ).to(device)  # fmt: skip
    assert loss(logits, target).item() == pytest.approx(other(logits, target).item(), abs=1e-12)
    assert torch.allclose(
        gradient(loss, logits, target), gradient(other, logits, target), atol=1e-13
    )


def test_clipping_stops_the_gradient_as_in_the_article():
    logits = torch.tensor([[[30.0, 0.0, 30.0], [0.0, 30.0, 0.0]]])
    target = torch.tensor([[0, 0, 1]])  # right, wrong, wrong, all beyond the clip
    assert CrossEntropy()(logits, target).item() == pytest.approx(2 / 3 * -math.log(1e-7), rel=1e-5)
    assert gradient(CrossEntropy(), logits, target).abs().max() == 0
    assert CrossEntropy(clip=None)(logits, target).item() == pytest.approx(20)
    assert gradient(CrossEntropy(clip=None), logits, target).abs().max() > 0.3
    far = logits * 1e3
    assert CrossEntropy(clip=None)(far, target).item() == pytest.approx(20000)


# -- the set ---------------------------------------------------------------------------------------


def zoo(classes):
    """Losses of every kind that a set treats differently."""
    article = {p.stem: instantiate(OmegaConf.load(p)) for p in CONFIGS if p.stem in ARTICLE}
    weight = [0.5 + c for c in range(classes)]
    return article | {
        "jaccard": Dice(alpha=1, beta=1, over="batch"),
        "log": Dice(link="-log", exponent=2),
        "focal": Dice(link="power", power=0.75, joint=True),
        "weighted": Dice(weight=weight, weight_normalised=True),
        "gamma": Dice(exponent=2.5, include_background=False),
        "absent": Dice(absent="skip"),
        "floor": Dice(floor=50.0),
        "sample": Dice(over="sample"),
        "row": Dice(over="row", exponent=1.5),
        "sigmoid": Dice(activation="sigmoid"),
        "ignoring": Dice(ignore_index=0),
        "stable": CrossEntropy(clip=None),
        "weighted_ce": CrossEntropy(weight=weight, label_smoothing=0.1),
        "both": Sum([Dice(exponent=2), CrossEntropy()], weights=[0.5, 2]),
        "nested": Sum(
            [Sum([Dice(), Dice(over="sample")], weights=[1, 3]), CrossEntropy(clip=None)]
        ),
        "foreign": torch.nn.CrossEntropyLoss(),
    }


def check_rows(losses, logits, target, atol):
    joint = LossSet(losses)
    x = logits.clone().requires_grad_()
    values = joint(x, target)
    seen, rows, coefficients = joint.rows(logits, target)
    assert joint.names == tuple(losses)
    assert rows.shape == (coefficients.shape[1], *logits.shape)
    assert rows.transpose(0, 1).is_contiguous()
    assert torch.allclose(values, seen, atol=atol, rtol=0)
    for k, (name, loss) in enumerate(losses.items()):
        assert values[k].item() == pytest.approx(loss(logits, target).item(), abs=atol), name
        (g,) = torch.autograd.grad(values[k], x, retain_graph=True)
        span = torch.tensordot(coefficients[k], rows, 1)
        assert (g - span).abs().max() <= atol, name
        assert (g - gradient(loss, logits, target)).abs().max() <= atol, name
        row_index = joint.steady_row(name, logits.shape[1])
        assert row_index is None or abs(coefficients[k, row_index]) > 1e-6, name
    return rows


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("space", [(5, 6), (3, 2, 4)])
def test_rows_are_exact(device, classes, space):
    logits, target = batch(c=classes, space=space, device=device)
    check_rows(zoo(classes), logits, target, 1e-12)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_rows_are_exact_for_random_sets(data):
    classes = data.draw(st.sampled_from([2, 3]))
    losses = {
        f"d{i}": Dice(**k) for i, k in enumerate(data.draw(st.lists(knobs(classes), max_size=9)))
    }
    if data.draw(st.booleans()) or not losses:
        losses["cce"] = CrossEntropy(ignore_index=data.draw(st.sampled_from([None, 255])))
    logits, target = batch(c=classes, space=(3, 4), seed=data.draw(st.integers(0, 9)))
    check_rows(losses, logits, target, 1e-11)


@pytest.mark.parametrize("classes, most", [(2, 4), (4, 12)])
def test_few_rows_serve_many_losses(classes, most):
    losses = {"cce": CrossEntropy(), "twin": CrossEntropy()}
    for i in range(16):
        losses[f"dice{i}"] = Dice(
            exponent=1 + i % 2, alpha=0.1 * i, link=["1-d", "-log"][i % 3 == 0]
        )
    logits, target = batch(c=classes)
    assert len(check_rows(losses, logits, target, 1e-12)) == most
    assert len(LossSet({"dice": Dice()}).rows(logits, target)[1]) == 1


def test_steady_rows_recover_their_row():
    logits, target = batch()
    joint = LossSet({name: load(name) for name in ARTICLE})
    _, rows, coefficients = joint.rows(logits, target)
    for k, name in enumerate(ARTICLE):
        own = gradient(load(name), logits, target)
        others = coefficients[k].clone()
        row_index = joint.steady_row(name, 2)
        others[row_index] = 0
        row = (own - torch.tensordot(others, rows, 1)) / coefficients[k, row_index]
        assert torch.allclose(row, rows[row_index], atol=1e-12)
    fragile = LossSet({"zero": Dice(absent="zero"), **{str(i): Dice() for i in range(5)}})
    assert fragile.steady_row("zero", 2) is None


@pytest.mark.parametrize(
    "knobs, safe",
    [(dict(beta=0), False), (dict(smooth_nr=1.0), False), (dict(exponent=3), False),
     (dict(exponent=2, alpha=1), False), (dict(exponent=2, beta=0.5), True),
     (dict(smooth_nr=[1.0, 0.0], smooth_dr=[1.0, 0.5]), True)],
)  # fmt: skip
def test_no_steady_row_where_the_coefficient_can_vanish(knobs, safe):
    joint = LossSet(
        {str(i): Dice() for i in range(9)} | {"it": Dice(include_background=False, **knobs)}
    )
    assert (joint.steady_row("it", 2) is not None) == safe


def test_without_weight_on_fn_a_perfect_prediction_has_no_coefficient():
    _, target = batch()
    joint = LossSet(
        {str(i): Dice() for i in range(9)} | {"it": Dice(include_background=False, beta=0)}
    )
    _, _, coefficients = joint.rows(30 * one_hot(target, 2), target)
    assert coefficients[-1, joint.steady_row("0", 2)].abs() < 1e-9


def test_a_set_takes_other_libraries_losses():
    monai = pytest.importorskip("monai.losses")
    logits, target = batch(dtype=torch.float32)
    loss = OneHotTarget(monai.DiceLoss(softmax=True))
    check_rows({"dice": load("dice_monai"), "monai": loss}, logits, target, 1e-6)
    assert loss(logits, target).item() == pytest.approx(
        load("dice_monai")(logits, target).item(), abs=1e-6
    )


def test_losses_out_of_use_are_freed():
    """Nothing in the process keeps them, so that memory does not grow with the runs of a sweep."""
    losses = zoo(2)
    logits, target = batch()
    joint = LossSet(losses)
    joint(logits, target), joint.rows(logits, target)
    kept = {name: weakref.ref(loss) for name, loss in losses.items()}
    for loss in losses.values():
        loss(logits, target)
    del losses, joint, loss
    gc.collect()
    assert [name for name, loss in kept.items() if loss() is not None] == []


# -- transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_vmap_over_stacked_runs(classes):
    joint = LossSet(zoo(classes))
    logits, target = batch(n=6, c=classes)
    logits, target = logits.unflatten(0, (3, 2)), target.unflatten(0, (3, 2))
    together = torch.func.vmap(joint)(logits, target)
    stacked = torch.func.vmap(joint.rows)(logits, target)
    grads = torch.func.vmap(torch.func.grad(lambda x, t: joint(x, t).sum()))(logits, target)
    for r in range(3):
        alone = joint(logits[r], target[r])
        assert torch.allclose(together[r], alone, atol=1e-13)
        for a, b in zip(stacked, joint.rows(logits[r], target[r]), strict=True):
            assert torch.allclose(a[r], b, atol=1e-13)
        g = gradient(lambda x, t: joint(x, t).sum(), logits[r], target[r])
        assert torch.allclose(grads[r], g, atol=1e-13)
    single = torch.func.vmap(Dice())(logits, target)
    assert torch.allclose(
        single, torch.stack([Dice()(x, t) for x, t in zip(logits, target, strict=True)])
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_traced_to_a_graph(classes):
    joint = LossSet({n: load(n) for n in (*ARTICLE, "cce_stable")})
    (x, t), (x2, t2) = (batch(c=classes, seed=seed) for seed in (0, 1))

    def step(x, t):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(joint(x, t)[1], x)[0], *joint.rows(x, t)

    graph = torch.fx.experimental.proxy_tensor.make_fx(step)(x, t)
    for a, b in zip(graph(x2, t2), step(x2, t2), strict=True):
        assert torch.allclose(a, b, atol=1e-14)


def test_second_derivatives_are_refused_and_no_other_nesting():
    logits, target = batch()
    loss = LossSet({name: load(name) for name in ("dice", "cce")})
    grad, vmap, jacrev = torch.func.grad, torch.vmap, torch.func.jacrev

    def total(x):
        return loss(x, target).sum()

    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(total(x := logits.clone().requires_grad_()), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        jacrev(jacrev(total))(logits)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad(lambda x: grad(total)(x).square().sum())(logits)

    one = gradient(lambda x, t: loss(x, t).sum(), logits, target)
    many = logits.expand(3, *logits.shape)
    for got in (vmap(grad(total))(many), grad(lambda x: vmap(total)(x).sum())(many)):
        torch.testing.assert_close(got, one.expand_as(many))
    # The outer derivative is by something that the logits do not depend on.
    w = torch.ones(1, dtype=logits.dtype)
    got = grad(lambda w: (w * grad(total)(logits)).sum())(w)
    torch.testing.assert_close(got, one.sum().view(1))


def test_losses_out_of_use_have_no_gradient():
    logits, target = batch()
    joint = LossSet({n: load(n) for n in ARTICLE})
    assert gradient(lambda x, t: 0 * joint(x, t).sum(), logits, target).abs().max() == 0


@pytest.mark.parametrize("classes", [2, 4])
def test_gradients_of_many_losses_in_one_batch(classes):
    """As TorchJD takes them: PyTorch maps the backward pass over the losses."""
    losses = [load(name) for name in (*ARTICLE, "dice_monai", "dice_row")]
    logits, target = batch(c=classes)
    x = logits.requires_grad_()
    values = torch.stack([loss(x, target) for loss in losses])
    one = torch.eye(len(losses), dtype=values.dtype)
    [together] = torch.autograd.grad(values, x, one, is_grads_batched=True, retain_graph=True)
    for row, value in zip(together, values, strict=True):
        [wanted] = torch.autograd.grad(value, x, retain_graph=True)
        torch.testing.assert_close(row, wanted)


@pytest.mark.parametrize("loss", [Dice(over="sample"), Dice(over="row", exponent=3)])
def test_torch_func_differentiates_sums_of_parts_of_a_batch(loss):
    logits, target = batch(2)
    slope = torch.func.grad(lambda x: loss(x, target))(logits)
    torch.testing.assert_close(slope, gradient(loss, logits, target))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "name, backend",
    [("article", "aot_eager"), slow("article", "inductor"), slow("zoo", "inductor")],
)
def test_compile_without_graph_breaks(name, backend):
    losses = {n: load(n) for n in ARTICLE} if name == "article" else zoo(2)
    joint = LossSet(losses)
    logits, target = batch(dtype=torch.float32, space=(16, 16))
    torch._dynamo.reset()

    def step(x, t):
        return torch.func.grad_and_value(lambda z: joint(z, t).sum())(x), joint.rows(x, t)

    (g, value), rows = torch.compile(step, fullgraph=True, backend=backend)(logits, target)
    (g2, value2), rows2 = step(logits, target)
    assert torch.allclose(value, value2, atol=1e-5) and torch.allclose(g, g2, atol=1e-6)
    for a, b in zip(rows, rows2, strict=True):
        assert torch.allclose(a, b, atol=2e-6)
    x = logits.clone().requires_grad_()
    v = torch.compile(Dice(), fullgraph=True, backend=backend)(x, target)
    assert torch.allclose(torch.autograd.grad(v, x)[0], gradient(Dice(), logits, target), atol=1e-8)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "classes, ignore_index, count", [(2, None, 2), slow(2, None, 4), slow(4, 0, 4)]
)
def test_compiled_values_and_gradient_are_exact(classes, ignore_index, count):
    """Large logits and many pixels, where a compiler's sum in float32 loses digits."""
    torch._dynamo.reset()
    shared = {"ignore_index": ignore_index}
    losses = {
        "stable": CrossEntropy(clip=None, **shared), "square": Dice(exponent=2, **shared),
        "cce": CrossEntropy(**shared), "dice": Dice(**shared),
    }  # fmt: skip
    joint = LossSet(dict(list(losses.items())[:count]))  # compiling takes seconds for each loss
    logits, target = batch(c=classes, space=(256, 256), dtype=torch.float32)
    x = (20 * logits).requires_grad_()

    values = torch.compile(joint, fullgraph=True, dynamic=False)(x, target)
    (g,) = torch.autograd.grad(values.sum(), x)
    double = x.detach().double().requires_grad_()
    exact = joint(double, target)
    assert torch.allclose(values.double(), exact, rtol=2e-6, atol=0)
    wanted = torch.autograd.grad(exact.sum(), double)[0]
    assert (g - wanted).abs().max() < 1e-5 * wanted.abs().max()


# -- numbers that don't lie ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [256, 1024])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gives_the_float_value(dtype, size, autocast):
    logits, target = batch(n=1, space=(size, size), dtype=torch.float32)
    low = logits.to(dtype)
    joint = LossSet({n: load(n) for n in (*ARTICLE, "cce_stable", "dice_monai")})
    exact = joint(low.double(), target)
    x = low.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = joint(x, target)
        (g,) = torch.autograd.grad(values.sum(), x)
    assert values.dtype == torch.float32 and g.dtype == dtype
    assert torch.allclose(values.double(), exact, rtol=2e-6)
    assert g.isfinite().all()


def test_half_modules_keep_their_knobs():
    logits, target = batch(dtype=torch.float32)
    assert Dice().half()(logits, target) == Dice()(logits, target)


def test_a_loss_serves_any_number_of_classes_and_type_in_turn():
    one = LossSet({name: load(name) for name in ("cce", "dice", "dice_fg_square")})
    with torch.inference_mode():  # what it keeps from here must do for training, too
        one(*batch(c=2))
    for classes, dtype in ((4, torch.float64), (2, torch.float32), (2, torch.float64)):
        logits, target = batch(c=classes, dtype=dtype)
        new = LossSet({name: load(name) for name in one.names})
        assert torch.equal(one(logits, target), new(logits, target))
        given, wanted = (
            gradient(lambda x, t, f=f: f(x, t).sum(), logits, target) for f in (one, new)
        )
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("scale", [0, 100, 1e4, -1e4])
def test_edges_are_finite(path, label, scale):
    """Empty and full classes, saturated logits, one pixel."""
    loss = instantiate(OmegaConf.load(path))
    for space in ((4, 4), (1, 1)):
        logits = torch.ones(1, 2, *space) * torch.tensor([0.0, float(scale)])[:, None, None]
        target = torch.full((1, *space), label)
        value, g = loss(logits, target), gradient(loss, logits, target)
        assert value.isfinite() and g.isfinite().all()
        _, rows, coefficients = LossSet({"it": loss, "dice": Dice()}).rows(logits, target)
        assert rows.isfinite().all() and coefficients.isfinite().all()


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if "Sum" not in p.read_text("utf-8")], ids=lambda p: p.stem
)
def test_all_ignored_is_zero(path):
    loss = instantiate(OmegaConf.load(path), ignore_index=255)
    logits, target = batch(dtype=torch.float32)
    target[:] = 255
    assert loss(logits, target).item() == 0
    assert gradient(loss, logits, target).abs().max() == 0
    assert LossSet({"it": loss})(logits, target).item() == 0


def test_ignored_pixels_count_nowhere():
    logits, target = batch(n=1, space=(4, 6))
    some = target.clone()
    some[:, 2:] = 255
    for over in ("row", "sample", "global"):
        # Rows that hold no pixel count 0, so compare the sum.
        loss, plain = (
            Dice(over=over, ignore_index=255, reduction="sum"),
            Dice(over=over, reduction="sum"),
        )
        expected = plain(logits[:, :, :2], target[:, :2]).item()
        assert loss(logits, some).item() == pytest.approx(expected, abs=1e-12)
        assert gradient(loss, logits, some)[:, :, 2:].abs().max() == 0


# -- properties ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), scale=st.sampled_from([0.1, 1, 10]), name=st.sampled_from(ARTICLE))
@settings(max_examples=60, deadline=None)
def test_properties(seed, scale, name):
    loss = load(name)
    logits, target = batch(n=3, space=(4, 5), seed=seed, scale=scale)
    value = loss(logits, target).item()
    assert value >= 0 and (name == "cce" or value <= 1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    moved = loss(logits.flatten(2)[..., order], target.flatten(1)[..., order]).item()
    assert moved == pytest.approx(value, abs=1e-12)  # where the pixels lie says nothing
    turned = loss(logits.flip(0), target.flip(0)).item()
    assert turned == pytest.approx(value, abs=1e-12)  # nor their order in the batch
    if "fg" not in name:  # classes are treated alike
        assert loss(logits.flip(1), 1 - target).item() == pytest.approx(value, abs=1e-12)
    better = logits + 0.1 * (2 * one_hot(target, 2) - 1)  # every pixel moves towards its label
    assert loss(better, target).item() <= value + 1e-12
    perfect = loss(60 * (2 * one_hot(target, 2) - 1), target).item()
    assert perfect == pytest.approx(0, abs=2e-7)


# -- types and edges of what is given --------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARTICLE, "dice_cce", "cce_stable", "dice_focal_tversky"])
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.bool],
)
def test_all_types_of_labels(name, dtype):
    loss, (logits, target) = load(name), batch()
    given = target.to(dtype)
    assert torch.equal(loss(logits, given), loss(logits, target))
    assert torch.equal(gradient(loss, logits, given), gradient(loss, logits, target))
    pair = LossSet({"it": loss, "dice": Dice()})
    for a, b in zip(pair.rows(logits, given), pair.rows(logits, target), strict=True):
        assert torch.equal(a, b)


def test_ignored_labels_of_a_short_type():
    logits, target = batch()
    target[0, 0] = 255
    loss = Sum([Dice(ignore_index=255), CrossEntropy(ignore_index=255)])
    assert torch.equal(loss(logits, target.to(torch.uint8)), loss(logits, target))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 2, 0, 4)])
def test_an_empty_batch_is_zero(path, shape):
    loss = instantiate(OmegaConf.load(path))
    logits, target = torch.zeros(shape), torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    assert loss(logits, target).item() == 0
    assert gradient(loss, logits, target).shape == shape
    values, rows, coefficients = LossSet({"it": loss}).rows(logits, target)
    assert values.item() == 0 and rows.numel() == 0 and coefficients.isfinite().all()


def test_a_soft_target_that_requires_a_gradient_is_refused():
    logits, target = batch()
    soft = one_hot(target, 2).requires_grad_()
    for loss in (Dice(), CrossEntropy(), LossSet({"it": Dice()})):
        with pytest.raises(ValueError, match="target: it requires a gradient.*detach"):
            loss(logits, soft)
    with pytest.raises(ValueError, match="target: torch.complex64"):
        Dice()(logits, soft.detach().to(torch.complex64))


@pytest.mark.parametrize("index", [False, True])
def test_one_channel(index):
    logits = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    target = (logits > 0).double()
    sigmoid = Dice(activation="sigmoid")
    p = logits.sigmoid()
    wanted = 1 - (2 * (p * target).sum() + 1e-7) / (p.sum() + target.sum() + 1e-7)
    assert sigmoid(logits, target).item() == pytest.approx(wanted.item(), abs=1e-12)
    given = target[:, 0].long() if index else target
    with pytest.raises(ValueError, match=r"one channel, whose softmax is 1.*sigmoid"):
        Dice()(logits, given)
    for loss in (CrossEntropy(), CrossEntropy(clip=None)):
        with pytest.raises(ValueError, match="one channel, whose softmax is 1.*BCEWithLogitsLoss"):
            loss(logits, given)
    with pytest.raises(ValueError, match="one channel, and include_background=False would leave"):
        Dice(activation="sigmoid", include_background=False)(logits, target)


def test_infinite_logits():
    """Of two classes the limit; where there is none, refused."""
    target = torch.tensor([[0, 1]])
    far = torch.tensor([[[float("inf"), 0.0], [0.0, float("inf")]]])
    for loss in (Dice(), CrossEntropy()):
        assert loss(far, target).item() == pytest.approx(loss(far.clamp(max=1e4), target).item())
        assert gradient(loss, far, target).isfinite().all()
        with pytest.raises(ValueError, match="logits: 1 of 6 are infinite"):
            loss(torch.tensor([[[float("inf"), 0.0], [0.0, 0.0], [0.0, 0.0]]]), target)


@pytest.mark.parametrize("make", [Dice, CrossEntropy, lambda: Sum([Dice()], [2.0])])
def test_settings_are_frozen(make):
    loss = make()
    names = [n for n in vars(loss) if n in loss._settings]
    assert names
    for name in names:
        with pytest.raises(AttributeError, match=f"{name} cannot change after construction"):
            setattr(loss, name, 100)
    loss.train(False).half()
    loss.remark = "anything else may be set"
    twin = copy.deepcopy(loss)
    logits, target = batch(dtype=torch.float32)
    assert torch.equal(twin(logits, target), loss(logits, target))
    with pytest.raises(AttributeError):
        setattr(twin, names[0], 3)


class Shifted(Dice):
    def __init__(self, shift):
        super().__init__(smooth_nr=1)
        self.shift = shift

    def forward(self, logits, target):
        return super().forward(logits, target) + self.shift


def test_a_subclass_may_set_what_is_its_own():
    logits, target = batch()
    loss = Shifted(3.0)
    loss.shift = 4.0
    wanted = Dice(smooth_nr=1)(logits, target) + 4
    assert torch.equal(loss(logits, target), wanted)
    assert LossSet({"it": loss, "dice": Dice()}).is_foreign("it")


def test_numpy_numbers_are_numbers():
    logits, target = batch()
    loss = Dice(
        smooth_nr=np.float32(0.5), smooth_dr=np.int64(1), weight=[np.float64(1), np.int8(3)],
        ignore_index=np.int64(255),
    )  # fmt: skip
    wanted = Dice(smooth_nr=0.5, smooth_dr=1, weight=[1, 3], ignore_index=255)
    assert torch.equal(loss(logits, target), wanted(logits, target))
    assert CrossEntropy(clip=np.float64(1e-3)).clip == 1e-3


@pytest.mark.parametrize("value", ["off", "no", "true", 0, 1, None, "", "maybe"])
@pytest.mark.parametrize(
    "kind, name",
    [(Dice, "include_background"), (Dice, "joint"), (Dice, "weight_normalised"),
     (CrossEntropy, "count_ignored")],
)  # fmt: skip
def test_a_truth_value_is_one(kind, name, value):
    with pytest.raises(ValueError, match=f"{name}=.*allowed are true and false"):
        kind(**{name: value})


@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), -1, None])
@pytest.mark.parametrize("name", ["exponent", "alpha", "smooth_nr", "floor", "power"])
def test_a_number_is_one(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*allowed is a number"):
        Dice(**{name: value})
    for index in (True, 1.5, "255"):
        with pytest.raises(ValueError, match="ignore_index=.*allowed is a whole number"):
            Dice(ignore_index=index)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(activation="tanh"), ["activation='tanh'", "softmax, sigmoid, none"]),
        (dict(over="image"), ["over='image'", "row, sample, batch, global"]),
        (dict(link="log"), ["link='log'", "-log"]),
        (dict(absent="drop"), ["absent='drop'", "skip"]),
        (dict(exponent=0), ["exponent=0"]),
        (dict(smooth_nr=-1), ["smooth_nr=-1", "at least 0"]),
        (dict(smooth_nr=[1, 2], smooth_dr=[1, 2, 3]), ["smooth_nr for 2", "smooth_dr for 3"]),
        (dict(weight="ab"), ["weight='ab'"]),
        (dict(weight=[1, 0], include_background=False), ["weight=[1, 0]", "above 0"]),
        (dict(weight=[1, 2], joint=True), ["weight", "joint"]),
    ],
)
def test_bad_settings(knobs, words):
    with pytest.raises(ValueError) as error:
        Dice(**knobs)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "loss", [Dice(), CrossEntropy(), CrossEntropy(clip=None), Sum([Dice(), CrossEntropy()])]
)
def test_bad_data(loss):
    logits, target = batch(dtype=torch.float32)
    cases = [
        (logits[0, 0, 0], target, ["logits", "(6,)"]),
        (logits, target[:, :3], ["target", "(2, 3, 6)", "(2, 5, 6)"]),
        (logits, target.float(), ["target", "float32", "integers"]),
        (logits.long(), target, ["logits", "int64"]),
        (logits[:, :1], target, ["target", "(2, 1, 5, 6)"]),
        (logits, target + 5, ["target", "class 6", "0 to 1"]),
        (logits, target - 1, ["target", "class -1", "0 to 1"]),
        (logits * float("nan"), target, ["logits", "120 of 120", "NaN"]),
    ]
    for x, t, words in cases:
        with pytest.raises(ValueError) as error:
            loss(x, t)
        assert all(word in str(error.value) for word in words), error.value
    for bad in (4, -1):
        with pytest.raises(ValueError, match=f"class {bad}, allowed are 0 to 3"):
            loss(torch.zeros(2, 4, 5, 6), torch.full_like(target, bad))
    with pytest.raises(ValueError, match="smooth_nr for 3 classes.*have 2"):
        Dice(smooth_nr=[1, 2, 3])(logits, target)
    with pytest.raises(ValueError, match="over='row'"):
        Dice(over="row")(logits[..., 0, 0], target[..., 0, 0])
    with pytest.raises(ValueError, match="ignore_index=1 cannot be told from a label; give class"):
        Dice(ignore_index=1)(logits, one_hot(target, 2))
    with pytest.raises(ValueError, match="class 7.*0 to 1 or ignore_index=9"):
        check_inputs(logits, target + torch.tensor([7]) - target, 9)
    for weights in ([1, 2], [], ()):
        with pytest.raises(ValueError, match=r"weights=.*one per loss is needed"):
            Sum([loss], weights=weights)


@pytest.mark.parametrize("name", list_losses())
def test_ignored_pixels_among_labels(name):
    """One-hot labels with marked pixels give what class indices do."""
    logits, target = batch()
    target[0, :2] = 255
    labels = one_hot(torch.where(target == 255, 0, target), 2).to(logits.dtype)
    labels = torch.where((target == 255).unsqueeze(1), 255, labels)
    loss, found = load_loss(name, ignore_index=255), []
    for form in (target, labels):
        x = logits.detach().requires_grad_()
        value = loss(x, form)
        found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_each_channel_of_a_sigmoid_ignores_its_own_labels():
    """And a batch without foreground is not one in which all is ignored."""
    logits, _ = batch()
    labels = torch.zeros_like(logits)
    loss = Dice(activation="sigmoid", ignore_index=255)
    assert loss(logits, labels) > 0.99
    labels[:, 1] = 255
    p = logits[:, 0].sigmoid().sum()
    right = 1 - 1e-7 / (p + 1e-7)
    torch.testing.assert_close(loss(logits, labels), 0.5 * right)
    assert loss(logits, torch.full_like(logits, 255)) == 0
