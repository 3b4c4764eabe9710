"""Targets that are right, ignored in part, or wrong: exact numbers, one line, or NaN that is said.

The reference is PyTorch's own cross entropy and Dice losses written out, in float64.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from fits import Plain, fit, seen
from oracle import expected
from small import LOSSES, Focal, assert_seen, batch, foreground_dice, small
from torch import nn

from losswatch import Observer, load_loss

# --- Ignored pixels in every form of target ------------------------------------------------------


def ignored_batch(classes=2):
    images, target = batch(classes)
    target[0, :3] = 255
    return images, target, target != 255


def bce(z, y, keep):
    each = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    return each[keep].mean()


def dice_of_channels(z, y, keep):
    p = z.sigmoid() * keep
    each = [foreground_dice(p[:, c], (y * keep)[:, c]) for c in range(z.shape[1])]
    return torch.stack(each).mean()


FORMS = {
    "indices": lambda t: t,
    "indices with a channel": lambda t: t.unsqueeze(1),
    "uint8": lambda t: t.to(torch.uint8),
    "floating point": lambda t: t.unsqueeze(1).double(),
    "floating point without a channel": lambda t: t.float(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_ignored_pixels_on_one_channel(form, activation):
    """Masks of 0, 1 and 255."""
    net = small(1)
    images, target, keep = ignored_batch()
    z = net(images)
    y, keep = torch.where(keep, target, 0).unsqueeze(1).double(), keep.unsqueeze(1)
    observer = Observer(
        {"cce_stable": "cce_stable", "dice_fg": "dice_fg"}, net, activation=activation,
        ignore_index=255,
    )  # fmt: skip
    found = observer(z if activation == "sigmoid" else z.sigmoid(), FORMS[form](target))
    losses = [lambda z, _: bce(z, y, keep), lambda z, _: dice_of_channels(z, y, keep)]
    assert_seen(found, expected(losses, z, y, net.parameters()), 1e-8)


SEVERAL = [
    (form, index)
    for form in (*FORMS, "labels", "labels of integers")
    for index in (255, 0, -1)
    # 0 is a label in planes of labels, and uint8 has no -1.
    if not (index == 0 and form.startswith("labels")) and (form, index) != ("uint8", -1)
]


@pytest.mark.parametrize("form, index", SEVERAL)
def test_ignored_pixels_with_several_sigmoid_channels(form, index):
    net = small(3)
    images, target, keep = ignored_batch(3)
    z, keep = net(images), keep.unsqueeze(1).expand(-1, 3, -1, -1)
    y = F.one_hot(torch.where(target == 255, 0, target), 3).movedim(-1, 1).double()
    if form.startswith("labels"):
        given = torch.where(keep, y, index)
        given[1, 2, 4:] = index  # each channel ignores its own
        keep = given != index
        given = given.long() if form == "labels of integers" else given
    elif index == 0:
        given, keep = FORMS[form](torch.where(target == 255, 1, target)), target != 0
        y = F.one_hot(torch.where(target == 255, 1, target), 3).movedim(-1, 1).double()
        keep = keep.unsqueeze(1).expand(-1, 3, -1, -1)
    else:
        given = FORMS[form](torch.where(target == 255, index, target))
    names = {"cce_stable": "cce_stable", "dice": "dice"}
    found = Observer(names, net, activation="sigmoid", ignore_index=index)(z, given)
    losses = [lambda z, _: bce(z, y, keep), lambda z, _: dice_of_channels(z, y, keep)]
    assert_seen(found, expected(losses, z, y, net.parameters()), 1e-6)


def test_ignored_pixels_of_one_hot_labels():
    net = small(3)
    images, target, keep = ignored_batch(3)
    y = F.one_hot(torch.where(keep, target, 0), 3).movedim(-1, 1).double()
    given = torch.where(keep.unsqueeze(1), y, 255)
    z = net(images)
    found = Observer(LOSSES, net, ignore_index=255)(z, given)
    losses = [load_loss(name, ignore_index=255) for name in LOSSES]
    wanted = expected(losses, z, target, net.parameters())  # test_losses.py holds it to PyTorch
    assert_seen(found, wanted)
    stable = Observer(["cce_stable"], net, ignore_index=255)(net(images), given)
    right = F.cross_entropy(z, target, ignore_index=255)
    torch.testing.assert_close(stable.values[0], right.detach())


# --- Wrong labels --------------------------------------------------------------------------------

CLASS = "target: holds class {}, allowed are 0 to 1"
LABEL = "target: holds labels from {} to {}, allowed are 0 to 1"
WRONG = {
    "0 and 255 for a softmax": (2, "softmax", lambda t: t * 255, CLASS.format(255)),
    "0 and 255 on one channel": (1, "sigmoid", lambda t: t * 255, CLASS.format(255)),
    "the same, floating point": (
        1, "sigmoid", lambda t: 255.0 * t.unsqueeze(1), LABEL.format(0, 255),
    ),
    "0 and 255 for probabilities": (1, "none", lambda t: t * 255, CLASS.format(255)),
    "class 5": (2, "softmax", lambda t: t + 4, CLASS.format(5)),
    "class 5 of sigmoids": (2, "sigmoid", lambda t: t + 4, CLASS.format(5)),
    "-1 and 1": (2, "softmax", lambda t: 2 * t - 1, CLASS.format(-1)),
    "-1 and 1 on one channel": (1, "sigmoid", lambda t: 2.0 * t - 1, LABEL.format(-1, 1)),
    "-100": (2, "softmax", lambda t: torch.where(t > 0, -100, t), CLASS.format(-100)),
    "one-hot x 255": (
        2, "softmax", lambda t: 255 * torch.stack([1 - t, t], 1), LABEL.format(0, 255),
    ),
    "labels x 255": (
        2, "sigmoid", lambda t: 255 * torch.stack([t, t], 1), LABEL.format(0, 255),
    ),
    "labels that add to 2": (
        2, "softmax", lambda t: torch.ones(2, 2, 8, 8), "do not add to 1 .* activation='sigmoid'",
    ),
    "indices of a half": (2, "softmax", lambda t: 0.5 * t, "class indices must be whole numbers"),
    "soft labels of one channel": (
        2, "softmax", lambda t: 0.3 * t.unsqueeze(1), "class indices must be whole numbers",
    ),
    "NaN indices": (2, "softmax", lambda t: t / 0, "target: holds NaN"),
    "NaN labels": (1, "sigmoid", lambda t: t / 0, "target: holds NaN"),
}  # fmt: skip


class Square(nn.Module):
    """A loss of somebody else, which takes any target."""

    def forward(self, output, target):
        return output.square().mean()


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels(case, caplog):
    """At the first batch one line; later NaN for losses of losswatch, and one line."""
    channels, activation, spoil, line = WRONG[case]
    net = small(channels)
    images, target = batch()

    def output():
        z = net(images)
        return z if activation != "none" else z.sigmoid()

    losses = {"cce": "cce", "dice": "dice", "dice_monai": "dice_monai", "mine": Square()}
    with pytest.raises(ValueError, match=line) as raised:
        Observer(losses, net, activation=activation)(output(), spoil(target))
    assert "\n" not in str(raised.value)
    observer = Observer(losses, net, activation=activation)
    right = observer(output(), target)
    assert right.norms.isfinite().all() and not caplog.messages
    for _ in range(2):
        found = observer(output(), spoil(target))
        assert found.names == right.names
        for a, b in zip(found[1:3], right[1:3], strict=True):
            assert a[:3].isnan().all()
            torch.testing.assert_close(a[3], b[3])
        assert found.cosines.isnan().sum() == 15
    assert [m for m in caplog.messages if "NaN there" in m] == caplog.messages
    [message] = caplog.messages
    assert torch.equal(observer(output(), target).norms, right.norms)


def test_a_foreign_loss_alone_may_have_any_target():
    net = small()
    images, target = batch()
    z = net(images)
    assert Observer([Square()], net)(z, target * 255).values.isfinite().all()


def test_wrong_labels_in_a_training(caplog):
    """PyTorch's loss ignores 255 and trains; the watch was not told."""

    class Ignoring(Plain):
        def loss(self, batch):
            images, target = batch
            target = target.clone()
            if self.global_step == 3:
                target[0, :2] = 255
            return self.loss_fn(self.net(images), target)

    watch = seen(["cce", "dice_monai"], strict=False, diagnose=False)
    with caplog.at_level(logging.WARNING):
        fit(Ignoring(small(), nn.CrossEntropyLoss(ignore_index=255)), watch)
    table = torch.from_numpy(watch.table(["cce", "dice_monai"]))
    assert watch.at == list(range(6))
    assert table[3].isnan().all() and table[[0, 1, 2, 4, 5]].isfinite().all()
    assert torch.from_numpy(watch.table(["loss_fn"])).isfinite().all()
    [line] = [m for m in caplog.messages if "losswatch" in m]
    assert "step 3: target: holds class 255, allowed are 0 to 1; presets and losses" in line


def test_a_module_that_ignores_another_label_is_not_silently_wrong():
    net = small()
    images, target = batch()
    target[0, 0] = 255
    dice = load_loss("dice")  # it knows of no ignored label
    with pytest.raises(ValueError, match="holds class 255"):
        Observer({"preset": "dice", "mine": dice}, net, ignore_index=255)(net(images), target)


# --- One loss that is ill ------------------------------------------------------------------------


class Root(nn.Module):
    """Its value is finite, its gradient is not."""

    def forward(self, logits, target):
        return (logits - logits.detach()).abs().sum().sqrt()


class Infinite(nn.Module):
    def forward(self, logits, target):
        return logits.mean() / 0


class Late(nn.Module):
    """Raises an error at its third call."""

    def __init__(self):
        super().__init__()
        self.calls = [0]

    def forward(self, logits, target):
        Late.count += 1
        if Late.count > 2:
            raise RuntimeError("late\nerror")
        return logits.square().mean()


@pytest.mark.parametrize("ill", [Root, Infinite])
def test_a_loss_that_is_ill_is_so_alone(ill):
    net = small()
    images, target = batch()
    z = net(images)
    found = Observer({"ill": ill(), "focal": Focal()} | {n: n for n in LOSSES}, net)(z, target)
    wanted = expected([Focal(), *map(load_loss, LOSSES)], z, target, net.parameters())
    assert not found.norms[0].isfinite() and found.cosines[0].isnan().all()
    rest = found._replace(
        values=found.values[1:], norms=found.norms[1:], cosines=found.cosines[1:, 1:]
    )
    assert_seen(rest, wanted)


def test_a_loss_that_fails_later_is_nan(caplog):
    Late.count = 0
    net = small()
    images, target = batch()
    observer = Observer({"late": Late(), "dice": "dice"}, net)
    rows = [observer(net(images), target) for _ in range(4)]
    assert [float(row.norms[0]) > 0 for row in rows] == [True, True, False, False]
    assert rows[3].values[0].isnan() and rows[3].norms[0].isnan()
    assert torch.equal(rows[3].norms[1], rows[0].norms[1])
    assert caplog.messages == ["losswatch: loss late failed, so it is NaN: late error"]


def test_nan_logits_later(caplog):
    """Losses over single images look for bad logits; all of them are NaN, and nothing is raised."""
    net = small()
    images, target = batch()
    observer = Observer(["cce", "dice", "dice_monai"], net)
    observer(net(images), target)
    found = observer(net(images * float("nan")), target)
    assert found.values.isnan().all() and found.norms.isnan().all()
    assert len(caplog.messages) == 1 and "dice_monai failed" in caplog.messages[0]
    with pytest.raises(ValueError, match="logits: 256 of 256 are NaN"):
        Observer(["cce"], net)(net(images * float("nan")), target)


@pytest.mark.parametrize("kind", ["detached", "argmax", "number"])
def test_a_loss_without_a_gradient(kind):
    class Term(nn.Module):
        def forward(self, logits, target):
            if kind == "number":
                return torch.tensor(0.3)
            z = logits.detach() if kind == "detached" else logits.argmax(1).double()
            return z.mean()

    net = small()
    images, target = batch()
    found = Observer({"term": Term(), "dice": "dice"}, net)(net(images), target)
    assert found.norms[0] == 0 and found.norms[1] > 0 and found.values.isfinite().all()
    watch = seen({"term": Term(), "dice": load_loss("dice")})
    fit(Plain(small()), watch)
    assert (watch.table(["term"])[:, 1] == 0).all() and (watch.table(["dice"])[:, 1] > 0).all()
