"""The steering engine on tiny random models: what each request gets, whatever shares its batch."""

import json
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import count, product

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    DEPTH,
    UNSHARED,
    VOCABULARY,
    WIDTH,
    ask,
    block_outputs,
    byte_tokenizer,
    find_blocks,
    random_direction,
    reciting_model,
    steer,
    tiny_config,
    tiny_engine,
    tiny_model,
    worker_held,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vispa_graph.engine.contract import Direction, Engine, Generation, GenerationRequest, ScoreRequest, mix
from vispa_graph.engine.fingerprint import fingerprint
from vispa_graph.engine.folder import find_model
from vispa_graph.engine.huggingface import HuggingFaceEngine
from vispa_graph.errors import (
    BatchError,
    ContextLengthError,
    DeadlineError,
    EngineBusyError,
    EngineClosedError,
    EngineMemoryError,
    InputError,
    LayerError,
    ModelNotFoundError,
    NonFiniteError,
    NotCausalError,
    SettingsError,
    UnsteerableModelError,
)
from vispa_graph.resources import Resources, embedded_folder
from vispa_graph.settings import Settings

LAYERS = (1, 2, 3)
STEERED = steer(random_direction(LAYERS, seed=1))
# One of each way to count positions (rotary, learned, slopes on the mask) and to return a hidden state (tensor, tuple).
KINDS = ("llama", "gpt2", "bloom", "gpt_neox")
PROMPT = "Should my father, 84, have surgery?"


@pytest.fixture
def opened():
    """Wraps models in engines that are closed when the test ends."""
    engines = []

    def make(model, tokenizer=None, **options):
        engine = HuggingFaceEngine(model, tokenizer or byte_tokenizer(), name="tiny", **{"linger": 0.0, **options})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engines():
    """One engine for each of a few kinds of models, on the same seed everywhere."""
    made = {architecture: tiny_engine(architecture) for architecture in KINDS}
    yield made
    for engine in made.values():
        engine.close()


def ids_of(text):
    """A prompt without a chat template, in tokens."""
    return byte_tokenizer()(text + "\n\n", return_tensors="pt")["input_ids"]


def user(text):
    return [{"role": "user", "content": text}]


def together(engine, *requests):
    """The results of requests that share one batch."""
    with worker_held(engine):
        futures = [engine.generate(r) if isinstance(r, GenerationRequest) else engine.score(r) for r in requests]
    return [future.result(60) for future in futures]


def probability(direction, layer, state):
    """The probe's probability for a state [d]."""
    index = direction.layers.index(layer)
    score = float(direction.vectors[index].astype(np.float64) @ state.double().numpy()) + float(direction.bias[index])
    return 1 / (1 + math.exp(-score))


# The calculation of the papers, written for one prompt alone: one whole forward pass for each layer


def adding(delta, start):
    def hook(_module, _inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, start:] += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


class Reference:
    """A model steered by simple hooks from the position `start` on, without padding, batches or a cache."""

    def __init__(self, architecture, steering, start=0, **changes):
        self.model, self.steering, self.deltas = tiny_model(architecture, **changes), steering, {}
        self.blocks, self.start = find_blocks(self.model), start

    def forward(self, ids, watch=None):
        """Logits [vocabulary] at the last position, and the state [d] there after the block `watch`."""
        seen = []
        handles = [self.blocks[layer].register_forward_hook(adding(delta, self.start)) for layer, delta in self.deltas.items()]
        if watch is not None:
            handles.append(self.blocks[watch].register_forward_hook(lambda _m, _i, o: seen.append(o[0] if isinstance(o, tuple) else o)))
        try:
            with torch.inference_mode():
                logits = self.model(ids, use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen[0][0, -1] if seen else None

    def calibrate(self, ids):
        """The magnitudes at the steered layers, in ascending order, each after the ones before it were added."""
        direction, magnitudes = self.steering.direction, []
        for index, layer in enumerate(direction.layers):
            _, state = self.forward(ids, watch=layer)
            w, e = direction.vectors[index].astype(np.float64), state.double().numpy()
            wanted = math.log(self.steering.target_probability / (1 - self.steering.target_probability))
            bias, strength = float(direction.bias[index]), self.steering.strength
            # Suppressing is ConVA's minus variant, down to 1 - P0.
            eps = max(0.0, wanted - bias - w @ e) if strength > 0 else min(0.0, -wanted - bias - w @ e)
            eps *= abs(strength) / (w @ w)
            self.deltas[layer] = torch.from_numpy(eps * w).float()
            magnitudes.append(eps)
        return magnitudes

    def text(self, ids, new_tokens):
        """Greedy decoding, the whole text again for each token."""
        tokens = []
        for _ in range(new_tokens):
            token = int(self.forward(torch.cat([ids, torch.tensor([tokens], dtype=torch.long)], dim=1))[0].argmax())
            if token == 258:
                break
            tokens.append(token)
        return byte_tokenizer().decode(tokens, skip_special_tokens=True)


def company():
    """Requests to share a batch with: other values, unsteered, shorter and longer prompts, other layers and methods."""
    return [
        ask("Why?", max_new_tokens=3),
        ask("x" * 150, steering=steer(random_direction(LAYERS, seed=5), target=0.99), max_new_tokens=2),
        ask("A question of middling length", steering=steer(random_direction([0, 2], method="pca", seed=6, alpha=2.0)), max_new_tokens=9),
        ask(PROMPT, steering=steer(random_direction([4], method="mean_difference", seed=7)), max_new_tokens=5),
        ask(PROMPT, max_new_tokens=4),
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calibration_in_the_prefill_equals_one_forward_pass_for_each_layer(architecture, opened):
    steering = steer(random_direction(LAYERS, seed=1), strength=1.0)
    reference = Reference(architecture, steering)
    expected = reference.calibrate(ids_of(PROMPT))
    text = reference.text(ids_of(PROMPT), 6)
    assert max(expected) > 0
    engine = opened(tiny_model(architecture))
    request = ask(PROMPT, steering=steering, max_new_tokens=6)
    alone = engine.generate(request).result()
    beside = together(engine, *company()[:2], request, *company()[2:])[2]
    assert (alone.batch_rows, beside.batch_rows) == (1, 6)
    for generation in (alone, beside):
        assert generation.steering.layers == LAYERS
        assert generation.steering.magnitude == pytest.approx(expected, rel=1e-4)
        assert generation.text == text


@pytest.mark.parametrize("strength", [0.5, 1.5, -1.0, -2.0])
def test_calibration_scaled_by_a_strength_equals_the_same_calculation(strength, opened):
    steering = steer(random_direction(LAYERS, seed=2), strength=strength, target=0.7)
    expected = Reference("llama", steering).calibrate(ids_of(PROMPT))
    assert any(expected)
    report = opened(tiny_model()).generate(ask(PROMPT, steering=steering, max_new_tokens=1)).result().steering
    assert report.magnitude == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("architecture", KINDS)
def test_the_last_prompt_token_has_the_target_where_it_was_lower_and_is_untouched_where_it_was_higher(architecture, opened):
    model = tiny_model(architecture)
    base = random_direction(LAYERS, seed=3)
    direction = Direction("value", "probe", LAYERS, base.vectors, np.array([-5, 200, -2], np.float32), 1.0, base.accuracy)
    with block_outputs(model) as before:
        engine = opened(model)
        with block_outputs(model) as after:
            report = engine.generate(ask(PROMPT, steering=steer(direction, target=0.8), max_new_tokens=1)).result().steering
    for index, (layer, lower) in enumerate(zip(LAYERS, [True, False, True], strict=True)):
        was, now = before[layer][-1][0, -1], after[layer][-1][0, -1]
        assert (probability(direction, layer, was) < 0.8) == lower
        if lower:
            assert probability(direction, layer, now) == pytest.approx(0.8, abs=1e-4)
        else:
            assert torch.equal(before[layer][-1], after[layer][-1])
            assert report.magnitude[index] == 0
        assert report.before[index] == pytest.approx(probability(direction, layer, was), abs=1e-4)
        assert report.after[index] == pytest.approx(probability(direction, layer, now), abs=1e-4)


def test_the_calibrated_magnitude_is_held_at_every_position_while_generating(opened):
    model = tiny_model()
    direction = random_direction(LAYERS, seed=1)
    with block_outputs(model) as before:
        engine = opened(model)
        with block_outputs(model) as after:
            report = engine.generate(ask(PROMPT, steering=steer(direction), max_new_tokens=5)).result().steering
    for index, layer in enumerate(LAYERS):
        delta = report.magnitude[index] * direction.vectors[index]
        for was, now in zip(before[layer][-len(after[layer]) :], after[layer], strict=True):
            assert np.allclose((now - was).numpy(), np.broadcast_to(delta, now.shape), atol=1e-5)


# Generated positions only, suppression, several values


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - UNSHARED))
def test_steering_generated_positions_equals_adding_from_the_last_prompt_token_on(architecture, opened):
    steering = steer(random_direction(LAYERS, seed=1))
    reference = Reference(architecture, steering, start=len(ids_of(PROMPT)[0]) - 1)
    expected = reference.calibrate(ids_of(PROMPT))
    text = reference.text(ids_of(PROMPT), 6)
    engine = opened(tiny_model(architecture))
    request = ask(PROMPT, steering=replace(steering, positions="generated"), max_new_tokens=6)
    same_prompt = ask(PROMPT, steering=steer(random_direction([2], method="pca", seed=3), positions="generated"), max_new_tokens=9)
    longer = ask("x" * 60, steering=steer(random_direction(LAYERS, seed=2), positions="generated"), max_new_tokens=3)
    for generation in (engine.generate(request).result(), together(engine, longer, same_prompt, request)[2]):
        assert generation.steering.magnitude == pytest.approx(expected, rel=1e-4)
        assert generation.steering.positions == "generated"
        assert generation.text == text


@pytest.mark.parametrize("architecture", sorted(UNSHARED))
def test_where_a_prompt_cannot_be_shared_generated_positions_are_refused_with_the_reason(architecture, opened):
    engine = opened(tiny_model(architecture))
    assert engine.describe()["generated_positions"] is False
    with pytest.raises(UnsteerableModelError, match=r"generated positions only: its cache .* Steer all positions"):
        engine.generate(ask(PROMPT, steering=steer(random_direction(LAYERS), positions="generated"))).result(60)
    assert engine.generate(ask(PROMPT, steering=steer(random_direction(LAYERS)), max_new_tokens=2)).result(60).steering


def test_a_prompt_that_several_values_share_is_read_once(opened):
    model = tiny_model()
    engine = opened(model)
    requests = [ask(PROMPT, steering=steer(random_direction(LAYERS, seed=n), positions="generated"), max_new_tokens=2) for n in range(4)]
    shapes = []
    handle = model.register_forward_pre_hook(lambda _m, _a, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    try:
        results = together(engine, *requests)
    finally:
        handle.remove()
    assert {r.batch_rows for r in results} == {4}
    prompt = results[0].prompt_tokens
    assert shapes[1:3] == [(1, prompt - 1), (4, 1)]  # after the text that holds the worker


def test_a_prompt_of_one_token_can_be_steered_at_generated_positions(opened):
    engine = opened(tiny_model(), byte_tokenizer(chat=True))
    engine._chat_tokens = lambda messages: [len(messages[0]["content"])] * len(messages[0]["content"])
    steering = steer(random_direction(LAYERS, seed=1), positions="generated")
    alone = engine.generate(ask("x", steering=steering, max_new_tokens=4)).result()
    beside = together(engine, ask("yyyy", steering=steering, max_new_tokens=4), ask("x", steering=steering, max_new_tokens=4))[1]
    assert alone.text == beside.text
    assert alone.text == engine.generate(ask("x", steering=replace(steering, positions="all"), max_new_tokens=4)).result().text


def test_letters_can_be_scored_at_generated_positions(opened):
    steering = steer(random_direction(LAYERS, seed=1), positions="generated")
    reference = Reference("llama", steering, start=len(ids_of(PROMPT)[0]) - 1)
    reference.calibrate(ids_of(PROMPT))
    expected, mass = plain_scores(reference.forward(ids_of(PROMPT))[0], ("A", "B"), ("", "Ġ"))
    scores = opened(tiny_model()).score(ScoreRequest(user(PROMPT), ("A", "B"), steering)).result()
    assert scores.probabilities == pytest.approx(expected, rel=1e-3)
    assert scores.mass == pytest.approx(mass, rel=1e-3)


@pytest.mark.parametrize("method", ["probe", "mean_difference", "pca"])
def test_a_negative_strength_steers_along_the_opposite_direction(method, opened):
    engine = opened(tiny_model())
    direction = random_direction(LAYERS, method=method, seed=1, bias=0.3)
    opposite = replace(direction, vectors=-direction.vectors, bias=-direction.bias)
    one = engine.generate(ask(PROMPT, steering=steer(direction, -1.5), max_new_tokens=8)).result()
    other = engine.generate(ask(PROMPT, steering=steer(opposite, 1.5), max_new_tokens=8)).result()
    assert one.text == other.text
    assert one.steering.magnitude == pytest.approx([-m for m in other.steering.magnitude])
    assert any(one.steering.magnitude)


def test_several_values_in_one_row_are_each_calibrated_as_if_alone_and_added_up(opened):
    model = tiny_model()
    weights = (0.7, -0.4)
    parts = [steer(random_direction([1], seed=1), 1.5), steer(random_direction([1], seed=2))]
    with block_outputs(model) as before:
        engine = opened(model)
        with block_outputs(model) as after:
            report = engine.generate(ask(PROMPT, steering=mix(parts, weights), max_new_tokens=1)).result().steering
    alone = [
        engine.generate(ask(PROMPT, steering=steer(s.direction, math.copysign(s.strength, w)), max_new_tokens=1)).result().steering.magnitude[0]
        for s, w in zip(parts, weights, strict=True)
    ]
    assert [r.magnitude[0] for r in (report, *report.others)] == pytest.approx([abs(w) * m for w, m in zip(weights, alone, strict=True)])
    moved = sum(abs(w) * m * s.direction.vectors[0] for w, m, s in zip(weights, alone, parts, strict=True))
    assert np.allclose((after[1][-1] - before[1][-1]).numpy(), np.broadcast_to(moved, after[1][-1].shape), atol=1e-4)
    for part, its_report in zip(parts, (report, *report.others), strict=True):
        assert its_report.after[0] == pytest.approx(probability(part.direction, 1, after[1][-1][0, -1]), abs=1e-4)


def test_the_order_of_several_values_does_not_matter_and_weight_zero_is_absence(opened):
    engine = opened(tiny_model())
    a, b, c = (steer(random_direction(layers, seed=n), 0.5) for n, layers in enumerate([(1, 2), (2, 3), (0, 4)]))

    def text(steering):
        return engine.generate(ask(PROMPT, steering=steering, max_new_tokens=8)).result().text

    assert text(mix([a, b, c], [1, 2, 1])) == text(mix([c, a, b], [1, 1, 2])) != text(mix([a, b, c], [1, 1, 2]))
    assert text(mix([a, c], [1, 0])) == text(a)
    assert text(mix([mix([a, b], [1, 2]), c], [2, 1])) == text(mix([a, b, c], [2, 4, 1]))


@pytest.mark.parametrize(("parts", "weights"), [([], []), ([STEERED], [1, 2])])
def test_a_mixture_without_one_weight_for_each_value_is_refused(parts, weights):
    with pytest.raises(InputError, match="one weight for each"):
        mix(parts, weights)


# Half precision


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_taken_in_bfloat16_and_steered(name, opened):
    engine = opened(tiny_model(name).to(torch.bfloat16))
    assert engine.generate(ask(PROMPT, steering=STEERED, max_new_tokens=2)).result(60).steering.after[0] >= 0.88


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_embedded_model_is_taken_in_half_precision(dtype):
    engine = HuggingFaceEngine.load(str(embedded_folder()), dtype=dtype)
    try:
        assert engine.generate(ask(PROMPT, max_new_tokens=4)).result(60).dtype == dtype
    finally:
        engine.close()


def test_a_prompt_without_tokens_is_refused(opened):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "A": 2}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    engine = opened(tiny_model(), PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"))
    with pytest.raises(InputError, match="no tokens"):
        engine.generate(ask(" ")).result(30)
    with pytest.raises(InputError, match="no tokens"):
        engine.score(ScoreRequest([{"role": "user", "content": " "}], ("A",))).result(30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_eps_is_solved_in_float32_from_the_state_as_it_is(dtype, opened):
    model = tiny_model().to(dtype)
    direction = random_direction([2], seed=1, bias=-10)
    with block_outputs(model) as before:
        engine = opened(model)
        generation = engine.generate(ask(PROMPT, steering=steer(direction), max_new_tokens=4)).result()
    state = before[2][-4][0, -1].double().numpy()
    w = direction.vectors[0].astype(np.float64)
    assert before[2][-4].dtype == dtype
    assert generation.steering.magnitude == pytest.approx(((math.log(9) + 10 - w @ state) / (w @ w),), rel=1e-5)
    assert generation.dtype == str(dtype).removeprefix("torch.") == engine.describe()["dtype"]
    assert (generation.batch_rows, generation.batch_width) == (1, generation.prompt_tokens)


# No steering, no trace


def recorded_logits(model, run):
    """The last position's logits [rows, vocabulary] of each forward pass while `run` runs."""
    seen = []
    handle = model.register_forward_hook(lambda _m, _i, output: seen.append(output.logits[:, -1].clone()))
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_plan_and_strength_zero_leave_the_logits_bit_equal_before_and_after_a_steered_batch(architecture, opened):
    ids = ids_of(PROMPT)
    plain = tiny_model(architecture).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=True,  # MPT's own default is none
        max_new_tokens=5,
        eos_token_id=258,
        pad_token_id=256,
        output_logits=True,
        return_dict_in_generate=True,
    )
    model = tiny_model(architecture)
    engine = opened(model, packed_bytes=0)  # products with packed weights round otherwise
    unsteered = ask(PROMPT, max_new_tokens=5)

    def logits_of(request):
        return recorded_logits(model, lambda: engine.generate(request).result())

    def same(logits):
        return len(logits) == len(plain.logits) and all(torch.equal(one, other) for one, other in zip(logits, plain.logits, strict=True))

    assert same(logits_of(unsteered))
    for method in ("probe", "mean_difference", "pca"):
        assert same(logits_of(ask(PROMPT, steering=steer(random_direction(LAYERS, method=method), strength=0.0), max_new_tokens=5)))
    assert not same(logits_of(ask(PROMPT, steering=steer(random_direction(LAYERS, method="pca")), max_new_tokens=5)))
    together(engine, *company())
    assert same(logits_of(unsteered))


@pytest.mark.parametrize("architecture", KINDS)
def test_with_packed_weights_too_a_steered_batch_leaves_unsteered_logits_bit_equal(architecture, opened):
    model = tiny_model(architecture)
    engine = opened(model)

    def unsteered():
        return recorded_logits(model, lambda: engine.generate(ask(PROMPT, max_new_tokens=5)).result())

    before = unsteered()
    together(engine, *company())
    assert all(map(torch.equal, before, unsteered()))


def test_closing_leaves_the_model_as_it_was_found(opened):
    model = tiny_model()
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=258)
    before = model.generation_config.to_dict()
    with torch.inference_mode():
        logits = model(ids_of(PROMPT)).logits
    engine = opened(model)
    together(engine, *company())
    engine.close()
    hooks = [hook for block in find_blocks(model) for hook in block._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("vispa_graph")]  # transformers leaves some of its own
    assert model.generation_config.to_dict() == before
    with torch.inference_mode():
        assert torch.equal(model(ids_of(PROMPT)).logits, logits)


@pytest.mark.parametrize(("architecture", "method"), [*product(("llama", "bloom"), ("mean_difference", "pca")), ("gpt_neox", "pca")])
def test_a_fixed_magnitude_adds_exactly_its_multiple_of_the_vector_at_exactly_the_chosen_blocks(architecture, method, opened):
    layers, alpha, strength = (1, 3), 0.5, 1.5
    direction = random_direction(layers, method=method, alpha=alpha, seed=4)
    model = tiny_model(architecture)
    with block_outputs(model) as before:
        engine = opened(model)
        with block_outputs(model) as after:
            engine.generate(ask(PROMPT, max_new_tokens=1)).result()
            unsteered = [outputs[-1] for outputs in after]
            report = engine.generate(ask(PROMPT, steering=steer(direction, strength), max_new_tokens=1)).result().steering
    assert report.magnitude == pytest.approx((alpha * strength,) * 2)
    for layer in range(DEPTH):
        was, now = before[layer][-1], after[layer][-1]
        if layer in layers:
            delta = torch.from_numpy(np.float32(alpha * strength) * direction.vectors[layers.index(layer)])
            assert torch.equal(now, was + delta)
        else:
            assert torch.equal(now, was)
        assert torch.equal(now, unsteered[layer]) == (layer < layers[0])


# The batch does not matter

PROMPTS = ("Why?", PROMPT, "x" * 90, "Is it right to lie to a friend, and if so, when? Ärzte fragen.")
STEERINGS = (
    None,
    steer(random_direction(LAYERS, seed=1)),
    steer(random_direction([0, 4], seed=2), strength=0.5, target=0.99),
    steer(random_direction([2], method="mean_difference", alpha=0.7, seed=3)),
    steer(random_direction(range(DEPTH), method="pca", seed=4), strength=2.0),
)
choices = st.tuples(
    st.sampled_from(range(len(PROMPTS))),
    st.sampled_from(range(len(STEERINGS))),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    st.integers(0, 3),
)


@pytest.fixture(scope="module")
def alone(engines):
    """What a request gets by itself; each is run once."""

    @cache
    def run(architecture, choice):
        return engines[architecture].generate(request_of(choice)).result()

    return run


def request_of(choice, **options):
    prompt, steering, new_tokens, temperature, seed = choice
    return ask(PROMPTS[prompt], steering=STEERINGS[steering], max_new_tokens=new_tokens, temperature=temperature, seed=seed, **options)


@pytest.mark.parametrize("architecture", KINDS)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(batch=st.lists(choices, min_size=2, max_size=5))
def test_a_rows_text_is_the_same_alone_and_in_any_batch(architecture, batch, engines, alone):
    results = together(engines[architecture], *map(request_of, batch))
    for choice, result in zip(batch, results, strict=True):
        by_itself = alone(architecture, choice)
        assert result.batch_rows == len(batch)
        assert (result.text, result.completion_tokens, result.finish) == (by_itself.text, by_itself.completion_tokens, by_itself.finish)
        assert result.prompt_tokens == by_itself.prompt_tokens
        assert (result.steering is None) == (STEERINGS[choice[1]] is None)
        if result.steering:
            assert result.steering.magnitude == pytest.approx(by_itself.steering.magnitude, rel=1e-4, abs=1e-5)
            assert result.steering.displacement == pytest.approx(by_itself.steering.displacement, rel=1e-3)


def test_a_small_capacity_splits_the_batch_and_changes_no_text(opened, engines):
    requests = [ask(prompt, steering=steering, max_new_tokens=6) for prompt, steering in product(PROMPTS[:2], STEERINGS)]
    small = opened(tiny_model(), capacity=100)
    split = together(small, *requests)
    assert [r.text for r in split] == [r.text for r in together(engines["llama"], *requests)]
    widest = max(r.prompt_tokens for r in split) + 6
    assert 1 < max(r.batch_rows for r in split) < len(requests)
    assert all(r.batch_rows == 1 or r.batch_rows * (r.prompt_tokens + 6) <= 100 for r in split)
    assert widest * len(requests) > 100


def test_a_row_that_is_done_does_not_run_past_the_positions_that_the_model_has(opened):
    model = tiny_model("gpt2", n_positions=64)
    engine = opened(model)
    requests = [ask("y" * 50, max_new_tokens=4), ask("bcdf", max_new_tokens=55)]
    expected = [engine.generate(request).result() for request in requests]
    assert [r.completion_tokens for r in expected] == [4, 55]  # together they would need 52 + 55 positions
    results = []
    prompts = prompts_seen(model, lambda: results.extend(together(engine, *requests)))
    assert [r.text for r in results] == [r.text for r in expected]
    assert sorted(map(len, prompts)) == [4, 6, 52]  # each once, beside the text that holds the worker: nothing failed and was run again


@pytest.mark.parametrize("architecture", KINDS)
def test_each_row_has_its_own_limit_of_new_tokens(architecture, opened):
    model = silent_end(tiny_model(architecture))
    limits = [1, 7, 3, 12]
    results = together(opened(model), *(ask(PROMPT, max_new_tokens=limit) for limit in limits))
    assert [r.completion_tokens for r in results] == limits
    assert {r.finish for r in results} == {"length"}
    longest = results[-1].text
    assert all(longest.startswith(r.text.rstrip("\N{REPLACEMENT CHARACTER}")) for r in results)


def test_a_magnitude_that_overflows_fails_only_its_own_request(opened):
    engine = opened(tiny_model())
    healthy = ask(PROMPT, max_new_tokens=6)
    expected = engine.generate(healthy).result().text
    with worker_held(engine):
        first = engine.generate(healthy)
        huge = engine.generate(ask("Why?", max_new_tokens=6, steering=steer(random_direction([1], method="pca"), strength=1e39)))
        last = engine.generate(healthy)
    assert first.result(60).text == last.result(60).text == expected
    with pytest.raises(NonFiniteError, match="layer 1"):
        huge.result(60)


def test_a_listener_that_raises_fails_only_its_own_request_and_nobody_hears_a_piece_twice(opened):
    engine = opened(reciting_model("maybe so"))
    pieces = []

    def fails(piece):
        if piece == "y":
            raise ValueError("a listener that breaks its promise")

    with worker_held(engine):
        healthy = engine.generate(ask(PROMPT, max_new_tokens=20, on_token=pieces.append))
        broken = engine.generate(ask("Why?", max_new_tokens=20, on_token=fails))
    assert healthy.result(60).text == "".join(pieces) == "maybe so"
    with pytest.raises(BatchError) as raised:
        broken.result(60)
    assert isinstance(raised.value.__cause__, ValueError)
    assert "promise" not in str(raised.value)


def test_a_listener_that_raises_does_not_make_its_neighbours_run_again(opened):
    model = reciting_model("maybe so")
    engine = opened(model)

    def run():
        with worker_held(engine):
            futures = [engine.generate(ask(PROMPT, max_new_tokens=20)), engine.generate(ask(PROMPT, max_new_tokens=20, on_token=lambda _: 1 / 0))]
        assert isinstance(futures[1].exception(60), BatchError)
        assert futures[0].result(60).batch_rows == 2

    assert len(recorded_logits(model, run)) == 1 + len("maybe so") + 1  # the one that holds the worker, and one for each token with the end


def test_a_batch_ends_with_its_last_row_even_if_the_others_would_never_stop(opened):
    model = reciting_model("oka")
    embeddings = model.model.embed_tokens.weight.detach().numpy()
    insisting = Direction("value", "pca", (1,), 1e3 * embeddings[byte_tokenizer()("o")["input_ids"]], np.zeros(1, np.float32), 1.0, np.ones(1))
    engine = opened(model)
    results = []
    requests = [ask(PROMPT, max_new_tokens=40), ask(PROMPT, steering=steer(insisting), max_new_tokens=2)]

    def run():
        results.extend(together(engine, *requests))
        engine.close()  # waits for the batch: a row's result comes when that row is done

    passes = recorded_logits(model, run)
    assert [(r.text, r.finish) for r in results] == [("oka", "stop"), ("kk", "length")]
    assert len(passes) == 1 + len("oka") + 1  # the one that holds the worker, and one for each token with the end


def test_a_letter_that_cannot_be_scored_fails_only_its_own_request(opened):
    engine = opened(tiny_model())
    with worker_held(engine):
        futures = [engine.score(ScoreRequest(user(PROMPT), letters)) for letters in (("A", "B"), ("AB", "C"), ("A", "B"))]
    assert futures[0].result(60).probabilities == pytest.approx(futures[2].result(60).probabilities, abs=1e-5)
    with pytest.raises(UnsteerableModelError, match="single token"):
        futures[1].result(60)


# What goes wrong in a batch


def silent_end(model):
    """The model with a bias against its end token, so that only limits end a text."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY)) if head.bias is None else head.bias
    head.bias.data[258] = -1e4
    return model


@contextmanager
def failing_forward(model, fails):
    """The model's forward pass raises what `fails(rows, step)` gives, if anything; steps are counted over all passes."""
    steps = count()

    def look(_module, _args, given):
        error = fails(given["input_ids"].shape[0], next(steps))
        if error:
            raise error

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_a_batch_that_crashes_in_the_middle_is_run_again_one_by_one_and_the_engine_goes_on(opened):
    model = tiny_model()
    engine = opened(model)
    requests = [request_of((n, n, 6, 0.0, 0)) for n in range(4)]
    expected = [engine.generate(request).result().text for request in requests]
    with failing_forward(model, lambda rows, step: RuntimeError("boom") if rows > 1 and step == 4 else None):
        assert [r.text for r in together(engine, *requests)] == expected
    with failing_forward(model, lambda rows, step: RuntimeError("boom") if step > 2 else None):
        crashed = [engine.generate(request) for request in requests]
        for future in crashed:
            assert isinstance(future.exception(60), BatchError)
            assert str(future.exception().__cause__) == "boom"
            assert "boom" not in str(future.exception())
    assert engine.generate(requests[0]).result().text == expected[0]


def test_a_crash_while_one_request_runs_leaves_those_behind_it_unharmed(opened):
    model = tiny_model()
    engine = opened(model)
    expected = engine.score(ScoreRequest(user(PROMPT), ("A", "B"))).result()
    with failing_forward(model, lambda rows, step: SystemExit(1) if step == 3 else None):
        with worker_held(engine):
            crashed = engine.generate(ask(PROMPT, max_new_tokens=6))
            behind = engine.score(ScoreRequest(user(PROMPT), ("A", "B")))
        assert behind.result(60) == expected
    assert isinstance(crashed.exception(60), BatchError)


@pytest.mark.parametrize("fits", [1, 2, 3])
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("[...] DefaultCPUAllocator: can't allocate memory")])
def test_a_batch_for_which_memory_runs_out_is_halved_until_it_fits_and_says_so(fits, when, error, opened, caplog):
    model = tiny_model()
    engine = opened(model)
    requests = [request_of((n % 4, n % 5, 7, float(n % 2), n)) for n in range(7)]
    expected = [engine.generate(request).result() for request in requests]
    with failing_forward(model, lambda rows, step: error if rows > fits and step > when else None):
        results = together(engine, *requests)
    assert [r.text for r in results] == [r.text for r in expected]
    assert all(r.batch_rows <= fits or r.completion_tokens <= when for r in results)
    assert max(r.halved for r in results) == {1: 3, 2: 2, 3: 2}[fits]
    assert all(r.halved == 0 for r in expected)
    assert "did not fit into memory" in caplog.text
    assert PROMPTS[0] not in caplog.text


def test_scores_for_which_memory_runs_out_tell_how_often_their_batch_was_halved(opened):
    model = tiny_model()
    engine = opened(model)
    requests = [ScoreRequest(user(text), ("A", "B")) for text in PROMPTS]
    expected = [engine.score(request).result() for request in requests]
    with failing_forward(model, lambda rows, step: torch.OutOfMemoryError("CUDA") if rows > 1 else None):
        with worker_held(engine):
            futures = [engine.score(request) for request in requests]
        scores = [future.result(60) for future in futures]
    assert [s.halved for s in expected] == [0] * len(PROMPTS)
    assert min(s.halved for s in scores) >= 1
    for score, alone in zip(scores, expected, strict=True):
        assert score.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


@pytest.mark.parametrize("kind", ["generate", "score"])
def test_a_request_that_does_not_fit_into_memory_by_itself_fails_alone(kind, opened):
    model = tiny_model()
    engine = opened(model)
    texts = ["x" * 40, "x" * 20, "x" * 30]

    def queue(text):
        return engine.generate(ask(text, max_new_tokens=2)) if kind == "generate" else engine.score(ScoreRequest(user(text), ("A", "B")))

    def fails(_module, _args, given):
        if given["input_ids"].shape[1] > 35:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(fails, with_kwargs=True)
    try:
        with worker_held(engine):
            futures = [queue(text) for text in texts]
        with pytest.raises(EngineMemoryError, match=r"4\d tokens does not fit"):
            futures[0].result(60)
        assert all(future.result(60) for future in futures[1:])
    finally:
        handle.remove()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("MPS backend out of memory"), RuntimeError("boom")])
def test_a_batch_that_fails_with_nobody_left_to_answer_is_not_run_again(error, opened):
    model = tiny_model()
    engine = opened(model)
    expected = engine.generate(ask(PROMPT, max_new_tokens=3)).result().text
    futures, passes = [], []

    def fails(rows, step):
        if rows > 1:
            passes.append(step)
            for future in futures:
                future.cancel()
            return error
        return None

    with failing_forward(model, fails):
        with worker_held(engine):
            futures.extend(engine.generate(ask(PROMPT, max_new_tokens=3)) for _ in range(3))
        assert engine.generate(ask(PROMPT, max_new_tokens=3)).result(60).text == expected
    assert len(passes) == 1
    assert all(future.cancelled() for future in futures)


def test_memory_that_runs_out_on_mps_is_told_by_its_words(opened):
    model = tiny_model()
    engine = opened(model)
    with (
        failing_forward(model, lambda rows, step: RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")),
        pytest.raises(EngineMemoryError),
    ):
        engine.generate(ask(PROMPT, max_new_tokens=2)).result(60)


def test_a_text_that_becomes_another_when_its_batch_is_run_again_fails_if_it_was_streamed(opened):
    model = reciting_model("maybe so")
    engine = opened(model, packed_bytes=0)  # whose copies would not change with the weights
    pieces = []

    def fails(rows, step):
        if rows > 1 and step == 4:
            model.lm_head.weight.data.zero_()
            return RuntimeError("boom")
        return None

    with failing_forward(model, fails):
        with worker_held(engine):
            streamed = engine.generate(ask(PROMPT, max_new_tokens=5, on_token=pieces.append))
            whole = engine.generate(ask(PROMPT, max_new_tokens=5))
        with pytest.raises(BatchError, match="another than the one streamed"):
            streamed.result(60)
        whole.result(60)
    assert "".join(pieces) in ("may", "mayb")
    assert whole.result(60).text == "!!!!!"


def test_deadlines_hold_for_requests_of_a_batch_that_wait_for_a_part_of_it(opened):
    model = silent_end(tiny_model())
    engine = opened(model)

    def run():
        with worker_held(engine):
            ahead = engine.generate(ask(PROMPT, max_new_tokens=CONTEXT - 100))
            late = engine.generate(ask("x" * 200, max_new_tokens=8, timeout=0.3))  # too long to share the context with the first
            cancelled = engine.generate(ask("x" * 200, max_new_tokens=8))
        cancelled.cancel()
        with pytest.raises(DeadlineError):
            late.result(60)
        assert not ahead.done()
        ahead.cancel()
        engine.generate(ask("Why?", max_new_tokens=1)).result(60)

    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.005))
    try:
        assert max(map(len, prompts_seen(model, run))) < 200  # neither was run
    finally:
        handle.remove()


def test_readings_for_which_memory_runs_out_are_halved_too(opened):
    model = tiny_model()
    engine = opened(model)
    expected = engine.read(TEXTS)
    with failing_forward(model, lambda rows, step: torch.OutOfMemoryError("CUDA") if rows > 5 else None):
        assert np.allclose(engine.read(TEXTS), expected, rtol=1e-3, atol=1e-4)


def test_a_cancelled_request_stops_taking_steps_and_its_neighbour_gets_its_own_text(opened):
    model = silent_end(tiny_model())
    engine = opened(model)
    other = ask(PROMPT, max_new_tokens=12)
    expected = engine.generate(other).result().text
    begun, heard, futures = threading.Event(), [], []

    def listen(piece):
        heard.append(piece)
        begun.set()
        if len(heard) == 3:
            futures[0].cancel()

    with worker_held(engine):
        futures.append(engine.generate(ask("Why?", max_new_tokens=400, on_token=listen)))
        futures.append(engine.generate(other))
    assert futures[1].result(60).text == expected
    assert futures[0].cancelled()
    assert len(heard) == 3
    passes = recorded_logits(model, lambda: engine.generate(ask(PROMPT, max_new_tokens=1)).result(60))
    assert len(passes) == 1  # the cancelled text is not being written on


def test_a_cancelled_request_that_waits_is_never_run(opened):
    model = tiny_model()
    engine = opened(model)

    def run():
        with worker_held(engine):
            waiting = engine.generate(ask("a" * 77, max_new_tokens=2))
            assert waiting.cancel()
        engine.generate(ask("b", max_new_tokens=2)).result(60)

    assert 79 not in map(len, prompts_seen(model, run))


def test_a_request_whose_time_is_up_while_it_runs_fails_and_its_neighbour_is_answered(opened):
    model = silent_end(tiny_model())
    engine = opened(model)
    other = ask(PROMPT, max_new_tokens=10)
    expected = engine.generate(other).result().text
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        with worker_held(engine):
            late = engine.generate(ask("Why?", max_new_tokens=400, timeout=0.1))
            patient = engine.generate(other)
        assert patient.result(60).text == expected
        with pytest.raises(DeadlineError, match=r"0\.1 s"):
            late.result(60)
    finally:
        handle.remove()


def test_a_request_whose_time_is_up_while_it_waits_fails_before_the_batch_ahead_of_it_is_done(opened):
    model = silent_end(tiny_model())
    engine = opened(model, timeout=0.05)
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    try:
        ahead = engine.generate(ask(PROMPT, max_new_tokens=200, timeout=60))
        late = engine.score(ScoreRequest(user(PROMPT), ("A", "B")))  # the engine's own timeout
        with pytest.raises(DeadlineError):
            late.result(60)
        assert not ahead.done()
        ahead.cancel()
    finally:
        handle.remove()


def test_a_full_queue_refuses_through_the_future(opened):
    engine = opened(tiny_model(), queue_size=2)
    with worker_held(engine):
        futures = [engine.generate(ask(PROMPT, max_new_tokens=2)) for _ in range(4)]
        for future in futures[2:]:
            with pytest.raises(EngineBusyError, match="busy"):
                future.result(0)
    assert all(future.result(60).text for future in futures[:2])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ask(PROMPT, max_new_tokens=0), "at least 1"),
        (ask(PROMPT, temperature=-1.0), "temperature"),
        (ask(PROMPT, temperature=math.nan), "temperature"),
        (ask(PROMPT, seed=-1), "seed"),
        (ask(PROMPT, seed=2**63), "seed"),
        (ask(PROMPT, steering=steer(random_direction(LAYERS), math.nan)), "finite"),
        (ask(PROMPT, steering=steer(random_direction(LAYERS), target=1.0)), "between 0 and 1"),
        (ScoreRequest([{"role": "user", "content": PROMPT}], ()), "1 to 26"),
        (ScoreRequest([{"role": "user", "content": PROMPT}], ("A", "B", "A")), "two options"),
        (GenerationRequest([{"role": "user"}]), "cannot be put into a prompt"),
    ],
)
def test_a_request_that_makes_no_sense_fails_its_future_and_raises_nothing_itself(request_, reason, engines):
    engine = engines["llama"]
    future = engine.generate(request_) if isinstance(request_, GenerationRequest) else engine.score(request_)
    with pytest.raises(InputError, match=reason):
        future.result(0)


def test_closing_from_a_callback_lets_the_running_batch_finish_steered(opened):
    engine = opened(silent_end(tiny_model()))
    request = ask(PROMPT, steering=STEERED, max_new_tokens=12)
    expected = engine.generate(request).result().text
    with worker_held(engine):
        short = engine.generate(ask("Why?", max_new_tokens=1))
        long = engine.generate(request)
        short.add_done_callback(lambda _: engine.close())
    assert long.result(60).text == expected
    assert isinstance(engine.generate(request).exception(0), EngineClosedError)


# Sampling and streaming


def test_the_time_to_the_first_token_counts_from_the_moment_a_request_is_handed_over(opened):
    model = silent_end(tiny_model())
    engine = opened(model)
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        begun = time.monotonic()
        with worker_held(engine):
            future = engine.generate(ask(PROMPT, max_new_tokens=5))
            time.sleep(0.1)
        first = future.result(60).first_token_seconds
        assert 0.12 <= first <= time.monotonic() - begun - 4 * 0.02
    finally:
        handle.remove()


def test_sampling_repeats_with_its_seed_and_changes_with_another(engines):
    def sample(seed):
        return engines["llama"].generate(ask(PROMPT, max_new_tokens=12, temperature=2.0, seed=seed)).result().text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_sampling_draws_from_the_softmax_at_its_temperature(opened):
    model = tiny_model(tie_word_embeddings=False)
    engine = opened(model)
    temperature, draws = 0.5, 400
    with torch.no_grad():  # a model that can only say a, b or c, whatever its blocks do
        head = model.lm_head
        head.bias = torch.nn.Parameter(torch.full((VOCABULARY,), -1e4))
        head.weight.zero_()
        wanted = byte_tokenizer()("abc")["input_ids"]
        head.bias[wanted] = torch.tensor([0.0, 1.0, 2.0])
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0]) / temperature, 0).numpy()
    results = together(engine, *(ask("Why?", max_new_tokens=1, temperature=temperature, seed=seed) for seed in range(draws)))
    shares = np.array([sum(r.text == letter for r in results) / draws for letter in "abc"])
    assert shares.sum() == 1
    assert np.abs(shares - expected).max() < 4 * math.sqrt(0.25 / draws)


@pytest.mark.parametrize("architecture", KINDS)
@settings(deadline=None, max_examples=6, derandomize=True)
@given(batch=st.lists(choices, min_size=1, max_size=3))
def test_streamed_pieces_joined_are_the_text(architecture, batch, engines):
    pieces = [[] for _ in batch]
    requests = [request_of(choice, on_token=heard.append) for choice, heard in zip(batch, pieces, strict=True)]
    for heard, result in zip(pieces, together(engines[architecture], *requests), strict=True):
        assert "".join(heard) == result.text
        assert all(heard)


def test_a_character_of_several_tokens_is_streamed_whole(opened):
    text, pieces = "é€😀 ok", []
    result = opened(reciting_model(text)).generate(ask("Say it.", max_new_tokens=40, on_token=pieces.append)).result()
    assert (result.text, result.finish, result.completion_tokens) == (text, "stop", len(text.encode()))
    assert pieces == list(text)


def test_a_character_cut_by_the_limit_is_still_streamed_as_the_text_has_it(opened):
    pieces = []
    result = opened(reciting_model("é€😀 ok")).generate(ask("Say it.", max_new_tokens=4, on_token=pieces.append)).result()
    assert (result.text, result.finish) == ("é\N{REPLACEMENT CHARACTER}", "length")
    assert "".join(pieces) == result.text


def test_a_tokenizer_that_would_tidy_spaces_away_afterwards_does_not(opened):
    tokenizer, pieces = byte_tokenizer(), []
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    result = opened(reciting_model("so ,it"), tokenizer).generate(ask("Say it.", max_new_tokens=20, on_token=pieces.append)).result()
    assert result.text == "so ,it"
    assert "".join(pieces) == result.text


# Prompts


def prompts_seen(model, run):
    """The ids of every prompt that the model is given while `run` runs, without padding."""
    seen = []

    def look(_module, _args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            mask = kwargs.get("attention_mask")  # left out where nothing is padded
            rows = kwargs["input_ids"]
            seen.extend(row[keep.bool()].tolist() for row, keep in zip(rows, torch.ones_like(rows) if mask is None else mask, strict=True))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen


CONVERSATION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]


def test_a_chat_template_is_used_where_there_is_one_with_the_assistants_header_and_one_beginning(opened):
    model = tiny_model()
    engine = opened(model, byte_tokenizer(chat=True))
    (ids,) = prompts_seen(model, lambda: engine.generate(GenerationRequest(CONVERSATION, max_new_tokens=1)).result())
    assert byte_tokenizer().decode(ids) == "<bos>[system]Be kind.\n[user]Why?\n[assistant]"


def test_without_a_chat_template_turns_are_set_apart_by_blank_lines(opened):
    model = tiny_model()
    engine = opened(model)
    (ids,) = prompts_seen(model, lambda: engine.generate(GenerationRequest(CONVERSATION, max_new_tokens=1)).result())
    assert byte_tokenizer().decode(ids) == "Be kind.\n\nWhy?\n\n"


@pytest.mark.parametrize(("architecture", "limit"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions"), ("mpt", "max_seq_len")])
def test_a_prompt_too_long_loses_its_middle_and_says_how_much(architecture, limit, opened):
    model = tiny_model(architecture, **{limit: 128})
    engine = opened(model)
    text = "".join(chr(ord("a") + i % 26) for i in range(300))
    results = []
    (ids,) = prompts_seen(model, lambda: results.append(engine.generate(ask(text, max_new_tokens=20)).result()))
    whole = byte_tokenizer()(text + "\n\n")["input_ids"]
    (result,) = results
    assert result.cut_tokens == len(whole) - 108
    assert result.prompt_tokens == len(ids) == 108
    assert ids == whole[:54] + whole[-54:]
    score = engine.score(ScoreRequest(user(text), ("A", "B"))).result()
    assert score.cut_tokens == len(whole) - 127


def test_a_prompt_that_we_cut_is_no_matter_for_a_warning_of_the_model_library(opened, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 64
    assert opened(tiny_model(), tokenizer).generate(ask("x" * 300, max_new_tokens=4)).result().cut_tokens > 200
    assert "Token indices" not in caplog.text
    tokenizer("x" * 300)
    assert "Token indices" in caplog.text


def test_a_prompt_that_fits_loses_nothing(engines):
    result = engines["llama"].generate(ask("x" * (CONTEXT - 2 - 8), max_new_tokens=8)).result()
    assert (result.cut_tokens, result.prompt_tokens) == (0, CONTEXT - 8)


def test_more_new_tokens_than_the_context_has_room_for_are_refused(engines):
    with pytest.raises(ContextLengthError, match=f"{CONTEXT} tokens"):
        engines["llama"].generate(ask("x" * 100, max_new_tokens=CONTEXT - 20)).result()


def test_reading_long_texts_meanwhile_does_not_cut_another_threads_prompt(engines):
    engine, done, lengths = engines["llama"], threading.Event(), set()

    def read():
        while not done.is_set():
            engine._raw_tokens("a" * 3000)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        lengths = {len(engine._chat_tokens(user("b" * 400))) for _ in range(1500)}
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert lengths == {402}


def test_the_models_own_generation_settings_do_not_decide(opened):
    own = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 30, "max_new_tokens": 40}
    spoiled = tiny_model()
    spoiled.generation_config = transformers.GenerationConfig(**own, eos_token_id=258, pad_token_id=256)
    engine = opened(spoiled)
    for steering in (None, STEERINGS[1]):
        reference = Reference("llama", steering)
        if steering:
            reference.calibrate(ids_of(PROMPT))
        text = reference.text(ids_of(PROMPT), 12)
        for _ in range(2):
            assert engine.generate(ask(PROMPT, steering=steering, max_new_tokens=12)).result().text == text


def test_a_text_ends_at_any_of_the_end_tokens_that_the_model_came_with(opened):
    model = reciting_model("to be", then_stop=False)
    model.generation_config.eos_token_id = [258, *byte_tokenizer()("b")["input_ids"]]
    result = opened(model).generate(ask("Say it.", max_new_tokens=20)).result()
    assert (result.text, result.finish, result.completion_tokens) == ("to ", "stop", 3)


# Scores


def plain_scores(logits, letters, spellings):
    """Letter shares and their mass, from a softmax over the whole vocabulary."""
    probabilities = np.exp(logits.double().numpy() - logits.max().item())
    probabilities /= probabilities.sum()
    vocabulary = byte_tokenizer().get_vocab()
    masses = np.array([sum(probabilities[vocabulary[s + letter]] for s in spellings) for letter in letters])
    return masses / masses.sum(), masses.sum()


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("steering", [None, STEERINGS[1]], ids=["unsteered", "steered"])
def test_option_scores_are_the_next_tokens_softmax_over_both_spellings_of_each_letter(architecture, steering, engines):
    reference = Reference(architecture, steering)
    if steering:
        reference.calibrate(ids_of(PROMPT))
    logits, _ = reference.forward(ids_of(PROMPT))
    letters = tuple("ABCDE")
    expected, mass = plain_scores(logits, letters, ("", "Ġ"))
    request = ScoreRequest(user(PROMPT), letters, steering)
    others = [ScoreRequest(user(prompt), ("A", "B"), STEERINGS[2]) for prompt in PROMPTS]
    for scores in (engines[architecture].score(request).result(), together(engines[architecture], *others, request)[-1]):
        assert sum(scores.probabilities) == pytest.approx(1)
        assert scores.probabilities == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert scores.mass == pytest.approx(mass, rel=1e-3)
        assert scores.cut_tokens == 0
        assert scores.prompt_tokens > 0


def test_a_tokenizer_with_one_spelling_of_a_letter_is_scored_on_that_one(opened):
    logits, _ = Reference("llama", None).forward(ids_of(PROMPT))
    expected, mass = plain_scores(logits, ("A", "B"), ("",))
    scores = opened(tiny_model(), byte_tokenizer(spaced_letters=False)).score(ScoreRequest(user(PROMPT), ("A", "B"))).result()
    assert scores.probabilities == pytest.approx(expected, rel=1e-4)
    assert scores.mass == pytest.approx(mass, rel=1e-4)
    assert mass != pytest.approx(plain_scores(logits, ("A", "B"), ("", "Ġ"))[1], rel=1e-3)


@pytest.mark.parametrize(
    ("blank", "decoder", "also"), [("Ġ", decoders.ByteLevel(), ["ĊA", "ĠĠA"]), ("▁", decoders.Metaspace(), ["▁▁A"])], ids=["byte level", "metaspace"]
)
def test_every_token_that_reads_as_the_letter_is_a_spelling_of_it_and_no_other(opened, blank, decoder, also):
    spellings, others = ["A", f"{blank}A", *also], ["B", f"{blank}B", "AB", f"{blank}AB", "Á", "a", f"{blank}", "A."]
    vocabulary = {token: number for number, token in enumerate([*spellings, *others, "<pad>", "<eos>"])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.decoder = decoder
    engine = opened(tiny_model(), PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>"))
    assert engine._spellings("A") == [vocabulary[token] for token in spellings]


def test_the_byte_of_a_letter_is_a_spelling_of_it_where_a_vocabulary_falls_back_to_bytes(opened):
    tokens = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "A", "▁A", "B"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "A")], unk_token="<unk>", byte_fallback=True))
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    engine = opened(tiny_model(), PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>"))
    assert engine._spellings("A") == sorted(vocabulary[token] for token in ("<0x41>", "A", "▁A"))
    assert engine._spellings("C") == [vocabulary["<0x43>"]]


def test_the_logits_of_the_whole_vocabulary_come_back_where_they_are_asked_for(engines):
    logits, _ = Reference("llama", None).forward(ids_of(PROMPT))
    plain, full = (engines["llama"].score(ScoreRequest(user(PROMPT), ("A", "B"), full=full)).result() for full in (False, True))
    assert plain.logits is None
    assert full.logits == pytest.approx(logits.numpy(), abs=1e-3)
    assert full.probabilities == pytest.approx(plain.probabilities, rel=1e-5)
    vocabulary = byte_tokenizer().get_vocab()
    assert full.spellings == tuple((vocabulary[letter], vocabulary[f"Ġ{letter}"]) for letter in "AB")


def test_the_order_of_the_letters_is_the_order_of_the_probabilities(engines):
    forward = engines["llama"].score(ScoreRequest(user(PROMPT), ("A", "B", "C"))).result()
    backward = engines["llama"].score(ScoreRequest(user(PROMPT), ("C", "B", "A"))).result()
    assert backward.probabilities == pytest.approx(forward.probabilities[::-1])


def test_letters_without_any_probability_are_an_error_and_not_a_guess(opened):
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    vocabulary = byte_tokenizer().get_vocab()
    model.lm_head.bias.data[[vocabulary[token] for token in ("A", "B", "ĠA", "ĠB")]] = -1e6
    with pytest.raises(NonFiniteError, match="none of the option letters"):
        opened(model).score(ScoreRequest(user(PROMPT), ("A", "B"))).result()


# What cannot be done


def test_weights_that_are_not_finite_are_refused_when_the_engine_is_made():
    model = tiny_model()
    find_blocks(model)[2].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="LlamaForCausalLM"):
        HuggingFaceEngine(model, byte_tokenizer(), name="tiny")


def test_logits_that_are_not_finite_fail_generations_and_scores(opened):
    model = tiny_model(tie_word_embeddings=False)
    engine = opened(model, packed_bytes=0)  # at loading it would be refused
    model.lm_head.weight.data[40, 0] = math.nan
    with pytest.raises(NonFiniteError, match="logits"):
        engine.generate(ask(PROMPT)).result()
    with pytest.raises(NonFiniteError, match="logits"):
        engine.score(ScoreRequest(user(PROMPT), ("A", "B"))).result()


def test_activations_that_are_not_finite_fail_readings(opened):
    model = tiny_model()
    engine = opened(model, packed_bytes=0)
    find_blocks(model)[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="activations"):
        engine.read(["a text"])
    with pytest.raises(NonFiniteError, match="layer 1"):
        engine.generate(ask(PROMPT, steering=steer(random_direction([1])))).result()


@pytest.mark.parametrize("part", ["vectors", "bias", "alpha"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_direction_that_is_not_finite_is_refused_and_fails_no_other_request(part, bad, engines):
    direction = random_direction(LAYERS)
    if part == "alpha":
        direction = replace(direction, alpha=bad)
    else:
        getattr(direction, part)[1] = bad
    with worker_held(engines["llama"]):
        other = engines["llama"].generate(ask(PROMPT, max_new_tokens=2))
        with pytest.raises(NonFiniteError, match="'value'"):
            engines["llama"].generate(ask(PROMPT, steering=steer(direction))).result(1)
        with pytest.raises(NonFiniteError, match="'value'"):
            engines["llama"].score(ScoreRequest(user(PROMPT), ("A", "B"), steer(direction))).result(1)
    assert other.result(60).completion_tokens <= 2


def test_a_direction_at_layers_that_the_model_lacks_is_refused(engines):
    with pytest.raises(LayerError, match=f"Layer 99 .* {DEPTH}"):
        engines["llama"].generate(ask(PROMPT, steering=steer(random_direction([1, 99])))).result()


def test_a_direction_of_another_models_width_is_refused(engines):
    with pytest.raises(UnsteerableModelError, match="fitted on another model"):
        engines["llama"].generate(ask(PROMPT, steering=steer(random_direction([1], width=WIDTH + 1)))).result()


def test_a_closed_engine_refuses_everything_and_can_be_closed_again(opened):
    engine = opened(tiny_model())
    engine.close()
    engine.close()
    for future in (engine.generate(ask(PROMPT)), engine.score(ScoreRequest(user(PROMPT), ("A", "B")))):
        with pytest.raises(EngineClosedError):
            future.result(0)
    with pytest.raises(EngineClosedError):
        engine.read([PROMPT])


# Reading

TEXTS = [
    "A",
    "I told the truth although it cost me.",
    "Would she lie?",
    "z" * 400,
    "Ärzte sollten zuhören.",
    *(f"text number {n}" for n in range(70)),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_read_gives_the_state_after_every_block_at_the_last_token_of_each_text(architecture, opened):
    states = opened(tiny_model(architecture)).read(TEXTS[:6])
    plain = tiny_model(architecture)
    assert states.shape == (6, DEPTH, WIDTH)
    assert states.dtype == np.float32
    for text, state in zip(TEXTS, states, strict=False):
        ids = byte_tokenizer()(text, return_tensors="pt")["input_ids"][:, :256]
        with torch.inference_mode(), block_outputs(plain) as outputs:
            hidden = plain(ids, output_hidden_states=True).hidden_states
        for layer in range(DEPTH - 1):  # behind the last block the model's own hidden state is normed
            assert np.allclose(state[layer], hidden[layer + 1][0, -1].numpy(), rtol=1e-3, atol=1e-4)
        assert np.allclose(state[-1], outputs[-1][0][0, -1].numpy(), rtol=1e-3, atol=1e-4)


TWINS = [
    "I told the truth although it cost me.",
    "I told the truth because it paid.",
    "I told the truth",
    "I told the truth",
    "I hid the truth although it cost me.",
    "I hid the truth because it paid. " * 5,
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_that_begin_alike_are_read_as_if_each_were_alone(architecture, opened):
    engine = opened(tiny_model(architecture))
    alone = np.concatenate([engine.read([text]) for text in TWINS])
    assert np.allclose(engine.read(TWINS), alone, rtol=1e-3, atol=1e-4)


def test_what_two_texts_begin_with_is_read_once(opened):
    engine = opened(tiny_model())
    widths = []
    engine._model.register_forward_pre_hook(lambda _m, _a, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True)
    engine.read(["Would she tell him so?", "Would she tell him lies?"])
    assert widths == [(1, len("Would she tell him ") + len("so?") + len("lies?"))]


def test_a_text_longer_than_the_models_window_is_read_as_if_alone_beside_texts_that_share_a_row(opened):
    engine = opened(tiny_model("mistral", sliding_window=128), linger=0.2)
    texts = ["Would she tell him so?", "Would she tell him lies?", "It was said of old. " * 11]
    alone = np.concatenate([engine.read([text]) for text in texts])
    assert np.allclose(engine.read(texts), alone, rtol=1e-3, atol=1e-4)


def test_texts_share_rows_that_have_no_more_positions_than_the_model(opened):
    engine = opened(tiny_model("gpt2", n_positions=64), byte_tokenizer())
    texts = ["Would she tell him so, whatever the people there may say?", "Would she tell him lies, or say what she knows of it all?", "Yes."]
    alone = np.concatenate([engine.read([text]) for text in texts])
    widths = []
    engine._model.register_forward_pre_hook(lambda _m, _a, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True)
    assert np.allclose(engine.read(texts), alone, rtol=1e-3, atol=1e-4)
    assert max(widths) <= 64


@pytest.mark.parametrize("architecture", ["mistral", "bloom", "jamba"])
def test_where_a_window_positions_or_a_memory_of_the_models_own_forbid_it_each_text_has_its_row(architecture, opened):
    engine = opened(tiny_model(architecture))
    rows = []
    engine._model.register_forward_pre_hook(lambda _m, _a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    engine.read(["Would she tell him so?", "Would she tell him lies?"])
    assert rows == [2]


@settings(deadline=None, max_examples=8, derandomize=True)
@given(order=st.permutations(range(len(TEXTS))))
def test_read_does_not_depend_on_the_order_of_the_texts(order, engines):
    straight = engines["llama"].read(TEXTS)
    assert np.allclose(engines["llama"].read([TEXTS[index] for index in order]), straight[order], rtol=1e-3, atol=1e-4)


def test_read_takes_conversations_at_the_assistants_header(opened):
    engine = opened(tiny_model(), byte_tokenizer(chat=True))
    state = engine.read([CONVERSATION, "raw"])[0]
    ids = byte_tokenizer()("<bos>[system]Be kind.\n[user]Why?\n[assistant]", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        hidden = tiny_model()(ids, output_hidden_states=True).hidden_states
    assert np.allclose(state[2], hidden[3][0, -1].numpy(), rtol=1e-3, atol=1e-4)


def test_read_is_unsteered_while_others_are_steered(engines):
    before = engines["llama"].read(TEXTS[:3])
    with worker_held(engines["llama"]):
        steered = [engines["llama"].generate(ask(PROMPT, steering=STEERINGS[4], max_new_tokens=3)) for _ in range(3)]
        reading = ThreadPoolExecutor(1).submit(engines["llama"].read, TEXTS[:3])
    assert all(future.result(60).steering for future in steered)
    assert np.allclose(reading.result(60), before, rtol=1e-4, atol=1e-5)


def test_read_reports_every_text_once(engines):
    counts = []
    engines["llama"].read(TEXTS, counts.append)
    assert sum(counts) == len(TEXTS)
    assert len(counts) > 1


def test_reading_nothing_gives_nothing(engines):
    assert engines["llama"].read([]).shape == (0, DEPTH, WIDTH)


def test_an_empty_text_cannot_be_read(engines):
    with pytest.raises(InputError, match="empty"):
        engines["llama"].read(["a text", ""])


def test_the_engine_keeps_the_contract(engines):
    engine = engines["llama"]
    assert isinstance(engine, Engine)
    assert (engine.name, engine.depth, engine.width) == ("tiny", DEPTH, WIDTH)
    assert engine.describe()["depth"] == DEPTH
    assert len(engine.fingerprint) == 64


# Loading


@pytest.fixture
def saved(tmp_path):
    """Writes a model and a tokenizer to a folder, as a user would."""

    def save(model, tokenizer=True):
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        if tokenizer:
            byte_tokenizer(chat=True).save_pretrained(folder)
        return folder

    return save


def test_the_fingerprint_is_the_same_for_a_reload_and_different_for_other_weights(saved):
    model = tiny_model()
    folder = saved(model)
    loaded = HuggingFaceEngine.load(str(folder), linger=0.0)
    loaded.close()
    tokenizer = byte_tokenizer(chat=True)
    assert loaded.fingerprint == fingerprint(model, tokenizer) == fingerprint(tiny_model(), tokenizer)
    assert fingerprint(tiny_model(seed=1), tokenizer) != loaded.fingerprint
    with torch.no_grad():
        find_blocks(model)[3].mlp.up_proj.weight.add_(1e-3)
    assert fingerprint(model, tokenizer) != loaded.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_theta": 5e4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"hidden_act": "gelu"},
    ],
)
def test_the_fingerprint_tells_configurations_apart_that_no_weight_shows(changes):
    tokenizer = byte_tokenizer()
    assert fingerprint(tiny_model(**changes), tokenizer) != fingerprint(tiny_model(), tokenizer)


def test_the_fingerprint_knows_a_configuration_neither_by_its_name_nor_by_its_version():
    tokenizer, model = byte_tokenizer(), tiny_model()
    plain = fingerprint(model, tokenizer)
    model.config._name_or_path, model.config.architectures, model.config.transformers_version = "/elsewhere", ["Other"], "1.0"
    model.config.use_cache = False
    assert fingerprint(model, tokenizer) == plain


@pytest.mark.parametrize("kind", ["saved", "derived"])
def test_the_fingerprint_covers_buffers(kind):
    tokenizer, model = byte_tokenizer(), tiny_model()
    model.register_buffer("extra", torch.zeros(3), persistent=kind == "saved")
    plain = fingerprint(model, tokenizer)
    model.extra.add_(1)
    assert fingerprint(model, tokenizer) != plain


def test_the_fingerprint_samples_every_column_of_a_square_matrix():
    tokenizer, model = byte_tokenizer(), tiny_model(hidden_size=256)
    plain = fingerprint(model, tokenizer)
    weight = find_blocks(model)[0].self_attn.q_proj.weight
    for column in (0, 1, 100, 255):
        before = weight.detach().clone()
        weight.data[:, column] += 1
        assert fingerprint(model, tokenizer) != plain
        weight.data.copy_(before)
    assert fingerprint(model, tokenizer) == plain


def our_hooks(model):
    """Those that transformers itself leaves on the blocks are not ours."""
    return [h for block in find_blocks(model) for h in block._forward_hooks.values() if h.__module__.startswith("vispa_graph")]


def test_a_model_whose_weights_are_not_in_memory_is_refused_without_hooks_left_behind():
    model = tiny_model()
    block = find_blocks(model)[3]
    block.mlp.up_proj.weight = torch.nn.Parameter(block.mlp.up_proj.weight.to("meta"))
    with pytest.raises(SettingsError, match="not in memory"):
        HuggingFaceEngine(model, byte_tokenizer(), name="tiny")
    assert not our_hooks(model)


def test_a_fingerprint_that_fails_leaves_no_hooks_behind(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("vispa_graph.engine.huggingface.fingerprint", lambda *_: 1 / 0)
    with pytest.raises(UnsteerableModelError, match="ZeroDivisionError"):
        HuggingFaceEngine(model, byte_tokenizer(), name="tiny")
    assert not our_hooks(model)
    monkeypatch.undo()
    engine = HuggingFaceEngine(model, byte_tokenizer(), name="tiny")
    assert len(our_hooks(model)) == DEPTH
    engine.close()


def test_a_saved_model_answers_as_the_one_in_memory(saved, opened):
    folder = saved(tiny_model())
    loaded = HuggingFaceEngine.load(str(folder), name="mine", linger=0.0)
    request = ask(PROMPT, steering=STEERINGS[1], max_new_tokens=8)
    try:
        assert loaded.name == "mine"
        assert loaded.generate(request).result().text == opened(tiny_model(), byte_tokenizer(chat=True)).generate(request).result().text
    finally:
        loaded.close()


def test_precision_and_device_pass_through(saved):
    engine = HuggingFaceEngine.load(str(saved(tiny_model())), dtype="bfloat16", device="cpu:0", linger=0.0)
    try:
        assert {(p.dtype, p.device.type) for p in engine._model.parameters()} == {(torch.bfloat16, "cpu")}
        assert engine.generate(ask(PROMPT, steering=STEERED, max_new_tokens=2)).result(60).dtype == "bfloat16"
    finally:
        engine.close()


def test_a_device_that_is_not_there_is_refused(saved):
    with pytest.raises(SettingsError, match="'nowhere'"):
        HuggingFaceEngine.load(str(saved(tiny_model())), device="nowhere")


def test_a_device_map_passes_through_and_without_accelerate_is_refused_with_the_remedy(saved, monkeypatch):
    folder, given = str(saved(tiny_model())), []
    monkeypatch.setattr("vispa_graph.engine.huggingface.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install accelerate"):
        HuggingFaceEngine.load(folder, device_map="auto")
    monkeypatch.setattr("vispa_graph.engine.huggingface.find_spec", lambda name: name)

    def load(*_, **options):
        given.append(options)
        raise OSError("far enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(NotCausalError, match="far enough"):
        HuggingFaceEngine.load(folder, device_map="auto", dtype="float16")
    assert (given[0]["device_map"], given[0]["dtype"]) == ("auto", torch.float16)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("Loading a GPTQ quantized model requires optimum"), r"not installed \(ImportError: .*requires optimum\)"),
        (torch.OutOfMemoryError("CUDA out of memory"), r"does not fit into memory .* bfloat16"),
        (MemoryError(), r"does not fit into memory .* bfloat16"),
    ],
)
def test_a_model_for_which_a_package_or_memory_is_lacking_is_refused_with_the_remedy(error, reason, saved, monkeypatch):
    def load(*_, **options):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(SettingsError, match=reason):
        HuggingFaceEngine.load(str(saved(tiny_model())))


def test_loading_from_a_folder_prints_nothing(saved, capfd):
    folder = saved(tiny_model())
    capfd.readouterr()
    HuggingFaceEngine.load(str(folder)).close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("place", ["missing", "a/b/missing"])
def test_a_missing_folder_is_not_found(place, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no folder"):
        HuggingFaceEngine.load(str(tmp_path / place))


def test_a_name_that_no_file_can_have_is_left_to_the_hub():
    assert find_model("x" * 5000) == "x" * 5000


def test_a_name_on_a_hub_that_cannot_be_reached_is_not_found(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"nobody/nothing-here .* the name and the network"):
        HuggingFaceEngine.load("nobody/nothing-here")


def small(name, **changes):
    """The configuration of a tiny model that is no causal language model."""
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    return getattr(transformers, name)(**{**common, **changes})


BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
NOT_CAUSAL = {
    "a masked model": lambda: transformers.BertForMaskedLM(small("BertConfig")),
    "another masked model": lambda: transformers.RobertaForMaskedLM(small("RobertaConfig")),
    "a sentence encoder": lambda: transformers.BertModel(small("BertConfig")),
    "an encoder and decoder": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "another encoder and decoder": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=VOCABULARY, decoder_ffn_dim=32, **BART)
    ),
    "a classifier": lambda: transformers.LlamaForSequenceClassification(tiny_config()),
    "a model without its head": lambda: transformers.LlamaModel(tiny_config(tie_word_embeddings=False)),
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_a_model_that_is_not_a_causal_language_model_is_refused_as_such(kind, saved):
    with pytest.raises(NotCausalError):
        HuggingFaceEngine.load(str(saved(NOT_CAUSAL[kind]())))


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def without(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def configured(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return change


DAMAGE = {
    "an empty folder": empty,
    "no configuration": without("config.json"),
    "a configuration that is not JSON": written("config.json", "{"),
    "an unknown kind of model": written("config.json", '{"model_type": "nonsense"}'),
    "no weights": without("model.safetensors"),
    "weights cut short": cut_weights,
    "weights that are something else": written("model.safetensors", "not tensors"),
    "weights of other shapes": configured(intermediate_size=40),
    "a depth that is no number": configured(num_hidden_layers="five"),
    "a number of heads that none can have": configured(num_attention_heads=0),
    "a tokenizer that is not JSON": written("tokenizer.json", "{"),
    "no tokenizer": without("tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_holds_no_whole_model_is_refused_with_what_it_needs(damage, saved):
    folder = saved(tiny_model())
    DAMAGE[damage](folder)
    # Without a configuration it is refused before anything is loaded.
    expected = NotCausalError if (folder / "config.json").exists() else ModelNotFoundError
    with pytest.raises(expected, match=r"config\.json, safetensors weights and a tokenizer|holds no config\.json.* save_pretrained"):
        HuggingFaceEngine.load(str(folder))


# Many threads


def test_eight_threads_with_different_questions_get_what_each_gets_alone(tmp_path):
    resources = Resources(Settings(cache=tmp_path))
    engine = resources.engine
    directions = [random_direction(range(1, engine.depth - 1), seed=seed, width=engine.width, bias=-1.0) for seed in range(8)]
    questions = [
        f"Should {who} be told {what}?" for who, what in product(("my father", "the whole family"), ("now", "later", "everything", "nothing at all"))
    ]
    requests = [
        GenerationRequest(
            user(question), steering=steer(direction) if number % 2 else None, max_new_tokens=16 + number, temperature=float(number % 3 == 2)
        )
        for number, (question, direction) in enumerate(zip(questions, directions, strict=True))
    ]
    try:
        alone = [engine.generate(request).result() for request in requests]
        barrier = threading.Barrier(8)

        def run(number):
            barrier.wait()
            generation = engine.generate(requests[number])
            scores = engine.score(ScoreRequest(requests[number].messages, ("A", "B"), requests[number].steering))
            return generation.result(120), scores.result(120)

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(run, range(8)))
        for by_itself, (generation, scores), request in zip(alone, results, requests, strict=True):
            assert generation.text == by_itself.text
            assert generation.completion_tokens == by_itself.completion_tokens
            assert scores.probabilities == pytest.approx(
                engine.score(ScoreRequest(request.messages, ("A", "B"), request.steering)).result().probabilities, rel=1e-3, abs=1e-6
            )
        assert max(generation.batch_rows for generation, _ in results) > 1
    finally:
        resources.close()


@pytest.mark.slow
def test_two_hundred_mixed_requests_from_many_threads_get_what_each_gets_alone(opened):
    """Steered by different values, at all or generated positions, suppressed, mixed, unsteered, sampled and scored."""
    rng = np.random.default_rng(0)
    directions = [random_direction(layers, seed=n, bias=-1.0) for n, layers in enumerate([LAYERS, (0, 4), (2,), tuple(range(DEPTH))])]
    plans = [None, *(steer(d) for d in directions), steer(directions[0], -1.0), mix([steer(d) for d in directions[:2]], [0.6, 0.4])]
    plans += [replace(plan, positions="generated") for plan in plans[1:3]]
    texts = [PROMPT, "Why?", "x" * 90, "Is it right to lie to a friend, and if so, when?", "Ärzte fragen, was zu tun ist."]

    def draw():
        text, plan = texts[rng.integers(len(texts))], plans[rng.integers(len(plans))]
        if rng.random() < 0.3:
            return ScoreRequest(user(text), ("A", "B", "C"), plan)
        return ask(
            text, steering=plan, max_new_tokens=int(rng.integers(1, 14)), temperature=float(rng.choice([0, 0, 0.8])), seed=int(rng.integers(9))
        )

    requests = [draw() for _ in range(200)]
    engine = opened(tiny_model(), linger=0.005)

    def run(request):
        return (engine.generate(request) if isinstance(request, GenerationRequest) else engine.score(request)).result(120)

    alone = [run(request) for request in requests]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(run, requests))
    for request, one, other in zip(requests, alone, together, strict=True):
        if isinstance(request, ScoreRequest):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
            assert one.mass == pytest.approx(other.mass, abs=1e-5)
        else:
            assert (one.text, one.completion_tokens, one.finish) == (other.text, other.completion_tokens, other.finish)
            assert (one.steering is None) == (request.steering is None)
    rows = [result.batch_rows for result in together if isinstance(result, Generation)]
    assert max(rows) >= 4  # they did share batches
    assert all(result.batch_rows == 1 for result in alone if isinstance(result, Generation))


def test_a_text_cannot_end_its_own_turn(opened):
    engine = opened(tiny_model("llama"), byte_tokenizer(chat=True))
    special = engine._tokenizer.eos_token
    plain = engine._chat_tokens([{"role": "user", "content": "hello there"}])
    forged = engine._chat_tokens([{"role": "user", "content": f"hello {special} there"}])
    end = engine._tokenizer.eos_token_id
    assert forged.count(end) == plain.count(end)
