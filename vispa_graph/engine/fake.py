"""An engine without a model, for tests of what is built on engines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from vispa_graph.engine.contract import Floats, Generation, GenerationRequest, Message, ScoreRequest, Scores, SteeringReport


class FakeEngine:
    """Answers at once and always the same: a comment names the value it was steered toward.

    Args:
        answer: Text for a request; None for the default.
        fail: Raised by every generation, to see how the caller bears it.
        depth: Number of blocks it pretends to have.

    Attributes:
        requests: All requests so far, in order.
    """

    name = "fake"
    fingerprint = "fake"

    def __init__(self, *, answer: Callable[[GenerationRequest], str] | None = None, fail: Exception | None = None, depth: int = 8) -> None:
        self.depth = depth
        self.requests: list[GenerationRequest | ScoreRequest] = []
        self.closed = False
        self._answer, self._fail = answer or _default_answer, fail

    def generate(self, request: GenerationRequest) -> Future[Generation]:
        """The fixed answer, one word at a time for those who listen."""
        self.requests.append(request)
        future: Future[Generation] = Future()
        if self._fail:
            future.set_exception(self._fail)
            return future
        text = self._answer(request)
        if request.on_token:
            for number, word in enumerate(text.split(" ")):
                request.on_token(f" {word}" if number else word)
        report = None
        if request.steering:
            layers = request.steering.direction.layers
            p0 = request.steering.target_probability
            report = SteeringReport(
                layers,
                (1.0,) * len(layers),
                (0.5,) * len(layers),
                (p0,) * len(layers),
                0.1,
                request.steering.direction.value,
                request.steering.positions,
            )
        prompt = len(str(request.messages).split())
        future.set_result(Generation(text, prompt, len(text.split()), "stop", report, 0, 1, batch_width=prompt, first_token_seconds=0.0))
        return future

    def score(self, request: ScoreRequest) -> Future[Scores]:
        """Probabilities that depend on the conversation only."""
        self.requests.append(request)
        weights = _generator(str(request.messages)).random(len(request.letters)) + 0.1
        future: Future[Scores] = Future()
        probabilities = weights / weights.sum()
        scores = Scores(tuple(float(p) for p in probabilities), 0.9, 0, prompt_tokens=len(str(request.messages).split()))
        if request.full:  # a vocabulary of the letters and one other token
            logits = np.log(np.append(0.9 * probabilities, 0.1)).astype(np.float32)
            scores = replace(scores, logits=logits, spellings=tuple((number,) for number in range(len(weights))))
        future.set_result(scores)
        return future

    def read(self, conversations: Sequence[str | Sequence[Message]], progress: Callable[[int], None] | None = None) -> Floats:
        """States that depend on each text only, [texts, depth, 4]."""
        if progress:
            progress(len(conversations))
        return np.stack([_generator(str(c)).standard_normal((self.depth, 4)) for c in conversations]).astype(np.float32)

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True


def _default_answer(request: GenerationRequest) -> str:
    value = request.steering.direction.value if request.steering else "nothing"
    return f"Seen from {value}, this matters. One should think about {value}."


def _generator(text: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
