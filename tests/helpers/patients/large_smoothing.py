"""A Dice of each image adds 1e4 above and below, on objects of 30 pixels: it starts at 0.03.

People say that their Dice loss is tiny from the first step. Such smoothing comes from code for
whole volumes. Remedy: 1.
"""

import torch
from clinic import Base, Fn, main, soft_dice, splits


class Patient(Base):
    out, activation = 1, "sigmoid"

    def data(self):
        return splits(low=2.5, high=4.0)

    def make_loss(self):
        s = 1.0 if self.healthy else 1e4
        return Fn(lambda z, y: soft_dice(z.sigmoid(), y, s, s, axes=(1, 2, 3)))

    def make_optimizer(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    main(Patient)
