"""The images: splitmix64 in plain Python gives the same numbers; statistics; independence."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losswatch.data.random import TEST, TRAIN, VAL, ThresholdedImages, image_and_label, uniform

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
