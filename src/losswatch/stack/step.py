"""The gradient of one training step as a pure function, for stacks of runs and the compiler.

The step uses the network, the losses and the observation of an ordinary run (run/module.py,
watch/lightning.py). Three things differ. The images are drawn inside the step. The backward passes
of all rows are one batched vector-Jacobian product. The optimiser's rule is another pure function
(optimizers.py). So torch.vmap can map the step over stacked runs, and it can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from losswatch.data.random import TRAIN, draw
from losswatch.losses import LossSet
from losswatch.stack.flat_parameters import State, splitter
from losswatch.watch.record import as_row
from losswatch.watch.span import combine


def make_gradient(
    net: nn.Module,
    losses: LossSet,
    shape: tuple[int, ...],
    *,
    observed: bool,
    cosines: bool = False,
) -> Callable[..., Any]:
    """The step up to the optimiser, as a pure function of one run's tensors.

    Args:
        net, losses: of the run.
        shape: of its images, [N, 1, *space].
        observed: whether the function returns an observation.
        cosines: whether the observation has cosines.

    The function takes

        parameters: [P], the parameters that require a gradient, as one vector.
        buffers: name -> tensor; batch norm's statistics and frozen parameters.
        numbers: the run's numbers for `data.random.draw`; and `trained` [K], 1 at the trained loss
            and 0 elsewhere.
        step: int64 scalar, the number of finished steps.

    and returns the gradient [P], the new buffers, and the observation as a row, empty if there is
    none.
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
            gradients, _ = combine(coefficients, vmap(pull)(rows)[0])
            norms = torch.linalg.vector_norm(gradients, dim=1)
            unit = gradients / norms[:, None]
            seen = as_row(values, norms, unit @ unit.T if cosines else None)
            # Not a product with `trained`: another loss may be infinite, and 0 times that is NaN.
            own = torch.where(numbers["trained"][:, None] > 0, gradients, 0).sum(0)
            return own, buffers, seen
        row = trained_row(rows, coefficients, numbers["trained"])
        return pull(row)[0], buffers, values.new_zeros(0)

    return gradient


def trained_row(rows: Tensor, coefficients: Tensor, trained: Tensor) -> Tensor:
    """The derivative of the trained loss by the logits, from what `LossSet.rows` returns.

    Args:
        trained: [K], 1 at the trained loss and 0 elsewhere.
    """
    own = torch.where(trained[:, None] > 0, coefficients, 0).sum(0)
    own = own.view(-1, *[1] * (rows.ndim - 1))
    return torch.where(own != 0, own * rows, 0).sum(0)  # other losses' rows may hold NaN
