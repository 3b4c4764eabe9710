"""The probe equals one `torch.autograd.grad` for each loss, and changes nothing in training."""

import copy
import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import ARTICLE, load_losses, probe, slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle, gradients
from torch import nn

from losswatch.data.random import TRAIN, uniform
from losswatch.disk.curves import read_curves
from losswatch.events.tags import watched_tags
from losswatch.losses import CrossEntropy, Dice, LossSet, OneHotTarget, Sum
from losswatch.watch.lightning import Watch
from losswatch.watch.record import Record


def monai():
    from monai.losses import GeneralizedDiceLoss

    return OneHotTarget(GeneralizedDiceLoss(softmax=True))


def assert_exact(observed, reference):
    seen, wanted = torch.stack(observed), reference.table()
    assert seen.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(seen, wanted.to(seen.device), rtol=1e-9, atol=1e-9)


# --- Exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("net", ["convnet", "unet"])
@pytest.mark.parametrize("trained", ["dice", slow("cce")])
def test_equals_one_gradient_per_loss(
    make_run, observed, device, net, batch_norm, classes, trained
):
    """Dice variants, cross entropy, a loss of MONAI's, and two that share no rows with others."""
    names = [*ARTICLE, "dice_jaccard", "dice_log", "dice_monai", "dice_cce"]
    losses = load_losses(*names, monai=monai(), cubic=Dice(exponent=3))
    reference = Oracle()
    run = make_run(
        net, batch_norm, classes, losses, trained,
        probe=probe(cosines=True), callbacks=[reference], precision="64-true", validate=False,
        accelerator=device,
    )  # fmt: skip
    run.fit()
    assert len(observed) == 4
    assert_exact(observed, reference)


@pytest.mark.parametrize("watched", [["dice"], ["cce"], ["dice_fg"], ["dice_log"], ["dice_monai"]])
def test_a_single_watched_loss(make_run, observed, watched):
    losses = load_losses(*watched)
    run = make_run(
        losses=losses, trained=watched[0], probe=probe(), precision="64-true", validate=False
    )
    reference = Oracle()
    reference_run = make_run(
        losses=load_losses(*watched, "cce" if watched != ["cce"] else "dice"), trained=watched[0],
        callbacks=[reference], precision="64-true", validate=False, folder="reference",
    )  # fmt: skip
    run.fit()
    reference_run.fit()
    wanted = reference.table()[:, [0, 2]]
    torch.testing.assert_close(torch.stack(observed), wanted, rtol=1e-9, atol=1e-9)


dices = st.builds(
    Dice,
    include_background=st.booleans(),
    exponent=st.sampled_from([1, 2, 1.5]),
    alpha=st.floats(0.1, 1),
    beta=st.floats(0.1, 1),
    smooth_nr=st.floats(0, 2),
    smooth_dr=st.floats(1e-7, 2),
    over=st.sampled_from(["row", "sample", "batch", "global"]),
    joint=st.booleans(),
    link=st.sampled_from(["1-d", "-d", "-log"]),
    reduction=st.sampled_from(["mean", "sum"]),
)
entropies = st.builds(
    CrossEntropy,
    clip=st.sampled_from([None, 1e-7, 0.01]),
    label_smoothing=st.sampled_from([0, 0.1]),
)
sums = st.builds(Sum, st.lists(st.one_of(dices, entropies), min_size=1, max_size=2))


@given(
    st.lists(st.one_of(dices, entropies, sums), min_size=2, max_size=6),
    st.integers(2, 4),
    st.data(),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_losses(make_run, observed, modules, classes, data):
    observed.clear()
    losses = LossSet({f"loss{i}": module for i, module in enumerate(modules)})
    reference = Oracle()
    run = make_run(
        losses=losses, classes=classes, trained=data.draw(st.sampled_from(losses.names)),
        probe=probe(cosines=True), callbacks=[reference], steps=2, precision="64-true",
        validate=False, data={"image_size": 4},
    )  # fmt: skip
    run.fit()
    assert_exact(observed, reference)


def test_norms_before_clipping(make_run, observed):
    reference = Oracle()
    run = make_run(
        probe=probe(cosines=True), callbacks=[reference], precision="64-true", validate=False,
        gradient_clip_val=1e-3,
    )  # fmt: skip
    run.fit()
    assert_exact(observed, reference)
    assert (reference.table()[:, 5:10] > 1e-3).all(), "clipping must have had something to do"


@pytest.mark.parametrize("batch_norm", [False, True])
def test_accumulated_batches(make_run, observed, batch_norm):
    """There is one observation for each optimiser step: the norm of the mean gradient."""
    reference = Oracle()
    run = make_run(
        batch_norm=batch_norm, probe=probe(cosines=True), callbacks=[reference],
        precision="64-true", validate=False, accumulate_grad_batches=3,
    )  # fmt: skip
    run.fit()
    assert len(observed) == 4
    assert_exact(observed, reference)


def test_frozen_parameters_do_not_count(make_run, observed):
    reference = Oracle()
    run = make_run(
        "unet", True, probe=probe(cosines=True), callbacks=[reference], precision="64-true",
        validate=False,
    )  # fmt: skip
    run.module.net.down.requires_grad_(False)
    run.fit()
    assert_exact(observed, reference)


class Unused(nn.Module):
    """A network with a parameter that does not affect the output."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(1, 2, 3, padding=1), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.used(x)


def test_unused_parameters_count_as_zero(make_run, observed):
    reference = Oracle()
    run = make_run(
        probe=probe(cosines=True), callbacks=[reference], precision="64-true", validate=False
    )
    run.module.net = Unused()
    run.fit()
    assert_exact(observed, reference)


# --- It changes nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("every", [slow(1), 3])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("net", ["convnet", "unet"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}],
)
def test_training_is_bit_identical(make_run, net, batch_norm, every, options):
    """Weights, running statistics and the optimiser's moments are equal with and without it."""
    states = []
    for watched in (None, probe(every_n_steps=every, cosines=True)):
        run = make_run(net, batch_norm, probe=watched, steps=8, val_check_interval=4, **options)
        states.append(run.fit().state_dict() | {
            f"{i}.{name}": moment
            for i, state in run.trainer.optimizers[0].state_dict()["state"].items()
            for name, moment in state.items()
        })  # fmt: skip
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not different
    if batch_norm:
        [counts] = {int(v) for k, v in states[1].items() if k.endswith("num_batches_tracked")}
        assert counts == 8 * options.get("accumulate_grad_batches", 1)


def test_random_numbers_are_left_alone(make_run):
    drawn = []
    for watched in (None, probe()):
        make_run(probe=watched, validate=False).fit()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_accumulated_dice_is_the_mean_of_the_batches(make_run, observed):
    """It is not the Dice of the joined batch. For cross entropy, a mean of pixels, they agree."""
    run = make_run(
        losses=load_losses("dice", "cce"), probe=probe(), precision="64-true", validate=False,
        steps=1, accumulate_grad_batches=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )  # fmt: skip
    net = copy.deepcopy(run.module.net).double()
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    run.fit()
    after = torch.nn.utils.parameters_to_vector(run.module.net.parameters()).detach()

    batches = []
    for step in (0, 1):
        u = uniform(torch.tensor(0), TRAIN, torch.tensor(step), (3, 1, 8, 8))
        batches.append(((u.double()), (u[:, 0] > 0.5).long()))
    joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))

    def dice(images, target):
        p, y = net(images).softmax(1), nn.functional.one_hot(target, 2).movedim(-1, 1)
        sums = (p * y).sum((0, 2, 3)), p.sum((0, 2, 3)) + y.sum((0, 2, 3))
        return 1 - ((2 * sums[0] + 1e-7) / (sums[1] + 1e-7)).mean()

    def cce(images, target):
        return nn.functional.cross_entropy(net(images), target)

    [seen] = observed
    for k, loss in enumerate((dice, cce)):
        mean = (loss(*batches[0]) + loss(*batches[1])) / 2
        [gradient] = gradients([mean], net.parameters())
        assert seen[k].item() == pytest.approx(mean.item(), rel=1e-9)
        assert seen[2 + k].item() == pytest.approx(gradient.norm().item(), rel=1e-9)
        if loss is dice:  # the trained one
            torch.testing.assert_close(after, before - 0.5 * gradient, rtol=0, atol=1e-12)
    assert abs(seen[0].item() - dice(*joined).item()) > 1e-6
    assert seen[1].item() == pytest.approx(cce(*joined).item(), rel=1e-9)


# --- What is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("every, steps", [(1, range(9)), (2, range(0, 9, 2)), (4, [0, 4, 8])])
def test_every_n_steps(make_run, every, steps):
    run = make_run(probe=probe(every_n_steps=every), steps=9, validate=False)
    run.fit()
    frame = read_curves(run.folder)
    for tag in watched_tags(ARTICLE, cosines=False):
        assert list(frame[tag].dropna().index) == list(steps)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_blocks(make_run, observed, monkeypatch, block):
    """The values written are those observed, wherever a block ends."""
    monkeypatch.setattr(Record, "BLOCK", block)
    run = make_run(probe=probe(cosines=True), steps=8, val_check_interval=5)
    run.fit()
    frame = read_curves(run.folder)[watched_tags(ARTICLE, cosines=True)].dropna()
    assert list(frame.index) == list(range(8))
    np.testing.assert_array_equal(frame.to_numpy(), torch.stack(observed).double().numpy())


class FailAt(pl.Callback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.step:
            raise self.error


def test_flushed_on_exception(make_run):
    run = make_run(probe=probe(), callbacks=[FailAt(6, RuntimeError("boom"))], steps=20)
    with pytest.raises(RuntimeError, match="boom"):
        run.fit()
    run.trainer.logger.close()
    assert list(read_curves(run.folder)["grad_norm/dice"].dropna().index) == list(range(7))


class Spoil(pl.Callback):
    """Makes a weight NaN or infinite before a step."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.step:
            with torch.no_grad():
                next(module.net.parameters()).view(-1)[0] = self.value


class Foreign(nn.Module):
    """A loss that does not check for NaN logits, unlike ours."""

    def forward(self, logits, target):
        return logits.square().mean()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_ends_the_run(make_run, value):
    """The error names the first such tensor, also with a loss that does not check its input."""
    run = make_run(
        losses=LossSet({"foreign": Foreign(), "more": Foreign()}), trained="foreign",
        probe=probe(), callbacks=[Spoil(3, value)], steps=6, validate=False,
    )  # fmt: skip
    weight = next(name for name, _ in run.module.net.named_parameters())
    said = f"with foreign, step 3: {weight} is {value}$"
    with pytest.raises(FloatingPointError, match=said):
        run.fit()
    assert run.trainer.global_step == 3


class Steep(nn.Module):
    """A finite value with a gradient that is not."""

    def forward(self, logits, target):
        return (logits.flatten()[0] - logits.flatten()[0].detach()).abs().pow(0.5)


def test_a_gradient_that_is_not_finite_is_named(make_run):
    run = make_run(losses=LossSet({"steep": Steep()}), trained="steep", steps=2, validate=False)
    with pytest.raises(FloatingPointError, match="steep, step 0: the gradient of .* is nan$"):
        run.fit()
    assert all(p.isfinite().all() for p in run.module.net.parameters())


def test_infinity_is_named(make_run, caplog):
    class Overflow(Foreign):
        def forward(self, logits, target):
            return super().forward(logits, target) * torch.finfo(torch.float32).max

    losses = LossSet({"foreign": Foreign(), "over": Overflow()})
    run = make_run(losses=losses, trained="foreign", probe=probe(), steps=2, validate=False,
                   callbacks=[Spoil(0, 1e6)])  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="losswatch"):
        run.fit()
    assert any("loss/over is inf at step 0" in r.getMessage() for r in caplog.records)


def test_latest_is_for_the_progress_bar(make_run, observed):
    shown = []

    class Ask(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            [watch] = [c for c in trainer.callbacks if isinstance(c, Watch)]
            shown.append(watch.latest())

    make_run(probe=probe(), callbacks=[Ask()], validate=False).fit()
    for asked, seen in zip(shown, observed, strict=True):
        assert asked == pytest.approx({
            f"loss/{name}": value for name, value in zip(ARTICLE, seen.tolist(), strict=False)
        })  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_close(make_run, observed, precision):
    reference = []
    for chosen in ("32-true", precision):
        observed.clear()
        run = make_run(probe=probe(), steps=3, validate=False, precision=chosen)
        run.fit()
        reference.append(torch.stack(observed).float())
    torch.testing.assert_close(*reference, rtol=0.1, atol=0.02)
