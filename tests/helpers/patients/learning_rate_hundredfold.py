"""Adam with a learning rate of 0.3: the loss jumps up at first, and the answer is constant then.

People say that the loss explodes and only background is predicted. Remedy: 0.003.
"""

from clinic import Base, main
from torch import nn


class Patient(Base):
    norm = None

    def __init__(self, healthy):
        self.lr = 3e-3 if healthy else 0.3
        super().__init__(healthy)

    def make_loss(self):
        return nn.CrossEntropyLoss()


if __name__ == "__main__":
    main(Patient)
