"""Trainers of Lightning, MONAI and Ignite, by a row of `test_odd.py`."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from odd import Odd, Run
from torch import nn
from torch.utils.data import DataLoader

from losswatch import Watch, WatchHandler


class Numbers(Watch):
    """Keeps what it would write."""

    def _keep(self, trainer, *numbers):
        self.numbers.append(numbers)
        super()._keep(trainer, *numbers)


class Module(pl.LightningModule):
    """Any network and criterion; subclasses change how the criterion is called."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = [run]  # a list, so that it is no submodule
        self.net, self.loss_fn = run.net, run.criterion
        self.optimizer = torch.optim.Adam

    def loss(self, images, target, step):
        return self.loss_fn(self.net(images), target)

    def training_step(self, step, batch_idx):
        [run], step = self.run, int(step)
        run.note(step, new=step % self.trainer.accumulate_grad_batches == 0)
        return self.loss(*run.batch(step), step)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


def lightning(
    run: Run,
    module=Module,
    criterion_name="loss_fn",
    callbacks=lambda run: [],
    batches=3,
    **options,
) -> None:
    """Lightning's Trainer."""
    watch = Numbers(run.losses, criterion_name, every_n_steps=1, cosines=True, strict=True,
                    diagnose=True, **run.row.options)  # fmt: skip
    watch.numbers = []
    made = module(run)
    made.watch = [watch]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        callbacks=[*([watch] if run.watched else []), *callbacks(run)], **options,
    )  # fmt: skip
    trainer.fit(made, DataLoader(list(range(batches)), batch_size=None))
    if run.watched:
        tags = watch.record.tags
        names = [tag.removeprefix("loss/") for tag in tags if tag.startswith("loss/")]
        run.seen = [(names, *numbers) for numbers in watch.numbers]
    run.end(trainer.optimizers[0])


def monai(run: Run, runs: int = 1) -> None:
    """MONAI's trainer."""
    from monai.engines import SupervisedTrainer
    from monai.engines.utils import IterationEvents

    steps = list(range(run.row.steps))
    data = [{"image": run.batch(i)[0], "label": run.batch(i)[1]} for i in steps]
    optimizer = torch.optim.Adam(run.net.parameters(), lr=0.01)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=1, train_data_loader=data, network=run.net,
        optimizer=optimizer, loss_function=run.criterion,
    )  # fmt: skip
    from ignite.engine import Events

    def before(engine):
        run.note((engine.state.iteration - 1) % len(steps))

    trainer.add_event_handler(Events.ITERATION_STARTED, before)
    _attach(run, trainer, IterationEvents.LOSS_COMPLETED, {})
    for _ in range(runs):
        trainer.run()
    run.end(optimizer)


def ignite(run: Run, runs: int = 1) -> None:
    """An engine of Ignite, by hand."""
    from ignite.engine import Engine

    optimizer = torch.optim.Adam(run.net.parameters(), lr=0.01)

    def step(engine, number):
        images, target = run.batch(number)
        optimizer.zero_grad()
        run.note(number)
        output = run.net(images)
        value = run.criterion(output, target)
        engine.state.output = {"pred": output, "label": target}
        engine.fire_event("loss_completed")
        value.backward()
        optimizer.step()
        return {"pred": output, "label": target}

    engine = Engine(step)
    engine.register_events("loss_completed")
    _attach(run, engine, "loss_completed", {"network": run.net})
    for _ in range(runs):
        engine.run(list(range(run.row.steps)), max_epochs=1)
    run.end(optimizer)


def _attach(run: Run, engine, event, options) -> None:
    if not run.watched:
        return
    handler = WatchHandler(
        run.losses, every_n_steps=1, cosines=True, strict=True, diagnose=True, **options,
        **run.row.options,
    )  # fmt: skip
    handler.attach(engine)
    engine.add_event_handler(event, lambda _: run.seen.append(tuple(handler.seen)))


# --- What changes in a training of Lightning ---------------------------------------------------


class Changed(pl.Callback):
    def on_after_backward(self, trainer, module):
        for p in module.net.parameters():
            p.grad = None if p.grad is None else p.grad * 2


class Penalty(pl.Callback):
    """A second backward pass."""

    def on_before_backward(self, trainer, module, loss):
        (0.1 * sum(p.square().sum() for p in module.net.parameters())).backward()


class Replaced(pl.Callback):
    def __init__(self, when):
        setattr(self, when, self.replace)

    def replace(self, trainer, module):
        torch.manual_seed(5)
        module.net[-1] = nn.Conv2d(4, 2, 1).double()
        if trainer.optimizers:
            trainer.optimizers = [torch.optim.Adam(module.parameters())]


def module(loss=None, **body):
    """A LightningModule that calls its criterion in another way; `loss(self, output, target)`."""

    def call(self, images, target, step):
        return loss(self, self.net(images), target)

    return type("Called", (Module,), ({"loss": call} if loss else {}) | body)


class Anyhow(nn.Module):
    """A criterion whose arguments have other names, and another order."""

    def __init__(self, result=lambda value: value):
        super().__init__()
        self.result = result

    def forward(self, y_true=None, y_pred=None, *more, target=None, input=None):
        output = y_pred if input is None else input
        if output is None or not output.is_floating_point():
            output = y_true
        return self.result(Odd()(output, None))


class Manual(Module):
    def __init__(self, run):
        super().__init__(run)
        self.automatic_optimization = False

    def training_step(self, step, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(step, batch_idx))
        optimizer.step()


def seen(self, output, target):
    """A loss that is a function."""
    self.watch[0].see(output, target)
    return Odd()(output, target)


def twice(self, output, target):
    return self.loss_fn(output.detach().requires_grad_(), target) + self.loss_fn(output, target)


def hook_on_loss(self, output, target):
    value = self.loss_fn(output, target)
    value.register_hook(lambda g: 2 * g)
    return value
