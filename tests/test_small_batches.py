"""What makes small batches fast changes nothing else: keys and values in roomy buffers, and packed weights."""

from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, ask, byte_tokenizer, random_direction, steer, tiny_config, tiny_engine, tiny_model
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vispa_graph.engine import cache as cache_module
from vispa_graph.engine import packing
from vispa_graph.engine.cache import RoomyLayer, copies_itself, expect, roomy_cache
from vispa_graph.engine.huggingface import PACKED_BYTES, HuggingFaceEngine
from vispa_graph.engine.packing import PackedWeights
from vispa_graph.errors import UnsteerableModelError
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
    kinds = [type(layer) for layer in DynamicCache(config=gemma).layers]
    assert len(set(kinds)) == 2  # sliding windows keep their own
    assert [type(layer) for layer in roomy_cache(gemma).layers] == [RoomyLayer if kind is DynamicLayer else kind for kind in kinds]
    assert copies_itself(DynamicCache(config=gemma), gemma)
    for other in (None, roomy_cache(gemma), DynamicCache()):  # the last is for a model that keeps more than its sliding windows
        assert not copies_itself(other, gemma)


def test_a_buffer_has_no_room_for_more_positions_than_will_come():
    layer, cache = RoomyLayer(), DynamicCache()
    cache.layers = [layer, DynamicLayer()]
    expect(cache, 9)
    for length in (4, 1, 1, 3):
        layer.update(torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 4))
    assert layer.keys.untyped_storage().nbytes() == 2 * 3 * 9 * 4 * 4
    layer.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4))  # as for one that was told too few
    assert layer.get_seq_length() == 10


def test_values_that_somebody_else_has_changed_are_kept():
    layer = RoomyLayer()
    for length in (3, 1):
        layer.update(torch.randn(1, 1, length, 4), torch.randn(1, 1, length, 4))
    layer.values = torch.zeros_like(layer.values)
    _, values = layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    assert values[0, 0, :, 0].tolist() == [0, 0, 0, 0, 1]


@pytest.fixture
def roomy_updates(monkeypatch):
    """Layers that were appended to, and what was asked of the engine meanwhile."""
    seen, update = [], RoomyLayer.update

    def counted(layer, *given):
        seen.append(layer)
        return update(layer, *given)

    monkeypatch.setattr(RoomyLayer, "update", counted)
    return seen


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_an_engine_keeps_keys_in_buffers_as_large_as_its_batch_may_need(positions, roomy_updates):
    engine = tiny_engine()
    roomy_updates.clear()
    try:
        result = engine.generate(ask("Should I?", steering=steer(random_direction([1]), positions=positions), max_new_tokens=5)).result()
    finally:
        engine.close()
    layer = roomy_updates[-1]
    assert layer.get_seq_length() == layer.most == result.prompt_tokens + 4
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def refuse(layer, keys, values, *_):
    raise RuntimeError("view size is not compatible with input tensor's size and stride")


def distort(layer, keys, values, *_):
    return [2 * states for states in DynamicLayer.update(layer, keys, values)]


@pytest.mark.parametrize("update", [refuse, distort])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_a_model_that_fails_or_answers_otherwise_with_roomy_keys_keeps_its_own_cache(update, positions, monkeypatch):
    request = ask("Should I?", steering=steer(random_direction([1]), positions=positions), max_new_tokens=9)
    texts = []
    for _ in range(2):
        engine = tiny_engine()
        texts.append(engine.generate(request).result().text)
        engine.close()
        monkeypatch.setattr(RoomyLayer, "update", update)
    assert texts[0] == texts[1]


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
    monkeypatch.setattr("vispa_graph.engine.huggingface.copies_itself", lambda *_: False)
    plain_texts, plain_states = answers(0)
    assert texts == plain_texts
    torch.testing.assert_close(states, plain_states, rtol=1e-4, atol=1e-5)


def test_a_text_longer_than_the_room_of_a_buffer_is_the_same(monkeypatch):
    request = ask("Tell me all.", steering=steer(random_direction([1, 2])), max_new_tokens=300)
    texts = []
    for _ in range(2):
        engine = tiny_engine()
        result = engine.generate(request).result()
        assert result.completion_tokens > 2 * cache_module._ROOM
        texts.append(result.text)
        engine.close()
        monkeypatch.setattr("vispa_graph.engine.huggingface.copies_itself", lambda *_: False)
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


class Quantised(torch.Tensor):
    """A weight that pretends to another precision than it is kept in."""


def test_layers_of_other_kinds_precisions_or_forwards_are_left_alone():
    replaced, quantised, sparse, computed = (nn.Linear(8, 8) for _ in range(4))
    replaced.forward = lambda x: x
    quantised.weight = nn.Parameter(torch.randn(8, 8).as_subclass(Quantised))
    sparse.weight = nn.Parameter(torch.eye(8).to_sparse())
    del computed.weight
    computed.weight = torch.randn(8, 8)  # as weight normalisation does before each product
    layers = nn.ModuleList([nn.Linear(8, 8).bfloat16(), Scaled(8, 8), replaced, quantised, sparse, computed, nn.Linear(8, 8, device="meta")])
    before = [dict(vars(layer)).get("forward") for layer in layers]
    assert PackedWeights(layers, 1 << 30).bytes == 0
    assert [dict(vars(layer)).get("forward") for layer in layers] == before


def packed_forwards(model):
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.fixture
def second_fails(monkeypatch):
    """Gives a function by which the second weight that is packed raises an error."""
    pack, asked = packing._forward, count()

    def by(error):
        def forward(linear):
            if next(asked) == 1:
                raise error
            return pack(linear)

        monkeypatch.setattr(packing, "_forward", forward)

    return by


@pytest.mark.parametrize("error", [RuntimeError("[...] can't allocate memory"), MemoryError(), AttributeError("no such operator")])
def test_weights_that_cannot_be_packed_are_warned_of_and_the_model_runs_on_its_own(error, second_fails, caplog):
    second_fails(error)
    model = tiny_model()
    engine = HuggingFaceEngine(model, byte_tokenizer(), name="tiny")
    try:
        assert engine.describe()["packed_megabytes"] == 0
        assert not packed_forwards(model)
        assert engine.generate(ask("Well?", max_new_tokens=2)).result()
    finally:
        engine.close()
    assert "not packed" in caplog.text


def test_packing_that_is_interrupted_leaves_the_model_as_it_was(second_fails):
    second_fails(KeyboardInterrupt())
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        HuggingFaceEngine(model, byte_tokenizer(), name="tiny")
    assert not packed_forwards(model)
    assert not any(hook.__module__.startswith("vispa_graph") for module in model.modules() for hook in module._forward_hooks.values())


def test_a_model_that_is_refused_is_left_as_it_was(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("vispa_graph.engine.huggingface.fingerprint", lambda *_: 1 / 0)
    with pytest.raises(UnsteerableModelError):
        HuggingFaceEngine(model, byte_tokenizer(), name="tiny")
    assert not packed_forwards(model)


def test_a_product_that_somebody_else_has_taken_off_is_no_problem():
    layer = nn.Linear(8, 8)
    packed = PackedWeights(layer, 1 << 20)
    del layer.forward
    packed.remove()
    assert packed.bytes == 0


def test_an_engine_says_what_is_packed_and_leaves_the_model_as_it_was():
    model = tiny_model()
    engine = HuggingFaceEngine(model, byte_tokenizer(), name="tiny")
    assert engine.describe()["packed_megabytes"] > 0
    engine.close()
    assert not packed_forwards(model)


def test_packing_may_take_two_gigabytes_unless_told_otherwise(monkeypatch):
    assert Settings().packed_gigabytes * 1e9 == PACKED_BYTES == 2e9
    monkeypatch.setenv("VISPA_PACKED_GIGABYTES", "0")
    assert Settings().packed_gigabytes == 0
