"""How `Watch` finds what a criterion gets, records what trains, and leaves errors alone."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import Functional, Manual, Plain, Wanted, fit, half, seen
from pytorch_lightning.loggers import CSVLogger
from small import Focal, small
from torch import nn

from losswatch import Watch, load_loss
from losswatch.watch.criterion import output_and_target

# --- Which argument is which ---------------------------------------------------------------------


class Named(Plain):
    def loss(self, batch):
        return self.loss_fn(target=batch[1], input=self.net(batch[0]))


class TargetFirst(Plain):
    def loss(self, batch):
        return self.loss_fn(batch[1], self.net(batch[0]))


class Keras(nn.Module):
    """Takes the target first, as losses of Keras do."""

    def forward(self, y_true, y_pred):
        return F.cross_entropy(y_pred, y_true)


class Weighted(nn.Module):
    """Has a third argument."""

    def forward(self, output, target, weight):
        return weight * F.cross_entropy(output, target)


class Third(Plain):
    def loss(self, batch):
        return self.loss_fn(self.net(batch[0]), batch[1], torch.tensor(3.0).double())


ORDERS = {
    "names": (Named, nn.CrossEntropyLoss, " (output: input, target: target)", 1),
    "target first": (TargetFirst, Keras, " (output: argument 2, target: argument 1)", 1),
    "a third one": (Third, Weighted, "", 3),
}


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_arguments_in_any_order(caplog, kind, watched, decay):
    """The output is what carries a gradient; the criterion's own call is taken, watched or not."""
    module, criterion, order, factor = ORDERS[kind]
    criterion, wanted = criterion(), Wanted(["cce", "dice", "cce_stable"])
    losses = {"cce": load_loss("cce"), "dice": load_loss("dice")}
    watch = seen(losses | ({"mine": criterion} if watched else {}))
    with caplog.at_level(logging.INFO):
        fit(module(small(), criterion, decay=decay), wanted, watch)
    own = "mine" if watched else "loss_fn"
    frame = wanted.frame()[:, :6]
    frame[:, [2, 5]] *= factor
    np.testing.assert_allclose(watch.table(["cce", "dice", own]), frame, rtol=1e-9)
    [line] = [m for m in caplog.messages if m.startswith("losswatch: watching")]
    assert f"({type(criterion).__name__}) gets{order}; its value" in line


def test_output_and_target():
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(2)
    assert output_and_target([x, y], {}) == (x, y, "")
    assert output_and_target([[x, x], 3, y], {}) == ([x, x], y, "")
    assert output_and_target([y], {"pred": {"out": x}}) == (
        {"out": x},
        y,
        " (output: pred, target: argument 1)",
    )
    assert output_and_target([y, y], {}) == (y, y, "")
    assert output_and_target([x, 3], {}) is None


# --- What trains ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.01}, {"accumulate_grad_batches": 2}],
    ids=["alone", "clipped", "accumulated"],
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_loss_that_trains_is_recorded(options, decay):
    """Its value and gradient are those of the preset with the same formula."""
    watch = seen(["cce_stable", "dice"])
    fit(Plain(small(), nn.CrossEntropyLoss(), decay=decay), watch, **options)
    assert len(watch.at) == (3 if "accumulate_grad_batches" in options else 6)
    np.testing.assert_allclose(watch.table(["loss_fn"]), watch.table(["cce_stable"]), rtol=1e-9)


@pytest.mark.parametrize("kind", [Functional, Manual])
def test_what_training_step_returns_is_recorded(kind):
    watch = seen(["cce_stable"], criterion=None if kind is Functional else "loss_fn")
    fit(kind(small()), watch)
    own = "trained" if kind is Functional else "loss_fn"
    np.testing.assert_allclose(watch.table([own]), watch.table(["cce_stable"]), rtol=1e-9)


@pytest.mark.parametrize("kind", [Plain, Functional])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_it_is_recorded_in_half_precision(precision, kind):
    watch = seen(["cce_stable"], criterion=None if kind is Functional else "loss_fn")
    fit(kind(small().float()), watch, batches=3, **half(precision))
    own = "trained" if kind is Functional else "loss_fn"
    np.testing.assert_allclose(watch.table([own]), watch.table(["cce_stable"]), rtol=0.02)


def test_a_criterion_that_returns_no_scalar():
    """Then what training_step returns is recorded, under another name."""

    class Parts(Plain):
        def loss(self, batch):
            return self.loss_fn(self.net(batch[0]), batch[1]).mean()

    watch = seen(["cce_stable"])
    fit(Parts(small(), nn.CrossEntropyLoss(reduction="none")), watch)
    np.testing.assert_allclose(watch.table(["trained"]), watch.table(["cce_stable"]), rtol=1e-9)


def test_names_are_unique():
    module = Plain(small(), nn.CrossEntropyLoss())
    module.dice = module.loss_fn
    watch = seen(["cce_stable", "dice"], criterion="dice")
    fit(module, watch)
    np.testing.assert_allclose(watch.table(["dice_2"]), watch.table(["cce_stable"]), rtol=1e-9)

    class DC_and_CE_loss(nn.Module):
        def forward(self, logits, target):
            return logits.square().mean()

    names = Watch([DC_and_CE_loss(), DC_and_CE_loss(), DC_and_CE_loss()]).observer.watched.names
    assert names == ("DC_and_CE_loss", "DC_and_CE_loss_2", "DC_and_CE_loss_3")


# --- Errors --------------------------------------------------------------------------------------


class Sad(CSVLogger):
    """Its disk is full."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("loss/") for name in metrics):
            raise OSError(28, "No space left on device")
        super().log_metrics(metrics, step)


class Broken(Plain):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("strict", [True, False])
def test_the_error_that_ends_a_training_stays(tmp_path, caplog, monkeypatch, strict):
    """And the hook on the criterion and the compiler's switch are put back."""
    monkeypatch.setattr("losswatch.compat.is_compiled", lambda module: True)
    module, watch = Broken(small()), seen(strict=strict)
    before = torch._functorch.config.donated_buffer
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, watch, logger=Sad(tmp_path))
    assert not module.loss_fn._forward_hooks
    assert torch._functorch.config.donated_buffer == before
    [line] = [m for m in caplog.messages if "nothing is watched from here on" in m]
    assert "No space left" in line


def test_a_logger_that_fails_ends_the_watching_not_the_training(tmp_path, caplog):
    trainer = fit(Plain(small()), seen(strict=False), logger=Sad(tmp_path), epochs=2)
    assert trainer.global_step == 12
    [line] = [m for m in caplog.messages if "nothing is watched from here on" in m]
    assert "No space left" in line
    with pytest.raises(OSError, match="No space left"):
        fit(Plain(small()), seen(strict=True), logger=Sad(tmp_path))


def test_two_watches_share_nothing():
    """They may watch one training, each with its own hook."""
    first, second = seen(["cce"]), seen(["dice"], every_n_steps=2)
    fit(Plain(small(), Focal()), first, second)
    assert first.at == [0, 1, 2, 3, 4, 5] and second.at == [0, 2, 4]
    same = first.table(["loss_fn"])[::2]
    np.testing.assert_allclose(second.table(["loss_fn"]), same, rtol=1e-9)
