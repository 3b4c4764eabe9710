"""Compiles a pure function of tensors: traces it, rewrites some operations, and calls Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from losswatch.compat import (
    compile_graph,
    is_out_of_memory,
    is_view,
    trace,
    traced_shape,
    tree_flatten,
    tree_unflatten,
)
from losswatch.data.random import RESOLUTION
from losswatch.stack.refusal import NotStackable
from losswatch.text import one_line

REGISTER = 16  # float32 numbers in a register of a CPU with AVX-512


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call for the shapes of that call.

    The first call raises

        NotStackable: the compiler cannot compile the function.
        RuntimeError: the function cannot be traced.
    """
    ready: Callable[..., Any] | None = None
    returned: Any = None

    def call(*inputs: Any) -> Any:
        nonlocal ready, returned
        leaves, structure = tree_flatten(inputs)
        if ready is None:

            def flat(*leaves: Tensor) -> Sequence[Tensor]:
                nonlocal returned
                outputs, returned = tree_flatten(function(*tree_unflatten(leaves, structure)))
                return outputs

            ready = _compile(flat, leaves)
        return tree_unflatten(ready(*leaves), returned)

    return call


def _compile(function: Callable[..., Any], example: Sequence[Tensor]) -> Callable[..., Any]:
    graph = trace(function, example)
    is_on_cpu = example[0].is_cpu
    _rewrite(graph, is_on_cpu)
    # A sum over the positions and channels of a kernel reads many numbers. By default Inductor cuts
    # the sum into parts, and writes and reads the result of each. On a CPU that takes a fifth more
    # time.
    patches = {"realize_acc_reads_threshold": 100} if is_on_cpu else {}
    try:
        return compile_graph(graph, example, patches)
    except Exception as error:  # only the compiler's code runs here
        if is_out_of_memory(error):
            raise
        why = one_line(error).split(". ")[0][:200]
        raise NotStackable(f"the compiler cannot compile them over runs: {why}") from error


def _rewrite(graph: torch.fx.GraphModule, is_on_cpu: bool) -> None:
    """Replace operations that Inductor cannot compile, or that are slow."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        # Inductor may change the layout of a tensor. Then a view of the tensor needs a copy.
        if is_view(node):
            node.target = aten.reshape.default
        # Inductor would compute the end of the hash again wherever an image or a label is read.
        if is_on_cpu and node.target is aten.mul.Tensor and node.args[1] == RESOLUTION:
            _store(graph, node)
        # MKL multiplies matrices in half the time if the last side is a multiple of a register. So
        # A B is computed as (B' A')'.
        if is_on_cpu and node.target is aten.bmm.default:
            a, b = node.args
            if traced_shape(a)[1] % REGISTER == 0 < traced_shape(b)[2] % REGISTER:
                with graph.graph.inserting_before(node):
                    a, b = (graph.graph.call_function(aten.mT.default, (x,)) for x in (a, b))
                    swapped = graph.graph.call_function(aten.bmm.default, (b, a))
                node.target, node.args = aten.mT.default, (swapped,)
    graph.recompile()


def _store(graph: torch.fx.GraphModule, node: torch.fx.Node) -> None:
    """Make Inductor write a tensor to memory once, because `as_strided` only reads memory."""
    shape = traced_shape(node)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    with graph.graph.inserting_after(node):
        stored = graph.graph.call_function(
            torch.ops.aten.as_strided.default, (node, list(shape), strides)
        )
    node.replace_all_uses_with(stored, delete_user_cb=lambda user: user is not stored)
