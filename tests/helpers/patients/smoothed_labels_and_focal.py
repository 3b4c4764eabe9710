"""Two healthy trainings: cross entropy with smoothed labels, and a focal loss on rare objects.

The first has gradient clipping, warm-up and a cosine learning rate.
"""

import torch
from clinic import Base, Fn, main, splits
from torch import nn


class Smoothed(Base):
    def make_loss(self):
        return nn.CrossEntropyLoss(label_smoothing=0.1)

    def update(self, loss, step):
        rise = min(1.0, (step + 1) / 20)
        fall = 0.5 * (1 + torch.cos(torch.tensor(3.14159 * step / self.steps))).item()
        self.optimizer.param_groups[0]["lr"] = 5e-3 * rise * fall
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()


class Focal(Base):
    def data(self):
        return splits(low=2.5, high=4.0)

    def make_loss(self):
        def focal(z, y):
            logp = z.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
            return -(torch.where(y > 0, 0.75, 0.25) * (1 - logp.exp()) ** 2 * logp).mean()

        return Fn(focal)


if __name__ == "__main__":
    main(Smoothed, Focal)
