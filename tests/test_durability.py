"""Runs whose process is killed, and reviews that wait from one process to another."""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import sys
import time

import durable
import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

KILLS = 20  # of each way


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a run in a process of its own, forked from one that has imported everything."""
    folder = tmp_path_factory.mktemp("durable")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["durable"])

    def start(thread, *, asynchronous, resume=None, pause=0.0, review=False, place=None):
        process = processes.Process(target=durable.serve, args=(str(folder), thread, asynchronous, resume, pause, review, place))
        process.start()
        return process

    start.folder = folder
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.11.10 the process that forks the others does not get our sys.path.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        # Directions are fitted once: the killed runs find them in the cache.
        ended(start("warm", asynchronous=False))
    return start


def ended(process):
    process.join(60)
    assert process.exitcode == 0


def log_of(start, thread):
    log = start.folder / f"{thread}.log"
    return log.read_text().split() if log.exists() else []


def output_of(start, thread):
    written = start.folder / f"{thread}.out"
    return durable.STRICT.loads_typed(("msgpack", written.read_bytes())) if written.exists() else None


def finished_on(start, thread, place=None):
    """The values whose comments are in the checkpointer; with a place, in that of the host around."""
    connection = sqlite3.connect(start.folder / "runs.sqlite")
    try:
        inside = "select distinct checkpoint_ns from checkpoints where thread_id = ? and checkpoint_ns like 'ask:%'"
        [name] = [row[0] for row in connection.execute(inside, (thread,))] if place else [""]
        found = SqliteSaver(connection, serde=durable.STRICT).get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": name}})
    finally:
        connection.close()
    if found is None:
        return []
    pending = [comment["value"] for _, channel, comments in found.pending_writes or [] if channel == "comments" for comment in comments]
    return pending + [comment["value"] for comment in found.checkpoint["channel_values"].get("comments", [])]


def kill_during_fan_out(start, thread, chance, asynchronous, place=None):
    """Kill the run of a thread once a random number of its comments were made, at a random moment between two of them."""
    pause = 0.02
    process = start(thread, asynchronous=asynchronous, pause=pause, place=place)
    made = chance.randrange(len(durable.VALUES))
    while len(log_of(start, thread)) < made or not (start.folder / f"{thread}.begun").exists():
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.001)
    time.sleep(chance.uniform(0, pause))
    process.kill()
    process.join()
    return log_of(start, thread)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_run_killed_at_any_moment_of_the_fan_out_goes_on_without_making_a_finished_comment_again(start, asynchronous, capsys):
    way, chance = "async" if asynchronous else "sync", random.Random(5)
    ended(start(f"undisturbed-{way}", asynchronous=asynchronous))
    expected = output_of(start, f"undisturbed-{way}")
    saved, made, lost = [], 0, 0
    for number in range(KILLS):
        thread = f"{way}-{number}"
        before = kill_during_fan_out(start, thread, chance, asynchronous)
        finished = finished_on(start, thread)
        ended(start(thread, asynchronous=asynchronous, resume="go on"))
        again = log_of(start, thread)[len(before) :]
        assert sorted(finished + again) == sorted(durable.VALUES)  # each unfinished one once, no finished one
        assert output_of(start, thread) == expected
        saved.append(len(finished))
        made, lost = made + len(before), lost + len(set(before) - set(finished))
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{way}: {KILLS} runs killed and resumed; {sum(saved)} of {made} comments made were kept, "
            f"{lost} were made but not yet written when the kill came; comments kept per run: {sorted(saved)}"
        )
    assert any(0 < count < len(durable.VALUES) for count in saved)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("place", ["node", "call", "tool"])
def test_so_does_one_inside_a_host_that_is_killed(start, asynchronous, place):
    way, chance = f"{place}-{'async' if asynchronous else 'sync'}", random.Random(7)
    ended(start(f"hosted-undisturbed-{way}", asynchronous=asynchronous, place=place))
    expected, kept = output_of(start, f"hosted-undisturbed-{way}"), []
    for number in range(KILLS // 5):
        thread = f"hosted-{way}-{number}"
        before = kill_during_fan_out(start, thread, chance, asynchronous, place)
        finished = finished_on(start, thread, place)
        ended(start(thread, asynchronous=asynchronous, resume="go on", place=place))
        again = log_of(start, thread)[len(before) :]
        assert sorted(finished + again) == sorted(durable.VALUES)
        assert output_of(start, thread) == expected
        kept.append(len(finished))
    assert any(0 < count < len(durable.VALUES) for count in kept)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_review_waits_from_one_process_to_another(start, asynchronous):
    thread = f"review-{asynchronous}"
    ended(start(thread, asynchronous=asynchronous, review=True))
    [stop] = output_of(start, thread)["__interrupt__"]
    assert [value["id"] for value in stop.value["values"]] == durable.VALUES
    assert log_of(start, thread) == []
    edited = [{"id": "karma", "weight": 4}, durable.VALUES[0]]
    ended(start(thread, asynchronous=asynchronous, resume=[{"id": "karma", "weight": 0}], review=True))
    assert "above 0" in output_of(start, thread)["__interrupt__"][0].value["problem"]
    ended(start(thread, asynchronous=asynchronous, resume=edited, review=True))
    out = output_of(start, thread)
    assert [(value["id"], value["weight"]) for value in out["values"]] == [("karma", 4.0), (durable.VALUES[0], 1.0)]
    assert sorted(log_of(start, thread)) == sorted(["karma", durable.VALUES[0]])
