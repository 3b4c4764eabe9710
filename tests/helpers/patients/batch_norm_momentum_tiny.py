"""Keras' momentum of 0.999 became PyTorch's 0.001: the running statistics stay at their start.

People say that a network is good in train() and useless in eval(). Remedy: 0.1.
"""

import torch.nn.functional as F
from clinic import Base, Fn, UNet, main, soft_dice, splits
from torch import nn


class Patient(Base):
    out, activation = 1, "sigmoid"

    def make_net(self):
        return UNet(1, lambda c: nn.BatchNorm2d(c, momentum=0.1 if self.healthy else 0.001))

    def data(self):
        return [(4 * images - 3, labels) for images, labels in splits()]

    def make_loss(self):
        def loss(z, y):
            dice = soft_dice(z.sigmoid(), y, axes=(0, 1, 2, 3))
            return F.binary_cross_entropy_with_logits(z, y) + dice

        return Fn(loss)


if __name__ == "__main__":
    main(Patient)
