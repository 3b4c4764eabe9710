"""Watch a LightningModule, which knows nothing of losswatch: one callback.

python scripts/examples/lightning_module.py [steps]
tensorboard --logdir outputs/examples/lightning
"""

import sys

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from shapes import disks, network
from torch.utils.data import DataLoader, TensorDataset

from losswatch import Watch, load_loss

STEPS = int(sys.argv[1]) if sys.argv[1:] else 200


class Segmenter(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.loss_fn = network(), load_loss("dice_ce_monai")

    def training_step(self, batch, batch_idx):
        images, masks = batch
        return self.loss_fn(self.net(images), masks)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    watch = Watch(["cce", "dice", "dice_fg"], criterion="loss_fn", every_n_steps=10)
    trainer = pl.Trainer(
        max_steps=STEPS,
        callbacks=[watch],
        logger=TensorBoardLogger("outputs/examples/lightning", name="", version=""),
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    trainer.fit(Segmenter(), DataLoader(TensorDataset(*disks(64)), batch_size=8, shuffle=True))
    print({name: round(value, 4) for name, value in watch.latest().items()})
