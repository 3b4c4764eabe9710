"""Foreground Dice where 95 % is foreground, without batch norm: everything becomes foreground.

The images are tissue with small holes. People say that the Dice is 0.97 from the first epoch, and
the mask is full. The Dice given here is that of the holes. Remedy: add the cross entropy.
"""

import torch.nn.functional as F
from clinic import Base, Fn, main, onehot, soft_dice, splits


class Patient(Base):
    norm, steps, every = None, 160, 16

    def data(self):
        return splits(low=3.0, high=5.0)

    def target(self, label):
        return 1 - label

    def make_loss(self):
        def loss(z, y):
            dice = soft_dice(z.softmax(1)[:, 1], onehot(y)[:, 1])
            return dice + (F.cross_entropy(z, y) if self.healthy else 0)

        return Fn(loss)

    def predict(self, output):
        return 1 - super().predict(output)


if __name__ == "__main__":
    main(Patient)
