"""Two healthy trainings: overlapping regions as sigmoids, and one image in eight without object.

Both train Dice + binary cross entropy. The second Dice is that of each image, with a smoothing of
1e-5, and its cross entropy weighs the foreground.
"""

import torch
import torch.nn.functional as F
from clinic import Base, Fn, disks, main, soft_dice, splits


class Regions(Base):
    out, activation, presets = 2, "sigmoid", ("cce", "dice", "dice_monai")

    def data(self):
        def nested(count, seed):
            images, outer = disks(count, seed, low=6.0, high=9.0)
            _, inner = disks(count, seed, low=3.0, high=9.0)
            return images + (outer * inner).unsqueeze(1), outer + outer * inner

        return nested(64, 1), nested(32, 2)

    def target(self, label):
        return torch.stack([label > 0, label > 1], 1).float()

    def make_loss(self):
        def loss(z, y):
            dice = soft_dice(z.sigmoid(), y, axes=(0, 2, 3))
            return dice + F.binary_cross_entropy_with_logits(z, y)

        return Fn(loss)

    def predict(self, output):
        hit = (output > 0).long()
        return hit[:, 0] * (1 + hit[:, 1])


class FewEmpty(Base):
    out, activation = 1, "sigmoid"

    def data(self):
        return splits(empty=0.125)

    def make_loss(self):
        weight = torch.tensor(3.0)

        def loss(z, y):
            dice = soft_dice(z.sigmoid(), y, axes=(1, 2, 3))
            return dice + F.binary_cross_entropy_with_logits(z, y, pos_weight=weight)

        return Fn(loss)


if __name__ == "__main__":
    main(Regions, FewEmpty)
