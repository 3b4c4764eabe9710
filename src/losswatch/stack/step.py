"""One training step of one run as two pure functions, to be stacked over runs and compiled.

The same networks, losses and observations as in an ordinary run (module.py, probe.py); what differs
is that the images are drawn inside the step, the backward passes of all rows are one batched
vector-Jacobian product, and the optimiser's rule is written out, so that all of it can be mapped
over stacked runs by `torch.vmap` and compiled. The rule is a function of its own: what takes long
to compile is then the same for all optimisers, and found in the compiler's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import standalone_compile
from torch.func import functional_call, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from losswatch.data.random import TRAIN, draw
from losswatch.losses import LossSet
from losswatch.watch.probe import observe


class NotStackable(NotImplementedError):
    """These runs need the ordinary step; the message says in one line what of them does."""


State = dict[str, Tensor]
# (parameters, their gradient, moments, steps done before, numbers) -> (parameters, moments)
Rule = Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor, State], tuple[Tensor, tuple]]


def _adam(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], t: Tensor, n: State) -> Any:
    """torch.optim.Adam and AdamW; Kingma and Ba 2015, Loshchilov and Hutter 2019."""
    g = g + n["weight_decay"] * (1 - n["decoupled"]) * p
    p = p * (1 - n["lr"] * n["weight_decay"] * n["decoupled"])
    m = moments[0] + (1 - n["beta1"]) * (g - moments[0])
    v = n["beta2"] * moments[1] + (1 - n["beta2"]) * g * g
    # float64: 0.999^t must not lose the digits that make 1 - 0.999^t at small t.
    correction1 = 1 - n["beta1"].double() ** (t + 1)
    correction2 = 1 - n["beta2"].double() ** (t + 1)
    size = (n["lr"] / correction1).float()
    return p - size * m / (v.sqrt() / correction2.sqrt().float() + n["eps"]), (m, v)


def _sgd(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], t: Tensor, n: State) -> Any:
    """torch.optim.SGD, with momentum, Nesterov's too."""
    g = g + n["weight_decay"] * p
    m = torch.where(t > 0, n["momentum"] * moments[0] + g, g)
    g = torch.where(n["nesterov"] > 0, g + n["momentum"] * m, m)
    return p - n["lr"] * g, (m,)


def _adam_numbers(group: Mapping[str, Any], decoupled: float) -> dict[str, float]:
    if group["amsgrad"] or group["maximize"]:
        raise NotStackable("amsgrad and maximize are not written out for stacked runs")
    beta1, beta2 = group["betas"]
    return {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"],
            "weight_decay": group["weight_decay"], "decoupled": decoupled}  # fmt: skip


def _sgd_numbers(group: Mapping[str, Any]) -> dict[str, float]:
    if group["dampening"] or group["maximize"]:
        raise NotStackable("dampening and maximize are not written out for stacked runs")
    numbers = {key: float(group[key]) for key in ("momentum", "nesterov", "weight_decay")}
    return {"lr": group["lr"], **numbers}


def optimizer_rule(optimizer: torch.optim.Optimizer) -> tuple[Rule, dict[str, float], list[str]]:
    """The rule of a torch optimiser, its numbers, and the names of its moments in a state_dict.

    Raises:
        NotStackable: for one that is not written out here.
    """
    group = optimizer.param_groups[0]
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW)
        return _adam, _adam_numbers(group, float(decoupled)), ["exp_avg", "exp_avg_sq"]
    if type(optimizer) is torch.optim.SGD:
        return _sgd, _sgd_numbers(group), ["momentum_buffer"]
    raise NotStackable(f"{type(optimizer).__name__} is not written out for stacked runs")


def trained_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def splitter(net: nn.Module) -> Callable[[Tensor], State]:
    """The function that cuts [P] into the trained parameters of `net` by name."""
    shapes = {name: p.shape for name, p in trained_parameters(net).items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def split(flat: Tensor) -> State:
        parts = zip(shapes.items(), flat.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    return split


def make_gradient(
    net: nn.Module,
    losses: LossSet,
    shape: tuple[int, ...],
    *,
    observed: bool,
    cosines: bool = False,
) -> Callable[..., Any]:
    """The step up to the optimiser, as a pure function of one run's tensors.

    Args of the result:
        parameters: [P], those that require a gradient, one after another.
        buffers: name -> tensor, batch norm's statistics and frozen parameters.
        numbers: the run's own: `seed` (int64), `thresholds` [C - 1], `low`, `high`, `trained` [K]
            (1 at the loss trained with, else 0).
        step: int64 scalar, the steps done before.

    It returns the gradient [P], the new buffers, and what was observed (`probe.observe`), empty if
    not `observed`.
    """

    split = splitter(net)

    def gradient(parameters: Tensor, buffers: State, numbers: State, step: Tensor) -> Any:
        image, label = draw(numbers, TRAIN, step, shape)

        def forward(parameters: Tensor) -> tuple[Tensor, State]:
            moved = {name: b.clone() for name, b in buffers.items()}
            return functional_call(net, (split(parameters), moved), (image,)), moved

        logits, pull, buffers = vjp(forward, parameters, has_aux=True)  # type: ignore[misc]
        values, rows, coefficients = losses.rows(logits, label)

        if observed:
            gradients = coefficients @ vmap(pull)(rows)[0]
            seen = observe(values, gradients, cosines)
            # Not a product: another loss may be infinite, and 0 times that is NaN.
            own = torch.where(numbers["trained"][:, None] > 0, gradients, 0).sum(0)
            return own, buffers, seen
        row = torch.tensordot(numbers["trained"] @ coefficients, rows, dims=1)
        return pull(row)[0], buffers, values.new_zeros(0)

    return gradient


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call for tensors of the shapes that it is given there."""
    ready: Callable[..., Any] | None = None
    returned: Any = None

    def call(*inputs: Any) -> Any:
        nonlocal ready, returned
        leaves, given = tree_flatten(inputs)
        if ready is None:

            def flat(*leaves: Tensor) -> Sequence[Tensor]:
                nonlocal returned
                outputs, returned = tree_flatten(function(*tree_unflatten(leaves, given)))
                return outputs

            ready = _compile(flat, leaves)
        return tree_unflatten(ready(*leaves), returned)

    return call


def _compile(function: Callable[..., Any], example: Sequence[Tensor]) -> Callable[..., Any]:
    """By make_fx and Inductor: Dynamo does not take an autograd.Function under torch.func, and to
    look at each call whether the shapes are still the same would take it a tenth of the time.
    """
    with torch.compiler._compile_session_context():  # is_compiling() is true, as under Dynamo
        graph = make_fx(function)(*example)
    aten, on_cpu = torch.ops.aten, example[0].is_cpu
    for node in list(graph.graph.nodes):
        # Inductor lays intermediate tensors out anew, and then a recorded view may not be one.
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        # MKL takes half the time for these products if the side that fills its registers of 16
        # numbers comes last: A B = (B' A')'.
        if on_cpu and node.target is aten.bmm.default:
            a, b = node.args
            if a.meta["val"].shape[1] % 16 == 0 < b.meta["val"].shape[2] % 16:
                with graph.graph.inserting_before(node):
                    a, b = (graph.graph.call_function(aten.mT.default, (x,)) for x in (a, b))
                    swapped = graph.graph.call_function(aten.bmm.default, (b, a))
                node.target, node.args = aten.mT.default, (swapped,)
    graph.recompile()
    # A sum over taps and channels reads many numbers. By default Inductor would cut it into parts,
    # and write and read what they give: on a CPU a fifth more time.
    patches = {"realize_acc_reads_threshold": 100} if on_cpu else {}
    return standalone_compile(
        graph,
        list(example),
        dynamic_shapes="from_example_inputs",
        options={"config_patches": patches},
    )
