"""Writing files and folders to disk whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path


class atomic_folder:
    """Context that gives a temporary folder and, if nothing was raised, puts it in place of `folder` in one step.

    Where another process was faster, its folder stays: equal keys make equal contents.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Path:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        # Made by name and not by mkdtemp, which would leave the folder to its owner alone.
        self._temporary = self._folder.with_name(f".{self._folder.name}-{uuid.uuid4().hex}.tmp")
        self._temporary.mkdir()
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            _name(error, self._folder)
        try:
            if kind is None:
                os.rename(self._temporary, self._folder)
        except OSError:
            if not self._folder.is_dir():
                raise
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file in one step: whoever reads it sees all of it or what was there before, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened by name and not by mkstemp, which would leave the file to its owner alone.
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
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


def _name(error: OSError, path: Path) -> None:
    """Have an error name a file where it names none, such as that of a full disk."""
    if error.filename is None and error.errno is not None:  # without a number its text would be lost
        error.filename = str(path)
