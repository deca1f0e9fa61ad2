"""What a steering engine must do. Nothing here imports torch, so that a fake engine costs nothing.

An engine owns one model. Requests from any thread are answered through futures; how they are batched is the engine's affair,
and in float32 no request can change the result of another; below, the rounding depends on the batch. A future can be cancelled at any
time, also while its request runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt

from vispa_graph.errors import InputError

Method = Literal["probe", "mean_difference", "pca", "sae"]
Contrast = Literal["opposed", "opposed+others"]
Reading = Literal["raw", "chat"]
Solver = Literal["exact", "saga"]
Positions = Literal["all", "generated"]
Floats = npt.NDArray[np.float32]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, eq=False)
class Direction:
    """Where a value lies in the residual stream: one vector a steered block.

    Attributes:
        value: Id of the value.
        method: How the vectors were made; it decides how their magnitude is found.
        layers: Zero-based decoder blocks, ascending. L below is their number, d the model's width.
        vectors: [L, d]. For `probe` the weights w of P(h) = sigmoid(w.h + b); for `mean_difference` the difference of the
            class means; for `pca` the unit first principal component of the pair differences; for `sae` the difference of the
            class means among the features of a sparse dictionary, decoded.
        bias: [L], the probe's b; zeros for the other methods.
        alpha: Multiple of the vector that is added where the magnitude is fixed (all but `probe`).
        accuracy: [L], balanced accuracy on the training sentences of the side w.h + b falls on (`probe`), or of the side of
            the midpoint of the class means (the others); 0..1.
        held_out: [L], the same on pairs that the fit it is measured by did not see; None where there are too few pairs to keep some apart.
    """

    value: str
    method: Method
    layers: tuple[int, ...]
    vectors: Floats
    bias: Floats
    alpha: float
    accuracy: Floats
    held_out: Floats | None = None


@dataclass(frozen=True, eq=False)
class Steering:
    """How strongly one request is steered, and where to.

    Attributes:
        direction: The direction.
        strength: Multiple of the method's own magnitude; 0 changes nothing, 1 is the method as published. Below 0 the value is
            suppressed: `-s` is `s` along the opposite direction (-w, -b), so that a probe ends at 1 - P0 or less.
        target_probability: P0 of `probe`, between 0 and 1.
        positions: `all` steers every position, as published. `generated` leaves the prompt as it is up to its last token and steers
            from there on, so that all values share one reading of the prompt: a method of its own, faster and weaker.
        others: Further values that steer the same request, each with its own strength; their `positions` follow this one's.
    """

    direction: Direction
    strength: float = 1.0
    target_probability: float = 0.9
    positions: Positions = "all"
    others: tuple[Steering, ...] = ()

    @property
    def parts(self) -> tuple[Steering, ...]:
        """This value and all others, one after the other."""
        return (self, *(part for other in self.others for part in other.parts))

    @property
    def method(self) -> str:
        """The method by name, as results and traces show it: that of the direction, and `-generated` where the prompt is left alone."""
        return self.direction.method if self.positions == "all" else f"{self.direction.method}-generated"


def mix(steerings: Sequence[Steering], weights: Sequence[float]) -> Steering:
    """Several values at once, each with its strength multiplied by its weight.

    Every value's magnitude is solved as if it were alone, and what they add is summed: their order does not matter.

    Args:
        steerings: At least one; the first one's `positions` hold for all.
        weights: One for each; any finite number.

    Raises:
        InputError: There is no steering, or not one weight for each.
    """
    if not steerings or len(steerings) != len(weights):
        raise InputError(
            f"{len(steerings)} steerings cannot be mixed with {len(weights)} weights. Give at least one steering and one weight for each."
        )
    first, *others = (
        replace(part, strength=part.strength * weight, others=()) for s, weight in zip(steerings, weights, strict=True) for part in s.parts
    )
    return replace(first, others=tuple(others))


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One text to generate.

    Attributes:
        messages: The conversation so far; put through the model's chat template where it has one.
        steering: None for the model as it is.
        max_new_tokens: At least 1.
        temperature: 0 for greedy decoding; above, tokens are drawn with `seed`, independently of the rest of the batch.
        seed: 0 to 2**63 - 1.
        on_token: Called with each new piece of text, from the engine's thread: it must be quick and must not raise.
        timeout: Seconds, from the moment it is handed over, after which it fails with a `DeadlineError`; None for the engine's own.
    """

    messages: Sequence[Message]
    steering: Steering | None = None
    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    on_token: Callable[[str], None] | None = field(default=None, repr=False)
    timeout: float | None = None


@dataclass(frozen=True)
class SteeringReport:
    """What steering did to one request.

    Attributes:
        layers: The steered blocks.
        magnitude: For each of them the multiple of the direction's vector that was added (eps of the paper, or alpha).
        before: Probe probability at the last prompt token before the block was steered; None without a probe.
        after: The same afterwards.
        displacement: Norm of what was added, all blocks together, as a share of the residual stream's norm at the last of them.
        value: Id of the value.
        positions: Which positions were steered; see `Steering`.
        others: Reports of the further values of the same request.
    """

    layers: tuple[int, ...]
    magnitude: tuple[float, ...]
    before: tuple[float, ...] | None
    after: tuple[float, ...] | None
    displacement: float
    value: str = ""
    positions: Positions = "all"
    others: tuple[SteeringReport, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A generated text and how it came about.

    Attributes:
        finish: "stop" where the model ended the text, "length" where max_new_tokens did.
        cut_tokens: Tokens removed from the middle of the prompt to fit the context; 0 if it fitted.
        batch_rows: Rows of the batch it ran in.
        batch_width: Prompt tokens of that batch's longest row.
        dtype: The model's precision. Below float32, a text repeats exactly only in a batch of the same rows and width.
        halved: How many times memory ran out, and its batch was halved and run again.
        first_token_seconds: From the moment it was handed over to its first token; None where that was not measured.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: Literal["stop", "length"]
    steering: SteeringReport | None
    cut_tokens: int
    batch_rows: int
    batch_width: int = 0
    dtype: str = "float32"
    halved: int = 0
    first_token_seconds: float | None = None


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Option letters to score as the next token after a conversation; at most 26, all different.

    Attributes:
        full: Whether the logits of the whole vocabulary come back too.
        timeout: As in `GenerationRequest`.
    """

    messages: Sequence[Message]
    letters: tuple[str, ...]
    steering: Steering | None = None
    full: bool = False
    timeout: float | None = None


@dataclass(frozen=True)
class Scores:
    """Next-token probabilities of option letters.

    Attributes:
        probabilities: One per letter, normalised over the letters; they sum to 1.
        mass: Share of the whole vocabulary's probability that fell on the letters; near 0 the model did not answer with a letter.
        cut_tokens: As in `Generation`.
        logits: [vocabulary], of the next token, where they were asked for.
        spellings: For each letter the ids of all tokens that read as it, where the logits were asked for.
        prompt_tokens, halved: As in `Generation`.
    """

    probabilities: tuple[float, ...]
    mass: float
    cut_tokens: int
    logits: Floats | None = None
    spellings: tuple[tuple[int, ...], ...] = ()
    prompt_tokens: int = 0
    halved: int = 0


@runtime_checkable
class Engine(Protocol):
    """One model that can be steered."""

    @property
    def name(self) -> str:
        """The model's name, as traces and manifests show it."""

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides what `read` returns: weights, dtype, tokenizer and chat template."""

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""

    def generate(self, request: GenerationRequest) -> Future[Generation]:
        """Generate a text; whatever is wrong, the future fails with a `ModelError` or an `InputError`, and nothing is raised here."""

    def score(self, request: ScoreRequest) -> Future[Scores]:
        """Score option letters; errors as in `generate`."""

    def read(self, conversations: Sequence[str | Sequence[Message]], progress: Callable[[int], None] | None = None) -> Floats:
        """Residual stream after every block at the last token of each text, unsteered.

        Args:
            conversations: Raw texts, or conversations read at the assistant's header.
            progress: Called with the number of texts read since the last call.

        Returns:
            [texts, depth, width], float32.
        """

    def close(self) -> None:
        """Finish what is running, refuse what is not, and let go of the model. Idempotent."""
