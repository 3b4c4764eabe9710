"""The images: splitmix64 in plain Python gives the same numbers; statistics; independence."""

import sys
import time
from itertools import islice
from multiprocessing import resource_sharer
from multiprocessing.connection import Client
from multiprocessing.process import current_process
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losswatch.data.loaders import batch_loader
from losswatch.data.random import (
    TEST,
    TRAIN,
    VAL,
    ThresholdedImages,
    image_and_label,
    label_shift,
    uniform,
)

GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64 - 1


def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


def splitmix64(state):
    """The published generator (Steele, Lea and Flood 2014), in Python's unbounded integers."""
    while True:
        state = (state + GOLDEN) & WORD
        yield mix(state)


def draw(seed=0, split=TRAIN, step=0, shape=(1,)):
    return uniform(torch.tensor(seed), split, torch.tensor(step), shape)


def make(thresholds=(0.5,), max_steps=4, global_step=0, accumulate=1, **knobs):
    """A datamodule with the part of a Trainer that its loaders use."""
    knobs = {"image_size": 6, "batch_size": 3, "val_size": 5, "test_size": 4} | knobs
    data = ThresholdedImages(thresholds, eval_batch_size=2, **knobs)
    data.trainer = SimpleNamespace(
        max_steps=max_steps, global_step=global_step, accumulate_grad_batches=accumulate
    )
    return data


def assert_same_batches(seen, wanted):
    seen, wanted = list(seen), list(wanted)
    assert len(seen) == len(wanted)
    for batch, other in zip(seen, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_reference_is_splitmix64():
    # Test vector of the Rosetta Code task "Pseudo-random numbers/Splitmix64".
    assert list(islice(splitmix64(1234567), 5)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(seed=st.integers(0, 2**63 - 1), split=st.sampled_from([0, 1, 2]), step=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_bits_are_splitmix64s(seed, split, step):
    key = mix((mix((seed * GOLDEN + split) & WORD) + step * GOLDEN) & WORD)
    expected = [(z >> 40) / 2**24 for z in islice(splitmix64(key), 6)]
    assert draw(seed, split, step, (2, 3)).flatten().tolist() == expected


def test_uniform_on_the_unit_interval():
    u = draw(step=3, shape=(1 << 20,)).double().numpy()
    assert u.min() >= 0 and u.max() < 1
    for bins in (2, 256, 4096):  # chi-square has mean bins - 1 and variance 2 (bins - 1)
        counts = np.bincount((u * bins).astype(int), minlength=bins)
        chi2 = ((counts - len(u) / bins) ** 2).sum() / (len(u) / bins)
        assert abs(chi2 - (bins - 1)) < 5 * np.sqrt(2 * (bins - 1))
    low_bits = np.bincount((u * 2**24).astype(int) % 256, minlength=256)
    chi2 = ((low_bits - len(u) / 256) ** 2).sum() / (len(u) / 256)
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)
    for power in (1, 2, 3):  # moments of the uniform distribution
        spread = np.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs((u**power).mean() - 1 / (power + 1)) < 5 * spread / np.sqrt(len(u))


@pytest.mark.parametrize(
    "other", [{"step": 1}, {"seed": 1}, {"split": VAL}, {"split": TEST}, {"step": 1 << 33}]
)
def test_keys_are_independent(other):
    n = 1 << 18
    a, b = draw(shape=(n,)).double().numpy(), draw(shape=(n,), **other).double().numpy()
    for x, y in ((a, b), (a**2, b), (a, b**2), (a[1:], b[:-1]), (a[:-1], b[1:])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(n)
    # No two numbers in a row occur twice (by chance they would once in 4,096 such tests).
    pairs = [set(zip(x[1:], x[:-1], strict=True)) for x in (a, b)]
    assert not pairs[0] & pairs[1]


@pytest.mark.parametrize("lag", [1, 2, 31, 32, 1024])
def test_neighbours_are_independent(lag):
    u = draw(seed=7, shape=(1 << 18,)).double().numpy()
    assert abs(np.corrcoef(u[lag:], u[:-lag])[0, 1]) < 5 / np.sqrt(len(u) - lag)


def test_first_pixels_of_steps_and_seeds_are_uniform():
    """Numbers are uniform along steps and seeds, too, where keys are hashed and not positions."""
    many = torch.arange(1 << 16)
    along_steps = torch.vmap(lambda s: uniform(torch.tensor(5), TRAIN, s, (2,)))(many)
    along_seeds = torch.vmap(lambda s: uniform(s, TRAIN, torch.tensor(5), (2,)))(many)
    for u in (along_steps.double().numpy(), along_seeds.double().numpy()):
        for x, y in ((u[1:, 0], u[:-1, 0]), (u[:, 0], u[:, 1])):
            assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(len(x))
        counts = np.bincount((u[:, 0] * 64).astype(int), minlength=64)
        chi2 = ((counts - len(u) / 64) ** 2).sum() / (len(u) / 64)
        assert abs(chi2 - 63) < 5 * np.sqrt(2 * 63)


def test_no_two_batches_alike():
    batches = {
        tuple(draw(seed, split, step, (4,)).tolist())
        for seed in range(10)
        for split in (TRAIN, VAL, TEST)
        for step in range(50)
    }
    assert len(batches) == 10 * 3 * 50


def test_stacked_keys_draw_the_same_bits():
    seeds, steps = torch.tensor([0, 3, 2**62]), torch.tensor([5, 0, 2**33])
    stacked = torch.vmap(lambda seed, step: uniform(seed, VAL, step, (2, 1, 3, 3)))(seeds, steps)
    for i in range(3):
        assert torch.equal(stacked[i], uniform(seeds[i], VAL, steps[i], (2, 1, 3, 3)))


@pytest.mark.parametrize("theta", [0.001, 0.05, 0.5, 0.95])
def test_theta_is_the_share_of_background(theta):
    data = make([theta], image_size=512, batch_size=4, max_steps=1)
    [(image, label)] = data.train_dataloader()
    n = label.numel()
    assert abs((label == 0).double().mean() - theta) < 5 * np.sqrt(theta * (1 - theta) / n)
    assert torch.equal(label[:, None], (image > torch.tensor(theta)).long())
    assert (image.shape, image.dtype) == ((4, 1, 512, 512), torch.float32)
    assert (label.shape, label.dtype) == ((4, 512, 512), torch.int64)


def test_several_thresholds_make_classes():
    thetas = [0.1, 0.3, 0.6]
    [(image, label)] = make(thetas, image_size=256, max_steps=1).train_dataloader()
    assert torch.equal(label, torch.bucketize(image[:, 0], torch.tensor(thetas)))
    shares = torch.bincount(label.flatten(), minlength=4) / label.numel()
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.005)


@pytest.mark.parametrize("low, high", [(-1, 1), (1, 0), (255, -3), (2, 2)])
def test_input_range_changes_only_the_input(low, high):
    [(u, wanted)] = make(max_steps=1).train_dataloader()
    [(image, label)] = make(max_steps=1, low=low, high=high).train_dataloader()
    assert torch.equal(label, wanted)
    assert torch.equal(image, low + (high - low) * u)


def test_label_at_the_threshold_is_background():
    u = torch.tensor([0.25, 0.5, 0.75]).view(1, 1, 3)
    _, label = image_and_label(u, torch.tensor([0.25, 0.5]), 0.0, 1.0)
    assert label.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("tau", [0.02, 0.3])
def test_noise_makes_foreground_as_likely_as_a_sigmoid_says(tau):
    [(u, label)] = make(
        [0.7], image_size=512, batch_size=4, max_steps=1, noise=tau
    ).train_dataloader()
    [(same, sure)] = make([0.7], image_size=512, batch_size=4, max_steps=1).train_dataloader()
    assert torch.equal(u, same) and not torch.equal(label, sure)
    u, label = u.flatten().double().numpy(), label.flatten().numpy()
    eta = 1 / (1 + np.exp((0.7 - u) / tau))
    for low in np.arange(0, 1, 0.1):  # binomial, in each tenth of the input
        here = (u >= low) & (u < low + 0.1)
        spread = np.sqrt((eta[here] * (1 - eta[here])).sum())
        assert abs(label[here].sum() - eta[here].sum()) <= 5 * spread + 1
    wrong = label != (u > 0.7)  # noise of one pixel tells nothing of the next one's
    lag = np.corrcoef((label - eta)[1:], (label - eta)[:-1])[0, 1]
    assert wrong.any() and abs(lag) < 5 / np.sqrt(len(u))


def test_noise_orders_several_classes():
    """P(class >= k) = sigmoid((u - θ_k) / τ), so that classes keep their order."""
    [(u, label)] = make([0.3, 0.6], image_size=512, max_steps=1, noise=0.1).train_dataloader()
    for k, theta in enumerate([0.3, 0.6], start=1):
        eta = torch.sigmoid((u[:, 0].double() - theta) / 0.1)
        spread = (eta * (1 - eta)).sum().sqrt()
        assert abs((label >= k).sum() - eta.sum()) < 5 * spread


def test_spread_gives_each_image_its_own_theta():
    data = make([0.9], image_size=32, batch_size=4096, max_steps=1, theta_spread=0.2)
    [(u, label)] = data.train_dataloader()
    for image, mask in zip(u[:200, 0], label[:200], strict=True):  # one threshold for an image
        assert not mask.any() or image[mask == 0].max() < image[mask == 1].min()
    empty = ~label.flatten(1).any(1)
    # θ is uniform on 0.7 to 1.1. An image of 1,024 pixels below 1 is empty at θ < 1 by chance, too.
    theta = np.linspace(0.7, 1.1, 100_001)
    chance = np.where(theta < 1, theta**1024, 1).mean()
    assert abs(empty.double().mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / 4096)
    share = label.double().mean().item()
    wanted = np.clip(1 - theta, 0, 1).mean()
    assert abs(share - wanted) < 5 * np.clip(1 - theta, 0, 1).std() / np.sqrt(4096)


def test_noise_and_spread_repeat_with_seed_split_and_step():
    knobs = {"noise": 0.2, "theta_spread": 0.1, "max_steps": 2}
    assert_same_batches(make(**knobs).train_dataloader(), make(**knobs).train_dataloader())
    first, second = (make(**knobs, seed=seed).train_dataloader() for seed in (0, 1))
    assert not torch.equal(next(iter(first))[1], next(iter(second))[1])


def test_the_least_noise_number_is_finite():
    ends = torch.tensor([0.0, 1 - 2**-24])
    shift = label_shift(1.0, ends, 0.0, ends)
    assert shift.isfinite().all() and shift[0] == pytest.approx(-np.log(2**24), rel=1e-3)
    assert torch.equal(label_shift(0.0, ends, 0.0, ends), torch.zeros(2))


def test_volumes():
    [(image, label)] = make(dims=3, max_steps=1).train_dataloader()
    assert image.shape == (3, 1, 6, 6, 6) and label.shape == (3, 6, 6, 6)


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader"])
def test_workers_change_nothing(loader):
    alone = getattr(make(), loader)()
    workers = getattr(make(num_workers=2), loader)()
    assert workers.num_workers == 2
    assert_same_batches(workers, alone)
    assert_same_batches(alone, alone)  # a second round over the loader gives the same


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches(loader, world):
    whole = list(getattr(make(), loader)())
    ranks = []
    for rank in range(world):
        data = make()
        data.rank, data.world_size = rank, world
        ranks.append(list(getattr(data, loader)()))
    for step, batch in enumerate(whole):
        for i, tensor in enumerate(batch):
            rows = sorted(row.tolist() for rank in ranks for row in rank[step][i])
            assert rows == sorted(row.tolist() for row in tensor)


def test_splits_differ_and_sizes_are_exact():
    sets = {
        name: torch.cat([image for image, _ in getattr(make(), f"{name}_dataloader")()])
        for name in ("train", "val", "test")
    }
    assert {name: len(images) for name, images in sets.items()} == {
        "train": 12,
        "val": 5,
        "test": 4,
    }
    images = torch.cat(list(sets.values())).flatten(1)
    assert len(images.unique(dim=0)) == 12 + 5 + 4


def test_training_continues_where_it_stopped():
    for accumulate in (1, 3):
        whole = list(make(accumulate=accumulate).train_dataloader())
        rest = make(accumulate=accumulate, global_step=3).train_dataloader()
        assert len(whole) == 4 * accumulate
        assert_same_batches(rest, whole[3 * accumulate :])


def test_seed_and_batch_size():
    [(a, _)] = make(max_steps=1).train_dataloader()
    [(b, _)] = make(max_steps=1, seed=1).train_dataloader()
    [(c, _)] = make(max_steps=1, batch_size=5).train_dataloader()
    assert not torch.equal(a, b)
    assert torch.equal(a, c[:3])  # a larger batch adds images


class Addresses(torch.utils.data.Dataset):
    """Item 0 is where the worker hands over its batches; item 1 is an error in its thread."""

    def __getitem__(self, number):
        if number:
            sys.excepthook(ValueError, ValueError("of the worker"), None)
            return number
        resource_sharer.DupFd(1)  # starts the thread
        return resource_sharer._resource_sharer._address


@pytest.mark.skipif(sys.platform != "linux", reason="the worker is forked, and shares the output")
def test_a_worker_whose_batch_is_not_taken_prints_nothing(capfd):
    """As when Ctrl-C ends the training while it takes a batch; another error is still printed."""
    batches = iter(batch_loader(Addresses(), range(2), num_workers=1))
    address = next(batches)
    Client(address, authkey=bytes(current_process().authkey)).close()
    time.sleep(0.5)
    next(batches)
    assert capfd.readouterr().err == "ValueError: of the worker\n"
