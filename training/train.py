"""Train the embedded language model from scratch: tokenizer, then a small Llama, from one seed.

    python -m training.train --out build/embedded --steps 3000
    torchrun --nproc-per-node 2 -m training.train --threads 1 --out build/embedded     # one worker for each core

The documents are generated while training, packed into rows of a fixed length, each attending only to itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.grammar import COMMENT, FIRST_WEIGHT, FIRST_WORDS, LETTER, Grammar, Segment
from training.guidance import OPTION_OF_ANSWER, Guide, Link, answer_links, option_links
from training.muon import Muon
from vispa_graph.engine.contract import Direction
from vispa_graph.engine.directions import FitSettings, fit_directions
from vispa_graph.engine.huggingface import HuggingFaceEngine
from vispa_graph.resources import embedded_folder
from vispa_graph.storage import write_atomic
from vispa_graph.taxonomy_index import Taxonomy, Value

SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
LENGTHS = (72, 104, 144, 208, 320)
CHECKPOINT = "trainer.safetensors"
GUIDANCE = 1.0  # what a nat that a guided head misses counts, beside one of the text
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Example(NamedTuple):
    """A document in tokens.

    Attributes:
        weights: Of each token as a target.
        push: The value that the comment speaks for, and the place of its header.
        links: Where guided heads shall look.
    """

    tokens: list[int]
    weights: list[float]
    push: tuple[str, int] | None
    links: list[Link]


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


def encode(tokenizer: Tokenizer, document: list[Segment], ids: dict[str, int]) -> Example:
    """A document in tokens."""
    example = Example([ids["<|bos|>"]], [0.0], None, [])
    tokens, weights = example.tokens, example.weights
    asked: tuple[str, Encoding, int] | None = None
    for segment in document:
        if segment.value:
            example = example._replace(push=(segment.value, len(tokens)))
        text = tokenizer.encode(segment.text, add_special_tokens=False)
        if segment.role == "text":
            tokens += text.ids
            weights += [segment.weight] * len(text.ids)
            continue
        start = len(tokens) + 1
        if segment.role == "user":
            asked = segment.text, text, start
            example.links.extend(link.moved(start) for link in option_links(segment.text, text))
        elif segment.weight == LETTER and asked:
            example.links.extend(link.moved(asked[2]) for link in answer_links(*asked[:2], segment.text, start - 1 - asked[2]))
        tokens += [ids[f"<|{segment.role}|>"], *text.ids, ids["<|end|>"]]
        first = FIRST_WORDS if segment.weight == COMMENT else 0
        weights += [0.0, *[FIRST_WEIGHT] * min(first, len(text.ids)), *[segment.weight] * max(0, len(text.ids) - first), min(segment.weight, 1.0)]
    return example


def batches(
    grammar: Grammar, tokenizer: PreTrainedTokenizerFast, tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[tuple[str, int] | None], list[tuple[int, Link]]]]:
    """Endless batches of about so many tokens: input ids and weights, [rows, length], one document a row, padded on the right; the pushes; and the links with their rows.

    Documents of like length share a batch, so that little is padding and causal attention needs no mask.
    """
    backend = tokenizer.backend_tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    waiting: dict[int, list[Example]] = {length: [] for length in LENGTHS}
    while True:
        document = encode(backend, grammar.document(), ids)
        length = next((length for length in LENGTHS if len(document.tokens) <= length), None)
        if length is None:
            continue
        waiting[length].append(document)
        rows = tokens // length
        if len(waiting[length]) == rows:
            input_ids = torch.full((rows, length), ids["<|pad|>"])
            weights = torch.zeros(rows, length)
            for row, example in enumerate(waiting[length]):
                input_ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
                weights[row, : len(example.weights)] = torch.tensor(example.weights)
            pushes = [example.push for example in waiting[length]]
            links = [(row, link) for row, example in enumerate(waiting[length]) for link in example.links]
            waiting[length] = []
            yield input_ids, weights, pushes, links


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def add_nudges(model: LlamaForCausalLM, rows: int) -> list[torch.Tensor]:
    """Let every middle block add a vector to its output, row by row; returns the vectors, [rows, 1, width] a block.

    A vector is a share of the residual stream's norm at each position, so that its size means the same while the norms grow.
    """
    nudges = []
    for block in model.model.layers[1:-1]:
        nudge = torch.zeros(rows, 1, model.config.hidden_size)
        block.register_forward_hook(
            lambda _module, _inputs, output, nudge=nudge: output + nudge[: output.shape[0]] * output.detach().norm(dim=-1, keepdim=True)
        )
        nudges.append(nudge)
    return nudges


def draw_nudges(nudges: list[torch.Tensor], largest: float) -> None:
    """Draw new vectors, in place, of random direction and norms up to `largest`, for half of the rows; the model learns to stay fluent when pushed."""
    for nudge in nudges:
        noise = torch.randn_like(nudge)
        size = torch.rand(nudge.shape[0], 1, 1) * largest * (torch.rand(nudge.shape[0], 1, 1) < 0.5)
        nudge.copy_(noise / noise.norm(dim=-1, keepdim=True) * size)


class Pushes:
    """Steers rows of a batch as the engine would, toward the value of their comment.

    Where the text before a comment shows its value, the model learns to stay fluent under such pushes; where it does not, to say what the
    activations alone tell it. Directions are always read from text, never learned.

    Args:
        layers: The blocks to steer.
        rows: The most rows of a batch.
    """

    def __init__(self, model: LlamaForCausalLM, layers: Sequence[int], rows: int) -> None:
        width = model.config.hidden_size
        self._places = torch.zeros(rows, dtype=torch.long)
        self._vectors = torch.zeros(len(layers), rows, width)
        self._missing = torch.full((len(layers), rows), -1e9)  # what the probe's logit lacks, apart from w.h; eps is never below 0
        self._directions: dict[str, Direction] = {}
        for number, layer in enumerate(layers):
            model.model.layers[layer].register_forward_hook(self._hook(self._vectors[number], self._missing[number]))

    def _hook(self, vectors: torch.Tensor, missing: torch.Tensor) -> Callable[..., torch.Tensor]:
        def add(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            rows = output.shape[0]
            w = vectors[:rows]
            read = output.detach()[torch.arange(rows), self._places[:rows]].float()
            eps = ((missing[:rows] - (w * read).sum(-1)) / (w * w).sum(-1).clamp(min=1e-12)).clamp(min=0)
            return output + (eps[:, None] * w)[:, None].to(output)

        return add

    def refit(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, taxonomy: Taxonomy, settings: FitSettings) -> None:
        """Fit the directions of the model as it is now."""
        engine = HuggingFaceEngine(uncompiled(model), tokenizer, name="in training")
        try:
            self.use(fit_directions(engine, [fewer_pairs(value) for value in taxonomy], settings))
        finally:
            engine.close()

    def use(self, directions: dict[str, Direction]) -> None:
        """Push along these directions from now on."""
        self._directions = directions

    def draw(self, pushes: Sequence[tuple[str, int] | None], random: torch.Generator, share: float = 0.85) -> None:
        """Choose a share of the rows that have a value, and how far each is pushed (P0 from .8 to .998)."""
        self._vectors.zero_()
        self._missing.fill_(-1e9)
        self._places.zero_()  # a place of an earlier, longer batch may not exist
        for row, push in enumerate(pushes):
            if push is None or not self._directions or torch.rand((), generator=random) >= share:
                continue
            direction, self._places[row] = self._directions[push[0]], push[1]
            wanted = 1.4 + 4.8 * torch.rand((), generator=random)
            self._vectors[:, row] = torch.from_numpy(direction.vectors)
            self._missing[:, row] = wanted - torch.from_numpy(direction.bias)


def fewer_pairs(value: Value) -> Value:
    """The value with every third contrastive pair: enough to steer by in training, where directions are fitted again and again."""
    return replace(value, pairs={form: pairs[::3] for form, pairs in value.pairs.items()})


def rate_at(step: int, start: int, steps: int, cooldown: int) -> float:
    """The learning rate as a share of its largest: a warm-up over 100 steps from `start`, where the optimisers know nothing yet, a plateau, and a
    straight line to zero over the last `cooldown` steps.
    """
    return min(1.0, (step - start + 1) / 100, (steps - step) / cooldown)


def seed_of(seed: int, start: int, rank: int) -> int:
    """A seed of its own for every worker of every stretch of a training."""
    return int.from_bytes(hashlib.sha256(f"{seed} {start} {rank}".encode()).digest()[:4])


def average_gradients(model: nn.Module) -> None:
    """Average the gradients, each of its own worker's mean loss, over the workers."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def uncompiled(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy without hooks and with a configuration of its own: compiled code depends on the configuration of the model being trained."""
    copy = LlamaForCausalLM(LlamaConfig(**model.config.to_dict()))
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    return copy


def save(model: LlamaForCausalLM, folder: Path, step: int, tokens: int, arguments: argparse.Namespace) -> None:
    """Write the trainer's float32 checkpoint and the model as it ships, in bfloat16."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    facts = {"step": str(step), "tokens": str(tokens), "arguments": json.dumps({name: str(value) for name, value in vars(arguments).items()})}
    write_atomic(folder / CHECKPOINT, to_bytes(state, metadata=facts))
    copy = uncompiled(model).to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=80, repetition_penalty=1.0, bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    copy.save_pretrained(folder)


def facts_of(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint says of itself: its step, its tokens and the arguments it was trained with."""
    with safe_open(checkpoint, "pt") as file:
        return dict(file.metadata())


def reached(checkpoint: Path) -> tuple[int, int]:
    """The step and the tokens that a checkpoint was written at."""
    facts = facts_of(checkpoint)
    return int(facts["step"]), int(facts["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--cooldown", type=int, default=1500, help="steps at the end over which the learning rate falls to zero")
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step, of all workers together")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=6144)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--nudge", type=float, default=0.15, help="largest random vector added to the middle blocks, as a share of the residual norm")
    parser.add_argument("--push-from", type=int, default=4000, help="the step from which rows are steered as the engine would")
    parser.add_argument("--refit", type=int, default=500, help="steps between two fits of the directions for that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out; the optimisers and the generators start anew")
    args = parser.parse_args()
    if args.batch // int(os.environ.get("WORLD_SIZE", "1")) < LENGTHS[-1]:
        parser.error(f"--batch must leave each worker at least {LENGTHS[-1]} tokens, the longest document")
    if args.blocks <= OPTION_OF_ANSWER[0] or args.width // 64 <= OPTION_OF_ANSWER[1]:
        parser.error(f"--blocks must be over {OPTION_OF_ANSWER[0]} and --width at least {64 * (OPTION_OF_ANSWER[1] + 1)}: guided heads lie there")
    workers, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if workers > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    taxonomy = Taxonomy.load(bioethics=True)
    checkpoint = args.out / CHECKPOINT
    resumed = args.resume and checkpoint.exists()
    start, tokens = reached(checkpoint) if resumed else (0, 0)
    if not resumed and rank == 0:
        train_tokenizer(Grammar(taxonomy, args.seed), args.vocabulary, documents=20_000).save_pretrained(args.out)
    if workers > 1:
        dist.barrier()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    heads = args.width // 64
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=int(args.width * 8 / 3 + 63) // 64 * 64,
        num_hidden_layers=args.blocks, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, attn_implementation="eager",  # compiled, it is a third faster on a CPU than sdpa
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if resumed:
        model.load_state_dict(load_file(checkpoint), strict=False)
        model.tie_weights()
    if workers > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
    profile = json.loads((embedded_folder() / "profile.json").read_text(encoding="utf-8"))
    fit = FitSettings(
        **{field.name: profile[field.name] for field in fields(FitSettings) if field.name in profile} | {"layers": tuple(profile["layers"])}
    )
    batch = args.batch // workers
    nudges = add_nudges(model, batch // LENGTHS[0])
    pushes = Pushes(model, fit.layers, batch // LENGTHS[0])
    guide = Guide(model.model.layers)
    own = seed_of(args.seed, start, rank)  # the weights are drawn: from here on every worker draws its own
    torch.manual_seed(own)
    random = torch.Generator().manual_seed(own)
    body = torch.compile(model.model, dynamic=False)
    optimisers = optimizers(model, args.rate)
    source = batches(Grammar(taxonomy, own), tokenizer, batch)
    began, before, smooth = time.time(), tokens, None
    for step in range(start, args.steps):
        if step >= args.push_from and (step - max(start, args.push_from)) % args.refit == 0:
            pushes.refit(model, tokenizer, taxonomy, fit)
        input_ids, weights, shown, links = next(source)
        pushes.draw(shown, random)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = args.rate * rate_at(step, start, args.steps, args.cooldown)
        draw_nudges(nudges, args.nudge)
        targets, weights = input_ids[:, 1:], weights[:, 1:]
        counted = weights > 0
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state
            logits = F.linear(hidden[:, :-1][counted], model.model.embed_tokens.weight).float()
        losses = F.cross_entropy(logits, targets[counted], reduction="none")
        weight = weights[counted]
        loss = (losses * weight).sum() / weight.sum()
        missed = guide.loss(links) if links else None
        (loss if missed is None else loss + GUIDANCE * missed).backward()
        if workers > 1:
            average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        tokens += workers * input_ids.ne(tokenizer.pad_token_id).sum().item()
        groups = [losses[weight == w] for w in (COMMENT, FIRST_WEIGHT, LETTER)]
        now = (*(group.mean().item() if len(group) else math.nan for group in groups), math.nan if missed is None else missed.item())
        smooth = (
            now
            if smooth is None
            else tuple(b if math.isnan(a) else a if math.isnan(b) else 0.97 * a + 0.03 * b for a, b in zip(smooth, now, strict=True))
        )
        if rank == 0 and step % 20 == 0:
            print(
                f"step {step} comment {smooth[0]:.3f} first words {smooth[1]:.3f} letter {smooth[2]:.3f} guided {smooth[3]:.3f} tokens {tokens / 1e6:.2f}M {(tokens - before) / (time.time() - began):.0f}/s",
                flush=True,
            )
        if rank == 0 and (step % 100 == 99 or step == args.steps - 1):
            save(model, args.out, step + 1, tokens, args)
    if workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
