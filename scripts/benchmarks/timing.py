"""Time and memory of functions that take no arguments."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Job = Callable[[], object]


def interleaved(jobs: Mapping[str, Job], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median milliseconds of each job over `rounds` rounds: CPU time, or on a GPU until its end.

    The jobs take turns, so that other work on the machine slows all of them alike. The order is
    shuffled in each round, because each job changes the CPU's caches for the next. Two more rounds
    come first, which do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    order, shuffled = list(jobs.items()), random.Random(0)
    for i in range(rounds + 2):
        shuffled.shuffle(order)
        for name, job in order:
            start = _now(device)
            job()
            if i >= 2:
                times[name].append(1e3 * (_now(device) - start))
    return {name: statistics.median(t) for name, t in times.items()}


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()  # a GPU works on after a call has returned
    return time.perf_counter()


def peak_memory(job: Job) -> float:
    """The largest size of the CPU tensors that the job creates, in MiB."""
    job()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU], profile_memory=True) as profiler:
        job()
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most / 2**20


def repeat(job: Job, times: int) -> None:
    for _ in range(times):
        job()
