"""The network ends in a softmax, and CrossEntropyLoss takes one more: it cannot fall below 0.31.

Seen in https://github.com/say4n/pytorch-segnet/issues/5 and
https://github.com/ternaus/robot-surgery-segmentation/issues/32. Remedy: return logits.
"""

from clinic import Base, main, splits
from torch import nn


class Patient(Base):
    def data(self):
        return splits(low=2.0, high=3.5, noise=0.5)

    def make_head(self):
        return None if self.healthy else nn.Softmax(dim=1)

    def make_loss(self):
        return nn.CrossEntropyLoss()


if __name__ == "__main__":
    main(Patient)
