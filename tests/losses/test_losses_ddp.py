"""Two ranks with uneven batches must train as one with the joined batch."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import gradients
from torch.nn.parallel import DistributedDataParallel

from losswatch.losses import CrossEntropy, Dice, LossSet, Sum

SPLIT = ((0, 3), (3, 4))  # rank 0 sees three samples, rank 1 one


def losses():
    return {
        "cce": CrossEntropy(),
        "stable": CrossEntropy(clip=None),
        "weighted_ce": CrossEntropy(clip=None, weight=[1, 2, 3]),
        "ignoring_ce": CrossEntropy(ignore_index=2),
        "dice": Dice(),
        "fg": Dice(include_background=False),
        "square": Dice(exponent=2),
        "log": Dice(link="-log", joint=True),
        "absent": Dice(absent="skip"),
        "sigmoid": Dice(activation="sigmoid", exponent=3),
        "ignoring": Dice(ignore_index=2, smooth_nr=0, smooth_dr=0),
        "sample": Dice(over="sample"),
        "row": Dice(over="row"),
        "sum": Sum([Dice(over="sample"), Dice(), CrossEntropy()], weights=[1, 2, 3]),
        "total": Dice(over="sample", reduction="sum"),
    }


def data():
    g = torch.Generator().manual_seed(0)
    images = torch.randn(4, 2, 5, 6, generator=g, dtype=torch.float64)
    target = torch.randint(0, 3, (4, 5, 6), generator=g)
    target[3][target[3] == 1] = 0  # class 1 is missing on rank 1
    return images, target


def network():
    torch.manual_seed(1)
    return torch.nn.Conv2d(2, 3, 3, padding=1).double()


def worker(rank, file, expected_values, expected_grads):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    images, target = (x[slice(*SPLIT[rank])] for x in data())
    net = network()
    named = losses()
    joint = LossSet(named)
    logits = net(images)
    values = joint(logits, target)
    seen, rows, coefficients = joint.rows(logits, target)
    assert torch.allclose(values, expected_values, atol=1e-6)
    assert torch.allclose(seen, expected_values, atol=1e-6)
    for k, (name, loss) in enumerate(named.items()):
        alone = loss(logits, target)
        assert torch.allclose(alone, expected_values[k], atol=1e-6), name
        cotangent = torch.tensordot(coefficients[k], rows, 1)
        ways = gradients([values[k], alone, (logits * cotangent).sum()], net.parameters())
        dist.all_reduce(ways)
        assert torch.allclose(ways / 2, expected_grads[k].expand_as(ways), atol=1e-6), name
    # As users meet it.
    wrapped = DistributedDataParallel(network())
    Dice()(wrapped(images), target).backward()
    index = list(named).index("dice")
    found = torch.cat([p.grad.flatten() for p in wrapped.parameters()])
    assert torch.allclose(found, expected_grads[index], atol=1e-6)
    # A loss over this rank's batch only averages over ranks.
    local = Dice(over="batch")(logits, target)
    mixed = LossSet({"local": Dice(over="batch"), "dice": Dice()})(logits, target)
    assert torch.allclose(mixed[0], local) and not torch.allclose(local, expected_values[index])
    del wrapped  # it holds on to the group, whose threads must end before the process does
    dist.barrier()
    dist.destroy_process_group()
    # On a busy machine a thread of gloo may still run while Python ends, which aborts the process.
    os._exit(0)


def test_two_uneven_ranks_equal_the_joined_batch():
    images, target = data()
    net = network()
    values = LossSet(losses())(net(images), target)
    grads = gradients(values, net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            worker, (f"{folder}/store", values.detach(), grads), nprocs=2, start_method="fork"
        )
