"""The LightningModule: training, evaluation and its metrics, and resuming."""

import weakref

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import ARTICLE, load_losses, probe
from torch import nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from losswatch.disk.curves import read_curves
from losswatch.losses import Dice, LossSet
from losswatch.run.scores import scores, tally


def by_hand(label, prediction, classes):
    """Accuracy, Dice and IoU per class from sets of pixels, in plain numpy."""
    label, prediction = label.numpy().ravel(), prediction.numpy().ravel()
    dice, iou = [], []
    for c in range(classes):
        y, p = label == c, prediction == c
        both, either = (y & p).sum(), (y | p).sum()
        dice.append(2 * both / (y.sum() + p.sum()) if either else 1.0)
        iou.append(both / either if either else 1.0)
    return {"accuracy": (label == prediction).mean(), "dice": dice, "iou": iou}


@pytest.mark.parametrize("classes, held", [(2, 2), (4, 4), (4, 2), (2, 1)])
def test_metrics(classes, held):
    """Only `held` classes appear; the others count as perfect."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, held, (5, 6, 7), generator=g)
    prediction = torch.randint(0, held, (5, 6, 7), generator=g)
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (label.numpy(), prediction.numpy()), 1)
    seen = scores(torch.from_numpy(matrix))
    wanted = by_hand(label, prediction, classes)
    assert seen["accuracy"] == pytest.approx(wanted["accuracy"], rel=1e-6)
    for name in ("dice", "iou"):
        assert seen[name] == pytest.approx(np.mean(wanted[name]), rel=1e-6)
        for c in range(classes):
            assert seen[f"{name}/class_{c}"] == pytest.approx(wanted[name][c], rel=1e-6)
    for c in range(classes):
        share = float((prediction == c).double().mean())
        assert seen[f"predicted/class_{c}"] == pytest.approx(share, rel=1e-6)
    stacked = scores(torch.from_numpy(np.stack([matrix, matrix.T])))
    assert all(torch.equal(stacked[name][0], value) for name, value in seen.items())


@pytest.mark.parametrize("classes", [2, 4])
def test_tally_of_a_batch(classes):
    """Equals torchmetrics', also for several runs under vmap, as a stack evaluates."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, classes, 6, 7, generator=g)
    target = torch.randint(0, classes, (3, 5, 6, 7), generator=g)
    losses = load_losses(*ARTICLE)
    stacked = torch.vmap(lambda x, y: tally(x, y, losses))(logits, target)
    for i in range(3):
        found = tally(logits[i], target[i], losses)
        wanted = multiclass_confusion_matrix(logits[i], target[i], classes)
        assert torch.equal(found.confusion, wanted)
        assert torch.equal(stacked.confusion[i], wanted)
        assert found.losses.dtype == torch.float64
        means = losses(logits[i], target[i]).double()
        torch.testing.assert_close(found.losses, means * target[i].numel(), rtol=1e-12, atol=0)
        torch.testing.assert_close(stacked.losses[i], found.losses, rtol=1e-6, atol=0)


def test_a_batch_without_images():
    """The last batch may leave no image to a rank. Nothing is added, though a loss is NaN then."""
    losses = LossSet({"mean": nn.CrossEntropyLoss(), "dice": Dice()})
    logits, target = torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.int64)
    assert losses(logits, target)[0].isnan()
    found = tally(logits, target, losses)
    assert not found.confusion.any() and not found.losses.any()


def test_evaluation_leaves_random_numbers_alone():
    class Noisy(nn.Module):
        def forward(self, logits, target):
            return (logits + torch.rand_like(logits)).mean()

    before = torch.get_rng_state()
    tally(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64), LossSet({"it": Noisy()}))
    assert torch.equal(torch.get_rng_state(), before)


class Fixed(nn.Module):
    """Logits that need no training: a linear function of the image."""

    def __init__(self, classes):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(classes).view(1, -1, 1, 1) * 2.0)

    def forward(self, x):
        return (x - 0.4) * self.scale


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_is_over_all_images(make_run, classes, stage):
    """Each pixel has the same weight, also in a smaller batch."""
    run = make_run(
        classes=classes, data={"val_size": 7, "test_size": 7, "eval_batch_size": 3}, steps=1
    )
    net = run.module.net = Fixed(classes)
    evaluate = run.trainer.validate if stage == "val" else run.trainer.test
    evaluate(run.module, run.data, verbose=False)
    run.trainer.logger.close()
    seen = {name: value.item() for name, value in run.trainer.callback_metrics.items()}
    batches = list(getattr(run.data, f"{stage}_dataloader")())
    assert [len(image) for image, _ in batches] == [3, 3, 1]
    label = torch.cat([y for _, y in batches])
    with torch.no_grad():
        logits = torch.cat([net(x) for x, _ in batches])
    wanted = by_hand(label, logits.argmax(1), classes)
    assert seen[f"{stage}/accuracy"] == pytest.approx(wanted["accuracy"], rel=1e-6)
    for name in ("dice", "iou"):
        assert seen[f"{stage}/{name}"] == pytest.approx(np.mean(wanted[name]), rel=1e-6)
        for c in range(classes):
            assert seen[f"{stage}/{name}/class_{c}"] == pytest.approx(wanted[name][c], rel=1e-6)
    losses = load_losses(*ARTICLE)
    sizes = [y.numel() for _, y in batches]
    each = torch.stack([losses(net(x), y).detach().double() for x, y in batches])
    wanted = np.average(each.numpy(), axis=0, weights=sizes)
    for name, value in zip(ARTICLE, wanted, strict=True):
        assert seen[f"{stage}/loss/{name}"] == pytest.approx(value, rel=1e-6)


def test_second_validation_starts_from_zero(make_run):
    run = make_run(steps=1)
    run.module.net = Fixed(2)
    seen = []
    for _ in range(2):
        run.trainer.validate(run.module, run.data, verbose=False)
        seen.append(dict(run.trainer.callback_metrics))
    run.trainer.logger.close()
    assert seen[0] == seen[1] and "val/accuracy" in seen[0]


@pytest.mark.parametrize("trained", ARTICLE)
@pytest.mark.parametrize("watched", [False, True])
def test_training_is_plain_gradient_descent(make_run, trained, watched):
    """The same steps, written out without Lightning, give the same weights."""
    run = make_run(
        trained=trained, steps=5, validate=False, precision="64-true",
        probe=probe() if watched else None,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )  # fmt: skip
    torch.manual_seed(0)
    net = type(run.module.net)(1, 2).double()
    loss = load_losses(trained).losses[0]
    run.data.trainer = run.trainer
    batches = list(run.data.train_dataloader())
    assert len(batches) == 5
    run.fit()
    for image, label in batches:
        value = loss(net(image.double()), label)
        gradients = torch.autograd.grad(value, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= 0.5 * g
    for (name, p), q in zip(net.named_parameters(), run.module.net.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-12, msg=name)


def test_frozen_parameters_stay(make_run):
    run = make_run("unet", optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
    run.module.net.head.requires_grad_(False)
    before = run.module.net.head.weight.clone()
    run.fit()
    assert torch.equal(run.module.net.head.weight, before)


class SaveAt(pl.Callback):
    def __init__(self, step, file):
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_same_run(make_run, tmp_path, workers):
    """Resumed after 3 of 8 steps it has the same images and weights, bit for bit."""
    file = tmp_path / "half.ckpt"
    options = {"batch_norm": True, "steps": 8, "validate": False}
    whole = make_run(callbacks=[SaveAt(3, file)], probe=probe(), **options).fit()
    rest = make_run(probe=probe(), folder="rest", data={"num_workers": workers}, **options)
    with torch.no_grad():
        for p in rest.module.parameters():
            p.zero_()  # the checkpoint must replace these
    resumed = rest.fit(ckpt_path=file, weights_only=True)
    assert rest.trainer.global_step == 8
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    both = [read_curves(tmp_path / folder)["grad_norm/cce"].dropna() for folder in ("run", "rest")]
    assert list(both[1].index) == [3, 4, 5, 6, 7]
    assert both[0].loc[3:].equals(both[1])


def test_the_graph_is_not_kept(make_run):
    """The tensors that the criterion gets are freed when the next step begins."""

    class Look(pl.Callback):
        seen, alive = [], []

        def on_fit_start(self, trainer, module):
            module.loss.register_forward_hook(self.see)

        def see(self, loss, args, value):
            logits, _ = args
            if not torch.is_grad_enabled():
                return
            assert logits.grad_fn is not None and value.grad_fn is not None
            self.seen += [weakref.ref(logits), weakref.ref(value)]

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.alive.append(sum(tensor() is not None for tensor in self.seen))

    make_run(callbacks=[Look()], probe=probe(every_n_steps=2), validate=False).fit()
    assert len(Look.seen) == 8 and Look.alive == [0] * 4


def test_a_process_is_left_as_it_was(make_run):
    """oneDNN's switch and the default type are as before after a run, also after one that fails."""
    before = torch.backends.mkldnn.enabled

    class Fail(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("boom")

    make_run(validate=False).fit()
    assert torch.backends.mkldnn.enabled == before
    with pytest.raises(RuntimeError, match="boom"):
        make_run(callbacks=[Fail()], validate=False).fit()
    assert torch.backends.mkldnn.enabled == before
    assert torch.get_default_dtype() == torch.float32
