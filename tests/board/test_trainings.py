"""Real trainings in the tab: what its server shows, against what the training itself computed."""

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from boards import Board, curves_of
from conftest import run_train
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from losswatch import Observer, Watch, WatchHandler

pytest.importorskip("plotly")

STEPS = 6
WATCHED = ["cce", "dice"]


class Training(pl.LightningModule):
    """A softmax before the cross entropy, which takes its softmax again: `activation-twice`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Softmax(1))
        self.loss_fn = nn.CrossEntropyLoss()
        self.values = []  # of the trained loss at each step

    def batch(self):
        images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(len(self.values)))
        return images, (images[:, 0] > 0).long()

    def loss(self, output, target):
        loss = self.loss_fn(output, target)
        self.values.append(loss.item())
        return loss

    def training_step(self, batch, batch_idx):
        images, target = self.batch()
        return self.loss(self.net(images), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def by_lightning(folder):
    training = Training()
    trainer = pl.Trainer(
        max_steps=STEPS, logger=TensorBoardLogger(folder, name="", version=""), accelerator="cpu",
        callbacks=[Watch(WATCHED, criterion="loss_fn", every_n_steps=1, diagnose=True)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(training, torch.utils.data.DataLoader(torch.zeros(STEPS)))
    trainer.logger.experiment.close()
    return training.values


def by_ignite(folder):
    from ignite.engine import Engine  # its import warns, which the test allows

    training = Training()
    optimizer = training.configure_optimizers()

    def step(engine, _):
        images, target = training.batch()
        output = training.net(images)
        loss = training.loss(output, target)
        engine.state.output = {"pred": output, "label": target, "loss": loss}
        engine.fire_event("loss_completed")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return engine.state.output

    engine = Engine(step)
    engine.register_events("loss_completed")
    engine.loss_function = training.loss_fn
    with SummaryWriter(folder) as writer:
        watch = WatchHandler(
            WATCHED, every_n_steps=1, diagnose=True, network=training.net, writer=writer
        )
        watch.attach(engine)
        engine.run(range(STEPS))
    return training.values


def by_a_loop(folder):
    training = Training()
    optimizer = training.configure_optimizers()
    observer = Observer(WATCHED, training.net, trained="cce")
    with SummaryWriter(folder) as writer:
        for step in range(STEPS):
            images, target = training.batch()
            output = training.net(images)
            loss = training.loss(output, target)
            seen = observer(output, target)
            for name, value, norm in zip(seen.names, seen.values, seen.norms, strict=True):
                writer.add_scalar(f"loss/{name}", value, step)
                writer.add_scalar(f"grad_norm/{name}", norm, step)
            text = "\n\n".join(finding.line() for finding in observer.findings())
            writer.add_text("findings", text, step)
            writer.add_text("trained", "cce", step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return training.values


@pytest.mark.parametrize(
    "train, trained",
    [(by_lightning, "loss_fn"), (by_ignite, "CrossEntropyLoss"), (by_a_loop, "cce")],
)
@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
def test_a_training_of_ones_own(tmp_path, train, trained):
    values = train(tmp_path / "mine")
    board = Board(tmp_path)
    assert board.plugin.is_active()
    [title] = board.titles()
    assert title == f"<b>trained with {trained}</b><br>mine"
    answer = board.get("figure")
    assert answer["notes"] == []
    norms, losses = (curves_of(answer["figure"], row=row) for row in ("y", "y2"))
    assert {*WATCHED} <= {*norms} and {*norms} == {*losses}
    steps, shown = losses["cce"]
    assert steps == list(range(STEPS)) and len(values) == STEPS
    np.testing.assert_allclose(shown, values, rtol=1e-5)
    assert min(norms["cce"][1]) > 0 and max(losses["dice"][1]) < 1
    [(name, step, text), *_] = board.marks()
    assert (name, step) == ("activation-twice", 0)
    assert text.startswith("step 0: ") and "softmax" in text


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "fused"])
def test_a_run_is_diagnosed_while_it_trains(tmp_path, launcher):
    run_train(
        "-m", "loss=dice_fg,dice_square", "model=convnet", "model.batch_norm=false", "theta=0.05",
        "data.image_size=16", "data.val_size=8", "data.test_size=8", "trainer.max_steps=400",
        "trainer.val_check_interval=400", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )  # fmt: skip
    run = tmp_path / "sweep/loss=dice_fg"
    told = json.loads((run / "result.json").read_text())["findings"][0]
    board = Board(tmp_path)
    ended = board.marks("x")
    assert told["name"] == "collapsed" and ended[0][:2] == ("collapsed", told["step"])
    assert told["text"] in ended[0][2] and board.marks("x2") == []
    # Before the end there is no result.json. The record says it.
    (run / "result.json").unlink()
    assert ended[0] in board.marks("x")
    # The signs of the first step alone: nothing is certain.
    whole = (run / "signs.f32").read_bytes()
    columns = len(json.loads((run / "signs.json").read_text())[0]["columns"])
    version = board.get("figure")["version"]
    (run / "signs.f32").write_bytes(whole[: 8 + 4 * columns])
    assert "collapsed" not in {name for name, _, _ in board.marks("x", version=version)}
