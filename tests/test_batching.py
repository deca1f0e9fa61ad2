"""The worker that merges requests into batches."""

import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vispa_graph.engine.batching import Batcher, Job, lingers_until
from vispa_graph.errors import BatchError, DeadlineError, EngineBusyError, EngineClosedError, NonFiniteError


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
            job.finish(job.payload * 2)


@pytest.fixture
def batcher_of():
    """Makes batchers that are closed when the test ends."""
    made = []

    def make(run, linger=0.0, capacity=100, **options):
        batcher = Batcher(run, linger=linger, capacity=capacity, **options)
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


def test_requests_that_keep_coming_prolong_the_linger(batcher_of):
    run = Runner()
    batcher = batcher_of(run, linger=1.0)
    futures = []
    for number in range(4):
        if number:
            time.sleep(0.4)  # the last comes more than one linger after the first
        futures.append(batcher.submit(Job("a", 1, number)))
    assert [future.result(30) for future in futures] == [0, 2, 4, 6]
    assert len(run.batches) == 1


def test_but_the_first_request_waits_no_more_than_four_lingers(batcher_of):
    batcher = batcher_of(Runner(), linger=0.3, capacity=10_000)
    started = time.monotonic()
    first = batcher.submit(Job("a", 1, 1))
    while not first.done():
        assert time.monotonic() < started + 8 * 0.3
        time.sleep(0.05)
        batcher.submit(Job("a", 1, 1))


def test_requests_of_another_kind_do_not_prolong_the_linger(batcher_of):
    batcher = batcher_of(Runner(), linger=0.6, capacity=10_000)
    started = time.monotonic()
    first = batcher.submit(Job("a", 1, 1))
    while not first.done():
        assert time.monotonic() < started + 3 * 0.6
        time.sleep(0.05)
        batcher.submit(Job("b", 1, 1))


def test_a_request_that_waited_as_long_for_another_batch_lingers_no_more(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run, linger=3, capacity=10)
    batcher.submit(Job("first", 10, 0))
    batcher.submit(Job("first", 10, 0))  # a full batch, which does not linger
    assert run.entered.wait(30)
    waited = batcher.submit(Job("a", 1, 1))
    time.sleep(3.1)
    batcher.submit(Job("a", 1, 2))
    run.gate.set()
    assert waited.result(2.5) == 2


arrivals = st.lists(st.floats(0, 1), min_size=1, max_size=20).map(sorted)


@given(arrivals, st.floats(0.001, 0.1), st.floats(0, 1))
def test_no_request_lingers_longer_than_four_times_and_none_that_has_once_already(came, linger, free):
    until = lingers_until(came, linger, free)
    assert until <= max(free, came[0] + 4 * linger)
    if came[0] + linger <= free:
        assert until == free


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.floats(0.001, 0.1))
def test_requests_that_come_within_a_linger_of_each_other_are_all_waited_for(gaps, linger):
    came = [0.0]
    for gap in gaps[:-1]:
        came.append(came[-1] + gap * linger)
    assert lingers_until(came, linger, free=0.0) == pytest.approx(came[-1] + linger)


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


def test_a_batch_is_as_wide_as_its_longest_prompt_and_its_longest_answer_together(batcher_of):
    run = Runner(held=True)
    jobs = [Job("a", 40, 0, new=10), Job("a", 10, 1, new=40), Job("a", 10, 2, new=10)]
    wait(submit_behind_a_held_one(batcher_of(run, capacity=100), run, jobs), 30)
    assert run.batches[1:] == [[("a", 0), ("a", 2)], [("a", 1)]]


def test_a_backlog_that_fills_a_batch_waits_for_no_others(batcher_of):
    run = Runner()
    batcher = batcher_of(run, linger=60.0, capacity=20)
    futures = [batcher.submit(Job("a", 10, number)) for number in range(3)]
    assert [future.result(30) for future in futures[:2]] == [0, 2]
    assert not futures[2].done()


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


@pytest.mark.parametrize("crash", [RuntimeError("secret"), MemoryError("secret"), SystemExit("secret")])
def test_a_crash_fails_the_requests_of_its_batch_and_the_worker_goes_on(crash, batcher_of):
    run = Runner(held=True)
    jobs = [Job("a", 1, 1), Job("a", 1, crash), Job("a", 1, 3), Job("b", 1, 4)]
    futures = submit_behind_a_held_one(batcher_of(run), run, jobs)
    assert futures[0].result(30) == 2  # it was done before the crash
    for future in futures[1:3]:
        assert isinstance(future.exception(30), BatchError)
        assert future.exception().__cause__ is crash
        assert str(crash) not in str(future.exception())  # it might quote a prompt
    assert futures[3].result(30) == 8


@pytest.mark.parametrize("crash", [RuntimeError("secret"), NonFiniteError("The logits are not finite.")])
def test_requests_that_fail_together_have_an_error_each(crash, batcher_of):
    run, cause = Runner(held=True), KeyError("cause")
    crash.__cause__ = cause
    futures = submit_behind_a_held_one(batcher_of(run), run, [Job("a", 1, crash), Job("a", 1, 2)])
    one, other = (future.exception(30) for future in futures)
    assert one is not other
    assert (type(one), str(one)) == (type(other), str(other))
    for error in (one, other):
        assert cause in (error.__cause__, error.__cause__.__cause__)


def test_a_request_that_a_run_leaves_open_fails(batcher_of):
    batcher = batcher_of(lambda jobs: None)
    with pytest.raises(BatchError, match="without an answer"):
        batcher.submit(Job("a", 1, 1)).result(30)


@pytest.mark.parametrize("late", [True, False])
def test_a_callback_that_wants_to_end_the_worker_does_not(late, batcher_of, caplog):
    run = Runner(held=True)
    batcher = batcher_of(run)
    batcher.submit(Job("first", 1, 0))
    assert run.entered.wait(30)
    future = batcher.submit(Job("a", 1, 1, timeout=0.01 if late else None))
    future.add_done_callback(lambda _: sys.exit("secret"))
    time.sleep(0.02)
    run.gate.set()
    assert isinstance(future.exception(30), DeadlineError) if late else future.result(30) == 2
    assert batcher.submit(Job("b", 1, 3)).result(30) == 6
    assert "SystemExit" in caplog.text
    assert "secret" not in caplog.text


def test_after_a_crash_new_requests_are_answered(batcher_of):
    batcher = batcher_of(Runner())
    assert isinstance(batcher.submit(Job("a", 1, ValueError())).exception(30), BatchError)
    assert batcher.submit(Job("a", 1, 21)).result(30) == 42


def test_a_cancelled_request_is_skipped_and_its_neighbours_run(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run)
    batcher.submit(Job("first", 1, 0))
    assert run.entered.wait(30)
    futures = [batcher.submit(Job(kind, 1, number)) for number, kind in enumerate("aaab")]
    assert futures[1].cancel()
    assert futures[3].cancel()
    run.gate.set()
    assert (futures[0].result(30), futures[2].result(30)) == (0, 4)
    assert batcher.submit(Job("c", 1, 5)).result(30) == 10
    assert run.batches == [[("first", 0)], [("a", 0), ("a", 2)], [("c", 5)]]
    assert wait(futures, 30).not_done == set()
    with pytest.raises(CancelledError):
        futures[1].result()


def test_a_worker_that_waits_holds_nothing_of_what_it_ran(batcher_of):
    class Prompt:
        pass

    def run(jobs):
        for job in jobs:
            job.finish(None)

    prompt = Prompt()
    left = weakref.ref(prompt)
    batcher = batcher_of(run)
    batcher.submit(Job("a", 1, prompt)).result(30)
    del prompt
    until = time.monotonic() + 30
    while left() is not None and time.monotonic() < until:
        time.sleep(0.001)
    assert left() is None


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
        batcher.submit(Job("a", 1, 4)).result(30)
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


def test_an_error_of_ours_reaches_the_caller_with_its_class_its_text_and_its_cause(batcher_of):
    error = NonFiniteError("not finite")
    error.__cause__ = cause = ValueError()
    reached = batcher_of(Runner()).submit(Job("a", 1, error)).exception(30)
    assert (type(reached), str(reached), reached.__cause__) == (NonFiniteError, "not finite", cause)


def test_a_request_can_be_cancelled_while_it_runs_and_its_neighbour_is_answered(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run, linger=0.2)
    futures = [batcher.submit(Job("a", 1, number)) for number in range(2)]
    assert run.entered.wait(30)
    assert futures[0].cancel()
    run.gate.set()
    assert futures[1].result(30) == 2
    assert wait(futures, 30).not_done == set()
    with pytest.raises(CancelledError):
        futures[0].result(0)
    assert not futures[1].cancel()  # too late


def test_a_full_queue_refuses_at_once_and_takes_requests_again_when_there_is_room(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run, queue_size=2)
    first = batcher.submit(Job("first", 1, 0))
    assert run.entered.wait(30)
    waiting = [batcher.submit(Job("a", 1, number)) for number in range(2)]
    with pytest.raises(EngineBusyError, match=r"2 requests are waiting.*queue_size"):
        batcher.submit(Job("a", 1, 3)).result(0)
    unbounded = batcher.submit(Job("a", 1, 4, bounded=False))
    run.gate.set()
    assert [future.result(30) for future in (first, *waiting, unbounded)] == [0, 0, 2, 8]
    assert batcher.submit(Job("a", 1, 5)).result(30) == 10


def test_requests_that_are_not_bounded_do_not_fill_the_queue_for_others(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run, queue_size=2)
    batcher.submit(Job("first", 1, 0))
    assert run.entered.wait(30)
    read = [batcher.submit(Job("read", 1, number, bounded=False)) for number in range(5)]
    asked = [batcher.submit(Job("a", 1, number)) for number in range(2)]
    run.gate.set()
    assert [future.result(30) for future in (*read, *asked)] == [0, 2, 4, 6, 8, 0, 2]


def test_a_request_whose_time_is_up_fails_before_its_batch_and_is_never_run(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run)
    first = batcher.submit(Job("first", 1, 0))
    assert run.entered.wait(30)
    late, patient = batcher.submit(Job("a", 1, 1, timeout=0.01)), batcher.submit(Job("a", 1, 2, timeout=60.0))
    time.sleep(0.02)
    batcher.sweep()  # as the running batch does between its steps
    with pytest.raises(DeadlineError, match=r"within 0\.01 s") as raised:
        late.result(0)
    assert isinstance(raised.value, TimeoutError)
    run.gate.set()
    assert (first.result(30), patient.result(30)) == (0, 4)
    assert run.batches == [[("first", 0)], [("a", 2)]]


def test_sweeping_fails_those_taken_from_the_queue_whose_time_is_up(batcher_of):
    failed = []

    def run(jobs):
        time.sleep(0.1)
        batcher.sweep()
        failed.append(jobs[0].future.done())

    batcher = batcher_of(run)
    with pytest.raises(DeadlineError):
        batcher.submit(Job("a", 1, 1, timeout=0.05)).result(30)
    batcher.close()
    assert failed == [True]


def test_sweeping_takes_cancelled_requests_out_of_the_queue(batcher_of):
    run = Runner(held=True)
    batcher = batcher_of(run, queue_size=1)
    batcher.submit(Job("first", 1, 0))
    assert run.entered.wait(30)
    waiting = batcher.submit(Job("a", 1, 1))
    assert waiting.cancel()
    batcher.sweep()
    next_one = batcher.submit(Job("a", 1, 2))
    run.gate.set()
    assert next_one.result(30) == 4


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(["finish", "fail", "cancel", "dropped"]), min_size=8, max_size=8))
def test_of_all_who_resolve_a_request_at_the_same_time_exactly_one_does(actions):
    job = Job("a", 1, 0)
    called = []
    job.future.add_done_callback(called.append)
    start = threading.Barrier(len(actions))
    do = {"finish": lambda: job.finish(1), "fail": lambda: job.fail(ValueError()), "cancel": job.future.cancel, "dropped": job.dropped}

    def act(action):
        start.wait()
        do[action]()

    with ThreadPoolExecutor(len(actions)) as pool:
        list(pool.map(act, actions))
    assert len(called) == (set(actions) != {"dropped"})
    assert job.dropped() == bool(called)


def test_closing_from_a_callback_does_not_wait_for_itself_and_ends_the_worker(batcher_of):
    ended = threading.Event()
    batcher = batcher_of(Runner(), finish=ended.set)
    future = batcher.submit(Job("a", 1, 1))
    future.add_done_callback(lambda _: batcher.close())
    assert future.result(30) == 2
    assert ended.wait(30)


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
    batcher = batcher_of(Runner(), linger=0.001, queue_size=1_000_000)
    outcomes = []

    def client():
        while not outcomes or not batcher._closed:
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
