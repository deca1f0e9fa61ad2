"""Writing files and folders to disk whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path

_TEMPORARY = re.compile(r"\..+-[0-9a-f]{32}\.tmp")
# Seconds after which a temporary file is taken to be left by a process that was killed.
_LEFT = 24 * 3600


class atomic_folder:
    """Context that gives a temporary folder and, if nothing was raised, puts it in place of `folder` in one step, whole also after a power cut.

    Where another process was faster, its folder stays: equal keys make equal contents.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Path:
        # Made by name and not by mkdtemp, which would leave the folder to its owner alone.
        self._temporary = _temporary_for(self._folder)
        self._temporary.mkdir()
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            _name(error, self._folder)
        try:
            if kind is None:
                _sync(self._temporary)
                os.rename(self._temporary, self._folder)
        except OSError as failure:
            if not self._folder.is_dir():
                _name(failure, self._folder)
                raise
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file in one step: whoever reads it sees all of it or what was there before, also after a power cut."""
    # Opened by name and not by mkstemp, which would leave the file to its owner alone.
    temporary = _temporary_for(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_for(path: Path) -> Path:
    """A new name beside a path, in a folder that is there and free of what killed processes have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may remove it just now
            if _TEMPORARY.fullmatch(left.name) and time.time() - left.lstat().st_mtime > _LEFT:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")


def _sync(folder: Path) -> None:
    """Have the files of a folder, and the folder itself, on the disk."""
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    with contextlib.suppress(OSError):  # Windows, and some file systems, cannot do that with a folder
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _name(error: OSError, path: Path) -> None:
    """Have an error name a file where it names none, such as that of a full disk."""
    if error.filename is None and error.errno is not None:  # without a number its text would be lost
        error.filename = str(path)
