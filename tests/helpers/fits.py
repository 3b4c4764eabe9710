"""LightningModules as people write them, and how a test trains and watches one."""

import copy

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from oracle import expected
from small import LOSSES
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from losswatch import Watch, load_loss
from losswatch.events.tags import watched_tags


class Plain(pl.LightningModule):
    """A module as people write it, with a criterion and a term of regularisation."""

    def __init__(self, net, criterion=None, decay=0.0, lr=0.01):
        super().__init__()
        self.net, self.loss_fn = net, criterion or nn.CrossEntropyLoss()
        self.decay, self.lr = decay, lr
        self.optimizer = torch.optim.Adam

    def loss(self, batch):
        images, target = batch
        return self.loss_fn(self.net(images), target)

    def training_step(self, batch, batch_idx):
        value = self.loss(batch)
        if self.decay:
            value = value + self.decay * sum(p.square().sum() for p in self.net.parameters())
        return value

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


class Functional(Plain):
    """Its loss is a function, so it tells the watch."""

    def loss(self, batch):
        images, target = batch
        logits = self.net(images)
        for callback in self.trainer.callbacks:
            if isinstance(callback, Watch):
                callback.see(logits, target)
        return F.cross_entropy(logits, target)


class Manual(Plain):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.automatic_optimization, self.clip = False, None

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if self.clip:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip)
        optimizer.step()


class Wanted(pl.Callback):
    """One gradient for each loss, at each batch; it must stand before the watch."""

    def __init__(self, names=LOSSES):
        self.losses, self.batches = [load_loss(name) for name in names], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        net = copy.deepcopy(module.net)
        with torch.random.fork_rng():
            found = expected(self.losses, net(batch[0]), batch[1], net.parameters())
        self.batches.append(found)

    def frame(self):
        rows = []
        for values, norms, cosines in self.batches:
            a, b = np.triu_indices(len(values), 1)
            rows.append(torch.cat([values, norms, cosines[a, b]]).numpy())
        return np.stack(rows)


def data(batches=6, dtype=torch.float64, classes=2):
    g = torch.Generator().manual_seed(1)
    images = torch.randn(2 * batches, 3, 8, 8, generator=g, dtype=dtype)
    target = torch.randint(0, classes, (2 * batches, 8, 8), generator=g)
    return DataLoader(TensorDataset(images, target), batch_size=2)


def fit(module, *callbacks, batches=6, dtype=torch.float64, logger=False, epochs=1, **options):
    torch.manual_seed(3)
    options = {"enable_progress_bar": False, "enable_model_summary": False} | options
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=logger, callbacks=list(callbacks),
        enable_checkpointing=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, data(batches, dtype), data(1, dtype))
    return trainer


class Seen(Watch):
    """Keeps what it would write."""

    def on_fit_start(self, trainer, module):
        super().on_fit_start(trainer, module)
        self.rows, self.at = [], []

    def _keep(self, trainer, *numbers):
        super()._keep(trainer, *numbers)
        self.rows.append(self.record.newest.numpy())
        self.at.append(self.record.step)

    def table(self, names=LOSSES):
        """What was seen of the losses of these names."""
        tags = watched_tags(names, self.record.cosines)
        return np.stack(self.rows)[:, [self.record.tags.index(tag) for tag in tags]]


def seen(losses=LOSSES, criterion="loss_fn", every_n_steps=1, strict=True, **options):
    options = {"diagnose": True} | options
    return Seen(losses, criterion, every_n_steps=every_n_steps, strict=strict, **options)


def half(precision):
    """In mixed precision; float16 with the scaler of a loss."""
    from pytorch_lightning.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    return {"plugins": [MixedPrecision(precision, "cpu", scaler)], "dtype": torch.float32}


def state(trainer):
    """Weights, buffers, state of the optimiser and of the random numbers."""
    moments = trainer.optimizers[0].state_dict()["state"].values()
    weights = trainer.lightning_module.state_dict().values()
    return [*weights, *(v for m in moments for v in m.values()), torch.get_rng_state()]
