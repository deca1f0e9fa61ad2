"""Files and folders that appear on disk whole or not at all."""

import errno
import os
import time

import pytest

from vispa_graph.storage import atomic_folder, write_atomic


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot have a folder itself brought to the disk")
def test_a_folder_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    synced, rename = [], os.rename

    def renamed(one, other):
        files = [one, *one.iterdir()]
        assert {path.stat().st_ino for path in files} <= set(synced)
        rename(one, other)

    monkeypatch.setattr("os.fsync", lambda number: synced.append(os.fstat(number).st_ino))
    monkeypatch.setattr("os.rename", renamed)
    with atomic_folder(tmp_path / "made") as temporary:
        for name in ("one", "two"):
            (temporary / name).write_text(name)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["one", "two"]
    assert len(synced) == 3


def test_a_folder_that_cannot_be_brought_to_the_disk_does_not_appear(tmp_path, monkeypatch):
    def full(_number):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"disk full.*made"), atomic_folder(tmp_path / "made") as temporary:
        (temporary / "file").write_text("")
    assert list(tmp_path.iterdir()) == []


def write_a_file(path):
    write_atomic(path, b"content")


def write_a_folder(path):
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("content")


@pytest.mark.parametrize("write", [write_a_file, write_a_folder])
def test_what_killed_processes_left_is_removed_after_a_day_and_nothing_else(write, tmp_path):
    temporary = [f".{name}-{number:032x}.tmp" for number, name in enumerate(("young", "old"))]
    foreign = ".old.tmp"
    for name in (*temporary, foreign):
        (tmp_path / name).write_text("")
    folder = tmp_path / f".folder-{2:032x}.tmp"
    folder.mkdir()
    (folder / "file").write_text("")
    days_ago = time.time() - 2 * 24 * 3600
    for name in (temporary[1], foreign, folder.name):
        os.utime(tmp_path / name, (days_ago, days_ago))
    write(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([temporary[0], foreign, "new"])
