"""The network is made anew after the optimiser, which then moves the parameters of the old one.

People say that the weights do not change, where they call Net() twice or copy the network. Remedy:
the parameters of the network that trains. Its gradients pile up meanwhile.
"""

import copy

import torch
import torch.nn.functional as F
from clinic import Base, Fn, main, onehot, soft_dice


class Patient(Base):
    def make_loss(self):
        def loss(z, y):
            return soft_dice(z.softmax(1), onehot(y), axes=(0, 2, 3)) + F.cross_entropy(z, y)

        return Fn(loss)

    def make_optimizer(self):
        net = self.net if self.healthy else copy.deepcopy(self.net)
        return torch.optim.Adam(net.parameters(), lr=self.lr)


if __name__ == "__main__":
    main(Patient)
