"""The findings, as a list: each is one function from the record of a training to one sentence.

RULES is in the order of cause and consequence, and the order in which findings are named. The page
README.md beside this file says where each threshold comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from losswatch.doctor.history import (
    ENDS,
    History,
    average,
    first,
    highest,
    holds,
    known,
    last,
    lowest,
    middle,
)

MOST = 3  # findings that are named
# The score above which a collapse is foreseen, without batch norm and with it: from the atlas
# (scripts/landscape/foreseen.py).
COLLAPSE, COLLAPSE_WITH_NORM = 200.0, 400.0
# A loss that is better than the best constant answer by this share of it has learnt something.
LEARNS = 0.6


class Finding(NamedTuple):
    """One thing that is wrong."""

    name: str
    step: int  # since when
    text: str  # one sentence with its numbers
    remedy: str  # one sentence

    def line(self) -> str:
        """The finding as one line."""
        return f"{self.name} (step {self.step}): {self.text} {self.remedy}"

    @classmethod
    def of_lines(cls, text: str) -> list[Finding]:
        """The findings whose lines are in a text; other lines are left out.

        Their `text` holds the remedy too, since nothing tells where it begins.

        >>> Finding.of_lines("floor (step 7): Nothing moves. Train longer.\\n\\nmore")
        [Finding(name='floor', step=7, text='Nothing moves. Train longer.', remedy='')]
        """
        lines = re.findall(r"^([\w-]{1,40}) \(step (\d{1,15})\): (.+)$", text, re.MULTILINE)
        return [cls(name, int(step), text, "") for name, step, text in lines]


Rule = Callable[[History], Finding | None]


def diagnose(history: History) -> list[Finding]:
    """What is wrong with a training: at most MOST findings, the cause before its consequences."""
    found: dict[str, Finding] = {}
    with np.errstate(all="ignore"):
        for rule in RULES if len(history) else ():
            finding = rule(history)
            if finding and not any(finding.name in FOLLOWS.get(name, ()) for name in found):
                found.setdefault(finding.name, finding)
    return list(found.values())[:MOST]


def against_collapse(h: History) -> str:
    """The remedies of a collapse that the network does not have already."""
    norm = "" if len(known(h.get("body/momentum"))) else "batch norm, "
    return f"Use {norm}class weights or a Dice with squared denominator, or add cross entropy."


# -- labels ----------------------------------------------------------------------------------------


def labels_outside(h: History) -> Finding | None:
    for head in range(h.heads):
        low, high = h.sign("label_min", head), h.sign("label_max", head)
        largest = h.classes - 1
        outside = (low < -1e-4) | (high > largest + 1e-4)
        if (step := h.since(outside)) is not None:
            text = (
                f"The labels go from {lowest(low):g} to {highest(high):g}, "
                f"but {largest + 1} classes have labels from 0 to {largest}."
            )
            remedy = (
                "Give the masks as class numbers (0/255 masks divided by 255), "
                "and tell the loss and losswatch which label to ignore."
            )
            return Finding("labels-outside", step, text, remedy)
        if holds((high > 0) & (high < 0.05), high):
            text = f"The largest label is {highest(high):.3g}, so the labels were divided twice."
            remedy = "Divide masks by 255 only where they hold 255."
            return Finding("labels-outside", int(h.steps[0]), text, remedy)
    for step, line in h.errors:
        if "target: holds" in line:
            return Finding("labels-outside", step, f"{line}.", "Give the masks as class numbers.")
    return None


def labels_overlap(h: History) -> Finding | None:
    sums = h.sign("label_sum")
    remedy = "Let each channel have a sigmoid of its own (activation='sigmoid')."
    if h.activation != "sigmoid" and (step := h.since(sums > 1.01)) is not None:
        text = f"The labels of a pixel add to up to {highest(sums):g}, but a softmax adds to 1."
        return Finding("labels-overlap", step, text, remedy)
    for step, line in h.errors:
        if "do not add to 1" in line:
            text = "The labels of some pixels add to less than 1, but a softmax adds to 1."
            remedy = f"Add the channel of the background to the labels. {remedy}"
            return Finding("labels-overlap", step, text, remedy)
    return None


def no_foreground(h: History) -> Finding | None:
    share = h.foreground("label")
    is_multilabel = h.activation == "sigmoid" and h.classes > 2
    share = h.by_class("label").sum(1) if is_multilabel else share
    images = first(h.sign("images"))
    is_first_batch = len(h) == 1 and images >= 4
    if not holds(share <= 0, share, least=1 if is_first_batch else 5):
        return None
    text = f"None of the {len(known(share))} batches observed holds any foreground."
    if is_first_batch:
        text = f"None of the {images:.0f} images of the first batch holds any foreground."
    remedy = "Look at the masks: a wrong folder, a wrong threshold or patches without any object."
    return Finding("no-foreground", int(h.steps[0]), text, remedy)


# -- what the network returns ----------------------------------------------------------------------


def activation_twice(h: History) -> Finding | None:
    low, high, off = h.sign("out_min"), h.sign("out_max"), h.sign("out_sum")
    end, shift = first(h.sign("ends_in")), first(h.sign("shift"))
    is_share = (low >= 0) & (high <= 1 + 1e-6) & (high - low > 1e-4)
    adds, by_graph = holds(off < 1e-3, off), end in (1, 2)
    takes_softmax = shift < 1e-4
    if h.activation == "none" and not (takes_softmax and adds):
        return None  # the loss reads probabilities, as it should
    if not holds(is_share, low, least=1 if by_graph else 3):
        return None
    if h.trained and not np.isfinite(h.best_perfect()):
        return None  # the loss takes no logits
    what = ENDS[int(end)] if by_graph else "softmax" if adds else "sigmoid"
    if what == "softmax" and shift >= 1e-4:
        return None  # the trained loss takes no softmax; only the presets do
    sums = ", adding to 1" if adds else ""
    text = (
        f"The output is a probability already (from {lowest(low):.3g} to {highest(high):.3g}{sums})"
        f", and the loss applies its {what} again."
    )
    remedy = f"Return the logits: take the {what} out of the network, or out of the loss."
    return Finding("activation-twice", int(h.steps[0]), text, remedy)


def activation_missing(h: History) -> Finding | None:
    for step, line in h.errors:
        if "activation='none' is for probabilities" in line:
            low, high = lowest(h.sign("out_min")), highest(h.sign("out_max"))
            text = (
                f"The loss reads probabilities, but the output goes from {low:.3g} to {high:.3g}."
            )
            return Finding("activation-missing", step, text, "Apply softmax or sigmoid first.")
    if h.is_one_class()[0]:
        return None  # what Dice says of a missing class depends on its smoothing
    least, most = h.sign("out_min"), h.sign("out_max")
    ends = [h.answer(n) for n in ("background", "foreground")]
    is_linear = abs(h.answer("even") - np.mean(ends)) < 1e-3 * abs(ends[0] - ends[1])
    if h.trained and h.classes == 2 and is_linear and h.best_perfect() < -0.5:
        text = (
            f"{h.trained} is a straight line in the probability ({ends[0]:.3g}, "
            f"{h.answer('even'):.3g}, {ends[1]:.3g} from background to foreground), and below 0: "
            "it gets probabilities where it needs their logarithms."
        )
        remedy = "Give it log_softmax, or take the cross entropy of the logits."
        return Finding("activation-missing", int(h.steps[0]), text, remedy)
    if not h.trained or holds((least >= 0) & (most <= 1), least):
        return None
    loud, half, opposite = (h.answer(n) for n in ("perfect", "perfect_half", "opposite"))
    start, best = h.start(), h.best_perfect()
    if not np.isfinite([loud, half, opposite]).all():
        return None
    size = max(abs(opposite - best), abs(start - best), 1e-12)
    is_loud = abs(loud - half) > 0.05 * size
    no_softmax = first(h.sign("shift")) > 0.05 or h.classes == 2
    outside = best > 1.05 or best < -1.05
    is_wrong = best > min(start, h.answer("constant")) and outside and no_softmax
    if not (is_loud or is_wrong):
        return None
    text = (
        f"The loss takes the output as it is ({lowest(least):.3g} to {highest(most):.3g}): a "
        f"perfect answer has {half:.3g} with logits of 10 and {loud:.3g} with logits of 20."
    )
    remedy = "Apply the softmax or sigmoid that the loss needs."
    return Finding("activation-missing", int(h.steps[0]), text, remedy)


def output_limited(h: History) -> Finding | None:
    if h.activation == "none":
        return None
    low, high, zeros = h.sign("out_min"), h.sign("out_max"), h.sign("zeros")
    end = first(h.sign("ends_in"))
    step, remedy = int(h.steps[0]), "Let the network end in its last convolution."
    if end == 3 or holds((low >= 0) & (zeros > 0.02), low, least=3):
        text = (
            f"The output is never below {max(0.0, lowest(low)):.3g}, and {average(zeros):.0%}"
            " of it is exactly 0, so the loss cannot push a class down."
        )
        return Finding("output-limited", step, text, remedy)
    length, centre = h.sign("out_length"), h.sign("out_centre")
    several = holds(length < 1e-3, length)
    if several:
        text = "The outputs of each pixel have length 1, so no probability comes near 0 or 1."
    elif end == 6 or holds(centre < 1e-3, centre, least=2):
        text = "A normalisation stands after the last convolution, so each channel has mean 0."
    elif end in (4, 5):
        text = f"The output ends in {ENDS[int(end)]}: {lowest(low):.3g} to {highest(high):.3g}."
    else:
        return None
    return Finding("output-limited", step, text, remedy)


# -- numbers that are not finite -------------------------------------------------------------------


def not_finite(h: History) -> Finding | None:
    outputs = (
        np.isnan(h.sign("out_max")) | np.isinf(h.sign("out_max")) | np.isinf(h.sign("out_min"))
    )
    outputs &= ~np.isnan(h.sign("bits"))
    own = {n: (h.value(n), h.norm(n)) for n, kind in h.kinds.items()
           if kind == "own" or n == h.trained}  # fmt: skip
    # A value that was only reported has no norm at any step.
    bad = {
        name: ~np.isfinite(v) | (~np.isfinite(g) if h.has_norm(name) else False)
        for name, (v, g) in own.items()
    }
    # A batch that could not be observed has no numbers at all.
    everything = np.all([~np.isfinite(h.value(n)) for n in h.kinds], axis=0)
    first_output = h.since(outputs)
    firsts = {name: step for name, is_bad in bad.items()
              if (step := h.since(is_bad & ~everything)) is not None}  # fmt: skip
    step = min(firsts.values(), default=None)
    if step is not None and (first_output is None or step < first_output):
        name = min(firsts, key=lambda n: (firsts[n], n != h.trained))
        i = int(np.flatnonzero(h.steps == step)[0])
        half = h.sign("bits")[i] == 16
        value, norm = own[name][0][i], own[name][1][i]
        what = f"value {value:.4g}, gradient norm {norm:.4g}".replace("nan", "NaN")
        text = f"{name} is not finite at step {step} ({what}), while the output is finite"
        if half:
            text += " and of half precision: its sums over pixels pass what 16 bits hold."
            return Finding("half-precision", step, text, "Compute the loss in float32.")
        text += "."
        remedy = "Keep its logarithms, roots and powers away from 0: clamp their arguments."
        return Finding("not-finite", step, text, remedy)
    if first_output is None:
        return None
    half = lowest(h.sign("bits")) == 16
    text = f"The network's output is not finite from step {first_output} on."
    if h.trained and np.isfinite(h.value(h.trained)[h.steps < first_output]).any():
        before = last(h.value(h.trained)[h.steps < first_output])
        text = text[:-1] + f"; before that {h.trained} was {before:.4g}."
    remedy = "Lower the learning rate, and look at the loss where it is perfect or empty."
    if half:
        return Finding("half-precision", first_output, text, "Compute the loss in float32.")
    return Finding("not-finite", first_output, text, remedy)


# -- the trained loss beside the others ------------------------------------------------------------


LOOK_AT = (
    "Look at the axis of its softmax and of its sums, at masks applied before the sigmoid, and at "
    "what it is given as target."
)


def dead_term(h: History) -> Finding | None:
    yard = h.yard_norm()
    names = [n for n, kind in h.kinds.items() if kind == "own" or n == h.trained]
    names.sort(key=lambda n: n == h.trained)
    for name in names:
        norm = h.norm(name)
        least = 1 if holds(h.sign("empty") < 1, h.sign("empty")) else 3
        quiet = norm <= 1e-9 * np.fmax(np.nan_to_num(yard), 1e-3)
        if not holds(quiet, norm, least) or (h.of_kind("ce") and np.isnan(yard[0])):
            continue
        value = known(h.value(name))
        text = f"{name} has no gradient at any of {len(known(norm))} observations"
        text += f" (its value is {last(value):.4g})" if len(value) else ""
        if len(known(yard)):
            text += f", while the watched losses have norms up to {highest(yard):.3g}"
        remedy = (
            "Look for a threshold, an argmax, detach(), .item() or a softmax of one channel in it."
        )
        return Finding("dead-term", int(h.steps[0]), f"{text}.", remedy)
    return None


def ignored_counted(h: History) -> Finding | None:
    counted = h.sign("counted")
    if h.ignore_index is None or not h.trained or not average(counted) < 0.98:
        return None
    pulled = h.sign("pull_ignored")
    if holds(pulled > 1e-3, pulled):
        text = (
            f"{average(pulled):.0%} of the gradient of {h.trained} comes from the "
            f"{1 - average(counted):.0%} of pixels that are to be ignored."
        )
        remedy = "Leave the ignored pixels out of all sums of the loss."
        return Finding("ignored-counted", int(h.steps[0]), text, remedy)
    for name in h.of_kind("ce"):
        ratio = h.value(h.trained) / h.value(name)
        if holds(
            (np.abs(ratio / counted - 1) < 0.1) & (h.cosine(h.trained, name) > 0.999), ratio, 2
        ):
            text = (
                f"{h.trained} is {average(ratio):.3g} of {name}, which is the share of pixels "
                f"that count ({average(counted):.3g}): its mean runs over ignored pixels, too."
            )
            remedy = "Divide by the number of pixels that count."
            return Finding("ignored-counted", int(h.steps[0]), text, remedy)
    return None


def absent_class(h: History) -> Finding | None:
    if not h.trained or h.classes < 3:
        return None
    best, loud, half = h.best_perfect(), h.answer("perfect"), h.answer("perfect_half")
    start = min(h.start(), h.answer("constant"))
    label = h.by_class("label")
    absent = h.sign("pull_absent")
    if not (start > 0 and best > 0.3 * start and abs(loud - half) < 0.02):
        return None
    if not (np.nan_to_num(label) <= 0).any() and not highest(absent) > 0.1:
        return None
    text = (
        f"Even a perfect answer leaves {h.trained} at {best:.3g} (it starts at "
        f"{h.start():.3g}), because images lack some of the {h.classes} classes"
    )
    if highest(absent) > 0.01:
        text += f"; up to {highest(absent):.0%} of its gradient comes from classes that are absent"
    remedy = "Take a Dice of each class without such weights, with its sums over the batch."
    return Finding("absent-class", int(h.steps[0]), f"{text}.", remedy)


def smoothing(h: History) -> Finding | None:
    if not h.trained:
        return None
    best, opposite = h.best_perfect(), h.answer("opposite")
    size = opposite - best
    is_bounded = abs(opposite - h.answer("opposite_half")) < 0.05 * size
    nothing = (h.answer("background") - best) / size if size else float("nan")
    share = average(h.foreground("label")[:3])
    norm = h.norm(h.trained)[:3] / h.yard_norm("dice_fg", "dice")[:3]
    is_small = holds(norm < 0.2, norm) or size < 0.5  # a Dice reaches from 0 to 1
    if not (is_bounded and nothing < 0.3 and 0 < share < 0.3 and is_small):
        return None
    text = (
        f"An answer without any foreground has {h.answer('background'):.3g} of {h.trained}, the "
        f"opposite of the labels {opposite:.3g}, and the gradient is {middle(norm):.2g} of that of "
        "Dice: the smoothing is larger than the sums over the pixels."
    )
    remedy = "Take a smoothing of 1 or less."
    return Finding("smoothing", int(h.steps[0]), text, remedy)


def empty_masks(h: History) -> Finding | None:
    empty, part = h.sign("empty"), h.sign("pull_empty")
    early = (np.arange(len(h)) < 6) & (empty > 0) & (empty < 1) & ~np.isnan(part)
    if early.sum() < 2:
        return None
    ratio = (part / empty / ((1 - part) / (1 - empty)))[early]
    if not (ratio < 1e-2).all():
        return None
    text = (
        f"{average(empty):.0%} of the images hold no foreground, and {h.trained} sends them "
        f"{np.max(ratio):.0e} of the gradient of other images: false positives there are free."
    )
    remedy = "Take the sums of the loss over the batch."
    return Finding("empty-masks", int(h.steps[0]), text, remedy)


def frozen(h: History) -> Finding | None:
    moved = h.get("body/moved")
    norm = np.fmax(h.yard_norm(), h.norm(h.trained) if h.trained else np.nan)
    if not holds(moved < 5e-5, moved, least=3) or not highest(norm) > 1e-6:
        return None
    text = (
        f"The weights move by at most {highest(moved):.1e} of their size between observations, "
        f"although there is a gradient (norm {highest(norm):.3g})."
    )
    remedy = (
        "Look at the learning rate, at clipping before the scale of mixed precision is removed, "
        "at zero_grad() between backward() and step(), and at what the optimiser was given."
    )
    return Finding("frozen", int(h.steps[0]), text, remedy)


def opposed(h: History) -> Finding | None:
    if not h.trained:
        return None
    perfect, opposite = h.best_perfect(), h.answer("opposite")
    apart = h.sign("apart")
    prefers = opposite < perfect - 0.01 * abs(perfect)
    cosines = {n: h.cosine(h.trained, n)[:3] for n in h.of_kind("ce", "dice")}
    against = [n for n, c in cosines.items() if holds(c < -0.3, c)]
    if not (apart[:1] < 0 and prefers or holds(apart[:3] < 0, apart[:3]) and against):
        return None
    text = f"{h.trained} pulls the classes apart in the wrong direction"
    if prefers:
        text += f": the opposite of the labels has {opposite:.3g}, a perfect answer {perfect:.3g}"
    if against:
        text += f" (cosine with {against[0]} {average(cosines[against[0]]):.2f})"
    remedy = "Look at the sign of the loss, and at the order of the classes in labels and output."
    return Finding("opposed", int(h.steps[0]), f"{text}.", remedy)


def scale(h: History) -> Finding | None:
    if not h.trained:
        return None
    norm = np.where(h.is_one_class(), np.nan, h.norm(h.trained))[:3]
    large = norm / h.yard_norm("ce")[:3]
    small = norm / h.yard_norm("dice", "dice_fg")[:3]
    step = int(h.steps[0])
    if holds(large > 50, large):
        text = (
            f"The gradient of {h.trained} is {middle(large):.3g} times that of cross entropy"
            f" (its value starts at {h.start():.4g})."
        )
        remedy = "Take the mean over the pixels instead of the sum."
        return Finding("scale", step, text, remedy)
    if holds(small < 0.035, small):
        text = f"The gradient of {h.trained} is {middle(small):.2g} of that of Dice."
        remedy = "Look at its smoothing, its weights and what it divides by; or add cross entropy."
        return Finding("scale", step, text, remedy)
    return None


def out_of_range(h: History) -> Finding | None:
    if not h.trained:
        return None
    values = h.value(h.trained)
    if (step := h.since(values < -1.01)) is None:
        return None
    text = f"{h.trained} is {lowest(values):.4g}, below what a mean of segmentation losses has."
    return Finding("out-of-range", step, text, "Look at the labels, and at what it divides by.")


def off_direction(h: History) -> Finding | None:
    if not h.trained or h.is_one_class()[0]:
        return None
    start, best, constant = h.start(), h.best_perfect(), h.answer("constant")
    step = int(h.steps[0])
    # Dice is least at any sure answer; with smoothed labels a cross entropy rises again.
    change = abs(h.answer("perfect") - h.answer("perfect_half"))
    part = 0.5 if change < 0.01 * abs(h.answer("opposite") - best) else 0.8
    if np.isfinite([start, best]).all() and start > 0 and best > part * min(start, constant):
        text = f"Even a perfect answer leaves {h.trained} at {best:.3g}; it starts at {start:.3g}."
        return Finding("off-direction", step, text, LOOK_AT)
    return None


def elsewhere(h: History) -> Finding | None:
    names = h.of_kind("ce", "dice")
    cosines = [h.cosine(h.trained, n) for n in names] if h.trained else []
    if len(cosines) < 2 or len(h) < 5:
        return None
    # Strong class weights point elsewhere, too; so the watched losses must also grow.
    grown = [known(h.value(n)) for n in names]
    grow = all(len(v) >= 5 and v[-3:].min() > 1.02 * v[0] for v in grown)
    if np.isfinite(h.best_perfect()) and not grow:
        return None
    # Where one class is predicted everywhere, the gradients are too small to compare.
    share = h.foreground("hard")
    largest = np.where((share > 1e-3) & (share < 1 - 1e-3), np.fmax.reduce(cosines), np.nan)
    late = known(largest)[-3:]
    if len(known(largest)) < 5 or not np.mean(late) < 0.3:
        return None
    text = (
        f"The gradient of {h.trained} points elsewhere than cross entropy and Dice: the larger "
        f"cosine goes from {known(largest)[0]:.2f} to {late[-1]:.2f}."
    )
    return Finding("off-direction", int(h.steps[0]), text, LOOK_AT)


def diverges(h: History) -> Finding | None:
    if not h.trained:
        return None
    values, moved = h.value(h.trained), h.get("body/moved")
    start = h.start()
    remedy = "Lower the learning rate, by ten at first."
    if (step := h.since(values > 10 * max(abs(start), 1e-3))) is not None:
        text = f"{h.trained} grows from {start:.4g} to {highest(values):.4g}."
        return Finding("diverges", step, text, remedy)
    if (step := h.since(moved > 0.9)) is not None:
        text = (
            f"The weights move by up to {highest(moved):.2f} of their size between two "
            "observations: the steps replace the network instead of changing it."
        )
        return Finding("diverges", step, text, remedy)
    return None


# -- several outputs, several modes, several terms -------------------------------------------------


def head_labels(h: History) -> Finding | None:
    first = h.sign("empty", 0)
    for head in range(1, h.heads):
        more = average(h.sign("empty", head) - first)
        if more > 0.1:
            text = (
                f"{average(h.sign('empty', head)):.0%} of the images have no foreground in the "
                f"labels of head {head}, but {average(first):.0%} in those of head 0."
            )
            remedy = "Make coarse labels by max pooling, so that small objects stay."
            return Finding("head-labels", int(h.steps[0]), text, remedy)
    return None


def head_idle(h: History) -> Finding | None:
    names = h.of_kind("ce") or h.of_kind("dice")
    if h.heads < 2 or not names or len(h) < 5:
        return None
    left = [known(h.value(names[0], head)) for head in range(h.heads)]
    if min(map(len, left)) < 5:
        return None
    shares = [values[-1] / values[0] for values in left]
    if max(shares) > 0.8 and min(shares) < 0.5:
        head = int(np.argmax(shares))
        text = (
            f"{names[0]} of head {head} stays at {shares[head]:.0%} of its first value, that of "
            f"head {int(np.argmin(shares))} falls to {min(shares):.0%}."
        )
        remedy = "Give each head its term in the trained loss, with its own target."
        return Finding("head-idle", int(h.steps[0]), text, remedy)
    return None


def mode_gap(h: History) -> Finding | None:
    shifted, moved = h.get("body/statistics_moved"), h.get("body/moved")
    batches, momentum = h.get("body/batches"), h.get("body/momentum")
    stands = holds(shifted <= 1e-7, shifted, least=2) and highest(moved) > 1e-4
    left = (1 - momentum) ** batches
    slow = last(left) > 0.5 and highest(batches) >= 50
    newest = holds(momentum >= 0.9, momentum, least=3)
    if not stands and not slow and not newest:
        return None
    text = "The statistics of batch norm do not follow the training"
    if newest:
        text += f": with momentum {lowest(momentum):g} they are those of the last batch"
    elif stands:
        text += f": they have not moved in {len(known(shifted))} observations"
    else:
        text += f": after {highest(batches):.0f} batches {last(left):.0%} is their start"
    text += ", so eval() gives another network than train()."
    remedy = "Give batch norm a momentum of 0.1, or take group norm."
    return Finding("mode-gap", int(h.steps[0]), text, remedy)


def terms_opposed(h: History) -> Finding | None:
    for i, a in enumerate(h.terms):
        for b in h.terms[i + 1 :]:
            late = known(h.cosine(a, b))[-3:]
            # At the end of any training the terms cancel, but then both are small.
            left = [known(h.norm(n))[-3:].min() / first(h.norm(n)) for n in (a, b)
                    if len(known(h.norm(n))) >= 8]  # fmt: skip
            if len(left) == 2 and min(left) > 0.1 and len(late) == 3 and late.mean() < -0.6:
                text = (
                    f"{a} and {b} pull against each other: the cosine of their gradients is "
                    f"{late.mean():.2f} at the end, and both are still at {min(left):.0%} of their "
                    "first norm or more."
                )
                remedy = "Let one of them act only where it does not oppose the other."
                return Finding("terms-opposed", h.since(h.cosine(a, b) < -0.5) or 0, text, remedy)
    return None


def terms_unbalanced(h: History) -> Finding | None:
    if not h.trained or len(h.terms) < 2:
        return None
    for a in h.terms:
        others = [b for b in h.terms if b != a and highest(h.norm(b)) > 0]
        own = h.cosine(h.trained, a)
        apart = [b for b in others if lowest(np.abs(h.cosine(a, b))) < 0.9]
        if apart and holds(own > 0.9999, own, least=4):
            text = (
                f"{a} does all the work: the cosine of its gradient with that of {h.trained} is "
                f"at least {lowest(own):.5f}, and {apart[0]} changes nothing."
            )
            remedy = f"Raise the weight of {apart[0]}, or leave it out."
            return Finding("terms-unbalanced", int(h.steps[0]), text, remedy)
    return None


# -- where the training has gone -------------------------------------------------------------------


def constant_since(h: History) -> tuple[int, int] | None:
    """The class that is predicted everywhere at the end, and the first observation of that."""
    hard, label = h.by_class("hard"), h.by_class("label")
    is_multilabel = h.activation == "sigmoid" and h.classes > 2
    if is_multilabel or len(h) < 5:
        return None
    there = ~np.isnan(hard[:, 0])
    if there.sum() < 5 or not there[-1]:
        return None
    c = int(np.argmax(hard[-1]))
    alone = (hard[:, c] > 0.9999) & (label[:, c] < 0.9999)
    places = np.flatnonzero(~alone & there & (label[:, c] < 0.9999))
    begin = int(places[-1]) + 1 if len(places) else 0
    if len(h) - begin < 3 or not alone[-3:].any():
        return None
    return c, begin


def collapsed(h: History) -> Finding | None:
    if (found := constant_since(h)) is None:
        return None
    c, begin = found
    # A network that starts to learn often predicts one class for a while.
    least = (100 if h.is_over else 300) if h.counts_steps else 0
    if h.steps[-1] - h.steps[begin] < max(least, h.steps[-1] / 2 if least else 0):
        return None
    constant = h.answer("constant")
    if h.trained and last(h.value(h.trained)) < constant - LEARNS * abs(constant):
        return None  # the network tells the pixels apart, though not yet at probability 1/2
    label = h.by_class("label")[begin:, c]
    what = ("background" if c == 0 else "foreground") if h.classes == 2 else f"class {c}"
    text = (
        f"Every pixel is predicted as {what} since step {h.steps[begin]}, although "
        f"{1 - average(label):.2%} of the labels are something else"
    )
    if h.trained and np.isfinite(constant):
        text += (
            f"; {h.trained} is {last(h.value(h.trained)):.4g}, the best constant answer has "
            f"{constant:.4g}"
        )
    return Finding("collapsed", int(h.steps[begin]), f"{text}.", against_collapse(h))


def score_of_collapse(h: History) -> tuple[float, int]:
    """How strongly a collapse is foreseen from the first batch, and the class that it goes to.

    The pull on all pixels alike over the pull apart, divided by slope^0.25, where slope = p(1 - p)
    at the best constant answer, at least 1e-7. NaN where it is not known.
    """
    alike, apart = h.by_class("alike")[0], h.sign("apart")[0] / 2
    share = h.answer("constant_share")
    slope = max(share * (1 - share), 1e-7)
    c = int(share > 0.5)
    if h.classes != 2 or not np.isfinite([alike[1], apart, share]).all() or not alike[c] > 0:
        return float("nan"), c
    return float(abs(alike[1] / apart) / slope**0.25), c


def collapse_ahead(h: History) -> Finding | None:
    if not h.trained or h.is_over or len(h) > 3 or h.is_one_class()[0]:
        return None
    score, c = score_of_collapse(h)
    least = COLLAPSE if np.isnan(h.get("body/momentum")[0]) else COLLAPSE_WITH_NORM
    if not score > least:
        return None
    what = ("background", "foreground")[c]
    text = (
        f"{h.trained} pulls all pixels towards {what} far more than it pulls the classes apart, "
        f"and the softmax has little slope there (score {score:.3g}, collapses were seen above "
        f"{least:g})."
    )
    return Finding("collapse-ahead", int(h.steps[0]), text, against_collapse(h))


def saturated(h: History) -> Finding | None:
    flat, wrong = h.sign("saturated"), h.sign("wrong")
    late = (flat > 0.99) & (wrong > 0.05)
    # A network may begin so; later three observations must agree.
    if not holds(late[-3:], flat[-3:], least=min(3, len(h))):
        return None
    places = np.flatnonzero(~late & ~np.isnan(flat))
    begin = int(places[-1]) + 1 if len(places) else 0
    text = (
        f"The softmax has no slope left at {flat[-1]:.1%} of the pixels since step "
        f"{h.steps[begin]}, while the mean error is {wrong[-1]:.3f}: no gradient leads back."
    )
    remedy = "Start again with a smaller learning rate, or add cross entropy."
    return Finding("saturated", int(h.steps[begin]), text, remedy)


def floor(h: History) -> Finding | None:
    if not h.trained:
        return None
    values, norms = known(h.value(h.trained)), known(h.norm(h.trained))
    if len(values) < 8 or values[0] <= 0 or len(norms) < 8:
        return None
    if not h.is_over and h.steps[-1] < 300:
        return None
    if not (values[-3:].min() > 0.9 * values[0] and norms[-3:].max() < 0.05 * norms[0]):
        return None
    text = (
        f"{h.trained} stands at {values[-1]:.4g} of {values[0]:.4g} at the start, and its gradient "
        f"has fallen to {norms[-1] / norms[0]:.1%}."
    )
    remedy = "Look at its smoothing and at what it divides by, or add cross entropy."
    return Finding("floor", int(h.steps[0]), text, remedy)


RULES: tuple[Rule, ...] = (
    labels_outside,
    labels_overlap,
    no_foreground,
    activation_twice,
    opposed,
    activation_missing,
    output_limited,
    not_finite,
    dead_term,
    ignored_counted,
    absent_class,
    empty_masks,
    head_labels,
    head_idle,
    terms_opposed,
    terms_unbalanced,
    off_direction,
    smoothing,
    scale,
    elsewhere,
    out_of_range,
    frozen,
    diverges,
    mode_gap,
    collapse_ahead,
    collapsed,
    saturated,
    floor,
)
# What follows from a finding, and is not named after it.
_OF_THE_LOSS = ("off-direction", "scale", "out-of-range", "opposed", "activation-missing")
FOLLOWS: dict[str, tuple[str, ...]] = {
    "labels-outside": _OF_THE_LOSS,
    "labels-overlap": _OF_THE_LOSS,
    "activation-twice": ("output-limited", *_OF_THE_LOSS),
    "activation-missing": ("off-direction",),
    "opposed": _OF_THE_LOSS,
    "ignored-counted": ("scale",),
    "absent-class": ("empty-masks", "off-direction"),
    "dead-term": ("scale", "frozen"),
    "terms-opposed": ("off-direction",),
}
