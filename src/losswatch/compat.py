"""All private and internal names of other libraries that losswatch uses.

A new version may move any of them. tests/test_compat.py has a test for each function here, and
pyproject.toml limits the versions to those that passed. Imports are inside the functions, because
the report and the start of Hydra import this file but do not need PyTorch or Lightning.
"""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl
    import torch
    from hydra._internal.callbacks import Callbacks
    from hydra.core.config_loader import ConfigLoader
    from hydra.plugins.sweeper import Sweeper
    from torch import Tensor, nn
    from torch.utils.tensorboard import SummaryWriter

# --- PyTorch: transforms and hooks ---------------------------------------------------------------


def recorded() -> bool:
    """Whether a compiler or a tracer records operations. It would keep tensors that hold data."""
    import torch

    if torch.compiler.is_compiling():
        return True
    # No public function tells whether dispatch modes (FakeTensor, make_fx) are active.
    return torch._C._len_torch_dispatch_stack() > 0


def traced(x: Tensor) -> bool:
    """Whether a compiler, a tracer or a torch.func transform hides the numbers of a tensor.

    Code must then not read values, and in-place operations may fail.
    """
    import torch

    if recorded():
        return True
    functorch = torch._C._functorch  # legacy: `autograd.grad(is_grads_batched=True)` makes these
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def grad_levels(x: Tensor) -> int:
    """How many active torch.func transforms differentiate by x."""
    import torch

    functorch, levels = torch._C._functorch, 0
    while functorch.is_functorch_wrapped_tensor(x):
        levels += functorch.is_gradtrackingtensor(x) and x.requires_grad
        x = functorch.get_unwrapped(x)
    return levels


def is_functorch_active() -> bool:
    """Whether a torch.func transform is active."""
    import torch

    return torch._C._are_functorch_transforms_active()


def softmax_backward(gradient: Tensor, p: Tensor) -> Tensor:
    """p·(gradient - Σ_c p·gradient), the derivative through a softmax over axis 1, in one pass."""
    import torch

    return torch._softmax_backward_data(gradient, p, 1, p.dtype)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of this module does something other than the `forward` of its class.

    Hooks with an attribute `only_observes`, such as that of `Watch`, do not count.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    acting = any(not hasattr(hook, "only_observes") for kind in hooks for hook in kind.values())
    return acting or "forward" in module.__dict__


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether a hook may change the gradient of a tensor, or act on it."""
    return bool(x._backward_hooks or x._post_accumulate_grad_hooks)


@contextmanager
def without_hooks(x: Tensor) -> Iterator[None]:
    """Remove the hooks of a tensor. Restores them on exit."""
    hooks = {} if x._backward_hooks is None else x._backward_hooks
    kept = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(kept)


# The tensors for which `retain_grad` was called, by id; see `watch_kept_gradients`.
_keeping: dict[int, weakref.ref[Tensor]] = {}


def watch_kept_gradients() -> None:
    """Remember from now on the tensors for which `Tensor.retain_grad` is called.

    Each backward pass adds to the gradient that such a tensor keeps, and PyTorch has no list of
    these tensors.
    """
    import torch

    original = torch.Tensor.retain_grad
    if hasattr(original, "is_watched"):
        return

    @functools.wraps(original)
    def retain_grad(self: Tensor) -> None:
        original(self)
        if self.retains_grad:
            key = id(self)
            _keeping[key] = weakref.ref(self, lambda _: _keeping.pop(key, None))

    retain_grad.is_watched = True  # type: ignore[attr-defined]
    torch.Tensor.retain_grad = retain_grad  # type: ignore


def note_kept_gradients() -> Callable[[], None]:
    """Note the gradients that tensors keep now. Returns a function that restores them."""
    kept = [x for reference in list(_keeping.values()) if (x := reference()) is not None]
    gradients = [x.grad for x in kept]

    def restore() -> None:
        for x, gradient in zip(kept, gradients, strict=True):
            x.grad = gradient

    return restore


# --- PyTorch: errors -----------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on a GPU or a CPU, also within a compiler."""
    import torch

    inner = getattr(error, "inner_exception", None)  # of Inductor's errors
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        # On the CPU PyTorch raises a plain RuntimeError.
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
        or (isinstance(inner, BaseException) and is_out_of_memory(inner))
    )


def why_not_differentiated(error: RuntimeError) -> str | None:
    """What to do if a graph cannot be differentiated; None for any other error."""
    reasons = {
        "second time": "the graph is gone: observe before backward()",
        "use_reentrant": "activation checkpointing must be that of use_reentrant=False",
        "donated buffer": "the network was compiled for one backward pass: set "
        "torch._functorch.config.donated_buffer = False before its first step",
    }
    return next((why for part, why in reasons.items() if part in str(error)), None)


# --- PyTorch: compiling --------------------------------------------------------------------------


def trace(function: Callable[..., Any], example: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The ATen operations of a function of tensors. `is_compiling()` is true during the trace.

    Raises:
        RuntimeError: the function looks at values.
    """
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.compiler._compile_session_context():  # as under torch.compile
        return make_fx(function)(*example)


def traced_shape(node: torch.fx.Node) -> torch.Size:
    """The shape of the result of a node of `trace`."""
    return node.meta["val"].shape


def is_view(node: torch.fx.Node) -> bool:
    """Whether a node of `trace` is a view, which needs suitable strides."""
    import torch

    aten = torch.ops.aten
    return node.target in (aten.view.default, aten._unsafe_view.default)


def compile_graph(
    graph: torch.fx.GraphModule, example: Sequence[Tensor], patches: dict[str, Any]
) -> Callable[..., Any]:
    """The graph of `trace`, compiled by Inductor for tensors with the shapes of the example.

    torch.compile would use Dynamo. Dynamo does not support an autograd.Function within torch.func,
    and at each call it checks the shapes again, which takes a tenth of the step.

    Args:
        graph, example: the graph, and example inputs.
        patches: settings of torch._inductor.config.

    Raises:
        Exception: the compiler fails, mostly with an InductorError whose text has the cause.
    """
    from torch._inductor import standalone_compile

    return standalone_compile(
        graph,
        list(example),
        dynamic_shapes="from_example_inputs",
        options={"config_patches": patches},
    )


# --- PyTorch: trees of tensors -------------------------------------------------------------------


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` was applied to a module or a part of it."""
    import torch

    kind = torch._dynamo.OptimizedModule
    return any(isinstance(m, kind) or m._compiled_call_impl is not None for m in module.modules())


class KeptBuffers:
    """From now until `remove`, compiled networks allow several backward passes.

    By default the first backward pass may overwrite the tensors that it reads.
    """

    def __init__(self) -> None:
        from torch._functorch import config

        self.config, self.before = config, config.donated_buffer
        config.donated_buffer = False

    def remove(self) -> None:
        self.config.donated_buffer = self.before


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `function` to the tensors of a tree of tuples and dicts."""
    from torch.utils import _pytree

    return _pytree.tree_map(function, tree)


def tree_flatten(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a tree, and its structure."""
    from torch.utils import _pytree

    return _pytree.tree_flatten(tree)


def tree_unflatten(leaves: Sequence[Tensor], structure: Any) -> Any:
    """The tree whose tensors and structure `tree_flatten` returned."""
    from torch.utils import _pytree

    return _pytree.tree_unflatten(leaves, structure)


# --- Lightning: the machine ----------------------------------------------------------------------


def process_rank() -> int:
    """The rank of this process among those that train one run. Needs no Trainer."""
    from pytorch_lightning.utilities import rank_zero_only

    return rank_zero_only.rank  # type: ignore[attr-defined]


def is_started_by_slurm(trainer: pl.Trainer) -> bool:
    """Whether Lightning treats the tasks of a Slurm job as its ranks."""
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment)


def forks_or_spawns(trainer: pl.Trainer) -> bool:
    """Whether Lightning starts the ranks as children of this process, by multiprocessing."""
    from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def why_not_installed(logger: type) -> str | None:
    """The package that a logger of Lightning lacks, as its constructor would say; or None."""
    for module in (base.__module__ for base in logger.__mro__):
        package, _, name = module.rpartition(".")
        is_there = getattr(sys.modules[module], f"_{name.upper()}_AVAILABLE", True)
        if package == "pytorch_lightning.loggers" and not is_there:
            return str(is_there)
    return None


# --- Lightning: the training loop ----------------------------------------------------------------


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether the optimiser's step waits for further batches (trainer.accumulate_grad_batches)."""
    return trainer.fit_loop._should_accumulate()


def batches_between_validations(trainer: pl.Trainer) -> int:
    """The number of batches between two validations."""
    return int(trainer.val_check_batch or 1)


def count_steps(trainer: pl.Trainer, steps: int) -> None:
    """Add to trainer.global_step, which by itself counts only steps of Lightning's optimisers."""
    done = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    done.ready += steps
    done.completed += steps


def loop_state(steps: int) -> dict[str, Any]:
    """The state of the fit loop that Lightning saves at a validation after `steps` steps."""
    import pytorch_lightning as pl

    trainer = pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    loops = trainer.fit_loop.state_dict()
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    batches = loops["epoch_loop.batch_progress"]
    for when in ("total", "current"):
        optimizer["step"][when] = dict.fromkeys(("ready", "completed"), steps)
        batches[when] = dict.fromkeys(("ready", "started", "processed", "completed"), steps)
        loops["epoch_progress"][when] |= {"ready": 1, "started": 1}
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": steps - 1}  # counted after it saves
    return loops


# --- Hydra ---------------------------------------------------------------------------------------

# The ValueError that Hydra raises for `loss=null` begins so: a group needs the name of a file.
# The error has no class of its own, and its text does not help a user.
NOT_A_CHOICE = "Config group override"


def several_values(error: Exception) -> str | None:
    """The override with several values that Hydra refuses for a single run; None: another error."""
    found = re.match(r"Ambiguous value for argument '(.*)'\n1\. ", str(error), re.DOTALL)
    return found[1] if found else None


def basic_sweeper() -> type[Sweeper]:
    """The class of Hydra's sweeper over a grid, to be subclassed."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper


def config_loader() -> ConfigLoader:
    """Hydra's loader of configs, which also lists the files of a group and the search path.

    `hydra.compose` gives neither the `hydra` section of a sweep's run nor these lists.
    """
    from hydra.core.global_hydra import GlobalHydra

    return GlobalHydra.instance().config_loader()


def no_callbacks() -> Callbacks:
    """An empty set of callbacks, for jobs that must not call those of the sweep."""
    from hydra._internal.callbacks import Callbacks

    return Callbacks()


# --- joblib --------------------------------------------------------------------------------------


def initialize_workers(function: Callable[[], None]) -> None:
    """Make each new process of joblib's default backend call a function first.

    The launcher passes no initializer to `Parallel`, so the backend of that name is replaced. The
    public `register_parallel_backend` needs the class, whose place is internal.
    """
    import joblib
    from joblib.parallel import LokyBackend

    make = partial(LokyBackend, initializer=function)
    joblib.register_parallel_backend("loky", make)


# --- Ignite --------------------------------------------------------------------------------------


def is_handled_by_others(engine: Any, event: Any, kind: type) -> bool:
    """Whether an event of an engine has a handler that is not a method of an object of `kind`."""
    handlers = [handler for handler, *_ in engine._event_handlers[event]]
    return any(not isinstance(getattr(h, "__self__", None), kind) for h in handlers)


# --- TensorBoard ---------------------------------------------------------------------------------


def event_file(writer: SummaryWriter) -> Any:
    """TensorBoard's file object behind a `SummaryWriter`, with `write(bytes)` and `flush()`.

    Used for writing a whole block of encoded events at once. TensorBoard's public interface takes
    one event at a time.
    """
    assert writer.file_writer is not None
    return writer.file_writer.event_writer._async_writer._writer._writer
