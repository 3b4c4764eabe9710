"""Trainings on one rank and on two, watched: `watched_ranks.py FOLDER COUNT KIND ...`.

The first COUNT kinds are of one rank, the others of two.
"""

import os
import sys
import traceback

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import Plain, fit, state
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from losswatch import Watch


class Halves(Plain):
    """Each of two ranks trains on an image of each batch."""

    def loss(self, batch):
        r, n = self.trainer.global_rank, self.trainer.world_size
        images, target = (x[r::n] for x in batch)
        return self.loss_fn(self.net(images), target)


class Paths(Plain):
    """The two images of a batch, which two ranks share, use different layers."""

    def loss(self, batch):
        r, n = self.trainer.global_rank, self.trainer.world_size
        images, target = batch
        first, middle, last = self.net[0], self.net[2], self.net[3]
        paths = [lambda x: last(first(x)), lambda x: last(middle(first(x)).relu())]
        logits = torch.cat([paths[i](images[i : i + 1]) for i in range(r, 2, n)])
        return self.loss_fn(logits, target[r::n])


class OneSided(Halves):
    """The second rank has a bad label, or does not call its criterion, or calls it later."""

    def __init__(self, net, kind):
        super().__init__(net, nn.CrossEntropyLoss(ignore_index=255))
        self.kind = kind

    def loss(self, batch):
        images, target = (x[self.trainer.global_rank :: 2] for x in batch)
        if self.trainer.global_rank and self.kind == "silent":
            return F.cross_entropy(self.net(images), target)
        if self.trainer.global_rank and (self.kind == "label" or self.global_step == 2):
            target = target.clone()
            target[:, 0] = 255
        return self.loss_fn(self.net(images), target)


THREE = ["cce", "dice", "dice_square"]


class Half(nn.Module):
    """A loss that one of two ranks cannot compute."""

    def forward(self, logits, target):
        if torch.distributed.get_rank():
            raise RuntimeError("not here")
        return logits.square().mean()


class States(pl.Callback):
    """Writes the state of each rank at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        torch.save(state(trainer), f"{self.folder}/{trainer.global_rank}.pt")


def train_ranks(folder, kind):
    """Train on one rank or two, on the same batches; what is seen goes to metrics.csv."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    module = Halves(net)
    if "paths" in kind:
        layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        module = Paths(nn.Sequential(*layers).double())
    elif kind in ("label", "late label", "silent"):
        module = OneSided(net, kind)
    logger = CSVLogger(folder, name="", version="")
    losses = [*THREE, Half()] if kind == "failing" else THREE
    is_strict = kind in ("one", "two", "one, paths", "two, paths")
    options = {"every_n_steps": 2, "strict": is_strict, "cosines": True, "diagnose": True}
    watch = Watch(losses, "loss_fn", **options)
    strategy = "ddp_find_unused_parameters_true" if "paths" in kind else "ddp"
    options = {} if kind.startswith("one") else {"strategy": strategy, "devices": 2}
    callbacks = [States(folder)] if kind == "unwatched" else [watch, States(folder)]
    fit(module, *callbacks, logger=logger, use_distributed_sampler=False, **options)


def start(folder, kinds, rank=None):
    """Train in a process of its own, as torchrun starts one; what it says goes to a file."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.dup2(os.open(f"{folder}/{rank}.txt", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
        if rank is not None:
            os.environ |= {"LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        for kind in kinds:
            print("kind", kind, file=sys.stderr)
            train_ranks(f"{folder}/{kind}", kind)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # nothing of the process that was forked is done twice


if __name__ == "__main__":
    folder, count, *kinds = sys.argv[1:]
    alone, both = kinds[: int(count)], kinds[int(count) :]
    ranks = [start(folder, both, "0"), start(folder, both, "1"), start(folder, alone)]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks))
