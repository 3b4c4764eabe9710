"""A Dice loss of one channel gets the raw logits, because nobody took the sigmoid.

People say that their Dice loss is negative or larger than 1, after BCEWithLogitsLoss took the
sigmoid before. Remedy: the sigmoid.
"""

from clinic import Base, Fn, main, soft_dice


class Patient(Base):
    out, activation = 1, "sigmoid"

    def make_loss(self):
        def loss(z, y):
            return soft_dice(z.sigmoid() if self.healthy else z, y, 1.0, 1.0, axes=(0, 1, 2, 3))

        return Fn(loss)


if __name__ == "__main__":
    main(Patient)
