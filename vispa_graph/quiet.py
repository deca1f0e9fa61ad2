"""Keeping the model libraries from printing: only the command line prints."""

from __future__ import annotations


class quiet:
    """Context in which transformers shows neither progress bars nor warnings: only the command line prints."""

    def __enter__(self) -> None:
        from transformers.utils import logging  # costs half a second; only here

        self._logging = logging
        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity(40)  # logging.ERROR
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        logging = self._logging
        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()
