"""What makes small batches fast changes nothing else: keys and values in roomy buffers, and packed weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, ask, byte_tokenizer, random_direction, steer, tiny_config, tiny_engine, tiny_model
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vispa_graph.engine import cache as cache_module
from vispa_graph.engine.cache import RoomyLayer, copies_itself, roomy_cache
from vispa_graph.engine.huggingface import HuggingFaceEngine
from vispa_graph.engine.packing import PackedWeights
from vispa_graph.settings import Settings

# Lengths of states to append, rows to keep (as in a shared prompt), and how many positions to crop.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 5)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("crop"), st.integers(-2, 0)),
    ),
    max_size=12,
)


@given(STEPS, st.integers(0, 3))
def test_a_roomy_layer_holds_bit_for_bit_what_the_librarys_own_layer_holds(steps, room):
    roomy, own = RoomyLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "_ROOM", room)
        for step, size in [("append", 3), *steps]:
            if step == "append":
                keys, values = torch.randn(2, 2, 3, size, 4, generator=generator)
                shown = [layer.update(keys, values) for layer in (roomy, own)]
                assert all(map(torch.equal, *shown))
            elif step == "select":
                [layer.batch_select_indices(torch.tensor(size)) for layer in (roomy, own)]
            elif own.get_seq_length() > 2:
                [layer.crop(size) for layer in (roomy, own)]
            assert roomy.get_seq_length() == own.get_seq_length()
            assert torch.equal(roomy.keys, own.keys)
            assert torch.equal(roomy.values, own.values)


def test_appending_to_a_roomy_layer_copies_nothing_that_was_there():
    layer = RoomyLayer()
    places = []
    for _ in range(100):
        keys, _ = layer.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4))
        places.append(keys.data_ptr())
    assert len(set(places[1:])) == 1


def test_only_layers_that_would_copy_themselves_are_replaced():
    assert all(type(layer) is RoomyLayer for layer in roomy_cache(tiny_config("llama")).layers)
    gemma = tiny_config("gemma3")
    gemma.layer_types = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"] * (gemma.num_hidden_layers - 4)
    kinds = [type(layer) for layer in DynamicCache(config=gemma).layers]
    assert len(set(kinds)) == 2  # sliding windows keep their own
    assert [type(layer) for layer in roomy_cache(gemma).layers] == [RoomyLayer if kind is DynamicLayer else kind for kind in kinds]
    assert not copies_itself(None)
    assert not copies_itself(roomy_cache(gemma))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steered_texts_and_readings_are_the_same_without_what_makes_them_fast(architecture, monkeypatch):
    def answers(packed_bytes):
        engine = HuggingFaceEngine(tiny_model(architecture), byte_tokenizer(), name="tiny", linger=0.05, packed_bytes=packed_bytes)
        direction = random_direction([1, 2])
        try:
            futures = [engine.generate(ask(text, steering=steering, max_new_tokens=20)) for text in ("Should I go?", "Or stay with her then?")
                       for steering in (None, steer(direction))]  # fmt: skip
            return [future.result().text for future in futures], torch.from_numpy(engine.read(["A text.", "Another one."]))
        finally:
            engine.close()

    texts, states = answers(1 << 30)
    monkeypatch.setattr("vispa_graph.engine.huggingface.copies_itself", lambda cache: False)
    plain_texts, plain_states = answers(0)
    assert texts == plain_texts
    torch.testing.assert_close(states, plain_states, rtol=1e-4, atol=1e-5)


def test_a_text_longer_than_the_room_of_a_buffer_is_the_same(monkeypatch):
    request = ask("Tell me all.", steering=steer(random_direction([1, 2])), max_new_tokens=300)
    texts = []
    for _ in range(2):
        engine = tiny_engine()
        texts.append(engine.generate(request).result().text)
        engine.close()
        monkeypatch.setattr("vispa_graph.engine.huggingface.copies_itself", lambda cache: False)
    assert texts[0] == texts[1]


def test_a_packed_layer_multiplies_few_vectors_as_before_and_many_by_its_own_weights():
    torch.manual_seed(0)
    layer = nn.Linear(96, 200)
    few, many = torch.randn(6, 1, 96), torch.randn(2, 40, 96)
    expected = layer(few), layer(many)
    packed = PackedWeights(layer, 1 << 20)
    with torch.inference_mode():
        torch.testing.assert_close(layer(few), expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(many), expected[1])
    assert packed.bytes == layer.weight.nbytes
    packed.remove()
    packed.remove()
    assert packed.bytes == 0
    assert "forward" not in vars(layer)
    assert torch.equal(layer(few), expected[0])


def test_the_largest_matrices_are_packed_as_far_as_memory_may_be_taken():
    small, large, middle = layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(8, 32)])
    packed = PackedWeights(layers, large.weight.nbytes + small.weight.nbytes)
    assert [("forward" in vars(layer)) for layer in (small, large, middle)] == [True, True, False]
    assert packed.bytes == large.weight.nbytes + small.weight.nbytes
    assert PackedWeights(nn.ModuleList([middle]), 0).bytes == 0


class Scaled(nn.Linear):
    """A layer with a product of its own, as quantisation and adapters bring."""


def test_layers_of_other_kinds_precisions_or_forwards_are_left_alone():
    replaced = nn.Linear(8, 8)
    replaced.forward = lambda x: x
    layers = nn.ModuleList([nn.Linear(8, 8).bfloat16(), Scaled(8, 8), replaced, nn.Linear(8, 8, device="meta")])
    before = [dict(vars(layer)).get("forward") for layer in layers]
    assert PackedWeights(layers, 1 << 30).bytes == 0
    assert [dict(vars(layer)).get("forward") for layer in layers] == before


def test_an_engine_says_what_is_packed_and_leaves_the_model_as_it_was():
    model = tiny_model()
    engine = HuggingFaceEngine(model, byte_tokenizer(), name="tiny")
    assert engine.describe()["packed_megabytes"] > 0
    engine.close()
    assert not any("forward" in vars(module) for module in model.modules())


def test_packing_may_take_two_gigabytes_unless_told_otherwise(monkeypatch):
    assert Settings().packed_gigabytes == 2
    monkeypatch.setenv("VISPA_PACKED_GIGABYTES", "0")
    assert Settings().packed_gigabytes == 0
