"""Odd networks, targets, losses and loops, as one table: right, or refused in one line.

*Right*: values, norms and cosines are those of one backward pass for each loss by a fresh network,
in each of three steps. Weights, buffers, the optimiser's state, random numbers and what modules
keep by themselves are equal to the bit with and without watching.
"""

import logging
import re
from functools import partial

import odd_networks as nets
import pytest
import torch
import torch.nn.functional as F
from odd import LOSSES, Odd, Row, assert_right, ignite, lightning, monai, one_hot, plain, train
from odd_loops import LOOPS
from odd_networks import NETWORKS, NOT_LINEAR, Doing, chain, of
from torch import nn

from losswatch import CrossEntropy, Dice, LossSet, Sum, load_loss

LINEAR = "a hook or an autograd.Function of the network makes its backward pass one that is not lin"
SPOILT = "; presets and losses of losswatch are NaN there"

ROWS = {f"network: {name}": Row(net) for name, net in NETWORKS.items()}
ROWS |= {f"network: {name}": Row(net, lines=(LINEAR,)) for name, net in NOT_LINEAR.items()}


# --- Networks of other shapes --------------------------------------------------------------------


def conv(dims, channels=2):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return lambda: nn.Sequential(kind(1, 4, 3, padding=1), nn.ReLU(), kind(4, channels, 1)).double()


def softmax(channels=2):
    return {"net": lambda: chain(nn.ReLU(), channels=channels), "classes": channels}


def sigmoid(channels=1):
    options = {"activation": "sigmoid"}
    net = lambda: chain(nn.ReLU(), channels=channels)  # noqa: E731
    return {"net": net, "classes": max(2, channels), "options": options}


def probabilities(channels=1):
    kind = nn.Sigmoid() if channels == 1 else nn.Softmax(1)
    net = lambda: nn.Sequential(*chain(nn.ReLU(), channels=channels), kind)  # noqa: E731
    return {"net": net, "classes": max(2, channels), "options": {"activation": "none"}}


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

# --- Targets -------------------------------------------------------------------------------------


def hot(classes):
    return lambda index: one_hot(index, classes)


def with_channel(make=lambda index: index):
    return lambda index: make(index).unsqueeze(1)


def marked(make=lambda index: index, mark=255):
    """The first lines of the first image are `mark`, in all channels if there are any."""

    def target(index):
        target = make(index).clone()
        target[0, ..., :3, :] = mark
        return target

    return target


def mask(index):
    ignored = torch.zeros_like(index, dtype=torch.bool)
    ignored[0, :3] = True
    return ignored.unsqueeze(1)


def whole(index):
    return torch.ones_like(index, dtype=torch.bool).unsqueeze(1)


def soft(channels):
    """Soft labels, a function of the class indices."""

    def labels(index):
        noise = torch.sin(7.0 * torch.arange(channels * index.numel(), dtype=torch.float64))
        noise = noise.view(len(index), channels, *index.shape[1:]) + one_hot(index, channels)
        return noise.softmax(1)

    return labels


def overlapping(index):
    return torch.stack([(index == 0) | (index == 2), index > 0, index == 1], 1).double()


def one_soft(index):
    return soft(2)(index.clamp(max=1))[:, 1:]


S2, S3, G1, G3, P1, P3 = (
    softmax(2), softmax(3), sigmoid(1), sigmoid(3), probabilities(1), probabilities(3),
)  # fmt: skip
KINDS = {"softmax 2": S2, "softmax 3": S3, "sigmoid 1": G1, "sigmoid 3": G3, "none 1": P1,
         "none 3": P3}  # fmt: skip
TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32,
         torch.float16, torch.float64)  # fmt: skip


def cast(kind, make=lambda index: index):
    return lambda index: make(index).to(kind)


def ignore(kind, index=255):
    return kind | {"options": kind.get("options", {}) | {"ignore_index": index}, "ignored": mask}


for kind in TYPES:
    for name, base in KINDS.items() if kind == torch.int64 else [*KINDS.items()][:4:2]:
        ROWS[f"target: {name}, {kind}"] = Row(**base, target=cast(kind))
for name, base in KINDS.items():
    several = base["classes"] if name[-1] != "1" else 1
    ROWS |= {
        f"target: {name}, [N, 1]": Row(**base, target=with_channel()),
        f"target: {name}, [N, 1] as float": Row(**base, target=cast(torch.float32, with_channel())),
        f"target: {name}, 255": Row(**ignore(base), target=marked()),
        f"target: {name}, 255 of [N, 1]": Row(**ignore(base), target=marked(with_channel())),
        f"target: {name}, 255 of uint8": Row(**ignore(base), target=marked(cast(torch.uint8))),
        f"target: {name}, 255 of float": Row(**ignore(base), target=marked(cast(torch.float32))),
        f"target: {name}, all 255": Row(
            **ignore(base) | {"ignored": whole}, target=lambda y: torch.full_like(y, 255)
        ),
        f"target: {name}, one class": Row(
            **base, target=torch.zeros_like, labels=lambda y, c=base["classes"]: hot(c)(0 * y)
        ),
        f"target: {name}, no image": Row(**base, batch=0),
    }
    if several > 1:
        for kind in (torch.int64, torch.float32, torch.bool):
            ROWS[f"target: {name}, one-hot {kind}"] = Row(**base, target=cast(kind, hot(several)))
        ROWS[f"target: {name}, 255 of one-hot"] = Row(**ignore(base), target=marked(hot(several)))
        ROWS[f"target: {name}, soft"] = Row(**base, target=soft(several), labels=soft(several))
    else:
        ROWS |= {
            f"target: {name}, bool": Row(**base, target=cast(torch.bool)),
            f"target: {name}, soft": Row(**base, target=one_soft, labels=soft(2)),
            f"target: {name}, soft [N]": Row(
                **base, target=lambda y: one_soft(y)[:, 0], labels=soft(2)
            ),
            f"target: {name}, 255 of soft": Row(
                **ignore(base), target=marked(one_soft), labels=soft(2)
            ),
        }


def one_label(index):
    """255 in one channel alone."""
    target = overlapping(index)
    target[0, 1, :3] = 255
    return target


ROWS |= {
    "target: softmax 2, bool": Row(**S2, target=cast(torch.bool)),
    "target: softmax 2, -1 ignored": Row(**ignore(S2, -1), target=marked(mark=-1)),
    "target: softmax 3, -100 ignored": Row(**ignore(S3, -100), target=marked(mark=-100)),
    "target: softmax 3, class 0 ignored": Row(
        **S3 | {"options": {"ignore_index": 0}}, ignored=lambda y: (y == 0).unsqueeze(1)
    ),
    "target: sigmoid 3, overlapping": Row(**G3, target=overlapping, labels=overlapping),
    "target: sigmoid 3, 255 of one label": Row(
        **ignore(G3) | {"ignored": lambda y: one_label(y) == 255}, target=one_label,
        labels=overlapping,
    ),
    "target: sigmoid 3, 255 of overlapping": Row(
        **ignore(G3), target=marked(overlapping), labels=overlapping
    ),
}  # fmt: skip


def holed(make):
    def target(index):
        target = make(index).double()
        target[0, ..., 0, 0] = torch.nan
        return target

    return target


INDICES = "allowed are 0 to "
BAD = {
    "0 and 255": (lambda y: 255 * y, ("softmax 2", "sigmoid 1", "none 1"), "class 255, allowed ar"),
    "float 0 and 255": (lambda y: 255.0 * y, ("softmax 2",), "class 255, allowed are 0 to 1"),
    "a float mask of 255": (
        lambda y: 255.0 * y.unsqueeze(1), ("sigmoid 1", "none 1"), "holds labels from 0 to 255"
    ),
    "class 5": (lambda y: 5 * y.clamp(max=1), [*KINDS], r"holds class 5, allowed are 0 to \d"),
    "-1 and 1": (lambda y: 2 * y - 1, ("softmax 2", "sigmoid 1", "none 1"), "holds class -1, allow"),
    "float -1 and 1": (lambda y: 2.0 * y - 1, ("sigmoid 1", "none 1"), "holds labels from -1 to 1"),
    "-100": (marked(mark=-100), [*KINDS], "holds class -100, allowed are 0 to"),
    "one-hot of 255": (lambda y: 255 * hot(3)(y), ("softmax 3", "sigmoid 3", "none 3"), "to 255, al"),
    "two of a pixel": (lambda y: 0 * hot(3)(y) + 1, ("softmax 3", "none 3"), "do not add to 1 over"),
    "no class": (lambda y: 0 * hot(3)(y), ("softmax 3", "none 3"), "do not add to 1 over the class"),
    "0.5": (lambda y: y - 0.5, ("softmax 2", "softmax 3", "sigmoid 3"), "must be whole numbers"),
    "soft [N, 1]": (one_soft, ("softmax 2", "none 3"), "must be whole numbers; soft labels of two"),
    "NaN": (holed(lambda y: y), [*KINDS], "NaN, none is allowed|must be whole numbers"),
    "NaN of one-hot": (holed(hot(3)), ("softmax 3", "sigmoid 3", "none 3"), "holds NaN, none is all"),
}  # fmt: skip
for name, (make, kinds, line) in BAD.items():
    for kind in kinds:
        ROWS[f"target: {kind}, {name}"] = Row(**KINDS[kind], target=make, refused=line)
        ROWS[f"target: {kind}, {name} in the second batch"] = Row(
            **KINDS[kind], bad=make, nan={1: LOSSES}, lines=(f"({line}).*{SPOILT}",)
        )
for name, make, line in [
    ("two targets", lambda y: [y, y], "target: 2 tensors for 1 outputs"),
    ("another size", lambda y: y[:, :4], "target: shape .*, allowed are"),
    ("another number of channels", hot(3), "target: shape .*, allowed are"),
    ("complex", lambda y: y.to(torch.complex64), "target: torch.complex64"),
    ("a number", lambda y: 1, "target: a tensor or a list of tensors is needed, got int"),
]:
    ROWS[f"target: {name}"] = Row(**S2, target=make, refused=line)

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
ROWS |= {f"loss: one that {name}": Row(**S2, losses=[*LOSSES, Doing(do)]) for name, do in DO.items()}
PRESETS = {name: load_loss(name) for name in LOSSES}
WRONG = {
    "raises": (lambda s, z, y: 1 / 0, "division by zero"),
    "returns a vector": (lambda s, z, y: z.mean((1, 2, 3)), "Doing must return a scalar tensor, it"),
    "returns a dict": (lambda s, z, y: {"loss": z.mean()}, "a scalar tensor, it returns a dict"),
    "returns a float": (lambda s, z, y: 1.0, "a scalar tensor, it returns a float"),
    "returns nothing": (lambda s, z, y: None, "a scalar tensor, it returns a NoneType"),
    "changes the target": (spoil, "loss Doing changes the target in place; let it work on a clone"),
    "changes the output": (lambda s, z, y: z.mul_(2).mean(), "in-place operation"),
    "changes the output in secret": (lambda s, z, y: z.detach().mul_(2).mean(), "changes the logits in p"),
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
    "loss: the stable cross entropy": Row(**S2, losses=["cce_stable"], truth={"cce_stable": F.cross_entropy}),
    "loss: none": Row(**S2, losses=[], refused="losses: at least one is needed"),
    "loss: a typo": Row(**S2, losses=["dise"], refused="there is no loss 'dise'; the presets are"),
    "loss: a function": Row(**S2, losses=[F.cross_entropy], refused="names of presets and modules"),
    "loss: a class": Row(**S2, losses=[nn.CrossEntropyLoss], refused="names of presets and modules"),
}  # fmt: skip
ROWS |= {f"loop: {name}": row for name, row in LOOPS.items()}


def test_table_is_large():
    assert len(ROWS) >= 176


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
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == len(row.lines), said
    for line, pattern in zip(said, row.lines, strict=True):
        assert re.search(pattern, line) and "\n" not in line
