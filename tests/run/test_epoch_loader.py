"""The loader of a user's data module, passed over again and again (run/epoch_loader.py)."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import slow
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from losswatch.run.epoch_loader import EpochLoader


class Numbers(Dataset):
    """0 to 6, each with random numbers of all generators."""

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return i, torch.rand(()), np.random.rand(), random.random()


def batches(load=None, done=0, steps=12, accumulate=1, seed=3):
    trainer = SimpleNamespace(max_steps=steps, global_step=done, accumulate_grad_batches=accumulate)
    load = load or (lambda: DataLoader(Numbers(), batch_size=3, shuffle=True))
    loader = EpochLoader(load, trainer, seed)
    assert len(loader) == steps * accumulate
    found = []
    for batch in loader:
        torch.rand(3), np.random.rand(), random.random()  # the training draws, too
        found.append([torch.as_tensor(part).tolist() for part in batch])
    return found


def test_each_pass_sees_each_image_once_in_another_order():
    found = batches()
    assert [len(numbers) for numbers, *_ in found] == [3, 3, 1] * 4
    orders = [sum((numbers for numbers, *_ in found[i : i + 3]), []) for i in range(0, 12, 3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert batches() == found != batches(seed=4)


@pytest.mark.parametrize(
    "workers, done", [(0, 1), (0, 3), (0, 8), (0, 11), (1, 8), slow(1, 1), slow(1, 3), slow(1, 11)]
)
def test_a_resumed_run_gets_the_same_batches(done, workers):
    """Also what the images are changed by, here or in a process of the loader."""

    def load():
        return DataLoader(Numbers(), batch_size=3, shuffle=True, num_workers=workers)

    assert batches(load, done) == batches(load)[done:]
    assert batches(load, done, accumulate=2) == batches(load, accumulate=2)[2 * done :]


def test_the_training_draws_as_without_a_loader():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    batches(steps=2)
    after = torch.rand(()), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    for _ in range(2):
        torch.rand(3), np.random.rand(), random.random()
    assert (torch.rand(()), np.random.rand(), random.random()) == after


class Endless(IterableDataset):
    def __iter__(self):
        return ((i, i) for i in range(4))


@pytest.mark.parametrize(
    "load",
    [
        lambda: DataLoader(Endless(), batch_size=3),  # without a length
        lambda: iter([([0, 1, 2], 0), ([3], 0)]),  # gives its batches once
        lambda: [([0, 1, 2], 0), ([3], 0)],
    ],
)
@pytest.mark.parametrize("done", [0, 3])
def test_loaders_of_other_kinds(load, done):
    found = [numbers for numbers, _ in batches(load, done, steps=5)]
    assert found == [[0, 1, 2], [3], [0, 1, 2], [3], [0, 1, 2]][done:]


@pytest.mark.parametrize("inner", [False, True])
def test_a_sampler_is_told_the_pass(inner):
    told = []

    class Sampler(list):
        def set_epoch(self, epoch):
            told.append(epoch)

    sampler = Sampler(range(7))
    given = {"batch_sampler": BatchSampler(sampler, 3, False)} if inner else {"sampler": sampler}
    batches(lambda: DataLoader(Numbers(), **given), steps=7 if inner else 15)
    assert [*dict.fromkeys(told)] == [0, 1, 2]


def test_a_loader_without_batches():
    with pytest.raises(ValueError, match="^data: pass 1 over the training images has no batch$"):
        batches(lambda: [])
