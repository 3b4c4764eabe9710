"""The networks: sizes, initial weights, and convolutions that equal PyTorch's."""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from losswatch.nets import ConvNet, UNet, layers
from losswatch.nets.cpu import fast_on_cpu
from losswatch.nets.layers import Conv2d

CONVS = (nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def size(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("dims, taps", [(2, 9), (3, 27)])
@pytest.mark.parametrize("classes", [2, 4])
def test_convnet_size(dims, taps, classes):
    plain = ConvNet(1, classes, dims=dims)
    assert size(plain) == (taps * 4 + 4) + (taps * 16 + 4) + (4 * classes + classes)
    # Batch norm has a scale and a shift, and the convolution then has no bias.
    assert size(ConvNet(1, classes, dims=dims, batch_norm=True)) == size(plain) + 2 * (8 - 4)
    deep = ConvNet(3, classes, dims=dims, width=5, depth=3)
    assert size(deep) == taps * 5 * (3 + 5 + 5) + 15 + 6 * classes


@pytest.mark.parametrize("batch_norm", [False, True])
def test_unet_size(batch_norm):
    def block(i, o):
        return 9 * o * (i + o) + (4 if batch_norm else 2) * o

    down = block(1, 8) + block(8, 16) + block(16, 32)
    up = (32 * 16 + 16) + block(32, 16) + (16 * 8 + 8) + block(16, 8)
    assert size(UNet(1, 2, batch_norm=batch_norm)) == down + up + 8 * 2 + 2


@pytest.mark.parametrize("make", [ConvNet, UNet])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_initialisation(make, dims, batch_norm):
    torch.manual_seed(0)
    net = make(1, 3, dims=dims, batch_norm=batch_norm, bn_momentum=0.07)
    convs = [m for m in net.modules() if isinstance(m, CONVS)]
    taps = [math.prod(m.kernel_size) for m in convs]
    for conv, k in zip(convs, taps, strict=True):
        bound = math.sqrt(6 / (k * (conv.in_channels + conv.out_channels)))
        assert conv.weight.abs().max() <= bound
        if conv.weight.numel() > 100:  # the standard deviation is bound / √3
            assert conv.weight.abs().max() > 0.9 * bound
            assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert conv.bias is None or not conv.bias.any()
    norms = [m for m in net.modules() if isinstance(m, NORMS)]
    assert bool(norms) == batch_norm
    for norm in norms:
        assert (norm.eps, norm.momentum) == (1e-3, 0.07)


@pytest.mark.parametrize("make", [ConvNet, UNet])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_batch_norm_stands_between_convolution_and_relu(make, batch_norm):
    net = make(1, 2, batch_norm=batch_norm)
    row = [m for m in net.modules() if not list(m.children())]
    relus = [i for i, layer in enumerate(row) if isinstance(layer, nn.ReLU)]
    assert relus
    for i in relus:
        conv = row[i - 2] if batch_norm else row[i - 1]
        assert isinstance(conv, CONVS)
        assert isinstance(row[i - 1], NORMS) == batch_norm
        assert (conv.bias is None) == batch_norm
    heads = [m for m in row if isinstance(m, CONVS) and m.kernel_size[0] == 1]
    assert heads and all(head.bias is not None for head in heads)


def test_default_momenta_are_those_of_conf():
    for name, net in (("convnet", ConvNet(1, 2, batch_norm=True)), ("unet", UNet(1, 2))):
        file = Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml"
        momenta = {m.momentum for m in net.modules() if isinstance(m, NORMS)}
        assert momenta == {OmegaConf.load(file).bn_momentum}


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [1, 4, layers.NARROW + 1])
def test_compiled_form_is_the_convolution(monkeypatch, kernel, bias, inputs):
    """Value and gradients, in float64, of the form that is used only when compiling."""
    torch.manual_seed(0)
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = Conv2d(inputs, 3, kernel, padding=padding, bias=bias).double()
    x = torch.randn(2, inputs, 5, 7, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(x, conv.weight, conv.bias, padding=padding)
    back = torch.randn_like(wanted)
    parameters = [x, *conv.parameters()]
    wanted_gradients = torch.autograd.grad(wanted, parameters, back)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if inputs <= layers.NARROW:  # so that the test fails if PyTorch's own is called
        monkeypatch.setattr(nn.Conv2d, "forward", None)
    y = conv(x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(
        torch.autograd.grad(y, parameters, back), wanted_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs, outputs", [(2, 3), (16, 8), (16, 16)])
def test_channels_last_form_is_the_convolution(monkeypatch, kernel, bias, inputs, outputs):
    """Value and gradients of the eager form equal PyTorch's convolution in its default layout."""
    torch.manual_seed(0)
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = Conv2d(inputs, outputs, kernel, padding=padding, bias=bias).double()
    x = torch.randn(2, inputs, 6, 8, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(x, conv.weight, conv.bias, padding=padding)
    back = torch.randn_like(wanted)
    parameters = [x, *conv.parameters()]
    wanted_gradients = torch.autograd.grad(wanted, parameters, back)
    if kernel == (1, 1) or outputs < 16 <= inputs:  # PyTorch's own must not be called
        monkeypatch.setattr(nn.Conv2d, "forward", None)
    y = conv(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(
        torch.autograd.grad(y, parameters, back), wanted_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dims, layout",
    [(2, torch.contiguous_format), (2, torch.channels_last), (3, torch.channels_last_3d)],
)
def test_enlarging_is_interpolation(dims, layout):
    """Value and gradient; the gradient is a part of a larger tensor, as after a concatenation."""
    x = torch.randn(2, 3, *(4, 6, 2)[:dims], dtype=torch.float64)
    x = x.to(memory_format=layout).requires_grad_()
    wanted = F.interpolate(x, scale_factor=2.0)
    y = layers.Enlarge.apply(x)
    assert torch.equal(y, wanted)
    back = torch.randn_like(torch.cat([wanted, wanted], dim=1))[:, :3]
    gradients = [torch.autograd.grad(z, x, back)[0] for z in (y, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(layers.Enlarge.apply, x)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "widths, good, bad", [((4,), (1, 3, 8), ()), ((2, 3, 4), (4, 8, 12), (1, 2, 6, 9))]
)
def test_unet_takes_what_its_levels_divide(dims, widths, good, bad):
    net = UNet(2, 3, dims=dims, widths=widths).eval()
    for side in good:
        assert net(torch.zeros(1, 2, *(side,) * dims)).shape == (1, 3, *(side,) * dims)
    for side in bad:
        with pytest.raises(ValueError, match=r"divisible by 4.*data.image_size or model.widths"):
            net(torch.zeros(1, 2, *(side,) * dims))


@pytest.mark.parametrize("dims", [2, 3])
def test_convnet_takes_any_size(dims):
    net = ConvNet(1, 2, dims=dims)
    for side in (1, 2, 7):
        assert net(torch.zeros(1, 1, *(side,) * dims)).shape == (1, 2, *(side,) * dims)


@pytest.mark.parametrize(
    "make, knobs, message",
    [
        (UNet, {"widths": []}, r"model.widths must name .* at least one level, got \[\]"),
        (UNet, {"widths": [8, 0]}, "each of model.widths must be a whole number .* got 0"),
        (UNet, {"widths": [8, 2.5]}, "each of model.widths must be a whole number .* got 2.5"),
        (UNet, {"convs": 0}, "model.convs must be a whole number of at least 1, got 0"),
        (ConvNet, {"width": -1}, "model.width must be a whole number of at least 1, got -1"),
        (ConvNet, {"depth": 0}, "model.depth must be a whole number of at least 1, got 0"),
        (ConvNet, {"depth": True}, "model.depth must be a whole number of at least 1, got True"),
    ],
)
def test_bad_settings(make, knobs, message):
    with pytest.raises(ValueError, match=message):
        make(1, 2, **knobs)


def test_unet_uses_every_level():
    """Each parameter affects the output, those of the skip connections too."""
    torch.manual_seed(0)
    net = UNet(1, 2, batch_norm=False).double()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    net(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_unet_narrows_before_it_enlarges():
    """A 1x1 convolution and an interpolation can change places, as a comment in UNet claims."""
    conv = layers.convolution(2, 4, 2, 1, bias=True)
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(
        F.interpolate(conv(x), scale_factor=2.0), conv(F.interpolate(x, scale_factor=2.0))
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_serves_the_next_step():
    """Counts pages from the system, in a process with the allocator's default settings."""
    steps = """
import resource, torch
from losswatch.nets import ConvNet
from losswatch.nets.cpu import fast_on_cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
with fast_on_cpu(ConvNet(1, 2)):
    faults()  # the first time all pieces are new
    print(before, min(faults() for _ in range(5)))  # the system may take idle pages back in between
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", steps], env=environment, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert after < 100 < before


@pytest.mark.parametrize(
    "net, native",
    [
        (lambda: ConvNet(1, 2), True),
        (lambda: ConvNet(1, 2, dims=3), False),
        (lambda: UNet(1, 2, widths=(4, 8)), False),
        (lambda: UNet(1, 2), False),
    ],
    ids=["convnet", "convnet-3d", "unet-narrow", "unet"],
)
def test_onednn_is_off_only_where_it_is_slower(net, native):
    before = torch.backends.mkldnn.enabled
    with fast_on_cpu(net()):
        assert torch.backends.mkldnn.enabled == (before and not native)
    assert torch.backends.mkldnn.enabled == before


def test_denormals_are_numbers_again_or_still_zero():
    """The switch is as before, on or off, though PyTorch cannot tell its state."""

    def are_zero():
        return bool(torch.tensor(1e-40) * 1 == 0)

    for before in (False, True, False):
        torch.set_flush_denormal(before)
        with fast_on_cpu(ConvNet(1, 2)):
            assert are_zero()
        assert are_zero() == before
