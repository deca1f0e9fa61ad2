"""Give the look-ups of multiple choice a start: fit them on the model's states as they are, and write them into the guided heads.

    python -m training.matching build/embedded       # a checkpoint whose options and answers look at letters and passages already

The answer finds its option by the product of two maps, what it carries from the passage and what it compares that with, and its letter by another two;
while neither of the two is any good, neither has a gradient to speak of, and training by itself waits there for longer than it has.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.grammar import Grammar
from training.guidance import LETTER_OF_OPTION, OPTION_OF_ANSWER, PASSAGE_OF_ANSWER, Link
from training.train import CHECKPOINT, LENGTHS, SPECIAL, encode, facts_of
from vispa_graph.storage import write_atomic
from vispa_graph.taxonomy_index import Taxonomy

Weights = dict[str, torch.Tensor]
HEAD = 64
# The dimensions of a head that rotary positions turn by at most about a third of a radian over sixty tokens, as far as options lie off.
SLOW = torch.cat([torch.arange(18, 32), torch.arange(50, 64)])
WRITTEN = 0.2  # what the answer writes down of the passage, as a share of its residual's size
LETTERS = "ABCDEFGH"
LOGIT = 8.0  # by how much the letter of the option that is looked at shall stand out


class Question(NamedTuple):
    """What the model holds when it is about to answer.

    Attributes:
        said: What the passage's head reads, normed, [width].
        states: What the option's head compares it with, normed, [tokens, width].
        there: Which of the tokens are the right option's, [tokens].
        residual: Of the answer's token, before the block of the option's head, [width].
    """

    said: torch.Tensor
    states: torch.Tensor
    there: torch.Tensor
    residual: torch.Tensor


class Reading(NamedTuple):
    """What every token of many documents, comments too, sees of letters at a head.

    Attributes:
        seen: What the head looks at, the normed states weighted by its attention, [tokens, width].
        letter: The place in the alphabet of the letter that the token shall hand on; -1 where there is none, [tokens].
        states: The normed states of all tokens before the block of the option's head, over the norm's weight, [all tokens, width].
        handing: Residuals of the tokens that hand on a letter: where the answer looks at them, or before the last norm if they are answers.
    """

    seen: torch.Tensor
    letter: torch.Tensor
    states: torch.Tensor
    handing: torch.Tensor


class Watch:
    """Runs documents through a model and keeps the states around the guided heads."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._grammar = Grammar(Taxonomy.load(bioethics=True), seed)
        self._ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
        self._letters = {tokenizer.convert_tokens_to_ids(letter): place for place, letter in enumerate(LETTERS)}
        self._normed: dict[int, torch.Tensor] = {}
        self._looks: dict[int, torch.Tensor] = {}
        self._residuals: dict[int | str, torch.Tensor] = {}
        for number, block in enumerate(model.model.layers):
            block.register_forward_pre_hook(lambda _module, inputs, number=number: self._residuals.update({number: inputs[0][0]}))
            block.input_layernorm.register_forward_hook(lambda _module, _inputs, output, number=number: self._normed.update({number: output[0]}))
            block.self_attn.register_forward_hook(lambda _module, _inputs, output, number=number: self._looks.update({number: output[1][0]}))
        model.model.norm.register_forward_pre_hook(lambda _module, inputs: self._residuals.update(last=inputs[0][0]))

    def documents(self, count: int, *, comments: bool = False) -> Iterator[tuple[list[int], list[Link]]]:
        """The tokens and the links of documents of multiple choice, or half of them comments, each when the model has just read it."""
        grammar = self._grammar
        kinds = [grammar.choice_by_stance] * 5 + [grammar.choice_by_act] * 2 + [grammar.choice_by_value, grammar.look_up_option]
        if comments:
            kinds += [grammar.bare_value_comment, grammar.value_in_question, grammar.neutral_comment] * 3
        for kind in grammar.random.choices(kinds, k=count):
            example = encode(self._tokenizer.backend_tokenizer, kind(), self._ids)
            if len(example.tokens) <= LENGTHS[-1]:
                with torch.inference_mode():
                    self._model.model(torch.tensor([example.tokens]))
                yield example.tokens, example.links

    def seen(self, head: tuple[int, int]) -> torch.Tensor:
        """What each token of the last document sees at a head, [tokens, width]."""
        block, number = head
        return self._looks[block][number] @ self._normed[block]

    def questions(self, count: int) -> list[Question]:
        """Each answer of so many documents that follows from a passage, or from words asked for."""
        found, block = [], OPTION_OF_ANSWER[0]
        for _, links in self.documents(count):
            asked, said = {link.query for link in links if link.head == PASSAGE_OF_ANSWER}, self.seen(PASSAGE_OF_ANSWER)
            for link in links:
                if link.head == OPTION_OF_ANSWER and link.query in asked:
                    there = torch.zeros(link.query + 1, dtype=torch.bool)
                    there[link.start : link.end] = True
                    states, residual = self._normed[block][: link.query + 1], self._residuals[block][link.query]
                    found.append(Question(said[link.query], states.clone(), there, residual.clone()))
        return found

    def reading(self, head: tuple[int, int], count: int) -> Reading:
        """What a head sees of letters in so many documents: of comments every token, of multiple choice those that hand one on."""
        parts: list[Reading] = []
        gain = self._model.model.layers[OPTION_OF_ANSWER[0]].input_layernorm.weight.detach().clamp(min=0.05)
        for tokens, links in self.documents(count, comments=True):
            letter = torch.full((len(tokens),), -1)
            for link in links:
                if link.head == head == LETTER_OF_OPTION:
                    letter[link.query] = self._letters.get(tokens[link.start], -1)
                elif link.head == head == OPTION_OF_ANSWER:
                    right = self._looks[head[0]][head[1], link.query, link.start : link.end].sum() > 0.8
                    letter[link.query] = self._letters[tokens[link.query + 1]] if right else -1
            comment = not links and self._ids["<|assistant|>"] in tokens  # what other tokens of multiple choice see harms nobody
            kept = torch.ones(len(tokens), dtype=torch.bool) if comment else letter >= 0
            handing = self._residuals[OPTION_OF_ANSWER[0] if head == LETTER_OF_OPTION else "last"][letter >= 0]
            parts.append(Reading(self.seen(head)[kept], letter[kept], self._normed[OPTION_OF_ANSWER[0]] / gain, handing))
        reading = Reading(*(torch.cat(part) for part in zip(*parts, strict=True)))
        if not len(reading.handing):
            raise SystemExit(
                "No option looks at its letter, or no answer at its option, so there is nothing to fit: train longer with guidance first."
            )
        return reading


def fit(found: list[Question], rank: int, steps: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps, both [rank, width], whose images of what is said and of a token have a high product at the right option's tokens alone."""
    width = found[0].said.shape[0]
    said = torch.stack([question.said for question in found])
    states = pad_sequence([question.states for question in found], batch_first=True)
    there = pad_sequence([question.there for question in found], batch_first=True)
    real = pad_sequence([torch.ones_like(question.there) for question in found], batch_first=True)
    maps = [torch.nn.Parameter(torch.randn(rank, width) / width**0.5) for _ in range(2)]
    optimiser = torch.optim.AdamW(maps, lr=3e-3, weight_decay=0.5)
    for _ in range(steps):
        rows = torch.randint(0, len(found), (96,))
        scores = torch.einsum("nr,ntr->nt", said[rows] @ maps[0].T, states[rows] @ maps[1].T).masked_fill(~real[rows], -torch.inf)
        loss = -functional.log_softmax(scores, dim=-1).masked_fill(~there[rows], -torch.inf).logsumexp(dim=-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return maps[0].detach(), maps[1].detach()


def plant_match(weights: Weights, said_map: torch.Tensor, option_map: torch.Tensor, found: list[Question]) -> None:
    """Let the passage's head write its image where the answer's residual is quietest, and the option's head compare that with options; in place."""
    residuals = torch.stack([question.residual for question in found])
    quiet, size = quietest(residuals, len(said_map)), sizes(residuals).mean()
    images = torch.stack([question.said for question in found]) @ said_map.T
    times = WRITTEN * size / images.pow(2).mean().sqrt()
    write(weights, PASSAGE_OF_ANSWER, "v", times * said_map)
    write(weights, PASSAGE_OF_ANSWER, "o", quiet.T)
    # The norm divides by the residual's size, and attention by the root of the head's.
    gain = (HEAD**0.5 * size / times).sqrt()
    query, key = torch.zeros(2, HEAD, len(residuals[0]))
    query[SLOW[: len(said_map)]] = gain * quiet.T / weights[f"model.layers.{OPTION_OF_ANSWER[0]}.input_layernorm.weight"].clamp(min=0.05)
    key[SLOW[: len(said_map)]] = gain * option_map
    write(weights, OPTION_OF_ANSWER, "q", query)
    write(weights, OPTION_OF_ANSWER, "k", key)


def read_letters(reading: Reading, others: float) -> torch.Tensor:
    """The map [letters, width] that tells the letter to hand on, and nothing at tokens that have none, which count so many times as much in all."""
    handing = reading.letter >= 0
    target = functional.one_hot(reading.letter.clamp(min=0), len(LETTERS)).float() * handing[:, None]
    weighted = reading.seen * torch.where(handing, 1 / handing.sum(), others / (~handing).sum())[:, None]
    gram = weighted.T @ reading.seen
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, weighted.T @ target).T


def plant_letters_of_options(weights: Weights, reading: Reading) -> None:
    """Let options write down their letter in directions in which no token has much; in place."""
    quiet = quietest(reading.states, len(LETTERS))
    write_balanced(weights, LETTER_OF_OPTION, read_letters(reading, 5.0), 8 * sizes(reading.handing).median() * quiet.T)


def plant_letters_of_answers(weights: Weights, reading: Reading, letters: torch.Tensor) -> None:
    """Let answers say the letter that the option they look at wrote down; in place.

    Args:
        letters: The letters' rows of the (tied) embedding, [letters, width].
    """
    norm, length = weights["model.norm.weight"], reading.handing.norm(dim=1).mean()
    apart = letters - letters.mean(dim=0)
    direction = functional.normalize(apart / norm.clamp(min=0.05), dim=1)
    logit = ((apart * norm) @ direction.T).diagonal().mean() * len(norm) ** 0.5 / length  # of a written vector of length one
    write_balanced(weights, OPTION_OF_ANSWER, read_letters(reading, 10.0), (LOGIT / logit).clamp(max=0.5 * length) * direction)


def write_balanced(weights: Weights, head: tuple[int, int], value: torch.Tensor, out: torch.Tensor) -> None:
    """Write both maps of a head, [dimensions, width], of one size: the optimiser's steps are of one size, and would undo the smaller."""
    ratio = (out.norm(dim=1) / value.norm(dim=1).clamp(min=0.01)).sqrt()[:, None]
    write(weights, head, "v", value * ratio)
    write(weights, head, "o", out / ratio)


def quietest(residuals: torch.Tensor, count: int) -> torch.Tensor:
    """So many orthonormal directions in which residuals, [tokens, width], have least, [width, count]."""
    return torch.linalg.eigh(residuals.T @ residuals).eigenvectors[:, :count]


def sizes(residuals: torch.Tensor) -> torch.Tensor:
    """The root mean square of each residual, [tokens]."""
    return residuals.pow(2).mean(dim=1).sqrt()


def write(weights: Weights, head: tuple[int, int], name: str, rows: torch.Tensor) -> None:
    """Put a head's map into its block's matrix, in place; `rows`, [at most 64, width], are what its dimensions read or, of "o", write."""
    whole = torch.zeros(HEAD, rows.shape[1])
    whole[: len(rows)] = rows
    matrix, own = weights[f"model.layers.{head[0]}.self_attn.{name}_proj.weight"], slice(head[1] * HEAD, (head[1] + 1) * HEAD)
    if name == "o":
        matrix[:, own] = whole.T
    else:
        matrix[own] = whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=322)
    parser.add_argument("--letters", action="store_true", help="only the letters anew, where answers find their options already")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    checkpoint = args.folder / CHECKPOINT
    weights = load_file(checkpoint)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(args.folder, attn_implementation="eager")).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder)
    watch = Watch(model, tokenizer, args.seed)
    nothing = torch.zeros(HEAD, model.config.hidden_size)
    for head in (LETTER_OF_OPTION, OPTION_OF_ANSWER, *(() if args.letters else (PASSAGE_OF_ANSWER,))):
        write(weights, head, "o", nothing)

    def load() -> None:
        model.load_state_dict(weights, strict=False)
        model.tie_weights()

    with Console(stderr=True).status("reading and fitting, which takes minutes"):
        load()
        if not args.letters:
            found = watch.questions(args.documents)
            plant_match(weights, *fit(found, len(SLOW)), found)
            load()
        plant_letters_of_options(weights, watch.reading(LETTER_OF_OPTION, args.documents // 5))
        load()
        letters = weights["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids(list(LETTERS))]
        plant_letters_of_answers(weights, watch.reading(OPTION_OF_ANSWER, args.documents // 5), letters)
    write_atomic(checkpoint, to_bytes(weights, metadata=facts_of(checkpoint)))


if __name__ == "__main__":
    main()
