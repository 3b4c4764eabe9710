"""What a network must read and return for a data set."""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ("softmax", "sigmoid", "multilabel")
NORMALISATIONS = ("zscore", "unit", "none")
IGNORED = -1  # the label of pixels that count nowhere


@dataclass(frozen=True)
class Form:
    """The form of a data set's images and labels.

    Attributes:
        in_channels: of an image.
        classes: the names of the classes. For "softmax" and "sigmoid" the first one is that of the
            background.
        dims: 2 for images, 3 for volumes.
        target: "softmax": one class a pixel, a channel of logits for each class. "sigmoid": two
            classes, one channel of logits for the second. "multilabel": classes that overlap, a
            channel of logits for each, all zeros where there is none of them.
        has_ignored: whether pixels may have the label `IGNORED`.
        axes: the orientation of volumes, such as "RAS", as of `volumes.axes_of`; "" if unknown.
    """

    in_channels: int
    classes: tuple[str, ...]
    dims: int
    target: str = "softmax"
    has_ignored: bool = False
    axes: str = ""

    @property
    def channels(self) -> int:
        """The channels that the network returns."""
        return 1 if self.target == "sigmoid" else len(self.classes)
