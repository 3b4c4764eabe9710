"""The observer against one `torch.autograd.grad` for each loss, on networks of other libraries."""

import copy
import random
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import expected
from small import LOSSES, Checkpointed, Drawing, Focal, assert_seen, batch, foreground_dice, small
from torch import nn

from losswatch import CrossEntropy, Dice, LossSet, Observer, Sum, list_losses, load_loss

# --- Networks of other libraries -----------------------------------------------------------------


def smp_unet():
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=3)
    for p in net.encoder.parameters():
        p.requires_grad_(False)
    return net


def monai_unet():
    from monai.networks.nets import UNet

    return UNet(2, 3, 3, channels=(4, 8, 16), strides=(2, 2), dropout=0.2)


def deeplab():
    torchvision = pytest.importorskip("torchvision")
    models = torchvision.models.segmentation
    return models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


def dynunet():
    from monai.networks.nets import DynUNet

    return DynUNet(
        2, 3, 3, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
        filters=[4, 8, 16], deep_supervision=True, deep_supr_num=1,
    )  # fmt: skip


@pytest.mark.parametrize("make", [smp_unet, monai_unet, deeplab])
def test_exact_on_networks_of_others(make):
    torch.manual_seed(0)
    net = make().double()
    images, target = batch(classes=3, size=32)
    observer = Observer([*LOSSES, Focal()], net.parameters())
    output = net(images)
    assert observer.pairs(output, target)[0][0].shape == (2, 3, 32, 32)
    seen = observer(output, target)
    assert seen.names == (*LOSSES, "Focal")
    logits = output["out"] if isinstance(output, dict) else output
    losses = [*map(load_loss, LOSSES), Focal()]
    assert_seen(seen, expected(losses, logits, target, net.parameters()))


@pytest.mark.parametrize("heads", ["first", "all"])
def test_deep_supervision(heads):
    """MONAI's DynUNet stacks its outputs; they are given as a list. All share most weights."""
    torch.manual_seed(0)
    net = dynunet().double().train()
    images, target = batch(classes=3, size=16)
    outputs = net(images).unbind(1)
    assert len(outputs) == 2
    seen = Observer(LOSSES, net.parameters(), heads=heads)(outputs, target)
    losses = list(map(load_loss, LOSSES))
    used = outputs if heads == "all" else outputs[:1]
    wanted = [expected(losses, output, target, net.parameters()) for output in used]
    values, norms, cosines = zip(*wanted, strict=True)
    if heads == "all":
        assert seen.names == (*(f"{n}.0" for n in LOSSES), *(f"{n}.1" for n in LOSSES))
    torch.testing.assert_close(seen.values, torch.cat(values), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen.norms, torch.cat(norms), rtol=1e-9, atol=1e-9)
    k = len(LOSSES)
    torch.testing.assert_close(seen.cosines[-k:, -k:], cosines[-1], rtol=1e-9, atol=1e-9)


def test_shared_weights_and_several_branches():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu())), self.a(x).mean()

    torch.manual_seed(0)
    net = Net().double()
    images, target = batch()
    output, other = net(images)
    seen = Observer(LOSSES, net.parameters())(output, target)
    assert_seen(seen, expected(map(load_loss, LOSSES), output, target, net.parameters()))
    other.backward()  # the graph is still there


# --- Targets and outputs -------------------------------------------------------------------------


def one_hot(target, classes):
    return F.one_hot(target, classes).movedim(-1, 1)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "given",
    [
        lambda t, c: t, lambda t, c: t.unsqueeze(1), lambda t, c: t.unsqueeze(1).float(),
        lambda t, c: t.to(torch.uint8), lambda t, c: t.double(),
        lambda t, c: one_hot(t, c), lambda t, c: one_hot(t, c).float(),
        lambda t, c: one_hot(t, c).bool(),
    ],
    ids=["indices", "monai", "float", "uint8", "double", "one-hot", "float one-hot", "bool"],
)  # fmt: skip
def test_targets_of_any_form(device, classes, given):
    net = small(classes, device)
    images, target = batch(classes, device=device)
    output = net(images)
    seen = Observer(LOSSES, net.parameters())(output, given(target, classes))
    assert_seen(seen, expected(map(load_loss, LOSSES), output, target, net.parameters()))


def test_a_module_of_others_gets_the_target_as_it_is():
    from monai.losses import DiceCELoss

    net = small()
    images, target = batch()
    output, target = net(images), target.unsqueeze(1)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    seen = Observer({"mine": loss, "preset": "dice_ce_monai"}, net.parameters())(output, target)
    wanted = expected([loss], output, target, net.parameters())
    for found, right in zip(seen[1:3], wanted[:2], strict=True):
        torch.testing.assert_close(found, right.expand(2), rtol=1e-6, atol=1e-9)


def test_soft_labels():
    net = small(3)
    images, _ = batch(3)
    soft = torch.rand(2, 3, 8, 8, dtype=torch.float64).softmax(1)
    output = net(images)
    seen = Observer(LOSSES, net.parameters())(output, soft)
    assert_seen(seen, expected(map(load_loss, LOSSES), output, soft, net.parameters()))


def test_ignored_pixels(device):
    net = small(3, device)
    images, target = batch(3, device=device)
    target[0, :3] = 255
    output = net(images)
    losses = [load_loss(name, ignore_index=255) for name in LOSSES]
    wanted = expected(losses, output, target, net.parameters())
    assert_seen(Observer(LOSSES, net.parameters(), ignore_index=255)(output, target), wanted)
    clear = Observer(LOSSES, net.parameters())
    with pytest.raises(ValueError, match="target: holds class 255, allowed are 0 to 2"):
        clear(output, target)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize(
    "given", [lambda t: t, lambda t: t.unsqueeze(1), lambda t: t.unsqueeze(1).double()]
)
def test_one_channel(device, activation, given):
    """Against PyTorch's binary cross entropy and the Dice of the foreground, written out."""
    net = small(1, device)
    images, target = batch(device=device)
    y, z = target.unsqueeze(1).double(), net(images)
    p = z.sigmoid()
    mine = Dice(activation=activation)  # a module: it reads the one channel by itself
    observer = Observer(
        {"cce_stable": "cce_stable", "dice_fg": "dice_fg", "mine": mine}, net.parameters(),
        activation=activation,
    )  # fmt: skip
    seen = observer(z if activation == "sigmoid" else p, given(target))
    losses = [
        lambda z, y: F.binary_cross_entropy_with_logits(z, y),
        lambda z, y: foreground_dice(z.sigmoid(), y),
        lambda z, y: foreground_dice(z.sigmoid(), y),
    ]
    assert_seen(seen, expected(losses, z, y, net.parameters()), 1e-8)


def test_classes_that_overlap():
    net = small(3)
    images, _ = batch()
    y = torch.randint(0, 2, (2, 3, 8, 8)).double()
    z = net(images)
    names = {"cce_stable": "cce_stable", "dice": "dice", "dice_cce": Sum([Dice(), CrossEntropy()])}
    seen = Observer(names, net.parameters(), activation="sigmoid")(z, y)

    def dice(z, y):
        return torch.stack([foreground_dice(z[:, c].sigmoid(), y[:, c]) for c in range(3)]).mean()

    bce = F.binary_cross_entropy_with_logits
    losses = [bce, dice, lambda z, y: dice(z, y) + bce(z, y)]
    assert_seen(seen, expected(losses, z, y, net.parameters()), 1e-8)


def test_probabilities_of_many_classes():
    net = small(3)
    images, target = batch(3)
    z = net(images)
    seen = Observer(LOSSES, net.parameters(), activation="none")(z.softmax(1), target)
    assert_seen(seen, expected(map(load_loss, LOSSES), z, target, net.parameters()))


def test_half_precision():
    net = small().float()
    images, target = batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = net(images.float())
        inside = Observer(LOSSES, net.parameters())(output, target)
    outside = Observer(LOSSES, net.parameters())(output, target)
    assert output.dtype == torch.bfloat16 and inside.norms.dtype == torch.float32
    for a, b in zip(inside[1:], outside[1:], strict=True):
        assert torch.equal(a, b)
    wanted = expected(map(load_loss, LOSSES), net(images.float()), target, net.parameters())
    torch.testing.assert_close(inside.values, wanted[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(inside.norms, wanted[1], rtol=0.05, atol=0.02)


# --- Nothing changes -----------------------------------------------------------------------------


def train(net, observer, steps=4):
    """The state after a few steps of an ordinary loop, and the random numbers that come next."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(1)
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters())
    images, target = batch(device=next(net.parameters()).device)
    for _ in range(steps):
        optimizer.zero_grad()
        output = net(images)
        value = loss(output, target)
        if observer:
            seen = observer(output, target)
            assert seen.norms.isfinite().all()
        value.backward()
        optimizer.step()
    moments = [m for state in optimizer.state_dict()["state"].values() for m in state.values()]
    drawn = torch.rand(3), random.random(), np.random.rand()
    drawn = [drawn[0], torch.tensor(drawn[1:]), torch.rand(3, device=images.device)]
    return [*net.state_dict().values(), *moments, *drawn]


@pytest.mark.parametrize("make", [small, Checkpointed])
def test_training_is_equal_to_the_bit(device, make):
    torch.manual_seed(0)
    net = make().to(device, torch.float64)
    other, drawing = copy.deepcopy(net), Drawing()
    observer = Observer([*LOSSES, drawing], other.parameters())
    for a, b in zip(train(net, None), train(other, observer), strict=True):
        assert torch.equal(a, b)
    assert drawing.calls == 0


def train_with_accelerate(net, observer, steps=4):
    """As `train`, in a loop of Accelerate with accumulation and clipping."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(1)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.Adam(net.parameters())
    prepared, adam = accelerator.prepare(net, optimizer)
    images, target = batch()
    for _ in range(steps):
        with accelerator.accumulate(prepared):
            output = prepared(images)
            if observer:
                observer(output, target)
            accelerator.backward(F.cross_entropy(output, target))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
            adam.step()
            adam.zero_grad()
    moments = [m for state in optimizer.state_dict()["state"].values() for m in state.values()]
    return [*net.state_dict().values(), *moments, torch.rand(3)]


def train_with_hugging_face(net, observer, steps=4):
    """As `train`, by a subclass of Hugging Face's Trainer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pixel_values, labels):
            logits = self.net(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
            if observer:
                observer(outputs["logits"], inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    images, target = batch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps, report_to=[], save_strategy="no", use_cpu=True, seed=1,
            disable_tqdm=True,
        )  # fmt: skip
        data = [{"pixel_values": x, "labels": y} for x, y in zip(images, target, strict=True)]
        trainer = Trainer(Model(), arguments, train_dataset=data)
        trainer.train()
    states = trainer.optimizer.state_dict()["state"].values()
    return [*net.state_dict().values(), *(m for s in states for m in s.values()), torch.rand(3)]


@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize("loop", [train_with_accelerate, train_with_hugging_face])
def test_training_in_loops_of_others_is_equal_to_the_bit(loop):
    torch.manual_seed(0)
    net = small()
    net.insert(2, nn.Dropout(0.3))
    other = copy.deepcopy(net)
    observer = Observer([*LOSSES, Drawing()], other.parameters())
    for a, b in zip(loop(net, None), loop(other, observer), strict=True):
        assert torch.equal(a, b)


def test_exact_with_checkpointing():
    torch.manual_seed(0)
    net = Checkpointed().double()
    images, target = batch()
    output = net(images)
    seen = Observer(LOSSES, net.parameters())(output, target)
    state = copy.deepcopy(net.state_dict())
    assert_seen(seen, expected(map(load_loss, LOSSES), output, target, net.parameters()))
    assert not torch.equal(
        net.state_dict()["middle.1.running_mean"], state["middle.1.running_mean"]
    )


def test_no_synchronisation():
    """Tensors of the meta device hold no numbers: a look at one is an error."""
    net = small().to("meta")
    observer = Observer([*LOSSES, Focal()], net.parameters())
    images, target = torch.empty(2, 3, 8, 8, dtype=torch.float64, device="meta"), batch()[1]
    seen = observer(net(images), target.to("meta"))
    assert seen.norms.is_meta and seen.norms.shape == (6,) and seen.cosines.shape == (6, 6)


def test_a_gradient_that_vanishes():
    net = small()
    images, target = batch()
    seen = Observer({"cce": "cce", "dead": Dead()}, net.parameters())(net(images), target)
    assert seen.norms[1] == 0 and seen.norms[0] > 0 and seen.cosines[0, 1].isnan()


class Dead(nn.Module):
    def forward(self, logits, target):
        return 0 * logits.sum()


# --- Bad input -----------------------------------------------------------------------------------


def observe(losses=("cce", "dice"), net=None, output=lambda o: o, target=lambda t: t, **options):
    net = net or small()
    images, label = batch()
    return Observer(losses, net.parameters(), **options)(output(net(images)), target(label))


REFUSED = {
    "a typo": (dict(losses=["dise"]), ValueError, "there is no loss 'dise'; the presets are cce, "),
    "a function": (dict(losses=[F.cross_entropy]), TypeError, "names of presets and modules.*func"),
    "no losses": (dict(losses=[]), ValueError, "losses: at least one is needed"),
    "activation": (dict(activation="relu"), ValueError, "activation='relu': allowed are softmax, "),
    "heads": (dict(heads="last"), ValueError, "heads='last': allowed are first, all"),
    "no_grad": (dict(output=lambda o: o.detach()), ValueError, "carries no gradient.*no_grad"),
    "shape": (dict(target=lambda t: t[:, :4]), ValueError, r"target: shape \(2, 4, 8\), allowed"),
    "classes": (dict(losses=["dice_multilabel"], net=small(3)), ValueError, "for 2 classes, but"),
    "labels": (dict(target=lambda t: t + 1), ValueError, "target: holds class 2, allowed are 0 to"),
    "one channel": (dict(net=small(1)), ValueError, "one channel, .* take activation='sigmoid'"),
    "logits": (dict(activation="none"), ValueError, "activation='none' is for probabilities"),
    "a dict": (dict(output=lambda o: {"out": 3}), TypeError, "output: a tensor or a list of tens"),
    "targets": (
        dict(output=lambda o: [o] * 3, target=lambda t: [t] * 2, heads="all"),
        ValueError, "target: 2 tensors for 3 outputs",
    ),
    "another net": (
        dict(output=lambda o: small()(batch()[0])), ValueError, "none of the parameters has a part",
    ),
    "no scalar": (dict(losses=[nn.CrossEntropyLoss(reduction="none")]), ValueError, "scalar"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        observe(**options)
    assert "\n" not in str(raised.value)


def test_parameters_that_are_none():
    with pytest.raises(ValueError, match="parameters: there are none"):
        Observer(["cce"], [])
    with pytest.raises(TypeError, match="parameters: tensors are needed, got a tuple"):
        Observer(["cce"], small().named_parameters())


def test_after_backward():
    net = small()
    images, target = batch()
    output = net(images)
    F.cross_entropy(output, target).backward()
    with pytest.raises(ValueError, match=r"the graph is gone: observe before backward\(\)"):
        Observer(["cce"], net.parameters())(output, target)


def test_reentrant_checkpointing():
    net = Checkpointed(reentrant=True).double()
    images, target = batch()
    with pytest.raises(ValueError, match="must be that of use_reentrant=False"):
        Observer(["cce"], net.parameters())(net(images), target)


def test_parameters_spread_over_ranks(tmp_path, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # PyTorch's own stays, with the rank
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = small()
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"spread over ranks \(FSDP\)"):
            observe(net=net)
    finally:
        dist.destroy_process_group()


# --- The package ---------------------------------------------------------------------------------


def test_importing_needs_nothing_but_torch():
    names = (
        "Watch, Observer, WatchHandler, load_loss, list_losses, Dice, CrossEntropy, Sum, LossSet"
    )
    slow = ["pytorch_lightning", "lightning", "hydra", "omegaconf", "matplotlib", "tensorboard",
            "pandas", "scipy", "ignite", "monai", "rich", "yaml"]  # fmt: skip
    code = (
        f"import sys; from losswatch import {names}; print([m for m in {slow} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_presets():
    assert {"cce", "dice", "dice_nnunet"} <= set(list_losses())
    loss = load_loss("dice_ce_monai", ignore_index=3, smooth_nr=2)
    assert [part.ignore_index for part in loss.losses] == [3, 3]
    assert loss.losses[0].smooth_nr == 2
    for settings, message in (
        ({"smoth_nr": 1}, "loss dice has no setting 'smoth_nr'; it has activation, "),
        ({"link": "exp"}, "loss dice: link='exp': allowed are"),
    ):
        with pytest.raises(ValueError, match=message):
            load_loss("dice", **settings)
    assert isinstance(LossSet({name: load_loss(name) for name in list_losses()}), LossSet)
