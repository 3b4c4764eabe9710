"""Masks of 0 and 1 are divided by 255 as integers: all are 0, and the loss falls to 0 at once.

Seen in https://github.com/HasnainRaz/FC-DenseNet-TensorFlow/issues/17. Remedy: do not divide.
"""

from clinic import Base, main
from torch import nn


class Patient(Base):
    out, activation = 1, "sigmoid"

    def target(self, label):
        return (label if self.healthy else label // 255).unsqueeze(1).float()

    def make_loss(self):
        return nn.BCEWithLogitsLoss()


if __name__ == "__main__":
    main(Patient)
