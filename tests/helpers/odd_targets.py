"""Odd targets, as `test_odd.py` tries them: each activation with each form, right and wrong."""

import torch
from odd import LOSSES, Row, one_hot
from odd_networks import chain
from torch import nn

SPOILT = "; presets and losses of losswatch are NaN there"


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


TARGETS = {}
for kind in TYPES:
    for name, base in KINDS.items() if kind == torch.int64 else [*KINDS.items()][:4:2]:
        TARGETS[f"target: {name}, {kind}"] = Row(**base, target=cast(kind))
for name, base in KINDS.items():
    several = base["classes"] if name[-1] != "1" else 1
    TARGETS |= {
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
            TARGETS[f"target: {name}, one-hot {kind}"] = Row(
                **base, target=cast(kind, hot(several))
            )
        TARGETS[f"target: {name}, 255 of one-hot"] = Row(
            **ignore(base), target=marked(hot(several))
        )
        TARGETS[f"target: {name}, soft"] = Row(**base, target=soft(several), labels=soft(several))
    else:
        TARGETS |= {
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


TARGETS |= {
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


BAD = {
    "0 and 255": (lambda y: 255 * y, ("softmax 2", "sigmoid 1", "none 1"), "class 255, allowed ar"),
    "float 0 and 255": (lambda y: 255.0 * y, ("softmax 2",), "class 255, allowed are 0 to 1"),
    "a float mask of 255": (
        lambda y: 255.0 * y.unsqueeze(1), ("sigmoid 1", "none 1"), "holds labels from 0 to 255"
    ),
    "class 5": (lambda y: 5 * y.clamp(max=1), [*KINDS], r"holds class 5, allowed are 0 to \d"),
    "-1 and 1": (lambda y: 2 * y - 1, ("softmax 2", "sigmoid 1", "none 1"), "holds class -1"),
    "float -1 and 1": (lambda y: 2.0 * y - 1, ("sigmoid 1", "none 1"), "holds labels from -1 to 1"),
    "-100": (marked(mark=-100), [*KINDS], "holds class -100, allowed are 0 to"),
    "one-hot of 255": (lambda y: 255 * hot(3)(y), ("softmax 3", "sigmoid 3", "none 3"), "to 255"),
    "two of a pixel": (lambda y: 0 * hot(3)(y) + 1, ("softmax 3", "none 3"), "do not add to 1"),
    "no class": (lambda y: 0 * hot(3)(y), ("softmax 3", "none 3"), "do not add to 1"),
    "0.5": (lambda y: y - 0.5, ("softmax 2", "softmax 3", "sigmoid 3"), "must be whole numbers"),
    "soft [N, 1]": (one_soft, ("softmax 2", "none 3"), "must be whole numbers; soft labels of two"),
    "NaN": (holed(lambda y: y), [*KINDS], "NaN, none is allowed|must be whole numbers"),
    "NaN of one-hot": (holed(hot(3)), ("softmax 3", "sigmoid 3", "none 3"), "holds NaN, none"),
}  # fmt: skip
for name, (make, kinds, line) in BAD.items():
    for kind in kinds:
        TARGETS[f"target: {kind}, {name}"] = Row(**KINDS[kind], target=make, refused=line)
        TARGETS[f"target: {kind}, {name} in the second batch"] = Row(
            **KINDS[kind], bad=make, nan={1: LOSSES}, lines=(f"({line}).*{SPOILT}",)
        )
for name, make, line in [
    ("two targets", lambda y: [y, y], "target: 2 tensors for 1 outputs"),
    ("another size", lambda y: y[:, :4], "target: shape .*, allowed are"),
    ("another number of channels", hot(3), "target: shape .*, allowed are"),
    ("complex", lambda y: y.to(torch.complex64), "target: torch.complex64"),
    ("a number", lambda y: 1, "target: a tensor or a list of tensors is needed, got int"),
]:
    TARGETS[f"target: {name}"] = Row(**S2, target=make, refused=line)
