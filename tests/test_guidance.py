"""Where attention is told to look while multiple choice is trained."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.grammar import LETTER, QUESTION, Grammar, Segment
from training.guidance import LETTER_OF_OPTION, OPTION_OF_ANSWER, PASSAGE_OF_ANSWER, Guide, Link
from training.matching import (
    HEAD,
    LETTERS,
    SLOW,
    Question,
    Reading,
    fit,
    plant_letters_of_answers,
    plant_letters_of_options,
    plant_match,
    write_balanced,
)
from training.train import SPECIAL, Example, encode
from vispa_graph.resources import embedded_folder
from vispa_graph.taxonomy_index import Taxonomy

PROMPT = "<passage>\nIt is late. So I am against it.\n</passage>\n<question>\nSell it?\n</question>\nA. Yes\nB. Not sell it\nAnswer with the letter."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(embedded_folder())


def encoded(tokenizer: PreTrainedTokenizerFast, document: list[Segment]) -> Example:
    return encode(tokenizer.backend_tokenizer, document, {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL})


def looks(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[tuple[tuple[int, int], str, str]]:
    """Of each link its head, the text of the token that looks, and the text that it looks at."""

    def text(start: int, end: int) -> str:
        return tokenizer.decode(example.tokens[start:end]).strip()

    return [(link.head, text(link.query, link.query + 1), text(link.start, link.end)) for link in example.links]


def test_an_option_looks_at_its_letter_and_the_answer_at_its_option_and_the_end_of_the_passage(tokenizer):
    example = encoded(tokenizer, [Segment("user", PROMPT, QUESTION), Segment("assistant", "B", LETTER)])
    found = looks(tokenizer, example)
    assert {(query, at) for head, query, at in found if head == LETTER_OF_OPTION} >= {("Yes", "A"), ("Not", "B"), ("it", "B")}
    assert (OPTION_OF_ANSWER, "<|assistant|>", "Not sell it") in found
    assert (PASSAGE_OF_ANSWER, "<|assistant|>", "So I am against it.") in found
    assert sum(head == OPTION_OF_ANSWER for head, *_ in found) == 1


def test_a_second_question_looks_at_its_own_options(tokenizer):
    again = [Segment("user", "A. Not sell it\nB. Yes\nAnswer with the letter.", 0.0), Segment("assistant", "A", LETTER)]
    example = encoded(tokenizer, [Segment("user", PROMPT, QUESTION), Segment("assistant", "B", LETTER), *again])
    first, second = [link for link in example.links if link.head == OPTION_OF_ANSWER]
    assert tokenizer.decode(example.tokens[second.start : second.end]).strip() == "Not sell it"
    assert second.start > first.query
    assert example.tokens[second.query + 1] == tokenizer.convert_tokens_to_ids("A")


def test_comments_have_no_links(tokenizer):
    grammar = Grammar(Taxonomy.load(), seed=1)
    assert not any(encoded(tokenizer, grammar.bare_value_comment()).links for _ in range(5))


def test_every_answer_of_the_grammar_finds_its_option(tokenizer):
    grammar = Grammar(Taxonomy.load(), seed=2)
    for _ in range(20):
        document = grammar.choice_by_stance()
        links = encoded(tokenizer, document).links
        letters = sum(segment.weight == LETTER for segment in document)
        assert sum(link.head == OPTION_OF_ANSWER for link in links) == letters
        assert sum(link.head == PASSAGE_OF_ANSWER for link in links) == 1


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4),
    ).eval()


def test_the_loss_is_the_surprise_at_where_attention_goes_and_falls_as_a_head_learns_to_look_there(model):
    model.set_attn_implementation("eager")
    guide = Guide(model.model.layers)
    tokens = torch.arange(5, 25)[None]
    links = [(0, Link(OPTION_OF_ANSWER, 12, 3, 5))]
    attention = model(tokens, output_attentions=True).attentions[OPTION_OF_ANSWER[0]][0, OPTION_OF_ANSWER[1]]
    before = guide.loss(links)
    assert before.item() == pytest.approx(-math.log(attention[12, 3:5].sum().item()), rel=1e-5)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(40):
        model(tokens)
        optimiser.zero_grad()
        guide.loss(links).backward()
        optimiser.step()
    model(tokens)
    assert guide.loss(links) < before - 0.3


def test_heads_count_alike_however_many_tokens_each_guides(model):
    model.set_attn_implementation("eager")
    guide = Guide(model.model.layers)
    model(torch.arange(5, 25)[None])
    one, many = [(0, Link(OPTION_OF_ANSWER, 12, 3, 5))], [(0, Link(LETTER_OF_OPTION, query, 2, 3)) for query in (6, 7, 8)]
    assert guide.loss(one + many).item() == pytest.approx((guide.loss(one) + guide.loss(many)).item() / 2)


def made_up_questions(count: int) -> list[Question]:
    """Answers whose right option is a noisy copy of what is said, of eight things that can be, among tokens that are none of it."""
    things, loud = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)), torch.randn(100, 256, generator=torch.Generator().manual_seed(2))
    questions = []
    for _ in range(count):
        order = torch.randperm(8)
        states = things[order].repeat_interleave(2, dim=0) + 0.3 * torch.randn(16, 256)
        there = torch.arange(16) // 2 == int(torch.randint(0, 8, ()))
        said = things[order[int(there.nonzero()[0]) // 2]] + 0.3 * torch.randn(256)
        questions.append(Question(said, states, there, torch.randn(100) @ loud))
    return questions


NORM = f"model.layers.{OPTION_OF_ANSWER[0]}.input_layernorm.weight"


def random_weights() -> dict[str, torch.Tensor]:
    blocks = {head[0] for head in (LETTER_OF_OPTION, PASSAGE_OF_ANSWER, OPTION_OF_ANSWER)}
    matrices = {f"model.layers.{block}.self_attn.{name}_proj.weight": torch.randn(256, 256) for block in blocks for name in "qkvo"}
    return matrices | {NORM: torch.rand(256) + 0.5, "model.norm.weight": torch.rand(256) + 0.5}


def own(weights: dict[str, torch.Tensor], head: tuple[int, int], name: str) -> torch.Tensor:
    """A head's map: [64, width], of "o" [width, 64]."""
    matrix, place = weights[f"model.layers.{head[0]}.self_attn.{name}_proj.weight"], slice(head[1] * HEAD, (head[1] + 1) * HEAD)
    return matrix[:, place] if name == "o" else matrix[place]


def said_by(weights: dict[str, torch.Tensor], head: tuple[int, int], state: torch.Tensor) -> torch.Tensor:
    """What a head adds that looks at one normed state alone."""
    return own(weights, head, "o") @ (own(weights, head, "v") @ state)


def normed(residual: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return residual / residual.pow(2).mean().sqrt() * norm


def test_the_fitted_match_makes_the_answers_head_look_at_the_right_option():
    torch.manual_seed(0)
    weights = random_weights()
    plant_match(weights, *fit(questions := made_up_questions(400), len(SLOW), steps=100), questions)
    right = []
    for question in made_up_questions(50):
        residual = question.residual + said_by(weights, PASSAGE_OF_ANSWER, question.said)
        query = own(weights, OPTION_OF_ANSWER, "q") @ normed(residual, weights[NORM])
        scores = question.states @ own(weights, OPTION_OF_ANSWER, "k").T @ query / HEAD**0.5
        right.append(scores.softmax(dim=0)[question.there].sum().item())
    assert sum(right) / len(right) > 0.8, "by chance it would be .125"


def test_an_option_hands_its_letter_on_to_the_answer_and_other_tokens_hand_on_nothing():
    torch.manual_seed(0)
    weights, letters, loud = random_weights(), torch.randn(len(LETTERS), 256), torch.randn(100, 256)
    seen = torch.randn(len(LETTERS), 256)

    def reading(states: torch.Tensor) -> Reading:
        """Every ninth token sees something that is no letter."""
        which = torch.arange(900) % 9
        which[which == 8] = -1
        things = torch.where((which < 0)[:, None], torch.randn(900, 256), states[which] + 0.1 * torch.randn(900, 256))
        return Reading(things, which, normed(torch.randn(900, 100) @ loud, torch.ones(256)), torch.randn(800, 100) @ loud)

    plant_letters_of_options(weights, reading(seen))
    background = torch.randn(len(LETTERS), 100) @ loud
    options = torch.stack(
        [normed(rest + said_by(weights, LETTER_OF_OPTION, state), weights[NORM]) for rest, state in zip(background, seen, strict=True)]
    )
    plant_letters_of_answers(weights, reading(options), letters)
    answer = torch.randn(100) @ loud
    gained = [letters @ normed(answer + said_by(weights, OPTION_OF_ANSWER, option), weights["model.norm.weight"]) for option in options]
    assert [int((logits - letters @ normed(answer, weights["model.norm.weight"])).argmax()) for logits in gained] == list(range(len(LETTERS)))
    spoken, silent = said_by(weights, OPTION_OF_ANSWER, options[0]), said_by(weights, OPTION_OF_ANSWER, torch.randn(256))
    assert silent.norm() < spoken.norm() / 2


def test_both_maps_of_a_planted_head_are_of_one_size():
    weights = random_weights()
    write_balanced(weights, LETTER_OF_OPTION, 0.01 * torch.randn(8, 256), 100 * torch.randn(8, 256))
    value, out = own(weights, LETTER_OF_OPTION, "v")[:8].norm(dim=1), own(weights, LETTER_OF_OPTION, "o")[:, :8].norm(dim=0)
    assert value.tolist() == pytest.approx(out.tolist(), rel=1e-4)
