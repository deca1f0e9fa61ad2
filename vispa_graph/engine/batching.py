"""One worker thread that merges requests from any thread into batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vispa_graph.errors import BatchError, DeadlineError, EngineBusyError, EngineClosedError, VispaError

P = TypeVar("P")
_log = logging.getLogger(__name__)
# How many lingers a request waits at most while more of its kind keep coming.
_LONGEST = 4


@dataclass(eq=False)
class Job(Generic[P]):
    """A request, waiting or running.

    The future stays pending until there is a result, so that it can be cancelled at any time.

    Attributes:
        kind: Only jobs of one kind run together.
        prompt: Tokens that it begins with.
        new: Most tokens that it adds to them. A batch is as wide as its longest prompt and its longest answer together.
        timeout: Seconds from now until it fails with a `DeadlineError`; None for never.
        halved: How often the batch it ran in was halved for want of memory.
        bounded: Whether it counts against the bound of the queue; not where its caller waits for it anyway before submitting more.
        begun: When it was made, by `time.monotonic`.
        queued: When it was submitted.
    """

    kind: Hashable
    prompt: int
    payload: P
    new: int = 0
    timeout: float | None = None
    halved: int = 0
    bounded: bool = True
    future: Future[Any] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.begun = self.queued = time.monotonic()
        self._deadline = None if self.timeout is None else self.begun + self.timeout
        self._lock, self._claimed = threading.Lock(), False

    @property
    def size(self) -> int:
        """Its width by itself, in tokens."""
        return self.prompt + self.new

    def finish(self, result: Any) -> None:
        """Resolve with a result, unless it was cancelled or has failed."""
        self._resolve(lambda: self.future.set_result(result))

    def fail(self, error: BaseException) -> None:
        """Resolve with an error, unless it was cancelled or is done."""
        self._resolve(lambda: self.future.set_exception(error))

    def dropped(self) -> bool:
        """Whether nobody waits for it any more: done, cancelled, or past its deadline, with which it fails here."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.fail(DeadlineError(f"The request was not answered within {self.timeout:g} s. Give it more time, or ask for fewer tokens."))
        if self.future.cancelled():
            self._claim()  # tells those who wait for several futures at once
        return self.future.done()

    def _resolve(self, resolve: Callable[[], None]) -> None:
        try:
            if self._claim():
                resolve()
        except BaseException as error:  # of a callback, such as SystemExit: it must not end the worker, for others wait for it
            if threading.current_thread() is threading.main_thread():
                raise
            _log.error("A callback of a request raised %s.", type(error).__name__)

    def _claim(self) -> bool:
        """Whether the caller is the one to resolve it: several threads may try, and whoever asked may have cancelled."""
        with self._lock:
            mine, self._claimed = not self._claimed, True
        return mine and self.future.set_running_or_notify_cancel()


class Batcher(Generic[P]):
    """Runs jobs in batches, in the order they came.

    Args:
        run: Called in the worker thread with jobs of one kind, to resolve every one. Those that it leaves open fail, with what it
            raised if it did, and the worker goes on.
        linger: Seconds that a job waits for others of its kind, see `lingers_until`, unless those that wait fill a batch already; without
            it, clients that ask at the same time never merge.
        capacity: Largest rows x width of a batch, in tokens; a single job may exceed it.
        queue_size: Most bounded jobs that wait; more are refused.
        finish: Called in the worker thread when it ends.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job[P]]], None],
        *,
        linger: float,
        capacity: int,
        queue_size: int = 1024,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._linger, self._capacity, self._queue_size, self._finish = run, linger, capacity, queue_size, finish
        self._waiting: deque[Job[P]] = deque()
        self._taken: list[Job[P]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="vispa-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job[P]) -> Future[Any]:
        """Queue a job. Its future fails with an `EngineClosedError` after `close`, with an `EngineBusyError` where the queue is full."""
        with self._changed:
            closed, busy = self._closed, job.bounded and self._queue_is_full()
            if not closed and not busy:
                job.queued = time.monotonic()
                self._waiting.append(job)
                self._changed.notify()
        if closed:
            job.fail(EngineClosedError("The engine is closed. Create a new graph or engine."))
        elif busy:
            job.fail(EngineBusyError(f"The engine is busy: {self._queue_size} requests are waiting already. Ask again later, or raise queue_size."))
        return job.future

    def _queue_is_full(self) -> bool:
        # Counted only where it may matter: most of the time little waits.
        return len(self._waiting) >= self._queue_size and sum(job.bounded for job in self._waiting) >= self._queue_size

    def sweep(self) -> None:
        """Let go of jobs that nobody waits for, in the queue or taken from it; called between the steps of a batch, so that they fail in time."""
        with self._changed:
            jobs = [*self._taken, *self._waiting]
        # Callbacks of their futures run here, and may submit: the lock must be free.
        dropped = {id(job) for job in jobs if job.dropped()}
        if dropped:
            with self._changed:
                self._waiting = deque(job for job in self._waiting if id(job) not in dropped)

    def close(self) -> None:
        """Refuse what waits, finish what runs. Idempotent; the worker's own thread does not wait for itself."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for job in waiting:
            job.fail(EngineClosedError("The engine was closed before this request ran."))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        try:
            while self._serve():
                pass
        finally:
            self.close()
            self._finish()

    def _serve(self) -> bool:
        """Wait for a batch and run it; False once closed. Whoever waits here for the next one holds nothing of the last."""
        batch = self._next()
        if batch is None:
            return False
        live = [job for job in batch if not job.dropped()]
        if not live:
            return True
        with self._changed:
            self._taken = live
        try:
            self._run(live)
        except BaseException as error:
            # A crash must fail its own requests and no others: whatever it was, the callers get to see it.
            for job in live:
                job.fail(as_ours(error))
        for job in live:
            job.fail(BatchError("The model ended without an answer to this request. The engine goes on; ask again, or check the model's own code."))
        with self._changed:
            self._taken = []
        return True

    def _next(self) -> list[Job[P]] | None:
        """Wait for a job, linger for its like, and take as many as fit; None once closed."""
        free = time.monotonic()
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            while not self._closed and (left := self._until(free) - time.monotonic()) > 0 and not self._full():
                self._changed.wait(left)
            if self._closed:
                return None
            batch, self._waiting = self._split()
            return batch

    def _until(self, free: float) -> float:
        kind = self._waiting[0].kind
        return lingers_until([job.queued for job in self._waiting if job.kind == kind], self._linger, free)

    def _full(self) -> bool:
        """Whether more like the oldest job wait than fit into its batch."""
        batch, kept = self._split()
        return any(job.kind == batch[0].kind for job in kept)

    def _split(self) -> tuple[list[Job[P]], deque[Job[P]]]:
        """The oldest job with those of its kind that fit into a batch with it, and the others."""
        kind = self._waiting[0].kind
        batch: list[Job[P]] = []
        kept: deque[Job[P]] = deque()
        prompt = new = 0
        for job in self._waiting:
            longer, more = max(prompt, job.prompt), max(new, job.new)
            if job.kind == kind and (not batch or (longer + more) * (len(batch) + 1) <= self._capacity):
                batch.append(job)
                prompt, new = longer, more
            else:
                kept.append(job)
        return batch, kept


def lingers_until(came: Sequence[float], linger: float, free: float) -> float:
    """Until when jobs of one kind wait for more of it.

    Requests of one caller come one after the other, the slower the more watch them: each that comes is waited for anew.

    Args:
        came: When each was submitted, oldest first.
        linger: How long is waited after each, and four times as long at most after the first.
        free: Since when no batch runs: a job that has waited out its linger by then has lingered enough.
    """
    oldest, newest = came[0], came[-1]
    return free if oldest + linger <= free else min(newest + linger, oldest + _LONGEST * linger)


def as_ours(error: BaseException) -> VispaError:
    """A copy of the error where it is one of ours, else a `BatchError` caused by it. Its text stays in the cause: it may quote a prompt.

    Each request gets its own: whoever raises an error adds to its traceback, and several threads may.
    """
    if isinstance(error, VispaError):
        own = copy(error).with_traceback(error.__traceback__)
        own.__cause__ = error.__cause__
        return own
    ours = BatchError(f"The model failed while it ran this request ({type(error).__name__}). The engine goes on; the cause is chained to this error.")
    ours.__cause__ = error
    return ours
