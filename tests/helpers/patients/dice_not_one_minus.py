"""A function named dice_loss returns the Dice coefficient: the loss falls, the masks are opposite.

Seen in https://github.com/akirasosa/mobile-semantic-segmentation/issues/24. Remedy: 1 - Dice.
"""

from clinic import Base, Fn, main, soft_dice


class Patient(Base):
    out, activation = 1, "sigmoid"

    def make_loss(self):
        def loss(z, y):
            away = soft_dice(z.sigmoid(), y, 1.0, 1.0, axes=(1, 2, 3))
            return away if self.healthy else 1 - away

        return Fn(loss)


if __name__ == "__main__":
    main(Patient)
