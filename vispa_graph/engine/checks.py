"""What a model must do to be steered, tried out on a few tokens when it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from vispa_graph.engine.layers import block_output
from vispa_graph.errors import NonFiniteError, NotCausalError, SettingsError, UnsteerableModelError

# Gives the logits [rows, steps, vocabulary] of two steps after some prompts; with True over one shared reading of each prompt.
Steps: TypeAlias = Callable[[Sequence[Sequence[int]], bool], torch.Tensor]


def check_device(device: str) -> None:
    """Check that tensors can be put on a device.

    Raises:
        SettingsError: There is no such device.
    """
    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:160]
        raise SettingsError(f"The device {device!r} cannot be used ({reason}). Choose another, such as cpu.") from error


def check_steerable(model: Any, blocks: nn.ModuleList) -> None:
    """Check that what the blocks return is the residual stream.

    At every block but the last (behind which the final norm comes), the output must be the model's next hidden state, and a vector
    added to it must arrive in the next block unchanged. A vector added at the last block must change the logits. No token may see the
    tokens after it. Without the vectors, the logits must be what they were.

    Raises:
        UnsteerableModelError: It is not so.
        NotCausalError: A token sees the tokens after it, as in an encoder.
        NonFiniteError: The states or the logits are not finite.
    """
    name = type(model).__name__
    complaint = f"{name} cannot be steered: "
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(1, 7, device=model.device)[None] % config.vocab_size
    with torch.inference_mode():
        before, seen = _observed(blocks, lambda: model(input_ids=ids, output_hidden_states=True, use_cache=False))
        _, other_end = _observed(blocks, lambda: model(input_ids=torch.cat([ids[:, :-1], ids[:, :1]], dim=1), use_cache=False))
    states = before.hidden_states
    if states is None or len(seen) != len(blocks) or len(states) < len(blocks) + 1:
        raise UnsteerableModelError(complaint + "its blocks do not each run once in a forward pass.")
    if any(state.shape != (1, ids.shape[1], config.hidden_size) for state in seen):
        raise UnsteerableModelError(complaint + f"its blocks return states of the shape {tuple(seen[0].shape)}, not rows x positions x width.")
    if not all(torch.isfinite(state).all() for state in seen):
        raise NonFiniteError(f"The activations of {name} are not finite. Try dtype float32 or bfloat16, or another copy of the weights.")
    if torch.isnan(before.logits).any():
        raise NonFiniteError(f"The logits of {name} are not finite. Try dtype float32 or bfloat16, or another copy of the weights.")
    # Experts are given other batches then, and round otherwise.
    if not all(difference(other[:, :-1], one[:, :-1]) <= tolerance(one.dtype) for one, other in zip(seen, other_end, strict=True)):
        raise NotCausalError(f"{name} lets a token see the tokens after it, so it does not generate text. Choose a causal language model.")
    for layer in range(len(blocks) - 1):
        if not torch.allclose(seen[layer], states[layer + 1], atol=1e-4, rtol=1e-3):
            raise UnsteerableModelError(complaint + f"what block {layer} returns is not the model's hidden state {layer + 1}.")
    sent, arrived, _ = _with_vectors(model, list(blocks), ids)
    for layer in range(len(blocks) - 1):
        received = arrived[layer + 1]
        if received is None or not torch.equal(received, sent[layer]):
            raise UnsteerableModelError(complaint + f"a vector added at block {layer} does not arrive in block {layer + 1}.")
    _, _, moved = _with_vectors(model, [blocks[-1]], ids)
    if torch.equal(moved, before.logits):
        raise UnsteerableModelError(complaint + "a vector added at its last block does not change the logits.")
    with torch.inference_mode():
        after = model(input_ids=ids, use_cache=False).logits
    if not difference(after, before.logits) <= tolerance(after.dtype):
        raise UnsteerableModelError(complaint + "its logits are not the same again once vectors that were added at its blocks are gone.")


def check_batching(name: str, steps: Steps, vocabulary: int) -> None:
    """Check that a prompt gives the same logits alone as beside a longer one.

    Raises:
        UnsteerableModelError: It does not, so requests cannot share a batch.
    """
    long, short = _prompts(vocabulary)
    together = steps([long, short], False)
    for row, prompt in enumerate([long, short]):
        alone = steps([prompt], False)[0]
        if not difference(together[row], alone) <= tolerance(alone.dtype):
            raise UnsteerableModelError(
                f"{name} cannot be steered: a prompt padded to the width of its batch gives other logits than by itself, "
                "so requests cannot share a batch."
            )


def sharing_problem(steps: Steps, vocabulary: int) -> str | None:
    """Why rows cannot share one reading of their prompt, which steering of generated positions needs; None if they can."""
    long, short = _prompts(vocabulary)
    prompts = [long, short, long]
    try:
        shared, own = steps(prompts, True), steps(prompts, False)
    except Exception as error:  # a cache of the architecture's own: many kinds, each with its own way to fail
        return f"its cache cannot be shared by rows ({type(error).__name__})"
    if not difference(shared, own) <= tolerance(own.dtype):
        return "the logits over a shared cache differ from those without"
    return None


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far logits or states differ, whatever constant was added to them, as a share of their size; NaN where they are not numbers.

    Entries that both rule out (-inf, as models that mask a part of their vocabulary give) do not count.
    """
    ruled_out = (one == -torch.inf) & (other == -torch.inf)
    one, other = (logits.float().masked_fill(ruled_out, 0.0) for logits in (one, other))
    one, other = (logits - logits.mean(-1, keepdim=True) for logits in (one, other))
    return float((one - other).norm() / other.norm().clamp(min=1e-9))


def tolerance(dtype: torch.dtype) -> float:
    """Largest share by which rounding alone may make logits or states of this precision differ."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1


def _prompts(vocabulary: int) -> tuple[list[int], list[int]]:
    return [1 + i % (vocabulary - 1) for i in (8, 3, 9, 1, 6, 4, 11)], [1 + i % (vocabulary - 1) for i in (7, 2, 10)]


def _observed(blocks: nn.ModuleList, run: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """What a forward pass returns, and what each block returned in it."""
    seen: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _i, output: seen.append(block_output(output))) for block in blocks]
    try:
        return run(), seen
    finally:
        for handle in handles:
            handle.remove()


def _with_vectors(model: Any, blocks: Sequence[nn.Module], ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor | None], torch.Tensor]:
    """Each block's output with a vector of its own added to it, what each block was given, and the logits."""
    sent: list[torch.Tensor] = []
    arrived: list[torch.Tensor | None] = []

    def add(_module: object, _inputs: object, output: Any) -> Any:
        hidden = block_output(output)
        vector = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device, dtype=hidden.dtype).roll(len(sent))
        sent.append(hidden + vector)
        return (sent[-1], *output[1:]) if isinstance(output, tuple) else sent[-1]

    def receive(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        arrived.append(given.clone() if isinstance(given, torch.Tensor) else None)

    handles = [block.register_forward_hook(add) for block in blocks]
    handles += [block.register_forward_pre_hook(receive, with_kwargs=True) for block in blocks]
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return sent, arrived, logits
