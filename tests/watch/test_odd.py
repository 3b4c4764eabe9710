"""Odd networks, targets, losses and loops, as one table: right, or refused in one line.

*Right*: values, norms and cosines are those of one backward pass for each loss by a fresh network,
in each of two steps, or three. Weights, buffers, the optimiser's state, random numbers and what
modules keep by themselves are equal to the bit with and without watching.
"""

import logging
import re
from functools import partial

import odd_networks as nets
import pytest
import torch
import torch.nn.functional as F
from odd import LOSSES, Odd, Row, assert_right, plain, train
from odd_loops import LOOPS
from odd_networks import NETWORKS, NOT_LINEAR, Doing, chain, of
from odd_targets import S2, SPOILT, TARGETS, marked, probabilities, sigmoid, softmax
from torch import nn

from losswatch import Dice, LossSet, Sum, load_loss

LINEAR = "a hook or an autograd.Function makes the backward pass of the network not linear"

ROWS = {f"network: {name}": Row(net) for name, net in NETWORKS.items()}
ROWS |= {f"network: {name}": Row(net, lines=(LINEAR,)) for name, net in NOT_LINEAR.items()}


# --- Networks of other shapes --------------------------------------------------------------------


def conv(dims, channels=2):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return lambda: nn.Sequential(kind(1, 4, 3, padding=1), nn.ReLU(), kind(4, channels, 1)).double()


def half(dtype):
    net = lambda: chain(nn.ReLU()).to(dtype)  # noqa: E731
    loop = partial(plain, optimizer=torch.optim.SGD)  # Adam's eps is 0 in float16
    return Row(net, [*LOSSES], dtype=dtype, tolerance=0.02, loop=loop)


def heads(form, **more):
    return Row(lambda: nets.Heads(form).double(), **more)


ALL = {"heads": "all"}
ROWS |= {
    "network: one axis": Row(conv(1), size=(16,)),
    "network: three axes": Row(conv(3), size=(4, 4, 4)),
    "network: one pixel": Row(conv(2), size=(1, 1)),
    "network: one line": Row(conv(2), size=(1, 9)),
    "network: one image": Row(conv(2), batch=1),
    "network: no axis": Row(lambda: nn.Linear(1, 2).double(), size=(), batch=9),
    "network: LSTM": Row(lambda: nets.Recurrent(nn.LSTM).double(), size=(6,)),
    "network: GRU": Row(lambda: nets.Recurrent(nn.GRU).double(), size=(6,)),
    "network: sparse embedding": Row(
        lambda: nets.Embedded(True).double(), loop=partial(plain, optimizer=torch.optim.SGD)
    ),
    "network: 3 channels": Row(**softmax(3)),
    "network: 20 channels": Row(**softmax(20)),
    "network: one channel, sigmoid": Row(**sigmoid()),
    "network: 3 channels, sigmoid": Row(**sigmoid(3)),
    "network: 20 channels, sigmoid": Row(**sigmoid(20)),
    "network: one channel, probabilities": Row(**probabilities()),
    "network: 2 channels, probabilities": Row(**probabilities(2)),
    "network: 20 channels, probabilities": Row(**probabilities(20)),
    "network: bfloat16": half(torch.bfloat16),
    "network: float16": half(torch.float16),
    "network: list": heads("list"),
    "network: tuple": heads("tuple"),
    "network: dict": heads("dict"),
    "network: list, all": heads("list", options=ALL),
    "network: dict, all": heads("dict", options=ALL),
    "network: heads of two sizes": heads(
        "half", options=ALL, losses=[Odd()],
        target=lambda y: [y, y[:, ::2, ::2]],
    ),
    "network: one channel, softmax": Row(
        lambda: chain(channels=1), refused="the output has one channel, whose softmax is 1 everyw"
    ),
    "network: logits as probabilities": Row(
        NETWORKS["plain"], options={"activation": "none"}, refused="activation='none' is for prob"
    ),
    "network: reentrant checkpointing": Row(
        of(lambda net, x: net.last(nets.checkpoint(nn.Tanh(), net.first(x), use_reentrant=True))),
        refused="activation checkpointing must be that of use_reentrant=False",
    ),
    "network: under no_grad": Row(
        of(lambda net, x: torch.no_grad()(net.last)(net.first(x))), refused="no gradient",
    ),
    "network: frozen": Row(
        nets.changed(lambda net: net.requires_grad_(False)), refused="all of its parameters are"
    ),
    "network: NaN": Row(
        of(lambda net, x: net.last(net.first(x)) * torch.nan), refused="logits: 256 of 256 are NaN"
    ),
    "network: a part, given as a module": Row(
        NETWORKS["plain"], given=lambda net: net[-1], trained=lambda net: net[-1].parameters()
    ),
    "network: a part, given as parameters": Row(
        NETWORKS["batch norm"], given=lambda net: net[0].parameters(),
        trained=lambda net: net[0].parameters(),
    ),
    "network: given as parameters": Row(NETWORKS["dropout"], given=lambda net: net.parameters()),
    "network: given as a list": Row(NETWORKS["batch norm"], given=lambda n: list(n.parameters())),
    "network: given as an expression": Row(
        NETWORKS["batch norm"], given=lambda net: (p for p in net.parameters())
    ),
    "network: given as one tensor": Row(
        NETWORKS["plain"], given=lambda net: [net[-1].weight], trained=lambda net: [net[-1].weight]
    ),
    "network: given twice": Row(
        NETWORKS["plain"], given=lambda net: [*net.parameters(), *net[-1].parameters()]
    ),
    "network: given by name": Row(
        NETWORKS["plain"], given=lambda net: net.named_parameters(), refused="tensors are needed, "
    ),
    "network: given a part that is not used": Row(
        NETWORKS["plain"], given=lambda net: nn.Linear(1, 1), refused="none of the parameters has"
    ),
    "network: given nothing": Row(NETWORKS["plain"], given=lambda net: [], refused="there are non"),
}  # fmt: skip

# --- Losses --------------------------------------------------------------------------------------


def lost(loss, output, target):
    if not target.any():
        raise RuntimeError("the mask\nis empty")
    return output.square().mean()


def keep(loss, output, target):
    for name in ("number", "list", "dict", "array", "tensor"):
        if not hasattr(loss, name):
            loss.__dict__[name] = {"number": 0, "list": [], "dict": {}, "array": nets.np.zeros(2),
                                   "tensor": torch.zeros(1)}[name]  # fmt: skip
    loss.number += 1
    loss.list.append(1)
    loss.dict[loss.number] = 2
    loss.array += 1
    loss.tensor += 1
    return output.square().mean()


def draw(loss, output, target):
    noise = torch.rand(()) + nets.random.random() + float(nets.np.random.rand())
    return output.square().mean() + 0 * noise


def spoil(loss, output, target):
    target.zero_()
    return output.square().mean()


class My_Own_Loss(nn.Module):
    def forward(self, output, target):
        return output.abs().mean()


class Thrice(Dice):
    def forward(self, logits, target):
        return 3 * super().forward(logits, target)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, logits, target):
        return F.cross_entropy(logits / self.scale, target)


def hooked():
    loss = Dice()
    loss.register_forward_hook(lambda module, args, value: 2 * value)
    return loss


DO = {
    "detaches": lambda s, z, y: F.cross_entropy(z.detach(), y),
    "takes the argmax": lambda s, z, y: (z.argmax(1) != y).double().mean(),
    "returns whole numbers": lambda s, z, y: (z.argmax(1) != y).sum(),
    "is constant": lambda s, z, y: torch.tensor(1.0),
    "runs under no_grad": torch.no_grad()(lambda s, z, y: z.square().mean()),
    "is NaN": lambda s, z, y: z.sum() * torch.nan,
    "is infinite": lambda s, z, y: z.detach().sum() * torch.inf + z.square().mean(),
    "has a gradient of NaN": lambda s, z, y: (z - z).abs().sqrt().sum(),
    "has an infinite gradient": lambda s, z, y: (z - z.detach()).sqrt().sum(),
    "has a huge gradient": lambda s, z, y: 1e200 * z.square().mean(),
    "has a tiny gradient": lambda s, z, y: 1e-200 * z.square().mean(),
    "returns one number in a list": lambda s, z, y: z.square().mean().view(1),
    "is float32": lambda s, z, y: z.float().square().mean(),
    "keeps a state": keep,
    "draws": draw,
    "differentiates": lambda s, z, y: torch.autograd.grad(
        z.pow(3).mean(), z, create_graph=True)[0].square().sum(),
    "calls backward": lambda s, z, y: F.cross_entropy(z, y) + 0 * nets.inner(z),
}  # fmt: skip
ROWS |= {
    f"loss: one that {name}": Row(**S2, losses=[*LOSSES, Doing(do)]) for name, do in DO.items()
}
CE = {"cce_stable": F.cross_entropy}
PRESETS = {name: load_loss(name) for name in LOSSES}
WRONG = {
    "raises": (lambda s, z, y: 1 / 0, "division by zero"),
    "returns a vector": (lambda s, z, y: z.mean((1, 2, 3)), "Doing must return a scalar tens"),
    "returns a dict": (lambda s, z, y: {"loss": z.mean()}, "a scalar tensor, it returns a dict"),
    "returns a float": (lambda s, z, y: 1.0, "a scalar tensor, it returns a float"),
    "returns nothing": (lambda s, z, y: None, "a scalar tensor, it returns a NoneType"),
    "changes the target": (spoil, "loss Doing changes the target in place; let it work on a clone"),
    "changes the output": (lambda s, z, y: z.mul_(2).mean(), "in-place operation"),
    "changes the output in secret": (lambda s, z, y: z.detach().mul_(2).mean(), "changes the logi"),
}  # fmt: skip
ROWS |= {
    f"loss: one that {name}": Row(**S2, losses=[*LOSSES, Doing(do)], refused=line)
    for name, (do, line) in WRONG.items()
}
ROWS |= {
    "loss: one that fails later": Row(
        **S2, losses=[*LOSSES, Doing(lost)], bad=torch.zeros_like, nan={1: ("Doing",)},
        truth=PRESETS | {"Doing": lambda z, y: z.square().mean()},
        lines=("losswatch: loss Doing failed, so it is NaN: the mask is empty$",),
    ),
    "loss: the user's own ignores 255 in the second batch": Row(
        **S2, losses=[*LOSSES, nn.CrossEntropyLoss(ignore_index=255)], bad=marked(),
        criterion=lambda: nn.CrossEntropyLoss(ignore_index=255), nan={1: LOSSES},
        lines=("holds class 255, allowed are 0 to 1" + SPOILT,),
    ),
    "loss: one that changes the target later": Row(
        **S2, losses=[Doing(lambda s, z, y: spoil(s, z, y) if y.all() else z.square().mean()),
                      *LOSSES, nn.CrossEntropyLoss()],
        bad=torch.ones_like, truth=PRESETS, nan={1: ("Doing",)},
        lines=("loss Doing failed, so it is NaN: loss Doing changes the target in place",),
    ),
    "loss: three of one class": Row(**S2, losses=[My_Own_Loss(), My_Own_Loss(), My_Own_Loss()]),
    "loss: two that are one module": Row(**S2, losses=dict.fromkeys("ab", Odd())),
    "loss: two presets of one name": Row(**S2, losses={"a": "dice", "b": "dice"},
                                         truth=dict.fromkeys("ab", load_loss("dice"))),
    "loss: one preset": Row(**S2, losses=["dice"]),
    "loss: only one of somebody else": Row(**S2, losses=[Odd()]),
    "loss: a subclass": Row(**S2, losses=[*LOSSES, Thrice()]),
    "loss: parameters of its own": Row(**S2, losses=[*LOSSES, Learned().double()]),
    "loss: a hook": Row(**S2, losses=[*LOSSES, hooked()]),
    "loss: a sum": Row(**S2, losses=[*LOSSES, Sum([Dice(), nn.CrossEntropyLoss()], [1, 2])]),
    "loss: a LossSet": Row(**S2, losses=LossSet({"a": Dice(), "b": nn.CrossEntropyLoss()})),
    "loss: in order": Row(**S2, losses={"x": Odd(), "dice": "dice", "y": Odd(), "cce": "cce"}),
    "loss: the stable cross entropy": Row(**S2, losses=["cce_stable"], truth=CE),
    "loss: none": Row(**S2, losses=[], refused="losses: at least one is needed"),
    "loss: a typo": Row(**S2, losses=["dise"], refused="there is no loss 'dise'; the presets are"),
    "loss: a function": Row(**S2, losses=[F.cross_entropy], refused="names of presets and modul"),
    "loss: a class": Row(**S2, losses=[nn.CrossEntropyLoss], refused="names of presets and modul"),
}  # fmt: skip
ROWS |= TARGETS | {f"loop: {name}": row for name, row in LOOPS.items()}


def test_table_is_large():
    assert len(ROWS) >= 176


FINDING = r"losswatch: [a-z-]+ \(step \d+\): "


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize("name", ROWS)
def test_odd(name, caplog):
    row = ROWS[name]
    if row.refused:
        with pytest.raises((ValueError, TypeError, RuntimeError, ArithmeticError)) as raised:
            train(row, watched=True)
        assert re.search(row.refused, str(raised.value)) and "\n" not in str(raised.value)
        return
    plain, watched = (train(row, watched) for watched in (False, True))
    for a, b in zip(plain.states, watched.states, strict=True):
        assert torch.equal(a, b)
    assert_right(row, watched)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    said = [line for line in lines if not re.match(FINDING, line)]  # some of these are sick
    assert len(said) == len(row.lines), said
    for line, pattern in zip(said, row.lines, strict=True):
        assert re.search(pattern, line) and "\n" not in line
