"""ToTensor divides masks of 0 and 1 by 255, so that the foreground is 0.0039.

Seen in https://github.com/albumentations-team/albumentations/issues/308 and
https://github.com/pytorch/vision/issues/2497. Remedy: do not divide.
"""

import torch.nn.functional as F
from clinic import Base, Fn, main, soft_dice


class Patient(Base):
    out, activation = 1, "sigmoid"

    def target(self, label):
        return label.unsqueeze(1).float() / (1 if self.healthy else 255)

    def make_loss(self):
        def loss(z, y):
            dice = soft_dice(z.sigmoid(), y, 1.0, 1.0, axes=(1, 2, 3))
            return F.binary_cross_entropy_with_logits(z, y) + dice

        return Fn(loss)


if __name__ == "__main__":
    main(Patient)
