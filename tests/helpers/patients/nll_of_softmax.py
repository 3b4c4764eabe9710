"""NLLLoss gets probabilities instead of their logarithms: it is negative and never steep.

People ask why their NLLLoss is negative. Remedy: log_softmax. The observer is told truly what the
network puts out.
"""

from clinic import Base, main, splits
from torch import nn


class Patient(Base):
    norm, steps, every = None, 160, 16

    def __init__(self, healthy):
        self.activation = "softmax" if healthy else "none"
        super().__init__(healthy)

    def data(self):
        return splits(low=2.5, high=4.0)

    def make_head(self):
        return nn.LogSoftmax(dim=1) if self.healthy else nn.Softmax(dim=1)

    def make_loss(self):
        return nn.NLLLoss()


if __name__ == "__main__":
    main(Patient)
