"""Cross entropy + Dice, and the Dice is divided by the number of pixels: it weighs 1e-4.

Older code divided a summed cross entropy so. People say that the Dice term changes nothing. The
objects are rare and faint and need it. Remedy: divide sums only.
"""

import torch
import torch.nn.functional as F
from clinic import Base, Fn, main, soft_dice, splits


class Patient(Base):
    steps, every = 160, 16

    def data(self):
        return splits(low=1.5, high=2.5, noise=0.5, bright=0.9)

    def make_loss(self):
        def dice(z, y):
            each = soft_dice(z.softmax(1)[:, 1], y.float(), 1.0, 1.0)
            return each / (1 if self.healthy else y.numel())

        self.ce, self.dice = Fn(F.cross_entropy), Fn(dice)
        return Fn(lambda z, y: self.ce(z, y) + self.dice(z, y))

    def terms(self):
        return {"term ce": self.ce, "term dice": self.dice}

    def make_optimizer(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9)


if __name__ == "__main__":
    main(Patient)
