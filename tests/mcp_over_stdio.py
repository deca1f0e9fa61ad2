"""`vispa` on an engine without a model that prints where it must not; started by `test_mcp_server.py` and `test_tracing.py`."""

from __future__ import annotations

import os

from conftest import WordEncoder

import vispa_graph.resources
from vispa_graph.cli import main
from vispa_graph.engine.fake import FakeEngine


class Printing(FakeEngine):
    def generate(self, request):
        print("a stray print")  # noqa: T201
        os.write(1, b"and one from a library in C\n")
        return super().generate(request)


vispa_graph.resources.Resources._load_engine = lambda self: Printing()
vispa_graph.resources.SentenceEncoder = lambda *_, **__: WordEncoder()
main()
