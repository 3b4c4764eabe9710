"""Half precision trains as well as float32, and large images fit into memory."""

import os
import re
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from conftest import ENVIRONMENT, ROOT, read_result, run_folders, run_train
from pytorch_lightning.plugins import MixedPrecision

from losswatch.config.errors import ConfigError
from losswatch.data.random import ThresholdedImages
from losswatch.disk.curves import read_curves
from losswatch.losses import CrossEntropy, Dice, LossSet
from losswatch.nets import ConvNet, UNet
from losswatch.nets.cpu import fast_on_cpu
from losswatch.run import train as run
from losswatch.run.module import SegmentationModule
from losswatch.run.planner import Planner
from losswatch.watch.lightning import Watch


@pytest.mark.parametrize("precision", ["16-mixed", "16"])
def test_float16_is_refused_on_a_cpu(compose, precision):
    """Lightning would train in bfloat16 without a word."""
    with pytest.raises(ConfigError, match=f"precision={precision} needs a GPU; .* bf16-mixed$"):
        compose("trainer.accelerator=cpu", f"trainer.precision={precision}").plan()


def unchecked(composed, folder):
    """The plan of a run whose first step has not been tried."""
    planner = Planner(composed.planner.sources)
    return planner.plan(composed.settings(folder), composed.settings, is_here=False)


@pytest.mark.parametrize(
    "options",
    [
        "trainer.precision=16-true",
        "trainer.precision=16-true optimizer.eps=1e-4",
        "trainer.precision=16-true optimizer=sgd",
        "trainer.precision=bf16-true",
        "trainer.precision=64-true",
    ],
)
def test_the_first_step_fails_in_the_check_where_it_fails_in_the_run(compose, options, tmp_path):
    composed = compose(
        "experiment=smoke", "model=convnet", "trainer.max_steps=2", "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false", "data.val_size=2", "data.test_size=2",
        *options.split(),
    )  # fmt: skip
    outcomes = []
    for attempt, kind in (
        (composed.plan, ConfigError),
        (lambda: run.train(unchecked(composed, tmp_path)), FloatingPointError),
    ):
        try:
            attempt()
            outcomes.append("works")
        except kind as error:
            outcomes.append(re.search(r"0\.0\.weight (is|NaN)", str(error)) and "fails")
    assert (
        outcomes
        == ["fails" if options.endswith("16-true") and "bf" not in options else "works"] * 2
    )


def in_float16() -> list[MixedPrecision]:
    """The plugin that Lightning uses for 16-mixed on a GPU. It also works, slowly, on a CPU."""
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]


class Observed(Watch):
    """Keeps its observations instead of writing them."""

    def on_fit_start(self, trainer, module):
        super().on_fit_start(trainer, module)
        self.seen = torch.empty(0)

    def flush(self, trainer):
        if self.record.steps:
            self.seen = torch.cat([self.seen, torch.tensor(self.record.drain()[1])])


def fit(net, plugins, *, steps, lr=1e-2, is_tested=True, **data):
    """The probe's observations, and the test metrics if it is tested."""
    losses = {"cce": CrossEntropy(), "dice": Dice(), "dice_square": Dice(exponent=2)}
    module = SegmentationModule(net, LossSet(losses), "dice", lambda p: torch.optim.Adam(p, lr=lr))
    watch = Observed(module.losses, "loss", every_n_steps=1, strict=True)
    images = ThresholdedImages([0.5], **data)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=1, num_sanity_val_steps=0,
        limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[watch], plugins=plugins,
    )  # fmt: skip
    with fast_on_cpu(net):
        trainer.fit(module, images)
        if is_tested:
            trainer.test(module, images, verbose=False)
    return watch.seen, trainer.callback_metrics


# Sums over 512 x 512 pixels overflow float16. A single small image rounds too much.
@pytest.mark.parametrize("size, batch", [(32, 2), (512, 1)])
def test_what_is_observed_in_float16(size, batch):
    seen = []
    for plugins in ([], in_float16()):
        torch.manual_seed(0)
        data = {"image_size": size, "batch_size": batch, "is_tested": False}
        seen.append(fit(ConvNet(1, 2), plugins, steps=2, lr=1e-3, **data)[0])
    torch.testing.assert_close(seen[1], seen[0], rtol=2e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: ConvNet(1, 2), lambda: UNet(1, 2)], ids=["convnet", "unet"]
)
def test_float16_reaches_the_same_accuracy(make):
    accuracy = []
    for plugins in ([], in_float16()):
        torch.manual_seed(0)
        accuracy.append(float(fit(make(), plugins, steps=300)[1]["test/accuracy"]))
    assert accuracy[0] > 0.97
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.005)


def on_gpu(*values):
    return pytest.param(*values, "cuda", marks=pytest.mark.gpu)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["convnet", "unet"])
@pytest.mark.parametrize(
    "precision, accelerator",
    [("bf16-mixed", "cpu"), on_gpu("bf16-mixed"), on_gpu("16-mixed")],
)
def test_mixed_precision_reaches_the_same_accuracy(tmp_path, model, precision, accelerator):
    common = [f"model={model}", f"trainer.accelerator={accelerator}"]
    for name in ("32-true", precision):
        run_train(*common, f"trainer.precision={name}", cwd=tmp_path, fresh=accelerator == "cuda")
    results = [read_result(folder) for folder in run_folders(tmp_path).values()]
    single, half = sorted(results, key=lambda r: r["config"]["trainer"]["precision"] != "32-true")
    accuracy = single["metrics"]["test/accuracy"]
    assert accuracy > 0.96
    assert half["metrics"]["test/accuracy"] == pytest.approx(accuracy, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [["data.image_size=512"], ["data.image_size=64", "data.dims=3"]], ids=["512²", "64³"]
)
def test_large_images_and_volumes_train(tmp_path, size):
    """The U-Net with five losses and two images a step needs at most 2 GiB, and the loss falls."""
    arguments = [
        *size, "trainer.accelerator=cpu", "trainer.max_steps=8", "data.batch_size=2",
        "data.val_size=2", "data.test_size=2", "data.eval_batch_size=1", "optimizer.lr=0.01",
    ]  # fmt: skip
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            cwd=tmp_path, env=ENVIRONMENT, stdout=said, stderr=said,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # otherwise Popen would wait for it
    assert status == 0, (tmp_path / "said").read_text()
    print(f"\npeak {used.ru_maxrss / 2**20:.2f} GiB, {used.ru_utime:.0f} s of one core")
    assert used.ru_maxrss < 2 * 2**20  # KiB
    [folder] = run_folders(tmp_path).values()
    watched = read_curves(folder).filter(regex="^(loss|grad_norm)/").dropna()
    assert len(watched) == 8 and (watched.to_numpy() > 0).all()
    assert watched["loss/dice"].iloc[-1] < watched["loss/dice"].iloc[0] - 0.01
