"""What a training step hands its outputs to."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Watcher(Protocol):
    """Sees the outputs of each training step: after the forward pass, before the backward pass.

    A LightningModule keeps a list of watchers and calls `see` of each in its `training_step`.
    Lightning's own hooks do not pass these tensors: `on_before_backward` gets the value alone, and
    when `on_train_batch_end` is called the graph is gone. A watcher that is a callback too keeps
    the tensors for its `on_before_backward` and drops them there, so that no graph outlives its
    step.
    """

    def see(self, logits: Tensor, target: Tensor, value: Tensor) -> None:
        """Take the outputs of one step.

        Args:
            logits: [N, C, *space], with the graph back to the parameters.
            target: int64 [N, *space].
            value: the trained loss of these, a scalar with its graph.
        """
