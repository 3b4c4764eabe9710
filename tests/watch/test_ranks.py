"""trainer.devices=2 trainer.strategy=ddp: two ranks train as one process with the whole batch."""

import re
import tempfile

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT, load_losses, read_result, run_train
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from losswatch.config.errors import ConfigError
from losswatch.data.random import TRAIN, image_and_label, uniform
from losswatch.disk.curves import read_curves
from losswatch.nets import ConvNet
from losswatch.run.build import make_net

NAMES = sorted(file.stem for file in (ROOT / "conf" / "loss").glob("*.yaml"))
TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folders where one process and two ranks trained the same run, and the ranks' output.

    Five images a step, four and then one at a validation: the ranks get 3 and 2, 2 and 2, 1 and 0.
    """
    own = tmp_path_factory.mktemp("own") / "loss"
    own.mkdir()
    (own / "foreign.yaml").write_text("_target_: torch.nn.CrossEntropyLoss\n")
    found = []
    for name, more in {"one": [], "two": [*TWO, "compile=true"]}.items():
        cwd = tmp_path_factory.mktemp(name)
        done = run_train(
            "--config-dir", str(own.parent), "experiment=smoke", *more,
            f"watch=[{','.join([*NAMES, 'foreign'])}]", "data.batch_size=5", "data.val_size=5",
            "trainer.max_steps=12", "trainer.val_check_interval=10", cwd=cwd,
        )  # fmt: skip
        [folder] = (cwd / "outputs").glob("*/*/")
        found.append((folder, done.stderr + done.stdout))
    (one, _), (two, said) = found
    return one, two, said


def test_two_ranks_observe_what_one_process_does(pair):
    """Values and gradient norms of each loss of conf/loss at each step; validations, too."""
    one, two = (read_curves(folder) for folder in pair[:2])
    assert len(one.filter(like="grad_norm/").dropna()) == 12
    assert {f"{kind}/{name}" for kind in ("loss", "grad_norm") for name in NAMES} <= {*two.columns}
    assert two.columns.equals(one.columns) and two.index.equals(one.index)
    same = two.columns.drop(["loss/foreign", "grad_norm/foreign"])
    np.testing.assert_allclose(two[same], one[same], rtol=1e-6, atol=1e-6)


def test_a_loss_that_knows_nothing_of_ranks(pair, compose):
    """In training its value is the mean over ranks, in validation the mean over pixels."""
    plan = compose("experiment=smoke").plan()
    u = uniform(torch.tensor(0), TRAIN, torch.tensor(0), (5, 1, 16, 16))
    images, target = image_and_label(u, torch.tensor([0.5]), 0.0, 1.0)
    with torch.no_grad():
        logits = make_net(plan)(images)
        shares = [F.cross_entropy(logits[rank::2], target[rank::2]).item() for rank in (0, 1)]
    scalars = read_curves(pair[1])
    assert scalars["loss/foreign"][0] == pytest.approx(sum(shares) / 2, rel=1e-6)
    assert abs(shares[0] - shares[1]) > 1e-4
    means = scalars[["val/loss/foreign", "val/loss/cce_stable"]].dropna().to_numpy()
    assert len(means) == 2
    np.testing.assert_allclose(means[:, 0], means[:, 1], rtol=1e-5)


def test_two_ranks_end_with_the_same_weights(pair):
    one, two = (
        torch.load(folder / "checkpoints" / "step=12.ckpt", weights_only=True)["state_dict"]
        for folder in pair[:2]
    )
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=0, atol=1e-6), name


def test_two_ranks_leave_one_run(pair):
    """Each line is printed once, and there is one folder, as of one process."""
    one, two, said = pair
    assert [f.name for f in two.parent.iterdir()] == [two.name]
    assert len(list(two.parents[1].iterdir())) == 1

    def files(folder):
        return {re.sub(r"tfevents.*", "tfevents", str(f.relative_to(folder)))
                for f in folder.rglob("*")}  # fmt: skip

    assert files(two) == files(one)
    lines = said.splitlines()
    assert len(lines) == 3
    assert re.match("run: experiment=smoke", lines[0])
    assert lines[1].endswith("not compiled: trainer.devices=2 needs the ordinary step")
    assert re.search("val Dice 0", lines[2])
    metrics = [read_result(folder)["metrics"] for folder in (one, two)]
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-6)


def refused(compose, *overrides, multirun=False):
    run = compose(*TWO, *overrides)
    with pytest.raises(ConfigError) as raised:
        run.plan(is_sweep=multirun)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_ranks_cannot_do_is_refused(compose):
    said = refused(compose, "data.batch_size=1")
    assert said == "data.batch_size must be at least 2, an image for each device, got 1"
    assert "data.eval_batch_size" in refused(compose, "data.eval_batch_size=1")
    for strategy in ("ddp_spawn", "ddp_fork"):
        assert strategy in refused(compose, f"trainer.strategy={strategy}")
    assert "without -m" in refused(compose, multirun=True)
    said = refused(compose, "trainer.sync_batchnorm=true")
    assert said.startswith("trainer.sync_batchnorm=true needs GPUs")
    assert "trainer.sync_batchnorm=false" in said


@pytest.mark.parametrize("devices, tasks", [(1, 2), (2, 1), (2, 2), (1, 1)])
def test_slurm_starts_a_task_for_each_device(compose, monkeypatch, devices, tasks):
    """Lightning would wait for missing tasks, and would train the same run in surplus ones."""
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    for name in ("NTASKS", "NTASKS_PER_NODE"):  # those of the job
        monkeypatch.setenv(f"SLURM_{name}", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(tasks))
    if devices == tasks:
        compose(*TWO, f"trainer.devices={devices}", "trainer.strategy=auto").plan()
    else:
        said = refused(compose, f"trainer.devices={devices}", "trainer.strategy=auto")
        assert said.startswith(f"Slurm tasks that run this command: {tasks}, trainer.devices x ")


@pytest.mark.slow
def test_a_sweep_of_several_ranks_a_run_is_refused_before_it_starts(tmp_path):
    done = run_train("-m", "experiment=smoke", "loss=dice,cce", *TWO, cwd=tmp_path, status=2)
    [line] = (done.stdout + done.stderr).splitlines()
    assert re.match(r"losswatch: trainer.devices=2 .* without -m .*nothing was started", line)
    assert not list(tmp_path.glob("outputs/*/*/"))


# --- Trained with each loss ----------------------------------------------------------------------


def trained_weights(name, world=1, rank=0, steps=50):
    """Weights of the plain network after 50 steps with a loss of conf/loss, five images a step.

    In float64: in float32 the rounding of the sums grows to 3e-6 with dice_sigmoid.
    """
    torch.manual_seed(0)
    net = ConvNet(1, 2).double()
    model = DistributedDataParallel(net) if world > 1 else net
    loss = load_losses(name).losses[0]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(steps):
        u = uniform(torch.tensor(0), TRAIN, torch.tensor(step), (5, 1, 16, 16))[rank::world]
        images, target = image_and_label(u, torch.tensor([0.5]), 0.0, 1.0)
        optimizer.zero_grad()
        loss(model(images.double()), target).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def rank_trains(rank, file, expected):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name, weights in expected.items():
        assert torch.allclose(trained_weights(name, 2, rank), weights, rtol=0, atol=1e-10), name
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_as_one_with_every_loss():
    expected = {name: trained_weights(name) for name in NAMES}
    start = trained_weights("dice", steps=0)
    assert all((weights - start).abs().max() > 0.01 for weights in expected.values())
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            rank_trains, (f"{folder}/store", expected), nprocs=2, start_method="fork"
        )
