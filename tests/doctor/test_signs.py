"""What the doctor reads of a batch, against numpy in float64; and that nothing is disturbed."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import LOSSES, Checkpointed, Drawing, Focal, batch, small
from torch import nn

from losswatch import Observer, load_loss
from losswatch.doctor.history import ENDS
from losswatch.watch import doctor as doctor_module
from losswatch.watch.answers import ANSWERS, LEVELS, ask
from losswatch.watch.signs import end_of, read_signs, sign_names


def numbers(output, target, slope=None, activation="softmax", ignore_index=None):
    found = read_signs(output, target, slope, activation, ignore_index)
    assert found.dtype == torch.float32
    return dict(zip(sign_names(max(2, output.shape[1])), found.tolist(), strict=True))


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("ignored", [False, True])
def test_numbers_of_a_batch(classes, ignored):
    g = torch.Generator().manual_seed(classes)
    z = 3 * torch.randn(3, classes, 5, 4, generator=g, dtype=torch.float64)
    label = torch.randint(0, classes, (3, 5, 4), generator=g)
    label[0] = 0
    if ignored:
        label[1, :2] = 255
    slope = torch.randn(z.shape, generator=g, dtype=torch.float64)
    found = numbers(z, label, slope, ignore_index=255 if ignored else None)

    x, t, d = z.numpy(), label.numpy(), slope.numpy()
    keep = t != 255
    p = softmax(x)
    y = np.stack([(t == c) & keep for c in range(classes)], 1).astype(float)
    pixels = {c: p[:, c][keep] for c in range(classes)}
    empty = np.array([not (t[i][keep[i]] > 0).any() for i in range(3)])
    pull = np.abs(d).sum()
    means = y.sum((0, 2, 3)) / keep.sum()
    wanted = {
        "out_min": x.min(),
        "out_max": x.max(),
        "out_sum": np.abs(x.sum(1) - 1).max(),
        "out_length": np.abs(np.sqrt((x**2).sum(1)) - 1).max(),
        "out_centre": (np.abs(x.mean((2, 3))) / x.std((2, 3))).max(),
        "zeros": 0,
        "bits": 64,
        "ends_in": 0,
        "multilabel": 0,
        "label_min": t[keep].min(),
        "label_max": t[keep].max(),
        "label_sum": 1,
        "images": 3,
        "pixels": 20,
        "counted": keep.mean(),
        "empty": empty.mean(),
        "slope": np.mean([np.mean(q * (1 - q)) for q in pixels.values()]),
        "saturated": np.mean(np.max([q * (1 - q) for q in pixels.values()], 0) < 1e-4),
        "wrong": np.mean([np.abs(p[:, c] - y[:, c])[keep].mean() for c in range(classes)]),
        "pull": pull,
        "pull_empty": np.abs(d[empty]).sum() / pull,
        "pull_ignored": np.abs(d)[np.repeat(~keep[:, None], classes, 1)].sum() / pull,
        "apart": -(d * (y - means[:, None, None]) * keep[:, None]).sum(),
        "shift": np.abs(d.sum(1)).sum() / pull,
    }
    hard = p.argmax(1)
    for c in range(classes):
        wanted[f"label/{c}"] = means[c]
        wanted[f"hard/{c}"] = (hard[keep] == c).mean()
        wanted[f"soft/{c}"] = pixels[c].mean()
        wanted[f"alike/{c}"] = -d[:, c].sum()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_one_channel_is_the_foreground_of_two_classes():
    z = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    label = (torch.rand(2, 1, 4, 4) > 0.5).double()
    slope = torch.randn_like(z)
    one = numbers(z, label, slope, "sigmoid")
    two = numbers(
        torch.cat([torch.zeros_like(z), z], 1), label[:, 0].long(), torch.cat([-slope, slope], 1)
    )
    for name in ("label/1", "hard/1", "soft/0", "alike/1", "apart", "slope", "wrong"):
        assert one[name] == pytest.approx(two[name], rel=1e-6), name


def test_labels_that_are_wrong_are_noted_before_they_are_clamped():
    z = torch.randn(2, 1, 4, 4)
    found = numbers(z, torch.full((2, 1, 4, 4), 255.0), activation="sigmoid")
    assert found["label_max"] == 255 and found["label/1"] == 1
    both = numbers(torch.randn(2, 2, 4, 4), torch.ones(2, 2, 4, 4))
    assert both["label_sum"] == 2


@pytest.mark.parametrize(
    "head, name",
    [
        (nn.Softmax(1), "softmax"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.ReLU(), "ReLU"),
        (nn.Tanh(), "tanh"),
        (nn.Hardtanh(), "a clamp"),
        (nn.BatchNorm2d(2), "a normalisation"),
        (nn.GroupNorm(1, 2), "a normalisation"),
        (nn.Identity(), "something else"),
    ],
)
def test_what_a_network_ends_in(head, name):
    net = nn.Sequential(nn.Conv2d(3, 2, 1), head)
    output = net(torch.randn(2, 3, 4, 4))
    assert ENDS[end_of(output)] == name
    assert ENDS[end_of(output.half().view(2, 2, 4, 4))] == name


def test_known_answers_of_cross_entropy_and_dice():
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    label[0, 0] = 1  # a quarter is foreground
    y = F.one_hot(label, 2).movedim(-1, 1).double()
    output = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    ce = dict(zip(ANSWERS, ask(nn.CrossEntropyLoss(), output, label, y, "logits").tolist(),
                  strict=True))  # fmt: skip
    assert ce["perfect"] == pytest.approx(0, abs=1e-6) and ce["opposite"] == pytest.approx(20)
    assert ce["opposite_half"] == pytest.approx(10, rel=1e-4)
    assert ce["background"] == pytest.approx(20 / 4)
    # The best constant of cross entropy is the share of the class, to the grid of LEVELS.
    levels = np.array(LEVELS)
    curve = 0.25 * np.log1p(np.exp(-levels)) + 0.75 * np.log1p(np.exp(levels))
    assert ce["constant"] == pytest.approx(curve.min(), rel=1e-6)
    best = 1 / (1 + math.exp(-levels[curve.argmin()]))
    assert ce["constant_share"] == pytest.approx(best, rel=1e-5)
    dice = dict(zip(ANSWERS, ask(load_loss("dice_fg"), output, label, y, "logits").tolist(),
                    strict=True))  # fmt: skip
    # Foreground everywhere: 1 - 2·4 / (16 + 4).
    assert dice["constant"] == pytest.approx(0.6, rel=1e-5)
    assert dice["constant_share"] == pytest.approx(1, rel=1e-5)


def test_the_best_constant_answer_is_a_formula_on_class_counts():
    """A table loss at a constant answer: tp = p·Y and Σp = n·p."""
    g = torch.Generator().manual_seed(0)
    label = (torch.rand(2, 8, 8, generator=g) < 0.1).long()
    y = F.one_hot(label, 2).movedim(-1, 1).double()
    count, n = float(y[:, 1].sum()), label.numel()
    found = ask(load_loss("dice"), torch.zeros(2, 2, 8, 8).double(), label, y, "logits")
    values = []
    for z in LEVELS:
        p = 1 / (1 + math.exp(-z))
        d = [2 * q * k / (n * q + k) for q, k in ((p, count), (1 - p, n - count))]
        values.append(1 - sum(d) / 2)
    assert found[ANSWERS.index("constant")].item() == pytest.approx(min(values), rel=1e-5)


# --- In a training --------------------------------------------------------------------------------


class Loud(nn.Module):
    """A loss that fails for answers that are not a network's."""

    def forward(self, logits, target):
        if not logits.requires_grad:
            raise RuntimeError("only for training")
        return F.cross_entropy(logits, target)


def trained(net, criterion, steps, look):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    images, target = batch()
    for _ in range(steps):
        output = net(images)
        look(output, target)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = [torch.get_rng_state(), *net.state_dict().values(), *criterion.state_dict().values()]
    return [x.clone() for x in state]


@pytest.mark.parametrize("criterion", [Drawing, Focal, Loud, nn.CrossEntropyLoss])
@pytest.mark.parametrize("make", [small, lambda: Checkpointed().double()])
def test_training_is_unchanged_bit_for_bit(criterion, make):
    nets = [make()]
    nets.append(copy.deepcopy(nets[0]))
    losses = [criterion(), criterion()]
    alone = trained(nets[0], losses[0], 4, lambda *_: None)
    observer = Observer({"cce": "cce", "dice": "dice", "own": losses[1]}, nets[1], trained="own")
    watched = trained(nets[1], losses[1], 4, observer)
    observer.findings()
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert len(observer.doctor.kept) == 4


def test_no_number_of_the_device_is_read():
    """Tensors of the meta device hold no numbers: a look at one is an error."""
    net = small().to("meta")
    observer = Observer([*LOSSES, Focal()], net, trained="dice")
    images = torch.empty(2, 3, 8, 8, dtype=torch.float64, device="meta")
    target = batch()[1].to("meta")
    for _ in range(3):
        observer(net(images), target)
    doctor = observer.doctor
    assert [row.device.type for _, row in doctor.kept] == ["meta"] * 3
    found = read_signs(net(images), target, torch.empty_like(net(images)), "softmax", None)
    assert found.is_meta
    y = torch.empty(2, 2, 8, 8, dtype=torch.float64, device="meta")
    assert ask(Focal(), net(images).detach(), target, y, "logits").is_meta


def test_steps_observed_one_after_another_are_thinned_out(monkeypatch):
    monkeypatch.setattr(doctor_module.Doctor, "MOST", 40)
    net = small()
    observer = Observer(["cce"], net, trained="cce")
    images, target = batch()
    for _ in range(700):
        observer(net(images), target)
        observer.report(torch.tensor(0.5))
    assert len(observer.doctor.fresh) <= 41 and len(observer.doctor.reported) <= 41
    steps = [step for step, _ in observer.doctor.kept]
    assert steps[:20] == [*range(20)] and len(steps) <= 41
    assert steps[20:] == sorted(steps[20:]) and steps[-1] >= 600
    assert len(observer.doctor.history()) == len(steps)


@pytest.mark.parametrize("trained_by", [None, "dice"])
def test_one_observation_is_enough_to_ask(trained_by):
    net = small()
    observer = Observer(["cce", "dice"], net.parameters(), trained=trained_by)
    assert observer.findings() == []
    images, target = batch()
    observer(net(images), target)
    assert observer.findings() == []


def test_a_trained_loss_that_is_not_watched_is_refused():
    with pytest.raises(ValueError, match="trained='focal': the watched losses are cce, dice"):
        Observer(["cce", "dice"], small(), trained="focal")


class Constant(nn.Module):
    """Answers the same for every pixel."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.view(1, -1, 1, 1).expand(len(images), -1, *images.shape[2:])


def first_finding(name, net, target):
    observer = Observer(["cce", "dice", "dice_fg", name], net, trained=name)
    observer(net(torch.zeros(len(target), 1, *target.shape[1:])), target)
    return observer.findings()[0].name


def test_a_loss_without_slope_and_a_smoothing_that_drowns_show_in_one_batch():
    label = torch.zeros(1, 16, 16, dtype=torch.int64)
    label[0, :4] = 1
    assert first_finding("dice_square", Constant(60.0, 0.0), label) == "saturated"
    few = torch.zeros(1, 4, 4, dtype=torch.int64)
    few[0, 0, 0] = 1
    assert first_finding("dice_smooth100", Constant(0.1, 0.0), few) == "smoothing"


def test_a_reported_value_is_looked_at_where_no_watched_loss_trains():
    net, (images, target) = small(), batch()
    observer = Observer(["cce", "dice"], net)
    for value in (0.5, 0.6, 700.0):
        observer(net(images), target)
        observer.report(torch.tensor(value))
    [finding] = observer.findings()
    assert finding.name == "diverges" and "from 0.5 to 700" in finding.text


def test_nothing_of_a_step_is_kept_alive():
    """The graph of the trained value is released when the observation ends."""
    net, (images, target) = small(), batch()
    observer = Observer(["cce"], net)
    observer.doctor.see_trained("mse", None, net(images).square().mean())
    observer(net(images), target)
    assert observer.doctor.value is None
    assert all(not row.requires_grad for _, row in observer.doctor.kept)


def test_a_writer_that_fails_does_not_end_the_training(caplog):
    class Full:
        def add_text(self, *_):
            raise OSError("no space left on device")

    label = torch.zeros(1, 16, 16, dtype=torch.int64)
    label[0, :4] = 1
    net = Constant(60.0, 0.0)
    observer = Observer(["cce", "dice_square"], net, trained="dice_square")
    observer(net(torch.zeros(1, 1, 16, 16)), label)
    observer.doctor.say([Full()])
    lines = caplog.messages
    assert lines[0].startswith("losswatch: saturated (step 0)") and "no space left" in lines[1]
