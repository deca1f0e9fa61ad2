"""What the embedded language model, and the adapter of the sentence encoder, are trained with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.embedded_model import QUESTIONS
from benchmarks.judge import SENTENCES
from training.grammar import CONTENT, OFTEN, Grammar, Situation, exchanged, read_yaml
from training.selection import adapt, examples
from training.situations import compact, graded
from training.train import Pushes
from vispa_graph.engine.contract import Direction
from vispa_graph.taxonomy_index import Taxonomy
from vispa_graph.taxonomy_index.taxonomy import SITUATIONS

LAYERS = (1, 2)
# What a matter may say that its situation does not: words that only join.
JOINING = set(
    re.findall(
        r"\w+",
        "the your a an his her their its and or not no of for from in on at with to before after by into over under between about during without "
        "against as instead than that this who other s every one",
    )
)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2)
    ).eval()


def direction() -> Direction:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(len(LAYERS), 32)).astype(np.float32)
    return Direction("karma", "probe", LAYERS, vectors, np.full(2, -1.0, np.float32), 1.0, np.ones(2, np.float32))


def test_a_pushed_row_reaches_its_probability_at_the_header_in_every_steered_block_and_other_rows_stay_as_they_are(model):
    ids = torch.randint(64, (3, 9))
    states: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        before = model(ids).logits
        pushes = Pushes(model, LAYERS, rows=4)
        for layer in LAYERS:
            model.model.layers[layer].register_forward_hook(lambda _m, _i, output, layer=layer: states.update({layer: output}))
        assert torch.equal(model(ids).logits, before), "nothing is drawn yet"
        pushes.use({"karma": direction()})
        pushes.draw([("karma", 5), None, ("karma", 5)], torch.Generator().manual_seed(0), share=1.0)
        after = model(ids).logits
    assert torch.equal(after[1], before[1])
    for row in (0, 2):
        for number, layer in enumerate(LAYERS):
            logit = float(states[layer][row, 5] @ torch.from_numpy(direction().vectors[number])) - 1
            assert logit > 1.4 - 1e-3, "P0 is drawn from .8 to .998; a state that is there already is left alone"


def test_a_comment_that_speaks_for_a_value_is_marked_with_it_so_that_it_can_be_steered_toward():
    grammar = Grammar(Taxonomy.load(), seed=3)
    for _ in range(20):
        assert grammar.value_in_question()[-1].value in grammar.positives
        assert grammar.value_then_comment()[-1].value in grammar.positives
        assert grammar.bare_value_comment()[-1].value in grammar.positives
        assert grammar.neutral_comment()[-1].value is None


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(Taxonomy.load(bioethics=True), seed=5)


VALUES = sorted(path.stem for path in (CONTENT / "comments").glob("*.yaml"))


@pytest.mark.parametrize("value", VALUES)
def test_sentences_of_comments_fit_any_topic_and_openers_name_it_once(value):
    parts = read_yaml(CONTENT / "comments" / f"{value}.yaml")
    assert all(len(set(sentences)) == len(sentences) >= (30 if value == "neutral" else 40) for sentences in parts.values())
    for kind, sentences in parts.items():
        for sentence in sentences:
            slots = re.findall(r"\{(\w+)\}", sentence)
            assert set(slots) <= {"topic", "Topic"}, sentence
            assert len(slots) == {"openers": 1, "reasons": 0}.get(kind, len(slots)) <= 1, sentence
            subject = re.match(r"(?!The question|What )[^,;:]*\{topic\} (?:is|are|was|were|has|have|does|do)\b", sentence, re.IGNORECASE)
            assert not subject, f"topics are singular and plural: {sentence}"


def test_there_are_comments_for_every_value_and_a_neutral_one(grammar):
    assert {value.id for value in grammar.values} | {"neutral"} == set(VALUES)


def test_the_main_noun_of_a_graded_situations_topic_stands_in_it(grammar):
    assert len(grammar.graded) > 11_000
    for situation in grammar.graded:
        assert re.match(r"(?:the|your) \S", situation.topic), situation
        assert re.search(rf"\b{re.escape(situation.topic.split()[-1].lower())}\b", situation.text.lower().replace("’", "'")), situation


def test_the_words_of_a_matter_stand_in_its_situation_so_that_they_can_be_copied(grammar):
    named = [situation for situation in (*grammar.graded, *grammar.free) if situation.matter]
    assert len(named) > 11_000
    for situation in named:
        text = re.findall(r"\w+", f"{situation.text} {situation.topic}".lower())
        assert re.search(rf"\b{re.escape(situation.topic.split()[-1].lower())}\b", situation.matter.lower()), situation
        assert not [word for word in re.findall(r"\w+", situation.matter.lower()) if word not in text and word not in JOINING], situation


def test_an_opener_names_the_matter_of_its_situation_and_other_sentences_its_topic(grammar):
    for value in VALUES:
        situation = replace(grammar.situation(), topic="the boat", matter="the boat with the zebra")
        assert all("the boat with the zebra" in grammar.comment(value, situation) for _ in range(5))
        assert all(grammar.comment(value, situation).count("zebra") == 1 for _ in range(5))
        assert "the boat" in grammar.comment(value, replace(situation, matter=""))


def runs_of_words(text: str, length: int = 6) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_the_judges_sentences_share_no_run_of_six_words_with_comments(grammar):
    judged = yaml.safe_load(SENTENCES.read_text(encoding="utf-8"))
    of_judge = set(chain.from_iterable(runs_of_words(sentence) for sentences in judged.values() for sentence in sentences))
    for parts in grammar.comments.values():
        for sentence in chain.from_iterable(parts.values()):
            assert not runs_of_words(re.sub(r"\{\w+\}", "x", sentence)) & of_judge, sentence


def test_the_benchmarks_questions_are_not_among_the_situations(grammar):
    known = {situation.text for situation in (*grammar.free, *grammar.graded)}
    assert not known & {entry["text"] for entry in yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))}


def test_some_situations_are_followed_up(grammar):
    texts = [grammar.situation().text for _ in range(400)]
    assert any(text.endswith(f"\n{second}") for text in texts for second in grammar.frames["follow_ups"])


@pytest.mark.parametrize("value", sorted(path.stem for path in (CONTENT / "comments").glob("*.yaml")))
def test_the_openers_that_are_said_most_begin_in_different_ways(value):
    openers = read_yaml(CONTENT / "comments" / f"{value}.yaml")["openers"][:OFTEN]
    assert len({opener.partition("{topic}")[0] for opener in openers}) == OFTEN


def test_most_sentences_are_among_the_first_of_their_list_but_all_are_said(grammar):
    reasons = grammar.comments["karma"]["reasons"]
    said = [grammar.sentence("karma", "reasons") for _ in range(4000)]
    assert set(said) == set(reasons)
    assert 0.8 < sum(sentence in reasons[:OFTEN] for sentence in said) / len(said) < 0.95


def test_a_noun_is_exchanged_wherever_it_stands_and_a_verb_of_the_same_letters_never(grammar):
    kept = Situation("I fast, and my fast is long.", "the fast")
    assert all(grammar.varied(kept) == kept for _ in range(50))
    dive = Situation("Is a dive allowed?", "the dive", "dive for a penalty")
    assert all(grammar.varied(dive) == dive for _ in range(50))
    changed = [grammar.varied(Situation("The boat? My boat!", "the boat", "sell the boat")) for _ in range(50)]
    assert any("boat" not in situation.text for situation in changed)
    for situation in changed:
        noun = situation.topic.split()[-1]
        assert situation.text == f"The {noun}? My {noun}!"
        assert situation.base == f"sell {situation.topic}"


def test_a_noun_beside_the_matter_is_exchanged_too_but_none_of_the_matter(grammar):
    situation = Situation("The boat and the hospital, the doctor?", "the boat", matter="the boat and the hospital")
    changed = [grammar.varied(situation) for _ in range(80)]
    assert any("doctor" not in one.text for one in changed)
    assert all(one.matter.startswith(one.topic) and one.topic.split()[-1] in one.text for one in changed)
    assert all(len(set(re.findall(r"the (\w+)", one.text.lower()))) == 3 for one in changed)


def test_an_exchanged_noun_gets_its_article():
    assert exchanged("boat", "oar", "A boat, a boat and the boat") == "An oar, an oar and the oar"
    assert exchanged("oar", "boat", "an oar on a lake") == "a boat on a lake"


AVERAGE = """
import torch, torch.distributed as dist
from torch import nn
from training.train import average_gradients
dist.init_process_group("gloo")
model = nn.Linear(2, 1, bias=False)
nn.init.ones_(model.weight)
(model(torch.tensor([[1.0, 10.0]])) * (dist.get_rank() + 1)).sum().backward()
average_gradients(model)
assert model.weight.grad.tolist() == [[1.5, 15.0]], model.weight.grad
"""


@pytest.mark.slow
def test_workers_average_their_gradients(tmp_path):
    script = tmp_path / "average.py"
    script.write_text(AVERAGE, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = {**os.environ, "PYTHONPATH": str(CONTENT.parents[1])}
    ended = subprocess.run(command, capture_output=True, text=True, env=paths, timeout=300)
    assert ended.returncode == 0, ended.stderr


def test_the_situations_of_the_package_are_those_that_were_graded():
    assert SITUATIONS.read_text(encoding="utf-8") == compact(graded()), "run python -m training.situations"


def test_what_the_adapter_learns_from_a_values_own_phrase_says_nothing_about_other_values():
    taxonomy = Taxonomy.load()
    texts, targets, known = examples(taxonomy)
    place = {text: number for number, text in enumerate(texts)}
    for column, value in enumerate(taxonomy):
        row = place[value.facets[0]]
        assert known[row].sum() == known[row, column] == targets[row, column] == 1
    assert known[place[taxonomy.situations[0].text]].all()
    assert not any(pair.positive in place for value in taxonomy for pair in value.all_pairs)


def test_an_adapter_changes_nothing_before_it_is_trained_and_the_product_it_is_saved_as_afterwards():
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.Sequential(nn.Linear(6, 4))})})
    plain, inputs = model["encoder"]["layer"][0].weight.clone(), torch.randn(3, 6)
    before = model["encoder"]["layer"](inputs)
    [(name, adapter)] = adapt(model, rank=2).items()
    assert name == "encoder.layer.0"
    assert torch.equal(model["encoder"]["layer"](inputs), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["encoder.layer.0.down", "encoder.layer.0.up"]
    nn.init.normal_(adapter.up)
    merged = inputs @ (plain + adapter.up @ adapter.down).T + adapter.linear.bias
    assert torch.allclose(model["encoder"]["layer"](inputs), merged, atol=1e-6)
