"""What the embedded language model, and the adapter of the sentence encoder, are trained with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from training.grammar import Grammar
from training.selection import adapt, examples
from training.situations import compact, graded
from training.train import Pushes
from vispa_graph.engine.contract import Direction
from vispa_graph.taxonomy_index import Taxonomy
from vispa_graph.taxonomy_index.taxonomy import SITUATIONS

LAYERS = (1, 2)


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
            assert logit > 0.4 - 1e-3, "P0 is drawn from .6 to .99; a state that is there already is left alone"


def test_a_comment_that_speaks_for_a_value_is_marked_with_it_so_that_it_can_be_steered_toward():
    grammar = Grammar(Taxonomy.load(), seed=3)
    for _ in range(20):
        assert grammar.value_in_question()[-1].value in grammar.positives
        assert grammar.value_then_comment()[-1].value in grammar.positives
        assert grammar.bare_value_comment()[-1].value in grammar.positives
        assert grammar.neutral_comment()[-1].value is None


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
