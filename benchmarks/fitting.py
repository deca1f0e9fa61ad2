"""Fitting, and the two ways to a distribution, against the plain procedure; runs interleaved, medians, ratios in one process.

    python -m benchmarks.fitting                             # all 31 values, three rounds: an hour on one core
    python -m benchmarks.fitting --values 4 --rounds 3       # minutes; the ratios are those of four values

The model is a random Qwen2 of 99 million parameters in float32; its text means nothing, its cost does.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from vispa_graph.engine.contract import Direction, GenerationRequest, Steering
from vispa_graph.engine.directions import FitSettings, ReadOnce, fit_direction, fit_directions
from vispa_graph.engine.huggingface import HuggingFaceEngine
from vispa_graph.engine.layers import default_layers
from vispa_graph.engine.pairs import make_twins
from vispa_graph.prompts import load_prompt
from vispa_graph.resources import embedded_folder
from vispa_graph.scoring import Ballot, mean_distribution, option_prompt, score_locally
from vispa_graph.taxonomy_index import Taxonomy, Value
from vispa_graph.waiting import run_steps

METHODS = ("probe", "mean_difference", "pca")
VALUES, OPTIONS = 6, ("Yes, in any case", "No, in no case", "It depends on what he wants")
QUESTION = (
    "My father is 84 and lives alone. His doctors advise an operation on the heart that may give him some more years, but he is afraid of "
    "the hospital and says that he has lived long enough. My sister wants to persuade him. Should he have the operation?"
)


def medians(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each run, the runs taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, HuggingFaceEngine]:
    """A random model as deep and wide as one of 100 million parameters, bare and, over the same weights, in an engine; with the tokenizer of the package."""
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_folder()))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=18,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=2048,
    )
    bare = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    hooked = copy.deepcopy(bare, {id(p): p for p in bare.parameters()})
    return bare, tokenizer, HuggingFaceEngine(hooked, tokenizer, name="random")


def one_at_a_time(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, values: Sequence[Value]) -> None:
    """The plain procedure: a forward pass a sentence, then for each value, block and method two fits, one of them without the held-out pairs."""
    for value in values:
        sides = []
        for texts in ([pair.positive for pair in value.all_pairs], [pair.negative for pair in value.all_pairs]):
            states = []
            for text in texts:
                with torch.inference_mode():
                    found = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256), output_hidden_states=True)
                states.append(torch.stack([state[0, -1] for state in found.hidden_states[1:]]).numpy())
            sides.append(np.stack(states))
        positives, negatives = sides
        held = make_twins(value.all_pairs, "raw").held
        for layer in range(positives.shape[1]):
            for kept in (~held, slice(None)):
                p, n = positives[kept, layer], negatives[kept, layer]
                probe = LogisticRegression(max_iter=10_000).fit(np.concatenate([p, n]), [1] * len(p) + [0] * len(n))
                for vector in (probe.coef_[0], p.mean(0) - n.mean(0), np.linalg.svd(p - n, full_matrices=False)[2][0]):
                    np.mean(positives[held, layer] @ vector > negatives[held, layer] @ vector)


def in_batches(engine: HuggingFaceEngine, values: Sequence[Value]) -> None:
    """What the package does."""
    once = ReadOnce(engine)
    for method in METHODS:
        fit_directions(once, values, FitSettings(method, tuple(range(engine.depth))))


def fitting_ratio(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: HuggingFaceEngine, values: Sequence[Value], rounds: int
) -> tuple[dict[str, float], float]:
    """Seconds of both, and how many times faster batches are."""
    found = medians({"one at a time": lambda: one_at_a_time(model, tokenizer, values), "in batches": lambda: in_batches(engine, values)}, rounds)
    return found, found["one at a time"] / found["in batches"]


def distribution_ratio(engine: HuggingFaceEngine, rounds: int, new_tokens: int) -> tuple[dict[str, float], float]:
    """Seconds of the paper's way, comment and then score, and of reading steered prefills; and their ratio."""
    layers, random = default_layers(engine.depth), np.random.default_rng(0)
    shape = (len(layers), engine.width)
    steerings = [
        Steering(
            Direction(
                f"value {number}",
                "probe",
                layers,
                (0.05 * random.standard_normal(shape)).astype(np.float32),
                np.zeros(len(layers), np.float32),
                1.0,
                np.ones(len(layers), np.float32),
            )
        )
        for number in range(VALUES)
    ]
    order = tuple(range(len(OPTIONS)))

    def comments_then_score() -> None:
        prompt = load_prompt("comment").render(text=QUESTION)
        futures = [engine.generate(GenerationRequest([{"role": "user", "content": prompt}], s, new_tokens)) for s in steerings]
        texts = [future.result().text for future in futures]
        ballots = [Ballot(str(n), order, option_prompt(QUESTION, OPTIONS, text, None)) for n, text in enumerate(texts)]
        mean_distribution(ballots, run_steps(score_locally(engine, ballots))[0])

    def direct() -> None:
        prompt = option_prompt(QUESTION, OPTIONS, None, None)
        ballots = [Ballot(str(n), order, prompt, steering) for n, steering in enumerate(steerings)]
        mean_distribution(ballots, run_steps(score_locally(engine, ballots))[0])

    direct()
    found = medians({"comment and score": comments_then_score, "direct": direct}, rounds)
    return found, found["comment and score"] / found["direct"]


def probe_seconds(taxonomy: Iterable[Value], blocks: int = 24, width: int = 896) -> float:
    """Seconds for the probes of all values at 24 blocks of width 896, with their held-out accuracies.

    The states are random, with dimensions as unequal in size as those of a language model.
    """
    random = np.random.default_rng(0)
    scale = np.exp(1.5 * random.standard_normal(width)).astype(np.float32)
    settings, seconds = FitSettings("probe", tuple(range(blocks))), 0.0
    for value in taxonomy:
        twins = make_twins(value.all_pairs, "raw")
        shape = (len(twins.positives), blocks, width)
        toward = 0.3 * random.standard_normal(width, dtype=np.float32)
        positives, negatives = (scale * (random.standard_normal(shape, dtype=np.float32) + side * toward) for side in (1, -1))
        started = time.perf_counter()
        fit_direction(value.id, positives, negatives, settings, held=(twins.held, twins.held))
        seconds += time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=31, help="how many values are fitted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128, help="length of a comment")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    taxonomy = Taxonomy.load()
    model, tokenizer, engine = load()
    values = list(taxonomy)[: args.values]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.0f}M parameters, {torch.get_num_threads()} threads, medians of {args.rounds} rounds\n")
    print("| what | seconds | measured | target |\n|---|---|---|---|")
    seconds, ways = distribution_ratio(engine, args.rounds, args.new_tokens)
    told = " / ".join(f"{taken:.2f}" for taken in seconds.values())
    print(f"| comment and score ({VALUES} x {args.new_tokens} tokens) / direct distribution | {told} | {ways:.1f} x | 6 x |", flush=True)
    seconds, fits = fitting_ratio(model, tokenizer, engine, values, args.rounds)
    told = " / ".join(f"{taken:.1f}" for taken in seconds.values())
    what = f"fitting {len(values)} values, {engine.depth} blocks, three methods, with held-out accuracies: one sentence at a time / in batches"
    print(f"| {what} | {told} | {fits:.1f} x | 2.5 x |", flush=True)
    print(f"| probes of {len(taxonomy)} values x 24 blocks at width 896, with held-out accuracies | {probe_seconds(taxonomy):.1f} | | 60 s |")
    engine.close()


if __name__ == "__main__":
    main()
