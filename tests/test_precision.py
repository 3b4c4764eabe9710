"""Half precision trains as well as float32, and what is large fits."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, read_result, run_folders, run_train

from losswatch.config import ConfigError
from losswatch.report import read_scalars


@pytest.mark.parametrize("precision", ["16-mixed", "16"])
def test_float16_is_refused_on_a_cpu(compose, precision):
    """Lightning would train in bfloat16 instead."""
    with pytest.raises(ConfigError, match=f"precision={precision} needs a GPU; .* bf16-mixed$"):
        compose("trainer.accelerator=cpu", f"trainer.precision={precision}").check()


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed needs a GPU")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["convnet", "unet"])
@pytest.mark.parametrize(
    "precision, accelerator",
    [("bf16-mixed", "cpu"), pytest.param("16-mixed", "gpu", marks=on_gpu)],
)
def test_mixed_precision_reaches_the_same_accuracy(tmp_path, model, precision, accelerator):
    common = [f"model={model}", f"trainer.accelerator={accelerator}"]
    for name in ("32-true", precision):
        run_train(*common, f"trainer.precision={name}", cwd=tmp_path)
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
    """The U-Net and all five losses, two images a step: within 2 GiB, and the loss falls."""
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
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it
    assert status == 0, (tmp_path / "said").read_text()
    print(f"\npeak {used.ru_maxrss / 2**20:.2f} GiB, {used.ru_utime:.0f} s of one core")
    assert used.ru_maxrss < 2 * 2**20  # KiB
    [folder] = run_folders(tmp_path).values()
    watched = read_scalars(folder).filter(regex="^(loss|grad_norm)/").dropna()
    assert len(watched) == 8 and (watched.to_numpy() > 0).all()
    assert watched["loss/dice"].iloc[-1] < watched["loss/dice"].iloc[0] - 0.01
