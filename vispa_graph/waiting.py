"""What waits for models, written once for sync and async runs.

Such a function is a generator of `Wait`s: it yields what it waits for, and goes on with what came of it. A sync run waits in its own
thread. An async one awaits, so that no thread is held however many runs wait, and cancelling it cancels what it waits for; what the
function computes in between, which may mean loading a model, is done in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from langchain_core.runnables import Runnable, RunnableConfig

I = TypeVar("I")  # noqa: E741
T = TypeVar("T")


@dataclass(frozen=True)
class Wait(Generic[T]):
    """Something to wait for, not begun yet: in the thread, or in the event loop."""

    now: Callable[[], T]
    later: Callable[[], Awaitable[T]]


Steps = Generator[Wait[Any], Any, T]


def run_steps(steps: Steps[T]) -> T:
    """The result, waited for in this thread."""
    step: Callable[[], Wait[Any]] = partial(next, steps)
    while True:
        try:
            waits = step()
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        try:
            step = partial(steps.send, waits.now())
        except BaseException as error:
            step = partial(steps.throw, error)


async def arun_steps(steps: Steps[T]) -> T:
    """The result, awaited."""
    step: Callable[[], Wait[Any]] = partial(next, steps)
    while True:
        taken = await _in_thread(steps, step)
        if not isinstance(taken, Wait):
            result: T = taken.result
            return result
        try:
            step = partial(steps.send, await taken.later())
        except Exception as error:
            step = partial(steps.throw, error)
        except BaseException as error:  # cancelled, which waits for no thread
            steps.throw(error)
            raise


async def _in_thread(steps: Steps[T], step: Callable[[], Wait[Any]]) -> Wait[Any] | _Done[Any]:
    """Go on in a thread to the next thing to wait for. Cancelled meanwhile, the steps are closed as soon as the thread is done with them."""
    running = asyncio.ensure_future(asyncio.to_thread(_take, step))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        running.add_done_callback(partial(_close, steps))
        raise


def _close(steps: Steps[Any], running: asyncio.Future[Any]) -> None:
    if not running.cancelled():  # by a loop that ends: the thread may still be in them
        running.exception()
        steps.close()


@dataclass(frozen=True)
class _Done(Generic[T]):
    result: T


def _take(step: Callable[[], Wait[Any]]) -> Wait[Any] | _Done[Any]:
    """The next thing to wait for, or the result: a future cannot hold the `StopIteration` that it comes in."""
    try:
        return step()
    except StopIteration as stop:
        return _Done(stop.value)


def answer_of(runnable: Runnable[I, T], given: I, config: RunnableConfig, **options: Any) -> Steps[T]:
    """What a LangChain component answers."""
    answer: T = yield Wait(partial(runnable.invoke, given, config, **options), partial(runnable.ainvoke, given, config, **options))
    return answer


def answers_of(runnable: Runnable[I, T], given: list[I], config: RunnableConfig) -> Steps[list[T]]:
    """What a LangChain component answers to each of several inputs."""
    answers: list[T] = yield Wait(partial(runnable.batch, given, config), partial(runnable.abatch, given, config))
    return answers


def settled(begin: Callable[[], Sequence[Future[T]]]) -> Steps[list[T | Exception]]:
    """The results or errors of futures; they are cancelled if the wait is."""

    def outcome(future: Future[T]) -> T | Exception:
        try:
            return future.result()
        except Exception as error:
            return error

    def now() -> list[T | Exception]:
        futures = begin()
        try:
            wait(futures)
        finally:
            for future in futures:
                future.cancel()
        return [outcome(future) for future in futures]

    async def later() -> list[T | Exception]:
        futures = begin()
        await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        return [outcome(future) for future in futures]

    outcomes: list[T | Exception] = yield Wait(now, later)
    return outcomes
