"""What stands between the model and a running batch: the rows that grow, how their tokens are chosen, and who hears of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

from vispa_graph.engine.batching import Job
from vispa_graph.engine.contract import GenerationRequest, ScoreRequest
from vispa_graph.engine.rows import Row
from vispa_graph.errors import BatchError, NonFiniteError


@dataclass(eq=False)
class Work:
    """A request with its prompt in tokens, what of its answer has been passed on, and the seconds until its first token; or a row to read."""

    request: GenerationRequest | ScoreRequest | None
    tokens: list[int]
    cut: int = 0
    streamed: str = ""
    first: float | None = None
    row: Row | None = None


class GrowingRow:
    """One row of a running batch: its tokens so far and the text that they make."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, job: Job[Work], request: GenerationRequest, stops: list[int] | None) -> None:
        self.job, self.request = job, request
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = self.done = False
        self._tokenizer, self._stops = tokenizer, frozenset(stops or ())
        self._before = job.payload.streamed  # in a batch that failed

    def add(self, token: int) -> None:
        """Take the next token; sets `done` with the last one."""
        if self.job.payload.first is None:
            self.job.payload.first = time.monotonic() - self.job.begun
        if token in self._stops:
            self.stopped = self.done = True
        else:
            self.tokens.append(token)
            self.done = len(self.tokens) >= self.request.max_new_tokens
        if not self.done and not self.request.on_token:
            return  # nobody reads the text before it is whole
        # Tidying would take back spaces that have been passed on.
        text = cast(str, self._tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        # A character may span several tokens: wait for the rest of it, unless there is no more.
        if self.done or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.text = text
            if self.request.on_token:
                self._pass_on(text, self.request.on_token)

    def _pass_on(self, text: str, listener: Callable[[str], None]) -> None:
        """Give the listener what it has not heard. The request fails if it cannot be taken back, or the listener raises."""
        if not text.startswith(self._before) and (self.done or not self._before.startswith(text)):
            self._fail("The request was run again after its batch had failed, and its text became another than the one streamed. Ask again.")
            return
        heard = self.job.payload.streamed
        if len(text) > len(heard):
            self.job.payload.streamed = text
            try:
                listener(text[len(heard) :])
            except Exception as error:
                self._fail(f"The listener on_token raised {type(error).__name__}. Mend it; the cause is chained to this error.", error)

    def _fail(self, reason: str, cause: Exception | None = None) -> None:
        self.done = True
        failure = BatchError(reason)
        failure.__cause__ = cause
        self.job.fail(failure)


class GrowingRows(StoppingCriteria):
    """Hands each new token to its row, reports rows as they finish, gives up those that nobody waits for, and stops both."""

    def __init__(self, rows: Sequence[GrowingRow], finished: Callable[[GrowingRow], None], sweep: Callable[[], None]) -> None:
        self._rows, self._finished, self._sweep = rows, finished, sweep

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Take each row's last token of `input_ids`, [rows, positions]; returns which rows are done, [rows]."""
        self._sweep()
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.done and row.job.dropped():
                row.done = True
            elif not row.done:
                row.add(token)
                if row.done:
                    self._finished(row)
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)


class Sampler(LogitsProcessor):
    """Refuses logits that are NaN (minus infinity rules a token out), and samples rows that ask for it with generators of their own.

    Adding Gumbel noise and taking the largest draws from the softmax, so in float32 a row's text does not depend on its neighbours.
    """

    def __init__(self, requests: Sequence[GenerationRequest], device: torch.device) -> None:
        # On the processor, a seed draws the same everywhere; to move the noise to a GPU in each step would cost more than the step.
        self._device = device if device.type == "cuda" else torch.device("cpu")
        sampled = [(row, request) for row, request in enumerate(requests) if request.temperature > 0]
        self._rows = [(row, request.temperature, torch.Generator(self._device).manual_seed(request.seed)) for row, request in sampled]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits [rows, vocabulary], those of sampled rows with their noise.

        Raises:
            NonFiniteError: A logit is NaN.
        """
        if torch.isnan(scores).any():
            raise NonFiniteError("The model's logits are not finite. Try dtype float32 or bfloat16, or a smaller strength.")
        for row, temperature, generator in self._rows:
            # Minus the logarithm of an exponential variable is a Gumbel variable.
            waiting = torch.empty(scores.shape[-1], dtype=torch.float64, device=self._device).exponential_(generator=generator)
            scores[row] = scores[row] / temperature - waiting.clamp(min=1e-300).log().to(scores)
        return scores


class Always(LogitsProcessor):
    """Leaves one token to choose."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] that rule all other tokens out."""
        only = torch.full_like(scores, -torch.inf)
        only[:, self._token] = 0
        return only
