"""Train the embedded language model from scratch: tokenizer, then a small Llama, from one seed.

    python -m training.train --out build/embedded --steps 3000

The documents are generated while training, packed into rows of a fixed length, each attending only to itself.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.grammar import COMMENT, FIRST_WEIGHT, FIRST_WORDS, LETTER, Grammar, Segment
from training.muon import Muon
from vispa_graph.taxonomy_index import Taxonomy

SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(grammar: Grammar, vocabulary: int, documents: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer on a sample of the corpus, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = (segment.text for _ in range(documents) for segment in grammar.document())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=CHAT_TEMPLATE, model_max_length=1024,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tokenizer: Tokenizer, document: list[Segment], ids: dict[str, int]) -> tuple[list[int], list[float]]:
    """Token ids of a document and the weight of each token as a target."""
    tokens, weights = [ids["<|bos|>"]], [0.0]
    for segment in document:
        text = tokenizer.encode(segment.text, add_special_tokens=False).ids
        if segment.role == "text":
            tokens += text
            weights += [segment.weight] * len(text)
        else:
            tokens += [ids[f"<|{segment.role}|>"], *text, ids["<|end|>"]]
            first = FIRST_WORDS if segment.weight == COMMENT else 0
            weights += [0.0, *[FIRST_WEIGHT] * min(first, len(text)), *[segment.weight] * max(0, len(text) - first), min(segment.weight, 1.0)]
    return tokens, weights


def batches(grammar: Grammar, tokenizer: PreTrainedTokenizerFast, rows: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of packed rows: input_ids, weights, positions, mask; all [rows, length] but the mask [rows, 1, length, length]."""
    backend = tokenizer.backend_tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    while True:
        packed: list[list[tuple[list[int], list[float]]]] = [[] for _ in range(rows)]
        room = [length] * rows
        misses = 0
        while misses < 6:
            document = encode(backend, grammar.document(), ids)
            size = len(document[0])
            fitting = [row for row in range(rows) if room[row] >= size]
            if not fitting:
                misses += 1
                continue
            row = min(fitting, key=lambda index: room[index])
            packed[row].append(document)
            room[row] -= size
        input_ids = torch.full((rows, length), ids["<|pad|>"])
        weights, owner = torch.zeros(rows, length), torch.full((rows, length), -1)
        positions = torch.zeros(rows, length, dtype=torch.long)
        for row, documents in enumerate(packed):
            start = 0
            for number, (tokens, weight) in enumerate(documents):
                stop = start + len(tokens)
                input_ids[row, start:stop] = torch.tensor(tokens)
                weights[row, start:stop] = torch.tensor(weight)
                owner[row, start:stop] = number
                positions[row, start:stop] = torch.arange(len(tokens))
                start = stop
        same = owner[:, :, None] == owner[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        yield {"input_ids": input_ids, "weights": weights, "positions": positions, "mask": (same & causal)[:, None]}


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def draw_nudges(nudges: list[torch.Tensor], largest: float) -> None:
    """Fill [rows, 1, width] per block, in place, with random constants, so that the model learns to stay fluent while it is pushed.

    Half of the rows stay as they are; the others get vectors of random direction and a norm of up to `largest`.
    """
    for nudge in nudges:
        noise = torch.randn_like(nudge)
        size = torch.rand(nudge.shape[0], 1, 1) * largest * (torch.rand(nudge.shape[0], 1, 1) < 0.5)
        nudge.copy_(noise / noise.norm(dim=-1, keepdim=True) * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--nudge", type=float, default=0.0, help="largest norm of the random vectors added to the middle blocks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out (its generator starts anew)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    taxonomy = Taxonomy.load()
    state = args.out / "trainer.safetensors"
    start = 0
    if args.resume and state.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
        start = json.loads((args.out / "trainer.json").read_text())["step"]
    else:
        tokenizer = train_tokenizer(Grammar(taxonomy, args.seed), args.vocabulary, documents=20_000)
        tokenizer.save_pretrained(args.out)
    heads = args.width // 32
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=int(args.width * 8 / 3 + 63) // 64 * 64,
        num_hidden_layers=args.blocks, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if start:
        model.load_state_dict(load_file(state), strict=False)
        model.tie_weights()
    nudges = [torch.zeros(args.rows, 1, args.width) for _ in range(args.blocks)]
    for block, nudge in list(zip(model.model.layers, nudges, strict=True))[1:-1]:
        block.register_forward_hook(lambda _module, _inputs, output, nudge=nudge: output + nudge)
    body = torch.compile(model.model)
    optimisers = optimizers(model, args.rate)
    source = batches(Grammar(taxonomy, args.seed + 1 + start), tokenizer, args.rows, args.length)
    began, tokens, smooth = time.time(), 0, None
    for step in range(start, args.steps):
        batch = next(source)
        warm, left = min(1.0, (step + 1) / 100), 1 - step / args.steps
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = args.rate * warm * max(left, 0.02)
        draw_nudges(nudges, args.nudge)
        hidden = body(input_ids=batch["input_ids"], attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False).last_hidden_state
        targets, weights = batch["input_ids"][:, 1:], batch["weights"][:, 1:]
        counted = weights > 0
        logits = F.linear(hidden[:, :-1][counted], model.model.embed_tokens.weight)
        losses = F.cross_entropy(logits, targets[counted], reduction="none")
        loss = (losses * weights[counted]).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        tokens += batch["input_ids"].ne(tokenizer.pad_token_id).sum().item()
        weight = weights[counted]
        groups = [losses[weight == w] for w in (COMMENT, FIRST_WEIGHT, LETTER)]
        now = tuple(group.mean().item() if len(group) else math.nan for group in groups)
        smooth = now if smooth is None else tuple(a if math.isnan(b) else 0.97 * a + 0.03 * b for a, b in zip(smooth, now, strict=True))
        if step % 50 == 0:
            print(
                f"step {step} comment {smooth[0]:.3f} first words {smooth[1]:.3f} letter {smooth[2]:.3f} tokens {tokens / 1e6:.2f}M {tokens / (time.time() - began):.0f}/s",
                flush=True,
            )
        if step % 250 == 249 or step == args.steps - 1:
            save_file({k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}, state)
            (args.out / "trainer.json").write_text(
                json.dumps({"step": step + 1, "tokens": tokens, "arguments": {k: str(v) for k, v in vars(args).items()}})
            )
            model.to(torch.bfloat16).save_pretrained(args.out)
            model.float().load_state_dict(load_file(state), strict=False)
    GenerationConfig(do_sample=False, max_new_tokens=80, repetition_penalty=1.0, bos_token_id=tokenizer.bos_token_id,
                     eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(args.out)  # fmt: skip


if __name__ == "__main__":
    main()
