"""The private and internal names of other libraries that losswatch uses, all in this one place.

A new version may move any of them. tests/test_compat.py has a test for each function here, and
pyproject.toml bounds the versions to those that passed. Imports stand inside the functions, since
the report and the start of Hydra import this file without needing PyTorch or Lightning.
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
    from hydra.core.utils import JobReturn
    from torch import Tensor, nn
    from torch.utils.tensorboard import SummaryWriter

# --- PyTorch: what is at work around a tensor ----------------------------------------------------


def recorded() -> bool:
    """Whether a compiler or a tracer records operations; it would keep tensors made of data."""
    import torch

    if torch.compiler.is_compiling():
        return True
    # There is no public way to ask for active dispatch modes (FakeTensor, make_fx) or transforms.
    return torch._C._len_torch_dispatch_stack() > 0


def traced(x: Tensor) -> bool:
    """Whether a compiler, a tracer or a torch.func transform stands between us and the numbers.

    Code then must not look at values, and in-place operations may not be allowed.
    """
    import torch

    if recorded():
        return True
    functorch = torch._C._functorch  # legacy: what `autograd.grad(is_grads_batched=True)` makes
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def grad_levels(x: Tensor) -> int:
    """How many of the torch.func transforms around us differentiate by x."""
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
    """Whether a call of this very module does something else than its class's `forward`.

    Hooks with an attribute `only_looks`, as that of `Watch`, do not count.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    acting = any(not hasattr(hook, "only_looks") for kind in hooks for hook in kind.values())
    return acting or "forward" in module.__dict__


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether a hook may change the gradient of a tensor, or act on it."""
    return bool(x._backward_hooks or x._post_accumulate_grad_hooks)


@contextmanager
def without_hooks(x: Tensor) -> Iterator[None]:
    """Inside, backward passes do not call the hooks of a tensor."""
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
    """From now on remember the tensors for which `Tensor.retain_grad` is called.

    Each backward pass adds to the gradient that such a tensor keeps, and PyTorch tells nobody which
    tensors of a graph do so.
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
    """What puts back the gradients that tensors keep now."""
    kept = [x for reference in list(_keeping.values()) if (x := reference()) is not None]
    gradients = [x.grad for x in kept]

    def restore() -> None:
        for x, gradient in zip(kept, gradients, strict=True):
            x.grad = gradient

    return restore


# --- PyTorch: errors -----------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on a GPU or on the CPU, in a compiler too."""
    import torch

    inner = getattr(error, "inner_exception", None)  # of Inductor's errors
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        # On the CPU PyTorch raises a plain RuntimeError.
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
        or (isinstance(inner, BaseException) and is_out_of_memory(inner))
    )


def why_not_differentiated(error: RuntimeError) -> str | None:
    """What to do about a graph that cannot be differentiated; None: the error is another one."""
    reasons = {
        "second time": "the graph is gone: observe before backward()",
        "use_reentrant": "activation checkpointing must be that of use_reentrant=False",
        "donated buffer": "the network was compiled for one backward pass: set "
        "torch._functorch.config.donated_buffer = False before its first step",
    }
    return next((why for part, why in reasons.items() if part in str(error)), None)


# --- PyTorch: compiling --------------------------------------------------------------------------


def trace(function: Callable[..., Any], example: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The ATen operations that a function of tensors does; is_compiling() is true meanwhile.

    Raises:
        RuntimeError: the function looks at values; see `stack.refusal.is_refusal`.
    """
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.compiler._compile_session_context():  # as under torch.compile
        return make_fx(function)(*example)


def traced_shape(node: torch.fx.Node) -> torch.Size:
    """The shape of what a node of `trace` computes."""
    return node.meta["val"].shape


def is_view(node: torch.fx.Node) -> bool:
    """Whether a node of `trace` is a view, which needs strides that fit."""
    import torch

    aten = torch.ops.aten
    return node.target in (aten.view.default, aten._unsafe_view.default)


def compile_graph(
    graph: torch.fx.GraphModule, example: Sequence[Tensor], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Inductor's code for a graph of `trace`, for tensors of the example's shapes.

    torch.compile would go through Dynamo. Dynamo does not take an autograd.Function under
    torch.func, and at each call it checks the shapes again, for a tenth of the step's time.

    Args:
        graph, example: the graph, and inputs of it.
        patches: settings of torch._inductor.config.

    Raises:
        Exception: the compiler cannot; most often an InductorError, with the cause in its text.
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
    """Whether `torch.compile` makes a module, or a part of it."""
    import torch

    kind = torch._dynamo.OptimizedModule
    return any(isinstance(m, kind) or m._compiled_call_impl is not None for m in module.modules())


class KeptBuffers:
    """From now until `remove`, networks are compiled so that several backward passes are possible.

    Otherwise the first one may overwrite what it reads.
    """

    def __init__(self) -> None:
        from torch._functorch import config

        self.config, self.before = config, config.donated_buffer
        config.donated_buffer = False

    def remove(self) -> None:
        self.config.donated_buffer = self.before


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree of tuples and dicts with `function` applied to its tensors."""
    from torch.utils import _pytree

    return _pytree.tree_map(function, tree)


def tree_flatten(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a tree, and its structure."""
    from torch.utils import _pytree

    return _pytree.tree_flatten(tree)


def tree_unflatten(leaves: Sequence[Tensor], structure: Any) -> Any:
    """The tree that `tree_flatten` took apart."""
    from torch.utils import _pytree

    return _pytree.tree_unflatten(leaves, structure)


# --- Lightning: the machine ----------------------------------------------------------------------


def process_rank() -> int:
    """The rank of this process among those that train one run; known before any Trainer is."""
    from pytorch_lightning.utilities import rank_zero_only

    return rank_zero_only.rank  # type: ignore[attr-defined]


def is_started_by_slurm(trainer: pl.Trainer) -> bool:
    """Whether Lightning takes its ranks to be the tasks of a Slurm job."""
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment)


def forks_or_spawns(trainer: pl.Trainer) -> bool:
    """Whether the ranks would be children of this process, by multiprocessing."""
    from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def why_not_installed(logger: type) -> str | None:
    """Which package one of Lightning's loggers lacks; its constructor would raise the same."""
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
    """After how many batches Lightning validates."""
    return int(trainer.val_check_batch or 1)


def count_steps(trainer: pl.Trainer, steps: int) -> None:
    """Add to trainer.global_step, which else counts the steps of Lightning's optimisers alone."""
    done = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    done.ready += steps
    done.completed += steps


def loop_state(steps: int) -> dict[str, Any]:
    """What Lightning saves of its fit loop at a validation after `steps` steps of one epoch."""
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

# How the ValueError begins that Hydra raises for `loss=null`, where a group needs the name of one
# of its files. It has no class of its own, and its text does not help a user.
NOT_A_CHOICE = "Config group override"


def several_values(error: Exception) -> str | None:
    """The override with several values of which Hydra says that a single run cannot have them."""
    found = re.match(r"Ambiguous value for argument '(.*)'\n1\. ", str(error), re.DOTALL)
    return found[1] if found else None


def split_grid(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a grid, in the order in which Hydra's basic sweeper runs them.

    Used to check all runs before the first one starts. Hydra calls `split_arguments` later, and
    offers no public way to ask for its result.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    [batch] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return batch


@contextmanager
def skip_validation(is_checked: Callable[[], bool]) -> Iterator[None]:
    """While this is open, a sweeper does not compose its runs once more if `is_checked()`.

    Hydra's sweepers compose each run only to see whether that is possible, which takes 70 ms a run.
    The patched method is that of the base class: Hydra loads its plugins from their files, so the
    class of the sweeper in use is another one than the class that an import gives.
    """
    from hydra.plugins.sweeper import Sweeper

    validate = Sweeper.validate_batch_is_legal

    def validate_unless_checked(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
        if not is_checked():
            validate(sweeper, batch)

    Sweeper.validate_batch_is_legal = validate_unless_checked  # type: ignore
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = validate  # type: ignore[method-assign]


def config_loader() -> ConfigLoader:
    """What Hydra composes configs with: it also lists the files of a group, and the search path.

    `hydra.compose` alone gives neither the `hydra` section of a sweep's run nor these lists.
    """
    from hydra.core.global_hydra import GlobalHydra

    return GlobalHydra.instance().config_loader()


def no_callbacks() -> Callbacks:
    """An empty set of callbacks, for jobs around which none of ours are to be called."""
    from hydra._internal.callbacks import Callbacks

    return Callbacks()


def job_error(job: JobReturn) -> Exception:
    """The error of a failed job. The public `return_value` would print a line, and raise it."""
    return job._return_value


# --- joblib --------------------------------------------------------------------------------------


def initialize_workers(function: Callable[[], None]) -> None:
    """Let each process that joblib's default backend starts from here on call a function first.

    `Parallel` takes no initializer from a launcher that passes none, so the backend of that name is
    replaced. The public `register_parallel_backend` needs the class, whose place is internal.
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
