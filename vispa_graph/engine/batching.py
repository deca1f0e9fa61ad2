"""One worker thread that merges requests from any thread into batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vispa_graph.errors import EngineClosedError

P = TypeVar("P")


@dataclass(eq=False)
class Job(Generic[P]):
    """A request waiting for its batch.

    Attributes:
        kind: Only jobs of one kind run together.
        size: What it adds to a batch's width, in tokens.
    """

    kind: str
    size: int
    payload: P
    future: Future[Any] = field(default_factory=Future)


class Batcher(Generic[P]):
    """Runs jobs in batches, in the order they came.

    Args:
        run: Called in the worker thread with jobs of one kind; it must resolve every job's future. What it raises fails the jobs
            whose futures are still open, and the worker goes on.
        linger: Seconds to wait for more jobs once there is one; without it, clients that ask at the same time never merge.
        capacity: Largest rows x width of a batch, in tokens; a single job may exceed it.
    """

    def __init__(self, run: Callable[[Sequence[Job[P]]], None], *, linger: float, capacity: int) -> None:
        self._run, self._linger, self._capacity = run, linger, capacity
        self._waiting: deque[Job[P]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="vispa-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job[P]) -> Future[Any]:
        """Queue a job.

        Raises:
            EngineClosedError: `close` was called.
        """
        with self._changed:
            if self._closed:
                raise EngineClosedError("The engine is closed. Create a new graph or engine.")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Refuse what waits, finish what runs. Idempotent; callable from any thread but the worker's."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(EngineClosedError("The engine was closed before this request ran."))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            live = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if not live:
                continue
            try:
                self._run(live)
            except BaseException as error:
                # A crash must fail its own requests and no others: whatever it was, the callers get to see it.
                for job in live:
                    if not job.future.done():
                        job.future.set_exception(error)

    def _next(self) -> list[Job[P]] | None:
        """Wait for a job, linger for its like, and take as many as fit; None once closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            until = time.monotonic() + self._linger
            while not self._closed and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._closed:
                return None
            first = self._waiting[0]
            batch: list[Job[P]] = []
            kept: deque[Job[P]] = deque()
            width = 0
            for job in self._waiting:
                wider = max(width, job.size)
                if job.kind == first.kind and (not batch or wider * (len(batch) + 1) <= self._capacity):
                    batch.append(job)
                    width = wider
                else:
                    kept.append(job)
            self._waiting = kept
            return batch
