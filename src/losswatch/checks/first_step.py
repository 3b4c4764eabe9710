"""Tries the first step of a run before training, so that a step that fails gives one clear line.

The trial does what training will do, with the run's own shapes: a forward pass, each loss and its
derivative, a backward pass and a step of the optimiser. Its results are thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils.flop_counter import FlopCounterMode

from losswatch.config.errors import ConfigError
from losswatch.data.form import Form
from losswatch.losses import LossSet
from losswatch.run.randomness import draws
from losswatch.watch.outputs import as_softmax, as_target


class Traits(NamedTuple):
    """What the first step shows of a network and its losses.

    Each list holds "model", or names of losses.
    """

    draws_random: list[str]  # those that draw from a global random generator
    keeps_state: list[str]  # those whose value for the same input changes from call to call
    layer_flops: float  # see `flops_of_layers`


def try_step(
    net: nn.Module,
    losses: LossSet,
    trained: str,
    make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    batch: tuple[Tensor, Tensor],
    form: Form,
    autocast: AbstractContextManager | None = None,
) -> tuple[Traits, torch.optim.Optimizer]:
    """Do one training step and call all losses. This changes `net` and `losses`.

    Args:
        net: on the device of the batch.
        losses: the losses watched, `trained` among them.
        make_optimizer: makes an optimiser from parameters.
        batch: images and labels.
        form: of the data.
        autocast: the context of the forward pass and the losses.

    Returns:
        what the step shows of the network and the losses, and the optimiser after its step.

    Raises:
        ConfigError: the step fails. The message is one line for the user.
    """
    for name, parameter in net.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ConfigError(
                f"model: {name} has no size before the first batch; give its layer the number of "
                "inputs instead of a lazy layer"
            )
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("model: no parameter requires a gradient, so there is nothing to train")
    images, target = batch
    draws_random, keeps_state = [], []
    with isolate_rng(), torch.enable_grad():
        with autocast or nullcontext():
            logits = _call("model", net, images)
            if _call("model", draws, net, images):
                draws_random.append("model")
            _check_logits(logits, (len(images), form.channels, *images.shape[2:]), images)
            if form.target == "sigmoid":
                logits = as_softmax(logits, "sigmoid")
            if form.target != "multilabel":
                target = _call("data", as_target, target, logits)
            for name, loss in zip(losses.names, losses.losses, strict=True):
                _try_loss(name, loss, logits, target)
                if not losses.is_foreign(name):
                    continue
                what = f"loss {name}"
                if _call(what, draws, loss, logits, target):
                    draws_random.append(name)
                if _call(what, _keeps_state, name, loss, logits, target):
                    keeps_state.append(name)
            loss = losses.losses[losses.names.index(trained)]
            value = _call(f"loss {trained}", loss, logits, target)
        _call(f"loss {trained}", value.backward)
    optimizer = _call("optimizer", make_optimizer, [*parameters, *loss.parameters()])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer must make a torch.optim.Optimizer, it makes a {type(optimizer).__name__}"
        )
    _call("optimizer", optimizer.step)
    for name, parameter in [*net.named_parameters(), *loss.named_parameters()]:
        if not parameter.isfinite().all():
            hint = ""
            if parameter.dtype == torch.float16:
                hint = "; an eps of 1e-8 is 0 in float16: raise it, or trainer.precision=bf16-true"
            raise ConfigError(f"optimizer: its first step makes {name} NaN or infinite{hint}")
    return Traits(draws_random, keeps_state, flops_of_layers(net, images)), optimizer


def flops_of_layers(net: nn.Module, images: Tensor) -> float:
    """The floating-point operations of a forward pass of a batch, for each layer with weights.

    If layers are small, most of a step's time is the overhead of calling them. Unlike a clock, the
    number is the same each time. It is infinite for a network that PyTorch cannot count.
    """
    layers = sum(1 for parameter in net.parameters() if parameter.ndim > 1)
    try:
        with torch.no_grad(), isolate_rng(), FlopCounterMode(display=False) as counter:
            net(images)
    except Exception:  # PyTorch cannot look into compiled and scripted networks
        return math.inf
    return counter.get_total_flops() / max(1, layers)


def _call(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of `what`.

    Raises:
        ConfigError: the call fails. The message is one line for the user.
    """
    try:
        return function(*args)
    except ConfigError:
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{what}: {message}") from error


def _check_logits(logits: Any, wanted: tuple[int, ...], images: Tensor) -> None:
    """Check that the network returns finite logits of this shape with a gradient.

    Raises:
        ConfigError: the network returns something else.
    """
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"model must return one tensor of logits, it returns a {type(logits).__name__}; wrap "
            "it in a module that returns the logits alone"
        )
    if logits.shape != wanted or not logits.is_floating_point():
        raise ConfigError(
            f"model must return logits of shape {wanted} for images of shape "
            f"{tuple(images.shape)}, it returns {tuple(logits.shape)} of {logits.dtype}"
        )
    if not logits.requires_grad:
        raise ConfigError(
            "model: its logits carry no gradient to its parameters, as under torch.no_grad()"
        )
    if not logits.isfinite().all():
        raise ConfigError("model: its logits are not finite at the first step")


def _try_loss(name: str, loss: nn.Module, logits: Tensor, target: Tensor) -> None:
    """Check that a loss has a scalar value with a gradient and does not change its arguments.

    Raises:
        ConfigError: the loss fails one of these checks.
    """
    leaf = logits.detach().requires_grad_()
    x, y = leaf.clone(), target.clone()
    value = _call(f"loss {name}", loss, x, y)
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        seen = repr(value)
        if isinstance(value, Tensor):
            seen = f"one of shape {tuple(value.shape)} and {value.dtype}"
        raise ConfigError(f"loss {name} must return a floating-point scalar tensor, not {seen}")
    if not torch.equal(x, logits) or not torch.equal(y, target):
        which = "target" if torch.equal(x, logits) else "logits"
        raise ConfigError(f"loss {name} changes the {which} in place; let it work on a clone")
    slope = None
    if value.requires_grad:
        [slope] = _call(f"loss {name}", partial(grad, allow_unused=True), value, leaf)
    if slope is None:
        raise ConfigError(f"loss {name}: its value has no gradient by the logits")


def _keeps_state(name: str, loss: nn.Module, logits: Tensor, target: Tensor) -> bool:
    """Whether a loss remembers earlier calls.

    Raises:
        ConfigError: the loss remembers them outside of its buffers and parameters. No checkpoint
            would hold that.
    """

    def value() -> Tensor:
        with isolate_rng():
            torch.manual_seed(0)
            return loss(logits.detach(), target).detach()

    def equal(a: Tensor, b: Tensor) -> bool:
        # A GPU may add numbers in another order at each call.
        return torch.allclose(a, b, rtol=1e-4 if a.is_cuda else 0, atol=0, equal_nan=True)

    kept = {key: tensor.clone() for key, tensor in loss.state_dict().items()}
    first = value()
    if equal(value(), first):
        return False
    loss.load_state_dict(kept)
    if not equal(value(), first):
        raise ConfigError(
            f"loss {name} gives another value for the same input when called again, and no "
            "checkpoint would hold what it remembers; keep that in buffers (register_buffer)"
        )
    return True
