"""Batches of one image with batch norm, and scans whose brightness and contrast differ widely.

Training sees each image normalised by itself, and eval() does not. People say that the Dice is good
in training and near 0 in validation. Remedy: group norm.
"""

import torch
from clinic import Base, disks, main
from torch import nn


class Patient(Base):
    batch, steps, every = 1, 160, 16

    def __init__(self, healthy):
        self.norm = (lambda c: nn.GroupNorm(1, c)) if healthy else nn.BatchNorm2d
        super().__init__(healthy)

    def data(self):
        def scans(count, seed):
            images, labels = disks(count, seed)
            g = torch.Generator().manual_seed(seed + 9)
            gain = 10 ** (2 * torch.rand(count, 1, 1, 1, generator=g) - 1)
            return gain * (images + 4 * torch.rand(count, 1, 1, 1, generator=g) - 2), labels

        return scans(64, 1), scans(32, 2)

    def make_loss(self):
        return nn.CrossEntropyLoss()


if __name__ == "__main__":
    main(Patient)
