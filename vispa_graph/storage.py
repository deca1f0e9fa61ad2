"""Writing folders to disk whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


class atomic_folder:
    """Context that gives a temporary folder and, if nothing was raised, puts it in place of `folder` in one step.

    Where another process was faster, its folder stays: equal keys make equal contents.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Path:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-", dir=self._folder.parent))
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.rename(self._temporary, self._folder)
        except OSError:
            if not self._folder.is_dir():
                raise
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
