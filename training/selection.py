"""Train the adapter with which the sentence encoder tells the values at stake, on the shipped phrases.

    python -m training.selection

The encoder's own weights stay as they are; each of its linear layers gets a product of two thin matrices added (LoRA, Hu et al. 2021).
What they are trained for is a linear reading of the values at stake from the sentence's vector; that reading itself is thrown away, since
the phrases near a query, in the space it leaves behind, tell the values better. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from vispa_graph.taxonomy_index import SentenceEncoder, Taxonomy
from vispa_graph.taxonomy_index.encoder import ADAPTER
from vispa_graph.taxonomy_index.index import OWN, phrases_of

LONGEST = 64  # word pieces; what is longer is cut
BATCH = 64
SCALE = 20.0  # of the unit vectors, so that the reading learns at a common rate


class Adapted(nn.Module):
    """A linear layer, frozen, with a product of two thin matrices added."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's product and the adapter's."""
        return self.linear(input) + (input @ self.down.T) @ self.up.T


def adapt(model: nn.Module, rank: int) -> dict[str, Adapted]:
    """Freeze a model and put an adapter on every linear layer of its blocks; by the layers' names."""
    model.requires_grad_(False)
    found: dict[str, Adapted] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("encoder.layer"):
            parent, _, last = name.rpartition(".")
            found[name] = Adapted(module, rank)
            setattr(model.get_submodule(parent), last, found[name])
    return found


def examples(taxonomy: Taxonomy) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Texts, their targets in 0..1 and which of them count, both [texts, values]. A value's own phrase says nothing about the others."""
    texts, targets, known = [], [], []
    for phrase in phrases_of(taxonomy):
        if phrase.kind != "sentence":  # sentences that live a value say little of what a question puts at stake
            texts.append(phrase.text)
            targets.append([phrase.weights.get(value, 0.0) for value in taxonomy.ids])
            known.append([1.0 if phrase.kind not in OWN or value == phrase.source else 0.0 for value in taxonomy.ids])
    return texts, torch.tensor(targets), torch.tensor(known)


def batches(lengths: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Every row once, rows of like length together, the batches in random order."""
    order = np.argsort(lengths + 4 * random.random(len(lengths)))
    chunks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    for place in random.permutation(len(chunks)):
        yield chunks[place]


def embed(model: nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Unit vectors [rows, dimensions]: the mean over the last states, as MiniLM pools them."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    sentences = SentenceEncoder().model
    model, tokenizer = sentences[0].auto_model.train(), sentences.tokenizer
    adapters = adapt(model, args.rank)
    texts, targets, known = examples(Taxonomy.load(bioethics=True))
    rows = [tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"] for text in texts]
    lengths = np.array([len(row) for row in rows])
    reading = nn.Linear(model.config.hidden_size, targets.shape[1])
    nn.init.zeros_(reading.weight)
    nn.init.constant_(reading.bias, -2.0)
    thin = [p for adapter in adapters.values() for p in (adapter.down, adapter.up)]
    optimiser = torch.optim.AdamW([{"params": thin, "lr": args.rate}, {"params": reading.parameters(), "lr": 1e-3}], weight_decay=0.01)
    steps = args.epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps))
    print(f"{len(texts)} texts, {sum(p.numel() for p in thin)} parameters, {steps} steps", flush=True)
    for epoch in range(args.epochs):
        losses = []
        for chosen in batches(lengths, random):
            logits = reading(embed(model, [rows[row] for row in chosen]) * SCALE)
            loss = functional.binary_cross_entropy_with_logits(logits, targets[chosen], reduction="none")
            loss = (loss * known[chosen]).sum() / known[chosen].sum()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(thin, 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}", flush=True)
    from safetensors.torch import save_file

    tensors = {f"{name}.{part}": getattr(adapter, part).detach().half().contiguous() for name, adapter in adapters.items() for part in ("down", "up")}
    save_file(tensors, ADAPTER, metadata={"recipe": json.dumps(vars(args))})
    print(f"{ADAPTER.stat().st_size / 2**20:.1f} MiB: {ADAPTER}")


if __name__ == "__main__":
    main()
