"""The processes that train the runs of a sweep side by side."""

import os
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import joblib
import pytest

from losswatch.sweep.workers import Workers


def work():
    return os.getpid(), joblib.cpu_count(), signal.getsignal(signal.SIGINT)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def wait():
    time.sleep(60)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def workers():
    made = Workers(2, cores=1)
    yield made
    made.stop()


def test_tasks_run_in_a_few_processes_that_ignore_ctrl_c(workers):
    done = [workers.submit(work) for _ in range(6)]
    pids, cores, handlers = zip(*(future.result(60) for future in done), strict=True)
    assert 1 <= len(set(pids)) <= 2 and os.getpid() not in pids
    assert set(cores) == {1} and set(handlers) == {signal.SIG_IGN}


def test_a_killed_process_breaks_its_tasks_and_not_those_that_follow(workers):
    with pytest.raises(BrokenProcessPool):
        workers.submit(die).result(60)
    assert workers.submit(work).result(60)[0] != os.getpid()


def test_stop_ends_processes_at_work(workers):
    pids = {workers.submit(work).result(60)[0] for _ in range(6)}
    at_work = [workers.submit(wait) for _ in range(2)]
    begin = time.monotonic()
    workers.stop()
    assert time.monotonic() - begin < 30 and all(future.done() for future in at_work)
    assert not any(map(alive, pids))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks only on Linux")
def test_processes_that_are_not_forked():
    spawned = Workers(1, cores=1, forks=False)
    try:
        assert spawned.submit(os.getpid).result(120) != os.getpid()
    finally:
        spawned.stop()
