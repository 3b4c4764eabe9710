"""The examples of scripts/examples run, the package is what they need, and a release is whole."""

import os
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest
from conftest import ENVIRONMENT, PATIENCE, ROOT, run_python, run_train
from curves import read_tensorboard

NEEDS = {
    "monai_trainer": ["monai", "ignite"], "hugging_face": ["transformers", "accelerate"],
    "accelerate_loop": ["accelerate"],
}  # fmt: skip
FOLDER = ROOT / "scripts" / "examples"


def run(name, cwd, *arguments):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    return run_python(str(FOLDER / f"{name}.py"), *arguments, cwd=cwd)


def test_each_example_is_tested():
    names = {path.stem for path in FOLDER.glob("*.py")} - {"shapes"}
    assert names == {"plain_loop", "lightning_module", "dead_term", *NEEDS}


def test_a_plain_loop(tmp_path):
    head, *lines = run("plain_loop", tmp_path, "41").stdout.splitlines()
    assert head.split()[:4] == ["step", "cce", "dice", "dice_fg"]
    numbers = [[float(x) for x in line.split()] for line in lines]
    assert [row[0] for row in numbers] == [0, 20, 40]
    assert all(x > 0 for row in numbers for x in row[1:]) and numbers[2][1] < numbers[0][1]


def test_a_lightning_module(tmp_path):
    done = run("lightning_module", tmp_path, "21")
    assert "watching 3 losses of what loss_fn (Sum) gets" in done.stderr
    curves = read_tensorboard(tmp_path / "outputs/examples/lightning")
    for tag in ("loss/cce", "grad_norm/cce", "grad_norm/dice", "grad_norm/dice_fg"):
        steps, values = zip(*curves[tag], strict=True)
        assert steps == (0, 10, 20) and min(values) > 0


@pytest.mark.slow
def test_monais_trainer(tmp_path):
    done = run("monai_trainer", tmp_path, "3")
    names = ("cce", "dice", "dice_monai", "DiceLoss")  # the last one is the loss that trains
    assert re.search(r"\{" + ", ".join(rf"'{name}': 0\.\d+" for name in names), done.stdout)
    curves = read_tensorboard(tmp_path / "outputs/examples/monai")
    for (_, norm), (_, trained) in zip(
        curves["grad_norm/dice_monai"], curves["grad_norm/DiceLoss"], strict=True
    ):
        assert trained == pytest.approx(norm, rel=1e-5)
    assert [step for step, _ in curves["grad_norm/dice_monai"]] == [0, 10, 20]


@pytest.mark.parametrize("name", ["hugging_face", "accelerate_loop"])
def test_hugging_face(tmp_path, name):
    last = run(name, tmp_path, "11").stdout.splitlines()[-1]
    assert re.search(r"cce': 0\.\d+.*dice': 0\.\d+", last)


def test_a_dead_term(tmp_path):
    done = run("dead_term", tmp_path, "5")
    assert done.stdout.startswith("gradient norm of the cross entropy: 0.0 at most.")
    assert (tmp_path / "outputs/watch/dead_term.png").stat().st_size > 10_000


# --- The package ---------------------------------------------------------------------------------


def test_the_command_prints_the_losses(tmp_path):
    done = run_train("losses", "--markdown", cwd=tmp_path)
    assert done.stdout in (ROOT / "conf/loss/README.md").read_text(encoding="utf-8")
    assert done.stdout.count("\n") == 2 + len(list((ROOT / "conf/loss").glob("*.yaml")))


SNIPPET = """
    import pytorch_lightning as pl
    import torch
    from losswatch import Observer, Watch, WatchHandler, list_losses, load_loss

    net = torch.nn.Conv2d(1, 2, 1)
    trainer = pl.Trainer(callbacks=[Watch(["cce"], criterion="loss_fn", every_n_steps=50)])
    seen = Observer(["cce", torch.nn.CrossEntropyLoss()], net.parameters())(net(torch.rand(1)), 1)
    reveal_type(seen.norms)
    WatchHandler({"mine": load_loss(list_losses()[0])}, every_n_steps="often")
"""


@pytest.mark.slow
def test_a_users_type_checker(tmp_path):
    (tmp_path / "mine.py").write_text(textwrap.dedent(SNIPPET))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "mine.py"], cwd=tmp_path, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert len([line for line in said if ": error:" in line]) == 1, done.stdout
    assert 'mine.py:9: note: Revealed type is "torch._tensor.Tensor"' in done.stdout
    assert 'mine.py:10: error: Argument "every_n_steps" to "WatchHandler"' in done.stdout


@pytest.mark.slow
def test_the_wheel(tmp_path):
    """Installed without this repository: it holds conf/, the command and the marker of types."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True, timeout=PATIENCE)
    [wheel] = tmp_path.glob("losswatch-*.whl")
    there = tmp_path / "there"
    subprocess.run([*pip, "install", "--no-deps", "--target", there, wheel], check=True)
    assert (there / "losswatch/py.typed").exists()
    environment = ENVIRONMENT | {"PYTHONPATH": str(there)}
    done = subprocess.run(
        [there / "bin/losswatch", "-m", "experiment=smoke", "loss=dice,cce"], cwd=tmp_path,
        env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0 and "done" in done.stdout, done.stderr
    code = "import losswatch; print(losswatch.__file__, len(losswatch.list_losses()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    path, count = done.stdout.split()
    assert os.fspath(there) in path and int(count) == len(list((ROOT / "conf/loss").glob("*.yaml")))


@pytest.mark.slow
def test_a_release(tmp_path):
    """The source archive holds what is needed, and its wheel is the one that is built here."""

    def build(form, source, into):
        command = [sys.executable, "-m", "build", "--no-isolation", f"--{form}", "-o", into, source]
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        [file] = into.iterdir()
        return file

    def names(wheel):
        with zipfile.ZipFile(wheel) as files:
            return set(files.namelist())

    archive = build("sdist", ROOT, tmp_path / "sdist")
    wheel = build("wheel", ROOT, tmp_path / "wheel")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", archive, wheel], check=True)
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    top = ["README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "train.py"]
    below = [path for folder in ("conf", "tests") for path in (ROOT / folder).rglob("*")]
    files = [path for path in below if path.is_file() and path.parent.name != "__pycache__"]
    for path in [*top, *(path.relative_to(ROOT) for path in files)]:
        assert (source / path).read_bytes() == (ROOT / path).read_bytes()
    assert names(build("wheel", source, tmp_path / "again")) == names(wheel)
