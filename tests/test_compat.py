"""Each private name that losswatch.compat uses: these fail when a new version moves one."""

import inspect
import os
import subprocess
import sys

import hydra
import joblib
import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode
from lightning_utilities.core.imports import RequirementCache
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter

from losswatch import compat
from losswatch.config import schema


def test_it_imports_no_slow_library():
    """The report and Hydra's start import this file."""
    code = (
        "import sys, losswatch.compat; "
        "print({'torch', 'pytorch_lightning', 'hydra'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- PyTorch: what is at work around a tensor ----------------------------------------------------


def see(function, transform):
    """What a function of a tensor returns where `transform` calls it."""
    seen = []
    transform(lambda x: (seen.append(function(x)), x.sum())[1])(torch.ones(2))
    return seen


def test_traced():
    from torch._subclasses import FakeTensorMode

    assert not compat.traced(torch.ones(2))
    assert not compat.traced(torch.ones(2, requires_grad=True))
    assert see(compat.traced, grad) == [True] and see(compat.traced, vmap) == [True]
    assert see(lambda x: compat.recorded(), vmap) == [False]
    with FakeTensorMode():
        assert compat.traced(torch.ones(2)) and compat.recorded()
    assert not compat.traced(torch.ones(2))

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(compat.traced(g))
            return g

    seen, x = [], torch.ones(2, requires_grad=True)
    y = Look.apply(x)
    torch.autograd.grad(y, x, torch.ones(3, 2), retain_graph=True, is_grads_batched=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_is_functorch_active():
    assert not compat.is_functorch_active()
    assert see(lambda x: compat.is_functorch_active(), grad) == [True]


def test_softmax_backward():
    x, g = (
        torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True),
        torch.ones(2, 3, 4).double(),
    )
    g[:, 1] = 3
    p = x.softmax(1)
    wanted = torch.autograd.grad(p, x, g)[0]
    torch.testing.assert_close(compat.softmax_backward(g, p.detach()), wanted, rtol=0, atol=1e-15)


def test_grad_levels():
    x = torch.ones(2)
    assert compat.grad_levels(x) == compat.grad_levels(x.clone().requires_grad_()) == 0
    assert see(compat.grad_levels, vmap) == [0]
    assert see(compat.grad_levels, grad) == [1]
    assert see(compat.grad_levels, lambda f: vmap(grad(lambda y: f(y).sum()))) == [1]
    assert see(compat.grad_levels, lambda f: grad(lambda y: grad(f)(y).sum())) == [2]


@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)  # fmt: skip
def test_has_hooks(hook):
    module = nn.ReLU()
    assert not compat.has_hooks(module)
    handle = getattr(module, hook)(lambda *_: None)
    assert compat.has_hooks(module)
    handle.remove()
    assert not compat.has_hooks(module)
    module.forward = lambda x: x
    assert compat.has_hooks(module)


# --- PyTorch: errors -----------------------------------------------------------------------------


def test_hooks_that_only_look_do_not_count():
    module = nn.Linear(1, 1)

    def look(*args):
        """Changes nothing."""

    look.only_observes = True
    module.register_forward_hook(look)
    assert not compat.has_hooks(module)
    module.register_forward_hook(lambda *args: None)
    assert compat.has_hooks(module)


def test_has_gradient_hooks():
    x, y, z = (torch.ones(2, requires_grad=True) for _ in range(3))
    y.register_hook(lambda g: g)
    z.register_post_accumulate_grad_hook(lambda p: None)
    assert [compat.has_gradient_hooks(p) for p in (x, y, z)] == [False, True, True]


def test_gradients_that_tensors_keep():
    compat.watch_kept_gradients()
    compat.watch_kept_gradients()  # once more changes nothing
    leaf = torch.ones(3, requires_grad=True)
    leaf.retain_grad()  # does nothing for a leaf
    h = 2 * leaf
    h.retain_grad()
    (h**2).sum().backward(retain_graph=True)
    before = h.grad
    restore = compat.note_kept_gradients()
    for factor in (1, 3):
        torch.autograd.grad((factor * h).sum(), leaf, retain_graph=True)
    assert not torch.equal(h.grad, before)
    restore()
    assert h.grad is before and torch.equal(before, torch.full((3,), 4.0))
    size = len(compat._keeping)
    del h, restore
    assert len(compat._keeping) == size - 1


def test_is_handled_by_others():
    ignite = pytest.importorskip("ignite.engine")

    class Ours:
        def handle(self, engine, error):
            pass

    engine, ours, event = ignite.Engine(lambda e, b: None), Ours(), ignite.Events.EXCEPTION_RAISED
    engine.add_event_handler(event, ours.handle)
    assert not compat.is_handled_by_others(engine, event, Ours)
    assert compat.is_handled_by_others(engine, event, dict)
    engine.add_event_handler(event, lambda engine, error: None)
    assert compat.is_handled_by_others(engine, event, Ours)


def test_without_hooks():
    x = torch.ones(2, requires_grad=True)
    plain, hooked = x.sum(), x.sum()
    hooked.register_hook(lambda g: 3 * g)
    for value, expected in ((plain, [1, 1]), (hooked, [1, 3])):
        with compat.without_hooks(value):
            [inside] = torch.autograd.grad(value, x, retain_graph=True)
        [outside] = torch.autograd.grad(value, x)
        assert [float(inside[0]), float(outside[0])] == expected


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_is_compiled():
    net = nn.Sequential(nn.Linear(1, 1))
    assert not compat.is_compiled(net) and compat.is_compiled(torch.compile(net))
    assert compat.is_compiled(nn.Sequential(torch.compile(net)))
    net[0].compile()
    assert compat.is_compiled(net)


def test_kept_buffers():
    """PyTorch reads this switch when it compiles a backward pass, and again when it runs one."""
    from torch._functorch._aot_autograd import graph_compile, runtime_wrappers

    for module in (graph_compile, runtime_wrappers):
        assert "config.donated_buffer" in inspect.getsource(module)
    config = torch._functorch.config
    assert config.donated_buffer
    kept = compat.KeptBuffers()
    assert not config.donated_buffer
    kept.remove()
    assert config.donated_buffer
    assert "donated buffer." in inspect.getsource(runtime_wrappers)  # of its error
    why = compat.why_not_differentiated(RuntimeError("..., which is a donated buffer."))
    assert "donated_buffer = False" in why


def test_why_not_differentiated():
    x = torch.ones(2, requires_grad=True)
    y = x.sin().sum()
    y.backward()
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(y, x)
    assert compat.why_not_differentiated(raised.value).startswith("the graph is gone: ")
    y = checkpoint(torch.sin, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(y, x)
    assert "use_reentrant=False" in compat.why_not_differentiated(raised.value)
    assert compat.why_not_differentiated(RuntimeError("another")) is None


def test_is_out_of_memory():
    from torch._inductor.exc import InductorError

    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert compat.is_out_of_memory(raised.value)
    assert compat.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert compat.is_out_of_memory(MemoryError())
    assert compat.is_out_of_memory(InductorError(MemoryError(), None))
    assert not compat.is_out_of_memory(InductorError(RuntimeError("g++"), None))
    assert not compat.is_out_of_memory(RuntimeError("out of range"))


class OldFunction(torch.autograd.Function):
    """In the style that torch.func does not take: the refusal comes from PyTorch's Python code."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()


REFUSED = {
    "a number": lambda x: float(x.sum()) * x.sum(),
    "a branch": lambda x: x.sum() if x.sum() > 0 else x.mean(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()).sum() * x.sum(),
    "a mask": lambda x: x[x > 0].sum(),
    "no batching rule": lambda x: x.sum() * torch.equal(x, x),
    "storage": lambda x: x.untyped_storage().size() * x.sum(),
    "uneven shapes": lambda x: torch.bincount(x.detach().long()).sum() * x.sum(),
    "in place": lambda x: torch.zeros(3).add_(x).sum(),
    "out=": lambda x: torch.add(x, x, out=torch.empty(3)).sum(),
    "an old autograd.Function": OldFunction.apply,
}


@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_torch_func_refuses_by_a_runtime_error(case):
    x = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 1.0]])
    with pytest.raises(RuntimeError):
        vmap(grad(REFUSED[case]))(x)


def test_a_tracer_refuses_by_a_runtime_error():
    with pytest.raises(RuntimeError):
        compat.trace(REFUSED["a branch"], [torch.ones(2)])


# --- PyTorch: compiling --------------------------------------------------------------------------


def test_trace_and_its_nodes():
    seen = []

    def function(x, y):
        seen.append(torch.compiler.is_compiling())
        return (x.view(3, 2) @ y).view(-1)

    graph = compat.trace(function, [torch.ones(2, 3), torch.ones(2, 5)])
    assert seen == [True] and not torch.compiler.is_compiling()
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert [compat.is_view(node) for node in nodes] == [True, False, True]
    assert [tuple(compat.traced_shape(node)) for node in nodes] == [(3, 2), (3, 5), (15,)]


# Inductor imports a part of PyTorch that PyTorch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compile_graph():
    x, y = torch.randn(4), torch.randn(4)
    graph = compat.trace(lambda x, y: [(x * y).sin() + 1], [x, y])
    function = compat.compile_graph(graph, [x, y], {"realize_acc_reads_threshold": 100})
    torch.testing.assert_close(function(y, y)[0], (y * y).sin() + 1)


def test_trees():
    tree = (torch.ones(1), {"a": torch.ones(2), "b": (torch.ones(3),)})
    doubled = compat.tree_map(lambda x: 2 * x, tree)
    leaves, structure = compat.tree_flatten(doubled)
    assert [x.tolist() for x in leaves] == [[2.0] * n for n in (1, 2, 3)]
    again = compat.tree_unflatten(leaves, structure)
    assert again[1]["b"][0] is leaves[2] and again[1].keys() == {"a", "b"}


# --- Lightning -----------------------------------------------------------------------------------


class Small(pl.LightningModule):
    """Batches are numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.full((1, 1), float(batch))).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Small):
    def validation_step(self, batch, batch_idx):
        pass


class Manual(Small):
    """Counts steps of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        compat.count_steps(self.trainer, 10)


def make_trainer(**options):
    return pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_process_rank(monkeypatch):
    assert compat.process_rank() == 0
    code = "from losswatch import compat; print(compat.process_rank())"
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_is_started_by_slurm():
    assert not compat.is_started_by_slurm(make_trainer())
    assert compat.is_started_by_slurm(make_trainer(plugins=[SLURMEnvironment()]))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp", "auto"])
def test_forks_or_spawns(strategy):
    trainer = make_trainer(strategy=strategy, devices=1 if strategy == "auto" else 2)
    assert compat.forks_or_spawns(trainer) == (strategy in ("ddp_spawn", "ddp_fork"))


class Look(pl.Callback):
    """Keeps what compat tells at the end of each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(
            (compat.is_accumulating(trainer), compat.batches_between_validations(trainer))
        )


def test_why_not_installed(monkeypatch):
    class Own(WandbLogger):
        pass

    assert compat.why_not_installed(CSVLogger) is None
    monkeypatch.setattr(pl.loggers.wandb, "_WANDB_AVAILABLE", RequirementCache("nosuch>=1"))
    for logger in (WandbLogger, Own):
        with pytest.raises(ModuleNotFoundError) as raised:
            logger()
        assert compat.why_not_installed(logger) == str(raised.value)
    names = [f"_{name.upper()}_AVAILABLE" for name in ("comet", "mlflow", "wandb")]
    assert all(hasattr(getattr(pl.loggers, n.split("_")[1].lower()), n) for n in names)


def test_the_training_loop():
    look = Look()
    trainer = make_trainer(accumulate_grad_batches=2, val_check_interval=4, callbacks=[look])
    trainer.fit(Validated(), range(8), range(1))
    assert look.seen == [(True, 4), (False, 4)] * 4


def test_count_steps():
    trainer = make_trainer(max_steps=35)
    module = Manual()
    trainer.fit(module, range(8))
    assert trainer.global_step == 40  # the first multiple of 10 that is enough
    compat.count_steps(trainer, 2)
    assert trainer.global_step == 42


def test_loop_state_is_that_of_a_run():
    """All counts are those that Lightning itself saves at a validation after as many steps."""

    class Save(pl.Callback):
        def on_validation_end(self, trainer, *_):
            self.loop = trainer.fit_loop.state_dict()

    save = Save()
    trainer = make_trainer(max_steps=8, val_check_interval=5, callbacks=[save])
    trainer.fit(Validated(), range(8), range(1))
    state = compat.loop_state(5)

    def counts(loop):
        progress = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        batches = loop["epoch_loop.batch_progress"]
        return {
            "steps": [progress["total"], progress["current"]],
            "ready": [batches[when]["ready"] for when in ("total", "current")],
            "epoch": loop["epoch_progress"]["current"],
            "stepped": loop["epoch_loop.state_dict"]["_batches_that_stepped"],
        }

    assert state.keys() == save.loop.keys()
    assert counts(state) == counts(save.loop)


# --- Hydra ---------------------------------------------------------------------------------------


@pytest.fixture
def multirun(tmp_path):
    """The config of a sweep, as Hydra gives it to callbacks, sweepers and launchers."""
    schema.register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        given = ["experiment=smoke", f"hydra.sweep.dir='{tmp_path}'"]
        cfg = hydra.compose("config", given, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        yield cfg


def test_basic_sweeper(multirun):
    """It splits a grid, and lets its runs be checked before it launches them."""
    seen = []

    class Sweeper(compat.basic_sweeper()):
        def validate_batch_is_legal(self, batch):
            seen.append(("checked", batch))

    sweeper = Sweeper(max_batch_size=None, params={"optimizer.lr": "0.1,0.2"})
    sweeper.hydra_context = HydraContext(compat.config_loader(), compat.no_callbacks())
    sweeper.config, sweeper.launcher = multirun, Launched(seen)
    sweeper.sweep(["theta=0.5,[0.3,0.6]", "loss=dice", "seed=range(0,2)", "+note='a,b'"])
    runs = [
        [f"optimizer.lr={lr}", f"theta={theta}", "loss=dice", f"seed={seed}", "+note='a,b'"]
        for lr in (0.1, 0.2)
        for theta in ("0.5", "[0.3,0.6]")
        for seed in (0, 1)
    ]
    assert seen == [("checked", runs), ("launched", runs)]


class Launched:
    """A launcher that notes what it is to launch."""

    def __init__(self, seen):
        self.seen = seen

    def launch(self, job_overrides, initial_job_idx):
        self.seen.append(("launched", job_overrides))
        return []


def test_config_loader(multirun):
    loader = compat.config_loader()
    run = loader.load_sweep_config(multirun, ["loss=cce", "seed=3"])
    assert run.seed == 3 and run.hydra.runtime.choices.loss == "cce"
    assert list(run.hydra.overrides.task) == ["loss=cce", "seed=3"]
    assert {"cce", "dice"} <= set(loader.get_group_options("loss", config_name="config"))
    [folder] = [s.path for s in loader.get_sources() if s.scheme() == "file"]
    assert folder == str(ROOT / "conf")


def test_no_callbacks():
    callbacks = compat.no_callbacks()
    assert callbacks.callbacks == []
    callbacks.on_job_start(config=None, task_function=None)


@pytest.mark.parametrize("override", ["loss=null", "model=3", "optimizer=null"])
def test_not_a_choice(multirun, override):
    with pytest.raises(ValueError) as raised:
        hydra.compose("config", [override])
    assert str(raised.value).startswith(compat.NOT_A_CHOICE)


@pytest.mark.parametrize("override", ["loss=dice,cce", "data.root='Köln', Dom"])
def test_several_values(override):
    """Hydra says so to a single run, and to a sweep nothing."""
    parsed = OverridesParser.create().parse_overrides([override])
    with pytest.raises(ConfigCompositionException) as raised:
        ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=True)
    assert compat.several_values(raised.value) == override
    ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.MULTIRUN, from_shell=True)
    assert compat.several_values(ValueError("loss=dice,cce")) is None


# --- joblib --------------------------------------------------------------------------------------


def test_initialize_workers():
    # Local, so that the processes get them by value and need not import this file.
    def set_up():
        os.environ["SET_UP"] = "yes"

    def is_set_up(_):
        return os.environ.get("SET_UP")

    before = joblib.parallel.BACKENDS["loky"]
    compat.initialize_workers(set_up)
    try:
        found = joblib.Parallel(n_jobs=2, backend="loky")(map(joblib.delayed(is_set_up), "ab"))
    finally:
        joblib.register_parallel_backend("loky", before)
        joblib.externals.loky.get_reusable_executor().shutdown()
    assert found == ["yes", "yes"] and not is_set_up(None)


# --- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboards_event_file_can_be_written_to(tmp_path):
    with SummaryWriter(tmp_path, filename_suffix=".end") as writer:
        [path] = tmp_path.iterdir()
        file = compat.event_file(writer)
        writer.add_scalar("before", 1.0, 0)
        writer.flush()
        size = path.stat().st_size
        file.write(path.read_bytes())  # all records once more, between two ordinary writes
        file.flush()
        assert path.stat().st_size == 2 * size
        writer.add_scalar("after", 2.0, 1)
    assert list(tmp_path.iterdir()) == [path]
    events = list(EventFileLoader(str(path)).Load())
    tags = [value.tag for event in events for value in event.summary.value]
    assert tags == ["before", "before", "after"]
