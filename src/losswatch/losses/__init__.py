"""Segmentation losses: one Dice family, cross entropy, and sets of them evaluated together.

    frozen.py         checks the settings of a loss and makes them read-only
    inputs.py         explains in one line which logits and targets no loss can take
    sums.py           the sums over pixels that losses read, by name
    pixels.py         from pixels to sums, and the only derivative by pixels, in plain form
    fast.py           the same, as fast as a CPU allows
    sum_table.py      the sums as one differentiable function of the logits
    ranks.py          the sums over the batches of all ranks
    rows.py           the few rows that span the gradients of all losses of a table
    table_loss.py     what losses of sums have in common
    loss_groups.py    many losses of one table evaluated together
    dice.py, cross_entropy.py    the losses as formulas on the sums
    compose.py        weighted sums, and sets that share a table

Everywhere: logits are floating point [N, C, *space] with any number of spatial axes. The target
holds class indices [N, *space] (any integer type, or boolean) or one-hot or soft labels
[N, C, *space]. An infinite logit gives the limit of large ones where that exists, as for one of two
classes. Where that limit does not exist, a CPU raises ValueError, and the value is NaN elsewhere.
An empty batch gives 0. Half-precision logits are cast to float32 first, and autocast lowers no
operation that is used here: the values are those of float32 with or without autocast. float64
stays float64.

Under `torch.distributed` the sums, and the pixel count of cross entropy, run over all ranks (one
all-reduce). Gradients are scaled by the number of ranks, so that their average over ranks, as
`DistributedDataParallel` takes it, is the gradient of all batches together.

A gradient cannot be differentiated again: `create_graph=True`, or a gradient inside a gradient of
torch.func, raises NotImplementedError.
"""

from losswatch.losses.compose import LossSet, OneHotTarget, Sum
from losswatch.losses.cross_entropy import CrossEntropy
from losswatch.losses.dice import Dice
from losswatch.losses.inputs import check_inputs
from losswatch.losses.table_loss import value_and_slope

__all__ = [
    "CrossEntropy",
    "Dice",
    "LossSet",
    "OneHotTarget",
    "Sum",
    "check_inputs",
    "value_and_slope",
]
