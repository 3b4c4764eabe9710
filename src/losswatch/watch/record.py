"""Keeps the numbers of many observations on the device, to write them in blocks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losswatch.events.tags import GRAD_COSINE, GRAD_NORM, LOSS, TRAINED, watched_tags
from losswatch.text import reason

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


def as_row(values: Tensor, norms: Tensor, cosines: Tensor | None) -> Tensor:
    """Values [K], norms [K] and the pairs of cosines [K, K], if there are any, as one vector."""
    parts = [values, norms]
    if cosines is not None:
        a, b = torch.triu_indices(len(norms), len(norms), offset=1, device=norms.device)
        parts.append(cosines[a, b])
    return torch.cat(parts)


class Record:
    """The observations of a training.

    Args:
        every_n_steps: multiples of it are observed; at least 1.
        cosines: whether cosines are kept.

    Raises:
        ValueError: every_n_steps is not a whole number of at least 1.
    """

    BLOCK = 500  # observations between two writes, at most
    SECONDS = 5.0  # between two writes of blocks that are not full, at least
    SPOILT = "presets and losses of losswatch are NaN there"

    def __init__(self, every_n_steps: int, cosines: bool) -> None:
        n = every_n_steps
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"every_n_steps={n!r}: allowed is a whole number of at least 1")
        self.every_n_steps, self.cosines = n, cosines
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start a training after this number of steps."""
        self.step, self.is_due, self.is_off = step - 1, False, False
        self.tags: list[str] = []
        self.steps: list[int] = []
        self.trained: str | None = None
        self.blocks = 0  # the number of blocks that were drained
        self.explain: Callable[[Sequence[float]], str] = str
        self.block = self.newest = torch.empty(0)
        self.written = time.monotonic()
        self.warned: set[str] = set()

    def move_to(self, step: int) -> None:
        """Go to a step, if it is new. Multiples of `every_n_steps` are due."""
        if step != self.step and not self.is_off:
            # Some loops count in steps greater than 1.
            self.is_due = step // self.every_n_steps > self.step // self.every_n_steps
            self.step = step

    def give_up(self, error: Exception, strict: bool) -> None:
        """Raise an error in watching if `strict`; else log one warning and stop watching."""
        if strict:
            raise error
        if not self.is_off:
            log.warning("losswatch: nothing is watched from here on: %s", reason(error))
        self.is_off, self.is_due = True, False

    def open(
        self,
        names: Sequence[str],
        device: torch.device,
        explain: Callable[[Sequence[float]], str],
        trained: str | None,
    ) -> None:
        """Prepare the blocks, at the first observation.

        Args:
            names: of the observed losses.
            device: of the numbers.
            explain: turns the three numbers of a fault (`losses.inputs`) into a line.
            trained: the name of the trained loss; None: unknown.
        """
        self.tags, self.explain = watched_tags(names, self.cosines), explain
        self.trained = trained
        self.block = torch.empty(self.BLOCK, len(self.tags), device=device)
        self.faults = torch.zeros(self.BLOCK, 3, device=device)

    def add(
        self,
        values: Tensor,
        norms: Tensor,
        cosines: Tensor,
        fault: Tensor | None = None,
        failed: Mapping[str, str] = MappingProxyType({}),
    ) -> bool:
        """Keep the numbers of this step, and return whether it is time to write.

        Args:
            values, norms, cosines: see `Seen`.
            fault: of output and target, [3] (`losses.inputs`).
            failed: why losses failed, by name.

        Raises:
            ValueError: the number of losses is not that of the first observation.
        """
        self.newest = as_row(values, norms, cosines if self.cosines else None)
        if len(self.newest) != len(self.tags):
            raise ValueError(f"the number of heads changed at step {self.step}")
        for name, why in failed.items():
            if name not in self.warned:
                self.warned |= {name, f"{LOSS}{name}", f"{GRAD_NORM}{name}"}
                log.warning("losswatch: loss %s failed at step %d: %s", name, self.step, why)
        self.block[len(self.steps)] = self.newest
        if fault is not None:
            self.faults[len(self.steps)] = fault
        self.steps.append(self.step)
        self.is_due = False
        return len(self.steps) == self.BLOCK or time.monotonic() - self.written > self.SECONDS

    def latest(self) -> dict[str, float]:
        """The values of the newest observation, by tag."""
        names = [tag for tag in self.tags if tag.startswith(LOSS)]
        return dict(zip(names, self.newest.tolist(), strict=False))

    def drain(self) -> tuple[np.ndarray, np.ndarray]:
        """The steps [B] and numbers [B, tags] kept so far; then forget them."""
        import numpy as np  # imported late: `from losswatch import Watch` needs only PyTorch

        steps, self.steps, self.written = np.array(self.steps, int), [], time.monotonic()
        if not len(steps):
            return steps, np.empty((0, len(self.tags)))
        self.blocks += 1
        values = self.block[: len(steps)].cpu().numpy()
        faults = self.faults[: len(steps)].cpu().numpy().copy()
        self.faults.zero_()
        for step, fault in zip(steps, faults, strict=True):
            if fault[0] > 0 and (line := self.explain(fault.tolist())) not in self.warned:
                self.warned.add(line)
                log.warning("losswatch: step %d: %s; %s", step, line, self.SPOILT)
        for tag, column in zip(self.tags, values.T, strict=True):
            rows = zip(steps, column, faults[:, 0], strict=True)
            bad = [(s, v) for s, v, fault in rows if not abs(v) < 1e38 and not fault > 0]
            if bad and tag not in self.warned and not tag.startswith(GRAD_COSINE):
                self.warned.add(tag)
                log.warning("%s is %s at step %d", tag, bad[0][1], bad[0][0])
        return steps, values

    def write(self, writer: SummaryWriter, steps: np.ndarray, values: np.ndarray) -> None:
        """Write a block to TensorBoard; with the first one, the name of the trained loss."""
        from losswatch.events.encode import write_scalars

        write_scalars(writer, self.tags, steps, values)
        if self.blocks == 1 and self.trained is not None:
            writer.add_text(TRAINED, self.trained, steps[0])
