"""Keeping the model libraries from printing: only the command line prints."""

from __future__ import annotations

import logging
import threading

# Two models may load at once; whoever came second must not take the first one's silence for the host's own setting.
_LOCK = threading.RLock()


class quiet:
    """Context in which transformers and the hub's client show neither progress bars nor warnings. One thread at a time."""

    def __enter__(self) -> None:
        _LOCK.acquire()
        from transformers.utils import logging as transformers_logging  # costs half a second; only here

        self._transformers = transformers_logging
        self._bars = transformers_logging.is_progress_bar_enabled()
        self._loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.CRITICAL)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        try:
            for logger, level in zip(self._loggers, self._levels, strict=True):
                logger.setLevel(level)
            if self._bars:
                self._transformers.enable_progress_bar()  # type: ignore[no-untyped-call]
        finally:
            _LOCK.release()
