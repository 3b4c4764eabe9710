"""zero_grad() stands between backward() and step(): the weights never move.

Seen in https://github.com/rll/deepul/issues/12. Remedy: zero_grad() first.
"""

from clinic import Base, main
from torch import nn


class Patient(Base):
    out, activation, steps, every = 1, "sigmoid", 72, 8

    def make_loss(self):
        return nn.BCEWithLogitsLoss()

    def update(self, loss, step):
        if self.healthy:
            return super().update(loss, step)
        loss.backward()
        self.optimizer.zero_grad()
        self.optimizer.step()


if __name__ == "__main__":
    main(Patient)
