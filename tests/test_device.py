"""Transfers between host and device, counted on PyTorch's meta device, which needs no GPU.

Tensors there have shapes but no numbers: code for a GPU runs, and reading a number fails. On a GPU
each read, and each copy from ordinary memory of the host, waits for all work queued before it.
"""

import math
from collections import Counter
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import pytorch_lightning as pl
import torch
from conftest import ARTICLE, ROOT, load_losses, probe
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from losswatch.losses import CrossEntropy
from losswatch.run.build import make_losses
from losswatch.run.process import quiet
from losswatch.stack.fit import Blocks
from losswatch.stack.member import make_member
from losswatch.stack.module import StackedModule
from losswatch.watch.record import Record

META = torch.device("meta")
READS = {"cpu", "tolist", "item", "numpy", "__int__", "__bool__", "__float__", "__index__"}
COPIES = {"tensor", "as_tensor", "new_tensor"}  # from Python's numbers
ENGINE = "torch.autograd._engine_run_backward"
run_backward = torch.autograd._engine_run_backward


def on_device(x):
    return isinstance(x, torch.Tensor) and x.device == META


class Transfers(TorchFunctionMode):
    """Counts transfers by `now()`. A number that is read is -1, a truth value False."""

    def __init__(self, now=lambda: 0):
        super().__init__()
        self.now, self.seen = now, Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        leaves = tree_leaves((args, kwargs))
        to_host = name == "to" and torch.device("cpu") in [*args, *kwargs.values()]
        if (name in READS or to_host) and on_device(args[0]):
            self.seen[self.now(), "read"] += 1
            kind = args[0].dtype
            read = torch.full(args[0].shape, 0 if kind == torch.bool else -1, dtype=kind)
            return function(read, *args[1:], **kwargs)
        # A mode is off while it handles a call, and these two call our derivatives in Python.
        watched = name in ("grad", "backward")
        with patch(ENGINE, self.run_backward) if watched else nullcontext():
            out = function(*args, **kwargs)
        # A scalar tensor of the host is passed as an argument of the kernel and not copied.
        moved = any(isinstance(x, torch.Tensor) and x.ndim and not on_device(x) for x in leaves)
        if any(map(on_device, tree_leaves(out))) and (name in COPIES or moved):
            self.seen[self.now(), "copy"] += 1
        return out

    def run_backward(self, *args, **kwargs):
        with self:
            return run_backward(*args, **kwargs)


class MetaAccelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


class Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + 0

    @staticmethod
    def backward(ctx, g):
        return g * torch.tensor(2.0, device=g.device)


def test_transfers_are_seen():
    with Transfers() as transfers:
        torch.tensor(1, device=META).item()
        (torch.ones(2).to(META) + 1).cpu()
    assert transfers.seen == {(0, "copy"): 2, (0, "read"): 2}
    x = torch.ones(2, device=META, requires_grad=True)
    with Transfers() as transfers:
        torch.autograd.grad(Copies.apply(x).sum(), x)
        Copies.apply(x).sum().backward()
    assert transfers.seen == {(0, "copy"): 2}


@pytest.mark.parametrize("net, classes", [("unet", 2), ("convnet", 4)])
def test_steps_move_nothing_between_host_and_device(make_run, monkeypatch, net, classes):
    """Counts in images, losses, probe, Lightning's loop and optimiser, from step 2 on."""
    monkeypatch.setattr(Record, "SECONDS", math.inf)  # until a block is full
    others = ("cce_stable", "dice_monai", "dice_nnunet", "dice_smp") if net == "convnet" else ()
    losses = load_losses(*ARTICLE, *others, weighted=CrossEntropy(weight=[0.5] * classes))
    run = make_run(
        net, batch_norm=True, classes=classes, losses=losses, probe=probe(cosines=True), steps=3,
        validate=False, strategy=SingleDeviceStrategy(META, accelerator=MetaAccelerator()),
        accelerator="auto",
    )  # fmt: skip
    run.trainer.logger = None
    with Transfers(lambda: run.trainer.global_step) as transfers:
        run.trainer.fit(run.module, run.data)
    assert run.trainer.global_step == 3
    assert run.data.thresholds.device == META  # where the images are drawn
    assert [seen for seen in transfers.seen if 1 <= seen[0] < 3] == []
    assert transfers.seen[3, "read"]  # what was observed, and the weights


@pytest.mark.parametrize("path", sorted((ROOT / "conf/loss").glob("*.yaml")), ids=lambda p: p.stem)
def test_no_loss_moves_anything(path):
    losses = load_losses(path.stem).to(META)
    logits = torch.randn(2, 2, 8, 8, device=META, requires_grad=True)
    target = torch.zeros(2, 8, 8, dtype=torch.int64, device=META)

    def use():
        torch.autograd.grad(losses(logits, target).sum(), logits)
        losses.rows(logits, target)

    use()
    with Transfers() as transfers:
        use()
    assert not transfers.seen


def test_a_stack_reads_twice_a_block(compose, tmp_path):
    """It reads the observations, and whether weights are finite, for any number of steps."""
    one = compose("experiment=smoke", "data.image_size=8", "compile=true")
    plans = [one.plan(tmp_path / str(i)) for i in range(3)]
    members, losses = [make_member(plan) for plan in plans], make_losses(plans[0])
    # Settings become tensors of the device once, which torch.func does not do under `Transfers`.
    losses.rows(torch.zeros(1, 2, 8, 8, device=META), torch.zeros(1, 8, 8, device=META).long())
    module = StackedModule(members, losses, compile=False, cosines=True)
    strategy = SingleDeviceStrategy(META, accelerator=MetaAccelerator())
    trainer = pl.Trainer(
        strategy=strategy, max_steps=15, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with quiet(), Transfers(lambda: trainer.global_step) as transfers:
        trainer.fit(module, Blocks(0, 15, 5), range(1))
    blocks = {step: n for (step, what), n in transfers.seen.items() if 0 < step < 15}
    assert blocks == {5: 2, 10: 2}
