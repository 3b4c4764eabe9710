"""`Watch` in the training of LightningModules that know nothing of it."""

import copy
import logging
import pickle
import re
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import watched_ranks
from conftest import ENVIRONMENT, run_python, slow
from curves import read_tensorboard
from fits import Functional, Manual, Plain, Wanted, fit, half, seen, state
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from small import LOSSES, Checkpointed, Drawing, Focal, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from watched_ranks import THREE

from losswatch import CrossEntropy, Dice, Watch, load_loss
from losswatch.events.tags import watched_tags


class Halved(Plain):
    """Its loss is not that of its criterion."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / 2


# --- Exact ---------------------------------------------------------------------------------------

TRAINED = {
    "plain": lambda: Plain(small()),
    "of losswatch": lambda: Plain(small(), load_loss("dice")),
    "regularised": lambda: Plain(small(), load_loss("dice"), decay=0.1),
    "halved": lambda: Halved(small(), load_loss("dice")),
    "functional": lambda: Functional(small()),
    "manual": lambda: Manual(small()),
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_exact(kind, clip):
    module, wanted = TRAINED[kind](), Wanted()
    watch = seen(criterion=None if kind == "functional" else "loss_fn", cosines=True)
    if kind == "manual":  # such a module clips by itself
        module.clip, clip = clip, None
    fit(module, wanted, watch, gradient_clip_val=clip)
    assert watch.at == list(range(6))
    np.testing.assert_allclose(watch.table(), wanted.frame(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reused", [True, False])
def test_the_trained_gradient_is_reused_only_where_it_is_that_of_the_loss(monkeypatch, reused):
    """Then one backward pass less is needed, after the first observation; a regulariser forbids it.

    The first observation has all passes and two more, which test the backward pass itself.
    """
    passes = []
    grad = torch.autograd.grad

    def count(*args, **options):
        passes[-1] += args[0].ndim == 4
        return grad(*args, **options)

    class Batches(pl.Callback):
        def on_train_batch_start(self, *_):
            passes.append(0)

    loss = load_loss("dice")
    watch = seen({**{name: load_loss(name) for name in ("cce", "dice_fg", "dice_square")},
                  "dice": loss, "dice_fg_square": load_loss("dice_fg_square")})  # fmt: skip
    module = Plain(small(), loss, decay=0.0 if reused else 0.1)
    monkeypatch.setattr("losswatch.watch.span.torch.autograd.grad", count)
    fit(module, Batches(), watch, batches=3)
    assert passes == ([6, 3, 3] if reused else [6, 4, 4])


def test_accumulated_batches():
    module, wanted, watch = Plain(small()), Wanted(), seen()
    fit(module, wanted, watch, accumulate_grad_batches=2)
    values = np.stack([v.numpy() for v, *_ in wanted.batches])
    assert watch.at == [0, 1, 2]
    k = len(LOSSES)
    np.testing.assert_allclose(watch.table()[:, :k], values.reshape(3, 2, k).mean(1), rtol=1e-9)

    # The norm is that of the mean gradient, which the optimiser gets.
    class Grads(pl.Callback):
        found = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            grads = [p.grad.flatten() for p in module.net.parameters()]
            self.found.append(float(torch.cat(grads).norm()))

    watch = seen(["cce_stable"])
    fit(Plain(small()), watch, Grads(), accumulate_grad_batches=2)
    np.testing.assert_allclose(watch.table(["cce_stable"])[:, 1], Grads.found, rtol=1e-9)


def test_several_calls_are_heads():
    class Deep(Plain):
        def loss(self, batch):
            images, target = batch
            logits = self.net(images)
            half = F.avg_pool2d(logits, 2)
            return self.loss_fn(logits, target) + self.loss_fn(half, target[:, ::2, ::2])

    watch = seen(["cce_stable", "dice"], heads="all")
    fit(Deep(small()), watch, batches=2)
    names = ["cce_stable.0", "dice.0", "cce_stable.1", "dice.1", "loss_fn.0", "loss_fn.1"]
    assert watch.record.tags == watched_tags(names, cosines=False)
    for trained, preset in (("loss_fn.0", "cce_stable.0"), ("loss_fn.1", "cce_stable.1")):
        np.testing.assert_allclose(watch.table([trained]), watch.table([preset]), rtol=1e-9)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision):
    found = []
    for options in ({"dtype": torch.float32}, half(precision)):
        watch = seen()
        fit(Plain(small().float()), watch, batches=3, **options)
        found.append(watch.table())
    np.testing.assert_allclose(*found, rtol=0.1, atol=0.02)


class Warm(Plain):
    """A backward pass comes before the first step.

    By default PyTorch then compiles the network for single passes, which a watched step is not.
    """

    def on_train_start(self):
        logits = self.net(torch.ones(2, 3, 8, 8))
        torch.autograd.grad(logits.square().sum(), self.net.parameters())


class Own(nn.Module):
    """PyTorch compiles no `nn.Sequential` by its method `compile`."""

    def __init__(self):
        super().__init__()
        self.layers = small().float()
        self.layers[2] = nn.GELU()

    def forward(self, images):
        return self.layers(images)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled_network(how, backend):
    net = Own()
    plain, watch = seen(), seen()
    fit(Warm(copy.deepcopy(net)), plain, dtype=torch.float32, batches=2)
    torch._dynamo.reset()
    before = torch._functorch.config.donated_buffer
    if how == "method":
        net.compile(backend=backend)
    else:
        net = torch.compile(net, backend=backend)
    fit(Warm(net), watch, dtype=torch.float32, batches=2)
    np.testing.assert_allclose(watch.table(), plain.table(), rtol=1e-4, atol=1e-5)
    assert torch._functorch.config.donated_buffer == before


def test_checkpointed_network():
    watch, wanted = seen(cosines=True), Wanted()

    class Dry(Checkpointed):
        def __init__(self):
            super().__init__()
            self.middle[2] = nn.Identity()

    fit(Plain(Dry().double()), wanted, watch)
    np.testing.assert_allclose(watch.table(), wanted.frame(), rtol=1e-9, atol=1e-9)


# --- Two ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Trainings on one rank and on two: their folder, and what the two processes have printed."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    kinds = ["two", "unwatched", "failing", "two, paths", "label", "late label", "silent"]
    alone = ["one", "one, paths"]
    for kind in (*alone, *kinds):
        (folder / kind).mkdir()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run_python(
        watched_ranks.__file__, str(folder), str(len(alone)), *alone, *kinds, cwd=folder,
        env=ENVIRONMENT | address,
    )  # fmt: skip
    errors = [(folder / f"{rank}.txt").read_text() for rank in "01"]
    said = {kind: [] for kind in kinds}  # the lines of both ranks
    for part in "".join(errors).split("kind ")[1:]:
        kind, *lines = part.splitlines()
        said[kind] += [line for line in lines if line.startswith("losswatch: ")]
    return folder, said


@pytest.mark.parametrize("kinds", [("one", "two"), ("one, paths", "two, paths")])
def test_two_ranks_are_as_one(ranks, kinds):
    """The norms are those of the averaged gradient, also where ranks use different layers."""
    frames = []
    for kind in kinds:
        frame = pd.read_csv(ranks[0] / kind / "metrics.csv").set_index("step")
        frames.append(frame[watched_tags(THREE, cosines=True)].dropna())
    assert list(frames[0].index) == list(frames[1].index) == [0, 2, 4]
    np.testing.assert_allclose(frames[1], frames[0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["two", "failing"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_are_equal_to_the_bit(ranks, kind, rank):
    plain, watched = (torch.load(ranks[0] / k / f"{rank}.pt") for k in ("unwatched", kind))
    assert len(plain) > 8
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a, b)


def test_an_error_on_one_rank_ends_the_watching_on_all(ranks):
    """Otherwise the other rank would wait for it."""
    lines = [line for line in ranks[1]["failing"] if "nothing is watched" in line]
    assert len(lines) == 2
    assert {line.split(": ")[-1] for line in lines} == {
        "not here", "another rank could not observe its batch",
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind, lines",
    [
        (
            "label",
            {"holds class 255, allowed are 0 to 1", "another rank could not observe its batch"},
        ),
        ("silent", {"some ranks have something to observe in this step, others not"}),
    ],
)
def test_a_rank_that_has_nothing_to_observe_ends_the_watching_on_all(ranks, kind, lines):
    """Before the sums over all ranks, for which the other rank would wait."""
    said = [line for line in ranks[1][kind] if "nothing is watched from here on: " in line]
    assert len(said) == 2 and {line.split(": ")[-1] for line in said} == lines


def test_a_bad_label_on_one_rank_later(ranks):
    """Losses are functions of the sums over all ranks: they are NaN in that step alone."""
    frame = pd.read_csv(ranks[0] / "late label" / "metrics.csv").set_index("step")
    frame = frame[[f"loss/{name}" for name in (*THREE, "loss_fn")]]
    assert list(frame.index[frame["loss/loss_fn"].notna()]) == [0, 2, 4]
    assert list(frame.index[frame["loss/cce"].notna()]) == [0, 4]
    lines = [line for line in ranks[1]["late label"] if "step 2: target: holds class 255" in line]
    assert len(lines) == 2


# --- Loggers -------------------------------------------------------------------------------------


def test_all_loggers_get_the_numbers(tmp_path):
    loggers = [
        TensorBoardLogger(tmp_path / "tb", name="", version=""),
        CSVLogger(tmp_path / "csv", name="", version=""),
    ]
    watch = seen(cosines=True, every_n_steps=2)
    fit(Plain(small()), watch, logger=loggers, epochs=2)
    tags = watched_tags(LOSSES, cosines=True)
    curves = read_tensorboard(tmp_path / "tb")
    frame = pd.read_csv(tmp_path / "csv/metrics.csv").set_index("step")
    for i, tag in enumerate(tags):
        steps, values = zip(*curves[tag], strict=True)
        assert steps == tuple(watch.at) == (0, 2, 4, 6, 8, 10)
        np.testing.assert_allclose(values, watch.table()[:, i], rtol=1e-6)
        np.testing.assert_allclose(frame[tag].dropna(), watch.table()[:, i], rtol=1e-6)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert "custom_scalars__config__" in events.PluginTagToContent("custom_scalars")


@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers_of_services(tmp_path, monkeypatch, name):
    """Without a server: W&B offline, MLflow in files."""
    pytest.importorskip(name)
    from pytorch_lightning.loggers import MLFlowLogger, WandbLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if name == "wandb":
        logger = WandbLogger(save_dir=tmp_path, offline=True)
    else:
        logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    given = []
    log_metrics = type(logger).log_metrics

    def remember(self, metrics, step=None):
        given.append((step, metrics))
        return log_metrics(self, metrics, step)

    monkeypatch.setattr(type(logger), "log_metrics", remember)
    watch = seen(every_n_steps=3)
    fit(Plain(small()), watch, logger=logger)
    rows = {step: metrics for step, metrics in given if "grad_norm/cce" in metrics}
    assert list(rows) == [0, 3]
    np.testing.assert_allclose([*rows[3].values()], watch.rows[1], rtol=1e-6)
    if name == "mlflow":
        [file] = tmp_path.glob("**/metrics/grad_norm/cce")
        assert [line.split()[2] for line in file.read_text().splitlines()] == ["0", "3"]
    else:
        logger.experiment.finish()


# --- Nothing changes -----------------------------------------------------------------------------


class Dropping(Plain):
    """Draws random numbers in its network."""

    def __init__(self, **options):
        net = small()
        net.insert(2, nn.Dropout(0.3))
        super().__init__(net, **options)


def compiled(backend):
    torch._dynamo.reset()
    return Plain(torch.compile(small().float(), backend=backend))


KINDS = {
    "plain": (Dropping, dict),
    "functional": (lambda: Functional(small()), lambda: {"gradient_clip_val": 0.1}),
    "of losswatch": (lambda: Dropping(criterion=load_loss("dice")), dict),
    "manual": (lambda: Manual(small()), dict),
    "accumulated": (Dropping, lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "checkpointed": (lambda: Plain(Checkpointed().double()), dict),
    "bfloat16": (lambda: Dropping().float(), lambda: half("bf16-mixed")),
    "float16": (lambda: Dropping().float(), lambda: half("16-mixed")),
    "compiled": (lambda: compiled("aot_eager"), lambda: {"dtype": torch.float32}),
    "compiled, Inductor": (lambda: compiled("inductor"), lambda: {"dtype": torch.float32}),
}


@pytest.mark.filterwarnings("ignore:.*TF32|.*deprecated")  # the compiler's own
@pytest.mark.parametrize("kind", [slow(k) if "Inductor" in k else k for k in KINDS])
@pytest.mark.parametrize("every", [1, 4])
def test_training_is_equal_to_the_bit(kind, every):
    make, options = KINDS[kind]
    losses = LOSSES if "compiled" in kind else [*LOSSES, Drawing()]
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        module = make()
        watch = [seen(losses, criterion=None if kind == "functional" else "loss_fn",
                      every_n_steps=every)] if watched else []  # fmt: skip
        states.append(state(fit(module, *watch, **options())))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_trains_and_draws_is_called_once():
    drawing = Drawing().double()
    watch = seen({"mine": drawing, "dice": load_loss("dice")})
    fit(Plain(small(), drawing), watch, batches=3)
    assert drawing.calls == 3 + 1 + 1  # one more in each validation: the sanity check, and the end


# --- What is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "criterion, line",
    [
        (Dice, r"loss_fn \(Dice\) gets; its value 0\.\d+ equals that of dice(, .*)?$"),
        (
            lambda: nn.CrossEntropyLoss(),
            r"loss_fn \(CrossEntropyLoss\) gets; .* equals that of cce(, .*)?; "
            "the loss that trains is recorded as loss_fn$",
        ),
        (
            Focal,
            r"loss_fn \(Focal\) gets; its value 0\.\d+ equals that of none of them, "
            "so it is another loss; the loss that trains is recorded as loss_fn$",
        ),
    ],
)
def test_the_first_observation_says_what_is_watched(caplog, criterion, line):
    with caplog.at_level(logging.INFO):
        fit(Plain(small(), criterion()), seen())
    said = [m for m in caplog.messages if m.startswith("losswatch: ")]
    assert len(said) == 1 and re.match("losswatch: watching 5 losses of what " + line, said[0])


class Sick(nn.Module):
    def forward(self, logits, target):
        raise RuntimeError("sick\nat heart")


FAILING = {
    "missing": (dict(criterion="lossfn"), r"criterion='lossfn' is not a submodule; modules that "
                                          r"look like a loss are loss_fn \(CrossEntropyLoss\)$"),
    "a function": (dict(criterion="loss"), "it is a function: call watch.see"),
    "an error": (dict(losses=["dice", Sick()]), "sick at heart$"),
    "classes": (dict(losses=["dice_multilabel"], classes=3), "for 2 classes, but logits"),
    "labels": (dict(target=5), "target: holds class 5, allowed are 0 to 1$"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
def test_an_error_ends_the_watching_not_the_training(caplog, case):
    options, message = dict(FAILING[case][0]), FAILING[case][1]
    net, target = small(options.pop("classes", 2)), options.pop("target", None)

    class Ignoring(Plain):
        def loss(self, batch):
            images, label = batch
            if target is None:
                return self.loss_fn(self.net(images), label)
            label = label.clone()
            label[0, 0, 0] = target
            return self.loss_fn(self.net(images), label)

    module = Ignoring(net, nn.CrossEntropyLoss(ignore_index=5))
    # Without the doctor, which would name the wrong labels, too (doctor/test_diagnosis.py).
    trainer = fit(module, seen(**options, strict=False, diagnose=False))
    assert trainer.global_step == 6
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    [line] = [text for text in said if "losswatch" in text]
    assert line.startswith("losswatch: nothing is watched from here on: ") and "\n" not in line
    assert re.search(message, line)
    with pytest.raises((ValueError, RuntimeError)):
        fit(Ignoring(small(3 if case == "classes" else 2), nn.CrossEntropyLoss(ignore_index=5)),
            seen(**options, strict=True))  # fmt: skip


@pytest.mark.parametrize("kind", [Plain, Functional])
def test_a_criterion_that_is_not_called(caplog, kind):
    class Idle(kind):
        def loss(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    fit(Idle(small()), seen(criterion="loss_fn" if kind is Plain else None))
    what = "loss_fn was not called with" if kind is Plain else "watch.see.logits, target. was not"
    [line] = [m for m in caplog.messages if "losswatch" in m]
    assert re.search(f"^losswatch: nothing was watched: {what}", line)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_every_n_steps_is_checked(n):
    with pytest.raises(ValueError, match="every_n_steps=.*: allowed is a whole number"):
        Watch(["cce"], "loss_fn", every_n_steps=n)


def test_it_is_a_callback_that_can_be_copied():
    watch = Watch(["cce", CrossEntropy(clip=None)], "loss_fn")
    assert isinstance(watch, pl.Callback) and isinstance(watch, Watch)
    for other in (pickle.loads(pickle.dumps(watch)), copy.deepcopy(watch)):
        assert isinstance(other, Watch) and isinstance(other, pl.Callback)
        assert other.observer.watched.names == ("cce", "CrossEntropy")


OTHER_NAME = """
import sys
import lightning as L
import torch
from losswatch import Watch

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.loss_fn = torch.nn.Conv2d(1, 2, 1), torch.nn.CrossEntropyLoss()
    def training_step(self, batch, batch_idx):
        return self.loss_fn(self.net(batch), batch[:, 0].round().long())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

watch = Watch(["cce", "dice"], "loss_fn", every_n_steps=1, strict=True)
assert isinstance(watch, L.Callback)
trainer = L.Trainer(max_steps=2, callbacks=[watch], logger=False, enable_checkpointing=False)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.rand(4, 1, 8, 8), batch_size=2))
print(sorted(watch.latest()), "pytorch_lightning" in sys.modules)
"""


@pytest.mark.slow
def test_lightning_under_its_other_name():
    """`pip install lightning` has the same classes in a package of its own."""
    pytest.importorskip("lightning")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OTHER_NAME], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "['loss/cce', 'loss/dice', 'loss/loss_fn'] False", (
        done.stderr
    )


def test_resumed_training_observes_the_same_steps():
    """Multiples of `every_n_steps`, wherever a training begins."""
    from losswatch.watch.record import Record

    record = Record(every_n_steps=50, cosines=False)
    record.begin(730)
    due = []
    for step in range(730, 860, 3):  # a loop that counts three optimisers
        record.move_to(step)
        if record.is_due:
            due.append(step)
            record.is_due = False
    assert due == [751, 802, 850]
    record.begin(750)
    record.move_to(750)
    assert record.is_due
