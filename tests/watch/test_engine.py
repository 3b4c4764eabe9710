"""`WatchHandler` in engines of MONAI and Ignite."""

import copy
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import expected
from small import LOSSES, Drawing, Focal, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from losswatch import WatchHandler, load_loss
from losswatch.events.tags import watched_tags

ignite = pytest.importorskip("ignite.engine")


def batches(count=4):
    g = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64),
            "label": torch.randint(0, 2, (2, 1, 8, 8), generator=g),  # with a channel, as MONAI's
        }
        for _ in range(count)
    ]


def monai_trainer(net, loss):
    """A trainer as MONAI's tutorials build it."""
    from monai.engines import SupervisedTrainer

    return SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=2, train_data_loader=batches(), network=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=0.01), loss_function=loss,
    )  # fmt: skip


class Look:
    """Notes what is seen, and what one gradient for each loss gives, before each backward pass."""

    def __init__(self, handler, losses):
        self.handler, self.losses = handler, losses
        self.seen, self.wanted = [], []

    def __call__(self, engine):
        output, label = engine.state.output["pred"], engine.state.output["label"].squeeze(1)
        self.wanted.append(expected(self.losses, output, label, engine.network.parameters()))
        if self.handler.seen is not None:
            self.seen.append((engine.state.iteration - 1, self.handler.seen))
            self.handler.seen = None


def dice_ce():
    from monai.losses import DiceCELoss

    return DiceCELoss(softmax=True, to_onehot_y=True)


def test_monais_trainer(tmp_path):
    from monai.engines.utils import IterationEvents

    trainer = monai_trainer(small(), dice_ce())
    with SummaryWriter(tmp_path) as writer:
        handler = WatchHandler(
            [*LOSSES, "dice_ce_monai"], every_n_steps=3, cosines=True, strict=True, writer=writer
        )
        handler.attach(trainer)
        look = Look(handler, [*map(load_loss, LOSSES), load_loss("dice_ce_monai")])
        trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, look)
        trainer.run()
    assert [step for step, _ in look.seen] == [0, 3, 6]
    for step, seen in look.seen:
        assert seen.names == (*LOSSES, "dice_ce_monai", "DiceCELoss")  # the last one trains
        for found, right in zip(seen[1:], look.wanted[step], strict=True):
            watched = found[:6, :6] if found.ndim == 2 else found[:6]
            torch.testing.assert_close(watched, right, rtol=1e-9, atol=1e-9)
        for found in seen[1:3]:
            torch.testing.assert_close(found[6], found[5], rtol=1e-6, atol=1e-9)
    events = EventAccumulator(str(tmp_path)).Reload()
    for i, tag in enumerate(watched_tags(seen.names, cosines=True)[:6]):
        curve = events.Scalars(tag)
        assert [event.step for event in curve] == [0, 3, 6]
        np.testing.assert_allclose([e.value for e in curve], [s.values[i] for _, s in look.seen])


@pytest.mark.parametrize("every", [1, 3])
def test_training_is_equal_to_the_bit(every):
    torch.manual_seed(0)
    nets = [small()]
    nets[0].insert(2, nn.Dropout(0.2))
    nets.append(copy.deepcopy(nets[0]))
    drawn = []
    for net, watched in zip(nets, (False, True), strict=True):
        torch.manual_seed(1)
        trainer = monai_trainer(net, dice_ce())
        if watched:
            losses = {name: load_loss(name) for name in LOSSES}
            WatchHandler(losses, every_n_steps=every, strict=True).attach(trainer)
        trainer.run()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert torch.equal(a, b)


def ignite_engine(net):
    """An engine of Ignite with an update function of one's own."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def update(engine, batch):
        optimizer.zero_grad()
        label = batch["label"].squeeze(1)
        output = net(batch["image"])
        loss = F.cross_entropy(output, label)
        engine.state.output = {"pred": output, "label": label}
        engine.fire_event("loss_completed")
        loss.backward()
        optimizer.step()
        return loss.item()

    return ignite.Engine(update)


def test_an_engine_of_ignite():
    net = small()
    engine = ignite_engine(net)
    handler = WatchHandler([*LOSSES, Focal()], every_n_steps=1, strict=True, network=net)
    with pytest.raises(ValueError, match="no event for a computed loss: .*register_events"):
        handler.attach(engine)
    engine.register_events("loss_completed")
    handler.attach(engine)
    engine.run(batches(), max_epochs=1)
    assert handler.seen.names == (*LOSSES, "Focal") and (handler.seen.norms > 0).all()
    with pytest.raises(ValueError, match=r"give WatchHandler\(network=...\)"):
        WatchHandler(["cce"]).attach(engine)


def test_an_error_ends_the_watching_not_the_training(caplog):
    trainer = monai_trainer(small(), dice_ce())
    handler = WatchHandler(["dice_multilabel", Drawing()], every_n_steps=1)  # takes no channel
    handler.attach(trainer)
    with caplog.at_level(logging.WARNING, logger="losswatch"):
        trainer.run()
    assert trainer.state.iteration == 8 and handler.seen is None
    [line] = [r.getMessage() for r in caplog.records if r.name.startswith("losswatch")]
    assert line.startswith("losswatch: nothing is watched from here on: ") and "\n" not in line


def test_an_error_of_the_training_is_raised():
    class Broken(nn.Module):
        def forward(self, output, label):
            raise RuntimeError("broken")

    trainer = monai_trainer(small(), Broken())
    WatchHandler(["cce"]).attach(trainer)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.run()


@pytest.mark.parametrize("handled", [False, True])
def test_an_error_that_others_handle_is_theirs(handled):
    """Ignite raises an error only where nobody handles it."""

    class Broken(nn.Module):
        def forward(self, output, label):
            raise RuntimeError("broken")

    trainer, swallowed = monai_trainer(small(), Broken()), []
    WatchHandler(["cce"]).attach(trainer)
    if handled:
        trainer.add_event_handler(
            ignite.Events.EXCEPTION_RAISED, lambda engine, error: swallowed.append(error)
        )
        trainer.run()
        assert {str(error) for error in swallowed} == {"broken"}
    else:
        with pytest.raises(RuntimeError, match="broken"):
            trainer.run()


def test_a_writer_that_fails_ends_the_watching_not_the_training(tmp_path, caplog):
    class Full(SummaryWriter):
        @property
        def file_writer(self):
            raise OSError(28, "No space left on device")

        @file_writer.setter
        def file_writer(self, value):
            pass

        def _get_file_writer(self):
            return None

    trainer = monai_trainer(small(), dice_ce())
    handler = WatchHandler(["cce"], every_n_steps=1)
    handler.writer = Full(tmp_path)
    handler.attach(trainer)
    trainer.run()
    assert trainer.state.iteration == 8
    [line] = [m for m in caplog.messages if m.startswith("losswatch: ")]
    assert "nothing is watched from here on" in line and "No space left" in line


def test_a_second_run_is_observed_from_its_first_step():
    net = small()
    engine = ignite_engine(net)
    engine.register_events("loss_completed")
    handler = WatchHandler(LOSSES, every_n_steps=3, strict=True, network=net)
    handler.attach(engine)
    steps = []
    engine.add_event_handler(
        "loss_completed",
        lambda e: (handler.seen is not None and steps.append(e.state.iteration - 1),
                   setattr(handler, "seen", None)),
    )  # fmt: skip
    engine.run(batches(), max_epochs=1)
    engine.run(batches(), max_epochs=1)
    assert steps == [0, 3, 0, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_second_run_of_a_compiled_network(caplog):
    """The switch that keeps its buffers is set in each run, and put back after it."""
    torch._dynamo.reset()
    net = torch.compile(small())
    engine = ignite_engine(net)
    engine.register_events("loss_completed")
    WatchHandler(LOSSES, every_n_steps=1, strict=True, network=net).attach(engine)
    before = torch._functorch.config.donated_buffer
    for _ in range(2):
        engine.run(batches(), max_epochs=1)
        assert torch._functorch.config.donated_buffer == before
        torch._dynamo.reset()
    assert not [m for m in caplog.messages if "losswatch" in m]
