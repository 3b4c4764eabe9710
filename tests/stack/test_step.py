"""The stacked step equals plain training: nn.Module, torch.optim, one gradient for each loss."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARTICLE, load_losses
from oracle import expected, gradients, truth
from torch import nn
from torch._dynamo.utils import counters
from torch.func import vjp, vmap

from losswatch.data.random import TRAIN, ThresholdedImages, _Batches
from losswatch.nets import ConvNet, UNet
from losswatch.nets.layers import NarrowConvolution
from losswatch.stack.compile import compiled
from losswatch.stack.flat_parameters import trained_parameters
from losswatch.stack.optimizers import optimizer_rule
from losswatch.stack.refusal import NotStackable
from losswatch.stack.step import make_gradient

STEPS = 5
# Each member's trained loss, θ, seed, input range and factor of the learning rate.
MEMBERS = [("dice", 0.3, 0, (0, 1), 1), ("cce", 0.6, 7, (1, -1), 3), ("cube", 0.9, 1, (2, 5), 0.2)]
NETS = {
    "convnet": lambda: ConvNet(1, 2),
    "convnet, BN": lambda: ConvNet(1, 2, batch_norm=True),
    "unet, BN": lambda: UNet(1, 2, widths=(2, 3), convs=1),
}
OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6}),
    "Adam, weight decay": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.3}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.3}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True}),
}


class Cube(nn.Module):
    """A foreign loss, which shares no rows with others."""

    def forward(self, logits, target):
        right = logits.gather(1, target[:, None])
        return (1 - right.tanh()).pow(3).mean()


class Wide(nn.Module):
    """Converts the images, which are float32, to the precision of its weights."""

    def __init__(self, net, dtype):
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype

    def forward(self, x):
        return self.net(x.to(self.dtype))


def make_stack(
    net="convnet", optimizer="Adam", dtype=torch.float64, late=False, names=ARTICLE, device="cpu"
):
    """Members and their stacked state; the softmax of `late` ones is saturated."""
    kind, options = OPTIMIZERS[optimizer]
    losses = load_losses(*names, cube=Cube()).to(device)
    members = []
    for trained, theta, seed, (low, high), factor in MEMBERS:
        torch.manual_seed(seed)
        module = Wide(NETS[net](), dtype).to(device)
        if late:
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(4)
        own = options | {"lr": options["lr"] * factor}
        members.append(
            SimpleNamespace(
                trained=trained, net=module, options=own,
                optimizer=kind(module.parameters(), **own),
                data=ThresholdedImages(
                    [theta], seed=seed, low=low, high=high, image_size=8, batch_size=3
                ),
            )
        )  # fmt: skip
    rule, _, moments = optimizer_rule(members[0].optimizer)
    rates = [optimizer_rule(m.optimizer)[1] for m in members]
    states = [m.net.state_dict() for m in members]
    names = trained_parameters(members[0].net)
    flat = torch.stack([torch.cat([s[n].flatten() for n in names]) for s in states])
    stacked = {
        "seed": torch.tensor([m.data.seed for m in members]),
        "thresholds": torch.stack([m.data.thresholds for m in members]),
        "trained": torch.tensor(
            [[float(n == m.trained) for n in losses.names] for m in members], dtype=dtype
        ),
        **{
            key: torch.tensor([float(getattr(m.data, key)) for m in members])
            for key in ("low", "high")
        },
        **{key: torch.tensor([n[key] for n in rates], dtype=dtype) for key in rates[0]},
    }
    rest = {n: torch.stack([s[n] for s in states]) for n in states[0] if n not in names}
    stacked = {key: value.to(device) for key, value in stacked.items()}
    state = (flat.clone(), rest, tuple(torch.zeros_like(flat) for _ in moments), stacked)

    def function(observed=True, ready=lambda function: function):
        gradient = make_gradient(
            members[0].net, losses, (3, 1, 8, 8), observed=observed, cosines=True
        )
        gradient = ready(vmap(gradient, in_dims=(0, 0, 0, None)))
        update = ready(vmap(rule, in_dims=(0, 0, 0, None, 0)))

        def one(parameters, buffers, moments, numbers, step):
            of_run = {key: numbers[key] for key in numbers if key not in rates[0]}
            own, buffers, seen = gradient(parameters, buffers, of_run, step)
            parameters, moments = update(parameters, own, moments, step, numbers)
            return parameters, buffers, moments, seen

        return one

    return SimpleNamespace(members=members, losses=losses, state=state, function=function)


def advance(function, state, first=0, steps=STEPS):
    """The state after some steps, and all observations [steps, members, tags]."""
    parameters, buffers, moments, numbers = state
    seen = []
    for i in range(first, first + steps):
        parameters, buffers, moments, values = function(
            parameters, buffers, moments, numbers, torch.tensor(i, device=parameters.device)
        )
        seen.append(values)
    return (parameters, buffers, moments, numbers), torch.stack(seen)


def train_plainly(member, losses):
    """Training as it is written without losswatch; the values, norms and cosines of each step."""
    net = copy.deepcopy(member.net)
    optimizer = type(member.optimizer)(net.parameters(), **member.options)
    batches = _Batches(member.data, TRAIN, 3, 3 * STEPS)
    seen = []
    for step in range(STEPS):
        images, target = (x.to(next(net.parameters()).device) for x in batches[step])
        logits = net(images)
        values = [loss(logits, target) for loss in losses.losses]
        seen.append(truth(values, gradients(values, net.parameters())).row())
        optimizer.zero_grad()
        values[losses.names.index(member.trained)].backward()
        optimizer.step()
    return net, torch.stack(seen)


# In float64, except for Adam's correction of its moments, which is rounded to float32.
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_plain_training(device, net, optimizer):
    stack = make_stack(net, optimizer, device=device)
    (flat, buffers, _, _), seen = advance(stack.function(), stack.state)
    near = {"rtol": 1e-9, "atol": 1e-10}
    if optimizer.startswith("Adam"):
        near = {"rtol": 1e-5, "atol": 1e-7}
    for i, member in enumerate(stack.members):
        plain, wanted = train_plainly(member, stack.losses)
        torch.testing.assert_close(seen[:, i], wanted, **near)
        torch.testing.assert_close(
            flat[i], torch.cat([p.detach().flatten() for p in plain.parameters()]), **near
        )
        assert not torch.equal(flat[i], stack.state[0][i]), "training must have moved the weights"
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer, **near)
            if name.endswith("num_batches_tracked"):
                assert buffers[name][i] == STEPS


@pytest.mark.parametrize("net", NETS)
def test_equals_plain_training_in_float32(net):
    stack = make_stack(net, dtype=torch.float32)
    (flat, _, _, _), seen = advance(stack.function(), stack.state)
    for i, member in enumerate(stack.members):
        plain, wanted = train_plainly(member, stack.losses)
        torch.testing.assert_close(seen[:, i].double(), wanted.double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            flat[i], torch.cat([p.detach().flatten() for p in plain.parameters()]),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_a_stack_of_one_is_that_member():
    """Members do not affect each other."""
    stack = make_stack("convnet, BN")
    (flat, buffers, _, _), seen = advance(stack.function(), stack.state)
    for i in range(len(MEMBERS)):
        parameters, rest, moments, numbers = stack.state
        alone = (
            parameters[i : i + 1],
            {n: b[i : i + 1] for n, b in rest.items()},
            tuple(m[i : i + 1] for m in moments),
            {n: v[i : i + 1] for n, v in numbers.items()},
        )
        (own, own_buffers, _, _), own_seen = advance(stack.function(), alone)
        torch.testing.assert_close(own[0], flat[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_seen[:, 0], seen[:, i], rtol=1e-10, atol=1e-12)
        for name, buffer in buffers.items():
            torch.testing.assert_close(own_buffers[name][0], buffer[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
def test_observing_changes_training_by_rounding_alone(net):
    stack = make_stack(net, "momentum")
    (watched, watched_buffers, _, _), _ = advance(stack.function(True), stack.state)
    (alone, buffers, _, _), seen = advance(stack.function(False), stack.state)
    assert seen.numel() == 0
    torch.testing.assert_close(watched, alone, rtol=1e-11, atol=1e-12)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, watched_buffers[name], rtol=1e-11, atol=1e-12)


def test_frozen_parameters_stay():
    stack = make_stack("convnet, BN")
    for member in stack.members:
        next(member.net.net.parameters()).requires_grad_(False)
    names = trained_parameters(stack.members[0].net)
    states = [m.net.state_dict() for m in stack.members]
    flat = torch.stack([torch.cat([s[n].flatten() for n in names]) for s in states])
    rest = {n: torch.stack([s[n] for s in states]) for n in states[0] if n not in names}
    state = (flat, rest, (torch.zeros_like(flat),) * 2, stack.state[3])
    (after, buffers, _, _), seen = advance(stack.function(), state)
    [frozen] = [name for name in rest if name.endswith("weight")]
    assert torch.equal(buffers[frozen], rest[frozen]) and not torch.equal(after, flat)
    net = stack.members[0].net
    images, target = _Batches(stack.members[0].data, TRAIN, 3, 3)[0]
    wanted = expected(stack.losses.losses, net(images), target, net.parameters())
    count = len(stack.losses.names)
    torch.testing.assert_close(seen[0, 0, count : 2 * count], wanted.norms, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "kind, options, reason",
    [
        (torch.optim.Adagrad, {}, "Adagrad is not written out"),
        (torch.optim.RMSprop, {}, "RMSprop is not written out"),
        (torch.optim.Adam, {"amsgrad": True}, "amsgrad and maximize are not written out"),
        (torch.optim.AdamW, {"maximize": True}, "amsgrad and maximize are not written out"),
        (torch.optim.SGD, {"maximize": True}, "dampening and maximize are not written out"),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}, "dampening and maximize are not"),
    ],
)
def test_other_optimizers_are_refused(kind, options, reason):
    optimizer = kind([nn.Parameter(torch.zeros(1))], lr=0.1, **options)
    with pytest.raises(NotStackable, match=reason):
        optimizer_rule(optimizer)


def test_a_subclass_is_another_optimizer():
    class Mine(torch.optim.SGD):
        """Its step may do something else, such as moving a scheduler."""

    with pytest.raises(NotStackable, match="Mine is not written out"):
        optimizer_rule(Mine([nn.Parameter(torch.zeros(1))], lr=0.1))


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_with_decoupled_weight_decay_is_adamw(decoupled):
    optimizer = torch.optim.Adam(
        [nn.Parameter(torch.zeros(1))], weight_decay=0.1, decoupled_weight_decay=decoupled
    )
    assert optimizer_rule(optimizer)[1]["decoupled"] == decoupled


# --- The sum that compiled and stacked convolutions are -----------------------------------------


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 5)])
def test_narrow_convolution_gradients(kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, *kernel, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(NarrowConvolution.apply, (x, weight))


@pytest.mark.parametrize("shared_input", [False, True])
def test_narrow_convolution_stacked(shared_input):
    """As the step calls it: under vmap, with several cotangents of one forward pass."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    weight = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    back = torch.randn(3, 7, 2, 2, 5, 6, dtype=torch.float64)

    def differentiate(convolve):
        def one(x, weight, back):
            y, pull = vjp(convolve, x, weight)
            return y, vmap(pull)(back)

        return vmap(one, in_dims=(None if shared_input else 0, 0, 0))(
            x[0] if shared_input else x, weight, back
        )

    y, (by_x, by_weight) = differentiate(NarrowConvolution.apply)
    wanted, (wanted_x, wanted_weight) = differentiate(lambda x, w: F.conv2d(x, w, padding=1))
    for got, reference in ((y, wanted), (by_x, wanted_x), (by_weight, wanted_weight)):
        torch.testing.assert_close(got, reference, rtol=1e-12, atol=1e-12)


# --- Compiled ------------------------------------------------------------------------------------

# Inductor imports a part of PyTorch that PyTorch itself deprecates.
compiling = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


FEW = {"dtype": torch.float32, "names": ("cce", "dice")}  # compiling takes a second for each loss


@pytest.fixture(scope="module", params=["traced", "inductor"])
def fast(request):
    """One step of a stack as the compiler gets it, or compiled, which takes half a minute."""
    stack = make_stack("convnet", **FEW)
    function = stack.function(ready=compiled)
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "traced":
            patched.setattr("losswatch.stack.compile.compile_graph", lambda graph, *_: graph)
        advance(function, stack.state, steps=1)
    return function


@pytest.mark.slow
@compiling
def test_the_next_optimizer_finds_the_compiled_gradient():
    for optimizer in ("Adam", "momentum"):
        stack = make_stack("convnet", optimizer, **FEW)
        counters["inductor"].clear()
        advance(stack.function(ready=compiled), stack.state, steps=1)
    assert counters["inductor"]["fxgraph_cache_hit"] >= 1


@compiling
@pytest.mark.parametrize("late", [False, True])
def test_compiled_equals_eager(fast, late):
    """Also thousands of steps later, with a saturated softmax and old moments of Adam."""
    stack = make_stack("convnet", late=late, **FEW)
    first = 5000 if late else 0
    (flat, buffers, moments, _), seen = advance(stack.function(), stack.state, first)
    (got, got_buffers, got_moments, _), got_seen = advance(fast, stack.state, first)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got_seen[:1], seen[:1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got_seen, seen, **near)
    torch.testing.assert_close(got, flat, **near)
    for a, b in zip(got_moments, moments, strict=True):
        torch.testing.assert_close(a, b, **near)
    for name, buffer in buffers.items():
        torch.testing.assert_close(got_buffers[name], buffer, **near)


@compiling
def test_nothing_is_compiled_again(fast, monkeypatch):
    """The step's number and the members' settings are tensors, not constants in the code."""
    stack = make_stack("convnet", **FEW)
    monkeypatch.delattr("losswatch.stack.compile.compile_graph")
    numbers = stack.state[3]
    low = numbers["low"] - 1
    numbers = numbers | {"lr": 2 * numbers["lr"], "seed": numbers["seed"] + 5, "low": low}
    changed = (*stack.state[:3], numbers)
    (got, *_), got_seen = advance(fast, changed, first=12_345, steps=3)
    (wanted, *_), seen = advance(stack.function(), changed, first=12_345, steps=3)
    torch.testing.assert_close(got_seen, seen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    _, later = advance(fast, changed, first=12_345, steps=20)
    assert len({tuple(values) for values in later.flatten(1).tolist()}) == 20  # new images


class Root(nn.Module):
    """Its value is finite, its gradient is not."""

    def forward(self, logits, target):
        return (logits - logits.detach()).abs().sum().sqrt()


@pytest.mark.parametrize("observed", [True, False])
def test_a_loss_that_is_ill_is_so_alone(observed):
    """The other losses, and a training with one of them, are as without it."""
    own, seen = [], []
    for more in ({}, {"ill": Root()}):
        torch.manual_seed(0)
        net, losses = ConvNet(1, 2).double(), load_losses("cce", "dice", **more)
        net = Wide(net, torch.float64)
        step = make_gradient(net, losses, (3, 1, 8, 8), observed=observed, cosines=True)
        flat = torch.cat([p.detach().flatten() for p in trained_parameters(net).values()])
        numbers = {
            "seed": torch.tensor(0), "thresholds": torch.tensor([0.5]), "low": torch.tensor(0.0),
            "high": torch.tensor(1.0),
            "trained": torch.tensor([float(n == "dice") for n in losses.names]).double(),
        }  # fmt: skip
        gradient, _, values = step(flat, {}, numbers, torch.tensor(0))
        own.append(gradient)
        seen.append(values)
    torch.testing.assert_close(*own, rtol=1e-12, atol=0)
    assert own[1].isfinite().all() and own[1].norm() > 0
    if observed:  # two or three values, norms, and the cosines of each pair
        assert not seen[1][5].isfinite() and seen[1][7:].isnan().all()
        torch.testing.assert_close(seen[1][[0, 1, 3, 4, 6]], seen[0], rtol=1e-12, atol=0)
