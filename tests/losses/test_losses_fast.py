"""The fast form of the table of sums against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losswatch.losses import CrossEntropy, Dice, LossSet, fast, pixels
from losswatch.losses.sums import Recipe


def recipes(over):
    clips = st.lists(st.sampled_from([0.0, 1e-7, 0.2]), unique=True, max_size=2)
    exponents = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), unique=True, min_size=1, max_size=3)
    return st.builds(
        Recipe,
        activation=st.just("softmax"),
        over=st.just(over),
        intersection=st.just("product"),
        ignore_index=st.sampled_from([None, 255, 1]),
        exponents=exponents.map(tuple),
        clips=clips.map(tuple) if over == "batch" else st.just(()),
        by_class=st.just(False),
    )


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("over", ["batch", "sample", "row"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_fast_and_plain_forms_agree(classes, over, data):
    recipe, seed = data.draw(recipes(over)), data.draw(st.integers(0, 99))
    space = data.draw(st.sampled_from([(5,), (3, 4), (2, 3, 4)]))
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, classes, *space, generator=g, dtype=torch.float64)
    target = torch.randint(0, classes, (3, *space), generator=g)
    if recipe.ignore_index is not None:
        target[0, :1] = recipe.ignore_index
    assert fast.is_fast(logits, target, recipe)

    quick, plain = (form.read_pixels(logits, target, recipe) for form in (fast, pixels))
    torch.testing.assert_close(quick.p, plain.p, rtol=0, atol=1e-14)
    found = fast.sums_of(quick, target, recipe)
    wanted = pixels.sums_of(plain, recipe, hard=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    slopes = torch.randn(wanted[0].shape, generator=g, dtype=torch.float64)
    first = len(recipe.keys()) - len(recipe.clips)
    if recipe.clips:  # of a total all classes have the same slope
        slopes[first:] = slopes[first:, :1]
    if data.draw(st.booleans()):
        slopes[..., 0, :] = 0
    torch.testing.assert_close(
        fast.by_logits(slopes, quick, target, recipe),
        pixels.by_logits(slopes, plain, recipe),
        rtol=1e-11, atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize(
    "logits, target, recipe",
    [
        (torch.zeros(2, 2, 3), torch.zeros(2, 2, 3), Recipe()),  # soft labels
        (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), Recipe()),  # no space
        (torch.zeros(0, 2, 3), torch.zeros(0, 3, dtype=torch.int64), Recipe()),
        (torch.zeros(2, 2, 3), torch.zeros(2, 3, dtype=torch.int64), Recipe("sigmoid")),
        (torch.zeros(2, 2, 3), torch.zeros(2, 3, dtype=torch.int64), Recipe(by_class=True)),
        (torch.zeros(2, 2, 3, device="meta"), torch.zeros(2, 3, device="meta"), Recipe()),
    ],
)
def test_where_the_plain_form_is_taken(logits, target, recipe):
    assert not fast.is_fast(logits, target, recipe)


# -- Losses of one form, evaluated as one ----------------------------------------------------------

SETTINGS = [
    {},
    {"exponent": 2.0},
    {"exponent": 0.5, "alpha": 0.2, "beta": 0.9, "smooth_nr": 1.0, "smooth_dr": 0.0},
    {"alpha": 1.0, "beta": 1.0, "smooth_dr": [0.1, 1.0, 2.0]},
    {"beta": 0.7, "smooth_dr": [0.1, 1.0, 2.0]},
]
FORMS = [
    {},
    {"include_background": False, "link": "-log"},
    {"link": "power", "power": 0.75, "absent": "zero"},
    {"absent": "skip", "weight": [1.0, 0.0, 3.0]},
    {"weight": [1.0, 0.0, 3.0], "weight_normalised": True, "reduction": "sum"},
    {"joint": True, "floor": 3.0},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("soft, ignore_index", [(False, None), (False, 1), (True, None)])
def test_losses_of_one_form_are_evaluated_as_one(form, soft, ignore_index):
    settings = [
        s for s in SETTINGS if not (form.get("joint") and isinstance(s.get("smooth_dr"), list))
    ]
    losses = [Dice(**form, **s, ignore_index=ignore_index) for s in settings]
    losses += [CrossEntropy(clip=c, ignore_index=ignore_index) for c in (None, 1e-7, 0.2)]
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    target = torch.randint(0, 3, (2, 4, 5), generator=g)
    if soft:
        target = torch.rand(logits.shape, generator=g, dtype=torch.float64)
    together = LossSet({str(i): loss for i, loss in enumerate(losses)})
    assert len(together.groups) < len(losses)

    logits.requires_grad_()
    values = together(logits, target)
    found, rows, coefficients = together.rows(logits, target)
    for k, loss in enumerate(losses):
        value = loss(logits, target)
        [slope] = torch.autograd.grad(value, logits)
        torch.testing.assert_close(values[k], value)
        torch.testing.assert_close(found[k], value.detach())
        torch.testing.assert_close(
            torch.autograd.grad(values[k], logits, retain_graph=True)[0], slope
        )
        torch.testing.assert_close(torch.tensordot(coefficients[k], rows, dims=1), slope)


def test_cross_entropies_of_other_clips_are_evaluated_as_one():
    losses = LossSet({str(c): CrossEntropy(clip=c) for c in (None, 1e-7, 0.2)})
    logits, target = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    wanted = torch.stack([loss(logits, target) for loss in losses.losses])
    torch.testing.assert_close(losses(logits, target), wanted)
    torch.testing.assert_close(losses.rows(logits, target)[0], wanted)


def test_a_loss_of_two_names_is_evaluated_once():
    class Mine(torch.nn.Module):
        calls = 0

        def forward(self, logits, target):
            Mine.calls += 1
            return (logits.softmax(1)[:, 1] - target).square().mean()

    dice, mine = Dice(), Mine()
    losses = LossSet({"a": mine, "b": dice, "c": mine, "d": dice})
    logits, target = torch.randn(1, 2, 3), torch.tensor([[0, 1, 1]])
    wanted = torch.stack([mine(logits, target), dice(logits, target)] * 2)
    Mine.calls = 0
    values, rows, coefficients = losses.rows(logits, target)
    torch.testing.assert_close(values, wanted)
    torch.testing.assert_close(losses(logits, target), wanted)
    assert Mine.calls == 2 and len(rows) == 2
    torch.testing.assert_close(coefficients[:2], coefficients[2:])
