"""Two healthy trainings: with a discriminator that trains along, and with a small learning rate.

The adversarial term rises and falls as the two compete. The second is plain SGD.
"""

import torch
import torch.nn.functional as F
from clinic import Base, Fn, main, onehot, soft_dice
from torch import nn


class Adversarial(Base):
    def make_loss(self):
        self.judge = nn.Sequential(
            nn.Conv2d(2, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1),
            nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4),
        )  # fmt: skip
        self.judging = torch.optim.Adam(self.judge.parameters(), lr=1e-3)
        self.ce = Fn(F.cross_entropy)
        self.fool = Fn(lambda z, y: 0.02 * F.softplus(-self.judge(z.softmax(1).float())).mean())
        return Fn(lambda z, y: self.ce(z, y) + self.fool(z, y))

    def terms(self):
        return {"term ce": self.ce, "term fool": self.fool}

    def update(self, loss, step):
        super().update(loss, step)
        images, label = self.train_set[0][: self.batch], self.train_set[1][: self.batch]
        with torch.no_grad():
            p = self.net(images).softmax(1)
        self.judging.zero_grad()
        real, fake = self.judge(onehot(label)), self.judge(p)
        (F.softplus(-real) + F.softplus(fake)).mean().backward()
        self.judging.step()


class SlowSGD(Base):
    def make_loss(self):
        def loss(z, y):
            return F.cross_entropy(z, y) + soft_dice(z.softmax(1), onehot(y), axes=(0, 2, 3))

        return Fn(loss)

    def make_optimizer(self):
        return torch.optim.SGD(self.net.parameters(), lr=2e-3)


if __name__ == "__main__":
    main(Adversarial, SlowSGD)
