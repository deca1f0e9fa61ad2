"""Finding the decoder blocks, refusing models that cannot be steered, and choosing layers."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, DEPTH, REFUSED, byte_tokenizer, find_blocks, tiny_config, tiny_model
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from vispa_graph.engine.checks import check_batching, check_steerable, sharing_problem
from vispa_graph.engine.huggingface import HuggingFaceEngine
from vispa_graph.engine.layers import block_output, check_layers, decoder_blocks, default_layers
from vispa_graph.errors import LayerError, NonFiniteError, NotCausalError, UnsteerableModelError


def test_the_default_layers_of_a_model_of_32_are_the_papers():
    assert default_layers(32) == tuple(range(10, 26))


@given(st.integers(1, 300))
def test_the_default_layers_keep_the_papers_fractions_at_any_depth(depth):
    layers = default_layers(depth)
    assert layers == tuple(range(layers[0], layers[-1] + 1))
    assert 0 <= layers[0] <= layers[-1] < depth
    assert abs(layers[0] - 10 / 32 * depth) <= 0.5
    assert abs(layers[-1] - min(25 / 32 * depth, depth - 1)) <= 0.5


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_fractions_choose_all_blocks_from_the_first_to_the_last_at_any_depth(depth, one, other):
    layers = check_layers(sorted([one, other]), depth)
    assert layers == tuple(range(layers[0], layers[-1] + 1))
    assert check_layers(layers, depth) == layers
    for layer, fraction in zip((layers[0], layers[-1]), sorted([one, other]), strict=True):
        assert abs(layer - min(fraction * depth, depth - 1)) <= 0.5


def test_one_fraction_is_one_block():
    assert check_layers([0.5], 24) == (12,)


@pytest.mark.parametrize("layers", [(0.8, 0.3), (0.1, 0.2, 0.3), (0.5, 1.5), (-0.5, 0.5), (2, 0.5)])
def test_fractions_that_are_no_range_are_refused(layers):
    with pytest.raises(LayerError, match="ascending from 0 to 1"):
        check_layers(layers, DEPTH)


def test_checked_layers_come_back_ascending_and_without_duplicates():
    assert check_layers([3, 0, 3, 1], 4) == (0, 1, 3)


@pytest.mark.parametrize(("layers", "reason"), [((), "at least one"), ((-1,), r"0 to 4"), ((2, 5), r"Layer 5 .* 5 \(0 to 4\)")])
def test_layers_that_the_model_does_not_have_are_refused_with_its_range(layers, reason):
    with pytest.raises(LayerError, match=reason):
        check_layers(layers, DEPTH)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blocks_are_found_in_every_architecture_and_pass_the_check(architecture):
    model = tiny_model(architecture)
    blocks = decoder_blocks(model)
    assert blocks is find_blocks(model)
    assert len(blocks) == DEPTH
    check_steerable(model, blocks)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "cohere2", "exaone4", "gpt_oss", "llama4", "lfm2", "jamba", "qwen3_next"])
def test_architectures_that_mix_kinds_of_blocks_are_tested_with_both(architecture):
    assert len(set(tiny_config(architecture).layer_types)) == 2


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_causal_model_that_cannot_be_steered_is_refused_with_the_reason(architecture):
    with pytest.raises(UnsteerableModelError, match=REFUSED[architecture][2]):
        HuggingFaceEngine(tiny_model(architecture), byte_tokenizer(), name="tiny")


def test_of_two_lists_of_the_right_length_the_one_nearer_the_root_is_taken():
    model = _composite(inner=nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(9, 9) for _ in range(3)])}), blocks=_list(nn.Linear(2, 2)))
    assert decoder_blocks(model) is model.blocks


def test_of_two_lists_at_the_same_depth_the_one_of_the_models_own_block_class_is_taken():
    model = _composite(adapters=_list(nn.Bilinear(9, 9, 9)), blocks=_list(nn.Linear(2, 2)))
    model._no_split_modules = ["Linear"]
    assert decoder_blocks(model) is model.blocks


def test_of_two_lists_that_nothing_else_tells_apart_the_larger_is_taken():
    model = _composite(norms=_list(nn.LayerNorm(2)), blocks=_list(nn.Linear(2, 2)))
    assert decoder_blocks(model) is model.blocks


def test_a_module_without_a_configuration_is_refused():
    with pytest.raises(UnsteerableModelError, match="no configuration"):
        decoder_blocks(nn.Linear(2, 2))


def test_a_model_without_a_list_of_as_many_blocks_as_it_claims_is_refused():
    model = tiny_model()
    model.config.num_hidden_layers = DEPTH + 2
    with pytest.raises(UnsteerableModelError, match=rf"no list of {DEPTH + 2} decoder blocks"):
        decoder_blocks(model)


def test_the_hidden_state_is_taken_from_a_tensor_or_the_head_of_a_tuple():
    hidden = torch.ones(1, 2, 3)
    assert block_output(hidden) is hidden
    assert block_output((hidden, None)) is hidden


@pytest.mark.parametrize("output", [None, {"hidden": torch.ones(1)}, (None, torch.ones(1))])
def test_any_other_block_output_is_refused(output):
    with pytest.raises(UnsteerableModelError, match="not a hidden state"):
        block_output(output)


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("differences", UnsteerableModelError, "block 0 returns is not the model's hidden state 1"),
        ("skips one", UnsteerableModelError, "do not each run once"),
        ("repeats", UnsteerableModelError, "do not each run once"),
        ("rounds between blocks", UnsteerableModelError, r"added at block \d does not arrive"),
        ("looks ahead", NotCausalError, "the tokens after it"),
        ("forgets its last", UnsteerableModelError, "last block does not change the logits"),
        ("is not finite", NonFiniteError, "logits of _Odd are not finite"),
    ],
)
def test_a_model_whose_blocks_do_not_carry_the_residual_stream_is_refused_with_the_reason(kind, error, reason):
    model = _Odd(kind)
    with pytest.raises(error, match=reason):
        HuggingFaceEngine(model, byte_tokenizer(), name="odd")
    assert not any(block._forward_hooks for block in model.layers)


def test_logits_that_are_not_a_number_pass_no_comparison():
    def steps(prompts, shared):
        return torch.full((len(prompts), 2, 9), torch.nan)

    with pytest.raises(UnsteerableModelError, match="cannot share a batch"):
        check_batching("Odd", steps, 9)
    assert sharing_problem(steps, 9) is not None


def test_a_later_token_may_change_the_rounding_of_half_precision_but_no_more():
    """As where an expert computes a token beside others, or alone."""
    rounding = _Odd("rounds by company").bfloat16()
    check_steerable(rounding, decoder_blocks(rounding))
    for model in (_Odd("rounds by company"), _Odd("looks ahead").bfloat16()):
        with pytest.raises(NotCausalError, match="the tokens after it"):
            check_steerable(model, decoder_blocks(model))


def test_the_same_model_without_the_oddity_passes():
    model = _Odd("none")
    check_steerable(model, decoder_blocks(model))


def test_a_model_that_cannot_generate_is_refused():
    with pytest.raises(NotCausalError, match="does not generate"):
        HuggingFaceEngine(tiny_model().model, byte_tokenizer(), name="headless")


def test_a_tokenizer_with_neither_padding_nor_end_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UnsteerableModelError, match="neither a padding nor an end token"):
        HuggingFaceEngine(tiny_model(), tokenizer, name="tiny")


class _Odd(PreTrainedModel, GenerationMixin):
    """A stack of linear blocks with one thing wrong."""

    config_class = type(tiny_config())

    def __init__(self, kind):
        super().__init__(tiny_config())
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        self.layers = nn.ModuleList([_Block(kind, self.config.hidden_size) for _ in range(self.config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids, output_hidden_states=False, **_):
        hidden = self.embed(input_ids)
        states = [hidden]
        layers = {"skips one": [*self.layers][1:], "repeats": [*self.layers, *self.layers]}.get(self.kind, self.layers)
        for layer in layers:
            hidden = hidden + layer(hidden) if self.kind == "differences" else layer(hidden)
            states.append(hidden)
            if self.kind == "rounds between blocks":
                hidden = hidden.round(decimals=1)
        logits = {"forgets its last": states[-2], "is not finite": hidden * torch.nan}.get(self.kind, hidden)
        return CausalLMOutput(logits=logits, hidden_states=tuple(states))


class _Block(nn.Module):
    def __init__(self, kind, width):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(width, width)

    def forward(self, hidden):
        out = self.linear(hidden)
        if self.kind == "rounds by company":
            return out * (1 + 2**-7 * (hidden[:, -1:].sum() > 0))
        return out + hidden.mean(1, keepdim=True) if self.kind == "looks ahead" else out


def _list(module):
    return nn.ModuleList([module for _ in range(3)])


def _composite(**parts):
    model = nn.Module()
    model.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(num_hidden_layers=3))
    for name, part in parts.items():
        setattr(model, name, part)
    return model
