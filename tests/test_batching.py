"""The worker that merges requests into batches."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vispa_graph.engine.batching import Batcher, Job
from vispa_graph.errors import EngineClosedError


class Runner:
    """Answers every job with twice its payload and remembers the batches; holds the first batch while `gate` is closed."""

    def __init__(self, *, held=False):
        self.batches = []
        self.entered, self.gate = threading.Event(), threading.Event()
        if not held:
            self.gate.set()

    def __call__(self, jobs):
        self.entered.set()
        assert self.gate.wait(30)
        self.batches.append([(job.kind, job.payload) for job in jobs])
        for job in jobs:
            if isinstance(job.payload, BaseException):
                raise job.payload
            job.future.set_result(job.payload * 2)


@pytest.fixture
def batcher_of():
    """Makes batchers that are closed when the test ends."""
    made = []

    def make(run, linger=0.0, capacity=100):
        batcher = Batcher(run, linger=linger, capacity=capacity)
        made.append((batcher, run))
        return batcher

    yield make
    for batcher, run in made:
        if isinstance(run, Runner):
            run.gate.set()
        batcher.close()


def submit_behind_a_held_one(batcher, run, jobs):
    """Submits jobs while the worker is busy with another, so that all of them wait when it takes the next batch."""
    first = batcher.submit(Job("first", 1, 0))
    assert run.entered.wait(30)
    futures = [batcher.submit(job) for job in jobs]
    run.gate.set()
    first.result(30)
    return futures


def test_requests_that_wait_together_run_together(batcher_of):
    run = Runner(held=True)
    futures = submit_behind_a_held_one(batcher_of(run), run, [Job("a", 1, n) for n in range(5)])
    assert [future.result(30) for future in futures] == [0, 2, 4, 6, 8]
    assert run.batches[1:] == [[("a", n) for n in range(5)]]


def test_requests_that_come_within_the_linger_of_each_other_run_together(batcher_of):
    run = Runner()
    batcher = batcher_of(run, linger=0.5)
    futures = []
    for number in range(3):
        futures.append(batcher.submit(Job("a", 1, number)))
        time.sleep(0.02)
    wait(futures, 30)
    assert [len(batch) for batch in run.batches] == [3]


def test_only_one_kind_runs_together_and_the_oldest_goes_first(batcher_of):
    run = Runner(held=True)
    jobs = [Job(kind, 1, number) for number, kind in enumerate("abaab")]
    wait(submit_behind_a_held_one(batcher_of(run), run, jobs), 30)
    assert run.batches[1:] == [[("a", 0), ("a", 2), ("a", 3)], [("b", 1), ("b", 4)]]


def test_rows_times_width_stays_within_the_capacity(batcher_of):
    run = Runner(held=True)
    jobs = [Job("a", size, number) for number, size in enumerate([10, 30, 40, 10, 25])]
    wait(submit_behind_a_held_one(batcher_of(run, capacity=100), run, jobs), 30)
    assert [[payload for _, payload in batch] for batch in run.batches[1:]] == [[0, 1, 3], [2, 4]]


def test_a_request_larger_than_the_capacity_runs_by_itself(batcher_of):
    run = Runner(held=True)
    jobs = [Job("a", 500, 1), Job("a", 10, 2), Job("a", 10, 3)]
    futures = submit_behind_a_held_one(batcher_of(run, capacity=100), run, jobs)
    assert [future.result(30) for future in futures] == [2, 4, 6]
    assert [len(batch) for batch in run.batches[1:]] == [1, 2]


@settings(deadline=None, max_examples=30)
@given(
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60)), min_size=1, max_size=25),
    capacity=st.integers(1, 120),
)
def test_every_request_runs_once_within_the_capacity_and_in_the_order_of_its_kind(jobs, capacity):
    run = Runner(held=True)
    batcher = Batcher(run, linger=0.0, capacity=capacity)
    try:
        futures = submit_behind_a_held_one(batcher, run, [Job(kind, size, number) for number, (kind, size) in enumerate(jobs)])
        assert [future.result(30) for future in futures] == [2 * number for number in range(len(jobs))]
    finally:
        batcher.close()
    assert sorted(payload for batch in run.batches[1:] for _, payload in batch) == list(range(len(jobs)))
    waiting = list(range(len(jobs)))
    for batch in run.batches[1:]:
        numbers = [payload for _, payload in batch]
        assert len({kind for kind, _ in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(jobs[number][1] for number in numbers) <= capacity
        assert numbers == sorted(numbers)
        assert numbers[0] == waiting[0]  # nobody is passed over for ever
        waiting = [number for number in waiting if number not in numbers]


@pytest.mark.parametrize("crash", [RuntimeError("out of memory"), MemoryError(), SystemExit(1)])
def test_a_crash_fails_the_requests_of_its_batch_and_the_worker_goes_on(crash, batcher_of):
    run = Runner(held=True)
    jobs = [Job("a", 1, 1), Job("a", 1, crash), Job("a", 1, 3), Job("b", 1, 4)]
    futures = submit_behind_a_held_one(batcher_of(run), run, jobs)
    assert futures[0].result(30) == 2  # it was done before the crash
    assert futures[1].exception(30) is crash
    assert futures[2].exception(30) is crash
    assert futures[3].result(30) == 8


def test_after_a_crash_new_requests_are_answered(batcher_of):
    batcher = batcher_of(Runner())
    assert isinstance(batcher.submit(Job("a", 1, ValueError())).exception(30), ValueError)
    assert batcher.submit(Job("a", 1, 21)).result(30) == 42


def test_a_cancelled_request_is_skipped_and_its_neighbours_run(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run)
    first = batcher.submit(Job("first", 1, 0))
    assert run.entered.wait(30)
    futures = [batcher.submit(Job(kind, 1, number)) for number, kind in enumerate("aaab")]
    assert futures[1].cancel()
    assert futures[3].cancel()
    assert not first.cancel()  # it runs already
    run.gate.set()
    assert (futures[0].result(30), futures[2].result(30)) == (0, 4)
    assert batcher.submit(Job("c", 1, 5)).result(30) == 10
    assert run.batches == [[("first", 0)], [("a", 0), ("a", 2)], [("c", 5)]]
    with pytest.raises(CancelledError):
        futures[1].result()


def test_closing_refuses_the_waiting_and_the_new_and_finishes_what_runs(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run)
    running = batcher.submit(Job("a", 1, 1))
    assert run.entered.wait(30)
    waiting, cancelled = batcher.submit(Job("a", 1, 2)), batcher.submit(Job("a", 1, 3))
    assert cancelled.cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(EngineClosedError, match="before this request ran"):
        waiting.result(30)
    with pytest.raises(EngineClosedError, match="Create a new"):
        batcher.submit(Job("a", 1, 4))
    assert closing.is_alive()  # it waits for what runs
    run.gate.set()
    assert running.result(30) == 2
    closing.join(30)
    assert not closing.is_alive()
    assert run.batches == [[("a", 1)]]


def test_closing_while_a_request_lingers_refuses_it_at_once(batcher_of):
    batcher = batcher_of(Runner(), linger=60.0)
    future = batcher.submit(Job("a", 1, 1))
    time.sleep(0.05)
    started = time.monotonic()
    batcher.close()
    assert isinstance(future.exception(5), EngineClosedError)
    assert time.monotonic() - started < 10


def test_closing_twice_and_from_several_threads_is_fine(batcher_of):
    batcher = batcher_of(Runner())
    with ThreadPoolExecutor(4) as pool:
        wait([pool.submit(batcher.close) for _ in range(4)], 30)
    batcher.close()
    assert not batcher._thread.is_alive()


def test_an_idle_batcher_can_be_closed():
    batcher = Batcher(Runner(), linger=0.0, capacity=1)
    batcher.close()
    assert not batcher._thread.is_alive()


@pytest.mark.parametrize("linger", [0.0, 0.005])
def test_one_request_at_a_time_never_waits_for_others(linger, batcher_of):
    batcher = batcher_of(Runner(), linger=linger)
    assert [batcher.submit(Job("a", 1, number)).result(30) for number in range(50)] == [2 * number for number in range(50)]


def test_many_threads_each_get_their_own_answer(batcher_of):
    run = Runner()
    batcher = batcher_of(run, linger=0.002)

    def client(start):
        return [batcher.submit(Job("ab"[number % 2], 1, number)).result(30) for number in range(start, start + 20)]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(client, range(0, 320, 20)))
    assert [answer for each in answers for answer in each] == [2 * number for number in range(320)]
    assert sum(map(len, run.batches)) == 320
    assert max(map(len, run.batches)) > 1


def test_threads_submitting_while_it_closes_are_all_answered_or_refused(batcher_of):
    batcher = batcher_of(Runner(), linger=0.001)
    outcomes = []

    def client():
        with suppress(EngineClosedError):
            while True:
                outcomes.append(batcher.submit(Job("a", 1, 0)))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    batcher.close()
    for thread in threads:
        thread.join(30)
    assert outcomes
    assert not wait(outcomes, 30).not_done
    assert all(future.exception() is None or isinstance(future.exception(), EngineClosedError) for future in outcomes)
