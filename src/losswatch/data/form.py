"""The properties of a data set that decide what a network reads and returns."""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ("softmax", "sigmoid", "multilabel")
NORMALISATIONS = ("zscore", "unit", "none")
IGNORED = -1  # the label of pixels that do not count


@dataclass(frozen=True)
class Form:
    """The form of a data set's images and labels.

    Attributes:
        in_channels: the channels of an image.
        classes: the names of the classes. For "softmax" and "sigmoid" the first class is the
            background.
        dims: 2 for images, 3 for volumes.
        target: "softmax": each pixel has one class, and each class has a channel of logits.
            "sigmoid": there are two classes, and one channel of logits for the second.
            "multilabel": classes may overlap, each class has a channel of logits, and the label of
            the background is 0 in all channels.
        has_ignored: whether pixels may have the label `IGNORED`.
        axes: the orientation of volumes, such as "RAS" (see `volumes.axes_of`); "" if unknown.
    """

    in_channels: int
    classes: tuple[str, ...]
    dims: int
    target: str = "softmax"
    has_ignored: bool = False
    axes: str = ""

    @property
    def channels(self) -> int:
        """The number of channels that the network returns."""
        return 1 if self.target == "sigmoid" else len(self.classes)
