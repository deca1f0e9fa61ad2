"""How fast the steering engine is, as ratios within one process, runs interleaved, medians.

    python -m benchmarks.engine                          # everything, about 100M parameters, one thread
    python -m benchmarks.engine --rounds 3 --only hooks  # some rows
    python -m benchmarks.engine --device cuda            # a model in the shape of 8B parameters, in bfloat16
    python -m benchmarks.engine --tiny --rounds 1        # whether it runs at all

Weights and directions are random: what a step costs does not depend on them. Compared with are the official procedure
(benchmarks/official.py), the model without an engine, and the engine behind a lock.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from benchmarks import official
from vispa_graph.engine.cache import expect, roomy_cache
from vispa_graph.engine.contract import Direction, Generation, GenerationRequest, Positions, Steering
from vispa_graph.engine.huggingface import PACKED_BYTES, HuggingFaceEngine
from vispa_graph.engine.layers import default_layers
from vispa_graph.engine.packing import PackedWeights

VALUES = 6
NEW_TOKENS = 128
PROMPTS = (60, 300)
THREADS = 8
# Prompt tokens of the eight clients, all different, and how much each of them asks for.
CLIENTS, CLIENT_TOKENS = range(40, 40 + 5 * THREADS, 5), 48


@dataclass
class Row:
    """A comparison: how many times longer `slow` takes than `fast`, and what the ratio should be; None where there is nothing to reach."""

    name: str
    group: str
    slow: Callable[[], object]
    fast: Callable[[], object]
    target: float | None
    at_least: bool = True


@dataclass
class Measured:
    """Medians over the rounds: of the ratio within a round, and of the seconds."""

    row: Row
    ratio: float
    slow: float
    fast: float

    @property
    def met(self) -> str:
        """Whether the target was met."""
        if self.row.target is None:
            return ""
        return "yes" if (self.ratio >= self.row.target if self.row.at_least else self.ratio <= self.row.target) else "no"

    @property
    def target(self) -> str:
        """The target in words."""
        return "" if self.row.target is None else f"{'>=' if self.row.at_least else '<='} {self.row.target:.3g}"


class Bench:
    """One random model over the same weights bare, with packed weights but no hooks, and inside an engine."""

    def __init__(self, config: PreTrainedConfig, layers: Sequence[int], device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.bare = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.bare.generation_config = GenerationConfig(pad_token_id=0)
        self.unhooked, hooked = (copy.deepcopy(self.bare, {id(p): p for p in self.bare.parameters()}) for _ in range(2))
        self.packed = PackedWeights(self.unhooked, PACKED_BYTES)
        self.blocks = self.bare.get_decoder().layers
        self.vocabulary, self.width = config.vocab_size, config.hidden_size
        # No end token: every text has its full length, as in the comparison.
        self.engine = HuggingFaceEngine(hooked, self._tokenizer(), name="random", capacity=1 << 20)
        self.layers = tuple(layers)
        self.steerings = [self._steering(seed) for seed in range(VALUES)]

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, self.vocabulary)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")

    def _steering(self, seed: int, positions: Positions = "all") -> Steering:
        vectors = np.random.default_rng(seed).normal(0, 0.1, (len(self.layers), self.width)).astype(np.float32)
        bias = np.full(len(self.layers), -2, np.float32)  # such that every layer has something to add
        direction = Direction(f"value {seed}", "probe", self.layers, vectors, bias, 1.0, np.ones(len(self.layers), np.float32))
        return Steering(direction, positions=positions)

    def prompt(self, tokens: int, seed: int = 0) -> list[int]:
        """Random tokens."""
        return np.random.default_rng(seed).integers(2, self.vocabulary, tokens).tolist()

    def ids(self, tokens: int, rows: int = 1) -> torch.Tensor:
        """The same prompt in every row, [rows, tokens]."""
        return torch.tensor([self.prompt(tokens)] * rows, device=self.bare.device)

    def requests(self, tokens: int, new_tokens: int, positions: Positions = "all", seed: int = 0) -> list[GenerationRequest]:
        """One request for each value, on the same prompt."""
        text = " ".join(f"w{number}" for number in self.prompt(tokens, seed))
        steerings = [Steering(s.direction, positions=positions) for s in self.steerings]
        return [GenerationRequest([{"role": "user", "content": text}], steering, new_tokens) for steering in steerings]

    # What is compared

    def steered(self, tokens: int, new_tokens: int, positions: Positions = "all") -> list[Generation]:
        """Six values through the engine."""
        futures = [self.engine.generate(request) for request in self.requests(tokens, new_tokens, positions)]
        return [future.result() for future in futures]

    def officially(self, tokens: int, new_tokens: int) -> list[list[int]]:
        """Six values by the official procedure; without new tokens its calibration alone."""
        texts = []
        for steering in self.steerings:
            deltas = official.calibrate(self.bare, self.blocks, self.ids(tokens), steering)
            if new_tokens:
                texts.append(official.generate(self.bare, self.blocks, self.ids(tokens), deltas, new_tokens))
        return texts

    def unsteered(self, tokens: int) -> Generation:
        """One unsteered generation through the engine."""
        return self.engine.generate(replace(self.requests(tokens, NEW_TOKENS)[0], steering=None)).result()

    def plain(self, tokens: int, rows: int = 1) -> torch.Tensor:
        """Unsteered generation without the engine."""
        ids = self.ids(tokens, rows)
        with torch.inference_mode():
            return self.bare.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)

    def without_hooks(self, tokens: int, rows: int) -> torch.Tensor:
        """Unsteered generation as the engine does it, with its cache and packed weights, but without its hooks."""
        ids, cache = self.ids(tokens, rows), roomy_cache(self.unhooked.config)
        expect(cache, tokens + NEW_TOKENS - 1)
        options = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, "do_sample": False, "max_new_tokens": NEW_TOKENS}
        with torch.inference_mode():
            return self.unhooked.generate(input_ids=ids, **options)

    def clients(self, *, lock: threading.Lock | None) -> None:
        """Eight threads ask for six rows each; with a lock one after the other."""

        def ask(client: int) -> None:
            requests = self.requests(CLIENTS[client], CLIENT_TOKENS, seed=client)
            if lock is None:
                futures = [self.engine.generate(request) for request in requests]
                for future in futures:
                    future.result()
                return
            with lock:
                for future in [self.engine.generate(request) for request in requests]:
                    future.result()

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(ask, range(THREADS)))

    def rows(self) -> Iterator[Row]:
        """All comparisons."""
        short, long = PROMPTS
        layers = len(self.layers)
        lock = threading.Lock()
        own = "cache and packed weights" if self.packed.bytes else "cache"
        for n in PROMPTS:
            yield Row(
                f"calibration of {VALUES} values, {layers} layers, prompt of {n}: official / engine",
                "calibration",
                lambda n=n: self.officially(n, 0),
                lambda n=n: self.steered(n, 1),
                1.2 * layers,
            )
        for n, target in ((short, 5.0), (long, 6.0)):
            yield Row(
                f"whole, {n} + {NEW_TOKENS} tokens: official / engine",
                "whole",
                lambda n=n: self.officially(n, NEW_TOKENS),
                lambda n=n: self.steered(n, NEW_TOKENS),
                target,
            )
        for n in PROMPTS:
            yield Row(
                f"{VALUES} steered rows / the same batch without engine or hooks, {n} + {NEW_TOKENS}",
                "hooks",
                lambda n=n: self.steered(n, NEW_TOKENS),
                lambda n=n: self.plain(n, VALUES),
                1.02,
                False,
            )
            yield Row(
                f"{VALUES} steered rows / the same batch with the engine's {own}, without hooks, {n} + {NEW_TOKENS}",
                "hooks",
                lambda n=n: self.steered(n, NEW_TOKENS),
                lambda n=n: self.without_hooks(n, VALUES),
                1.02,
                False,
            )
        for n in PROMPTS:
            yield Row(
                f"{VALUES} unsteered rows / one, both without engine or hooks, {n} + {NEW_TOKENS}",
                "one",
                lambda n=n: self.plain(n, VALUES),
                lambda n=n: self.plain(n),
                None,
            )
        yield Row(
            f"{VALUES} steered rows / one unsteered generation, {short} + {NEW_TOKENS}",
            "one",
            lambda: self.steered(short, NEW_TOKENS),
            lambda: self.plain(short),
            1.8,
            False,
        )
        yield Row(
            f"{VALUES} steered rows / one unsteered, both through the engine, {short} + {NEW_TOKENS}",
            "one",
            lambda: self.steered(short, NEW_TOKENS),
            lambda: self.unsteered(short),
            None,
        )
        yield Row(
            f"{VALUES} rows steered at generated positions / one unsteered generation, {long} + {NEW_TOKENS}",
            "one",
            lambda: self.steered(long, NEW_TOKENS, "generated"),
            lambda: self.plain(long),
            1.8,
            False,
        )
        yield Row(
            f"{THREADS} threads x {VALUES} rows: a lock around batches / merged",
            "threads",
            lambda: self.clients(lock=lock),
            lambda: self.clients(lock=None),
            1.35,
        )

    def agreement(self) -> str:
        """How many texts are the same, token by token, as the official procedure's.

        Raises:
            SystemExit: Not all in float32, where rounding is no excuse: then the rows compare different things.
        """
        wanted = self.officially(PROMPTS[0], 16)
        texts = [generation.text for generation in self.steered(PROMPTS[0], 16)]
        same = sum(text.split() == [f"w{token}" for token in tokens] for text, tokens in zip(texts, wanted, strict=True))
        told = f"{same} of {VALUES} texts of 16 tokens are the same as the official procedure's"
        if same < VALUES and self.bare.dtype == torch.float32:
            raise SystemExit(f"Only {told}.")
        return told


def measure(rows: Sequence[Row], rounds: int, console: Console) -> list[Measured]:
    """Time both sides of every row once a round, one row after the other, so that a busy minute spoils a round and not a row."""
    seconds: list[list[tuple[float, float]]] = [[] for _ in rows]
    for number in range(rounds):
        for row, times in zip(rows, seconds, strict=True):
            # Who goes first changes from round to round.
            order = (row.slow, row.fast) if number % 2 == 0 else (row.fast, row.slow)
            first, second = timed(order[0]), timed(order[1])
            times.append((first, second) if number % 2 == 0 else (second, first))
        console.print(f"round {number + 1} of {rounds}", style="dim")
    median = statistics.median
    return [
        Measured(row, median(s / f for s, f in times), median(s for s, _ in times), median(f for _, f in times))
        for row, times in zip(rows, seconds, strict=True)
    ]


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def bandwidth(device: str) -> float:
    """Bytes a second that the device's memory moves, from copying 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * source.numel() / statistics.median(times)


def speed(bench: Bench, rounds: int, device: str) -> str:
    """Tokens a second beside the most that reading the weights once a step allows."""
    n = PROMPTS[0]
    seconds = statistics.median(timed(lambda: bench.steered(n, NEW_TOKENS)) for _ in range(rounds))
    weights = sum(p.numel() * p.element_size() for p in bench.bare.parameters())
    bound = VALUES * bandwidth(device) / weights
    return f"{VALUES * NEW_TOKENS / seconds:.0f} tokens/s of {VALUES} steered rows, {n} + {NEW_TOKENS}; bandwidth bound {bound:.0f} tokens/s"


def config_of(device: str, tiny: bool) -> tuple[PreTrainedConfig, Sequence[int]]:
    """The model's shape and the layers to steer."""
    if tiny:
        return Qwen2Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
        ), range(2, 5)
    if device != "cpu":
        shape: dict[str, Any] = {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        return LlamaConfig(**shape, vocab_size=128256, max_position_embeddings=8192), default_layers(32)
    shape = {"hidden_size": 640, "intermediate_size": 1600, "num_hidden_layers": 18, "num_attention_heads": 10, "num_key_value_heads": 5}
    return Qwen2Config(**shape, vocab_size=32000, tie_word_embeddings=True), range(4, 16)


def shown(measured: Sequence[Measured], markdown: bool, title: str) -> Table | str:
    cells = [
        (
            m.row.name,
            f"{m.ratio:.3g}",
            m.target,
            m.met,
            f"{m.slow:.3g} / {m.fast:.3g}",
        )
        for m in measured
    ]
    heads = ("what", "ratio", "target", "met", "seconds")
    if markdown:
        lines = [f"{title}\n", f"| {' | '.join(heads)} |", "|---|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)]
        return "\n".join(lines)
    table = Table(*heads, title=title)
    for row in cells:
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="calibration, whole, hooks, one or threads; or words of a row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the processor")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the benchmark itself")
    parser.add_argument("--markdown", action="store_true", help="print the table for a document")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    config, layers = config_of(args.device, args.tiny)
    bench = Bench(config, layers, args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)
    size = sum(p.numel() for p in bench.bare.parameters()) / 1e6
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{args.threads} thread(s) of a processor"
    title = (
        f"{size:.0f}M parameters, {len(bench.blocks)} blocks, {len(bench.layers)} steered, {str(bench.bare.dtype)[6:]}, {where}, {args.rounds} rounds"
    )
    console.print(bench.agreement())
    rows = [row for row in bench.rows() if args.only in (None, row.group) or args.only in row.name]
    measured = measure(rows, args.rounds, console)
    table = shown(measured, args.markdown, title)
    print(table) if args.markdown else Console().print(table)
    if args.device.startswith("cuda"):
        print(speed(bench, args.rounds, args.device))
    else:
        print("GPU: not measured; python -m benchmarks.engine --device cuda")
    bench.engine.close()


if __name__ == "__main__":
    main()
