"""Sparse dictionaries: what is learned reconstructs, few samples gain by it, and a published one can be used."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner import learn_when_told
from safetensors.numpy import load_file, save_file
from tiny_models import DEPTH, tiny_engine

from vispa_graph.engine.dictionary import Features, SparseDictionary, learn_dictionary, learn_features, open_dictionary
from vispa_graph.engine.directions import FitSettings, fit_direction
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import StoreError

WIDTH, TRUE, ACTIVE = 256, 30, 4


@pytest.fixture(scope="module")
def sparse():
    """States made of few of some true features, and noise."""
    random = np.random.default_rng(0)
    true = random.standard_normal((TRUE, WIDTH))
    true /= np.linalg.norm(true, axis=1, keepdims=True)

    def states(count, always=None):
        present = np.zeros((count, TRUE))
        for row in present:
            row[random.choice(TRUE, ACTIVE, replace=False)] = random.uniform(1, 3, ACTIVE)
        if always is not None:
            present[:, always] = 2.0
        return (present @ true + 0.4 * random.standard_normal((count, WIDTH))).astype(np.float32)

    return true, states


@pytest.fixture(scope="module")
def learned(sparse):
    _, states = sparse
    return learn_features(states(1500), features=64, active=8)


def cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_a_learned_dictionary_explains_what_its_states_have_in_common(sparse, learned):
    _, states = sparse
    fresh = states(500)
    noise = 0.4**2 * WIDTH
    signal = ((fresh - fresh.mean(0)) ** 2).sum(1).mean() - noise
    assert learned.unexplained(fresh) < (noise + 0.5 * signal) / (noise + signal)


def test_the_same_states_and_seed_give_the_same_dictionary(sparse):
    _, states = sparse
    data = states(60)
    one, other = (learn_features(data, features=16, active=4, seed=3) for _ in range(2))
    assert np.array_equal(one.encoder, other.encoder)
    assert np.array_equal(one.decoder, other.decoder)


def gain(sparse, learned, count):
    """How much nearer the truth a direction from `count` pairs lies with the dictionary than without; a mean of ten cosines."""
    true, states = sparse
    gained = []
    for value in range(10):
        positives, negatives = states(count, value)[:, None], states(count)[:, None]
        plain = fit_direction("value", positives, negatives, FitSettings("mean_difference", (0,)))
        decoded = fit_direction("value", positives, negatives, FitSettings("sae", (0,)), dictionary=SparseDictionary({0: learned}))
        gained.append(cosine(decoded.vectors[0], true[value]) - cosine(plain.vectors[0], true[value]))
    return np.mean(gained)


def test_with_50_samples_or_fewer_the_direction_lies_nearer_the_truth_than_the_plain_mean_difference_but_not_with_many(sparse, learned):
    assert min(gain(sparse, learned, count) for count in (12, 24, 50)) > 0.02
    assert gain(sparse, learned, 400) < 0.01


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_state_has_at_most_the_active_features_and_they_are_its_largest(features, active):
    random = np.random.default_rng(features)
    found = Features(
        random.standard_normal((features, 5)).astype(np.float32),
        random.standard_normal(features).astype(np.float32),
        random.standard_normal((features, 5)).astype(np.float32),
        random.standard_normal(5).astype(np.float32),
        min(active, features),
    )
    states = random.standard_normal((7, 5)).astype(np.float32)
    encoded = found.encode(states)
    before = (states - found.centre) @ found.encoder.T + found.encoder_bias
    assert ((encoded > 0).sum(1) <= found.active).all()
    for row, whole in zip(encoded, before, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(-whole)[: found.active]) & set(np.flatnonzero(whole > 0))


def test_the_direction_is_the_mean_difference_of_the_features_decoded(learned, sparse):
    _, states = sparse
    positives, negatives = states(10, 1)[:, None], states(15)[:, None]
    direction = fit_direction("value", positives, negatives, FitSettings("sae", (0,)), dictionary=SparseDictionary({0: learned}))
    expected = (learned.encode(positives[:, 0]).mean(0) - learned.encode(negatives[:, 0]).mean(0)) @ learned.decoder
    assert np.allclose(direction.vectors[0], expected, atol=1e-4)
    assert direction.alpha == 0.5
    assert not direction.bias.any()


def test_no_more_features_are_learned_than_there_are_states(sparse):
    _, states = sparse
    assert learn_features(states(9)).encoder.shape == (9, WIDTH)


@pytest.mark.parametrize("shape", [(256, 896), (512, 64)])
@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_a_dictionary_is_told_from_one_that_differs_in_any_column(shape, where):
    size, width = shape
    matrices = {name: np.zeros(shape, np.float32) for name in ("encoder", "decoder")}
    plain = Features(**matrices, encoder_bias=np.zeros(size, np.float32), centre=np.zeros(width, np.float32), active=4)
    seen = {SparseDictionary({0: plain}).fingerprint}
    for column in range(width):
        changed = np.zeros(shape, np.float32)
        changed[:, column] = 1
        seen.add(SparseDictionary({0: replace(plain, **{where: changed})}).fingerprint)
    assert len(seen) == 1 + width


# On disk


@pytest.fixture
def folder(tmp_path, sparse):
    _, states = sparse
    place = tmp_path / "dictionary"
    data = states(40)[:, None]
    learn_dictionary(place, [3], lambda layers: data[:, : len(layers)])
    return place


def test_only_blocks_that_are_missing_are_learned(folder, sparse):
    _, states = sparse
    asked, done = [], []
    data = states(40)[:, None]
    before = open_dictionary(folder, [3]).layers[3]
    both = learn_dictionary(folder, [3, 5], lambda layers: asked.append(list(layers)) or data, lambda *steps: done.append(steps))
    assert asked == [[5]]
    assert done == [(1, 1)]
    assert np.array_equal(both.layers[3].encoder, before.encoder)
    learn_dictionary(folder, [3, 5], lambda layers: pytest.fail("nothing was missing"))


def test_it_lies_there_as_sparsify_would_write_it_and_can_be_used_from_there(folder):
    place = folder / "layers.3"
    assert set(load_file(place / "sae.safetensors")) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    assert json.loads((place / "cfg.json").read_text()) == {"activation": "topk", "k": 16, "num_latents": 40, "d_in": WIDTH}
    assert not open_dictionary(folder, [3]).layers[3].decoder.flags.owndata


@pytest.mark.slow
def test_processes_that_learn_at_once_steer_by_the_same_dictionary_even_if_they_read_otherwise(tmp_path):
    place = tmp_path / "dictionaries" / "one"
    place.parent.mkdir()
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    processes = [context.Process(target=learn_when_told, args=(place, number, ready, go)) for number in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=120)
    go.set()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {place.with_name(str(number)).read_text() for number in range(2)} == {open_dictionary(place, [3, 5]).fingerprint}
    assert sorted(path.name for path in place.iterdir()) == ["layers.3", "layers.5"]


@pytest.mark.skipif(os.name == "nt", reason="modes of files are of Unix")
def test_a_dictionary_can_be_read_by_whoever_may_read_what_the_process_writes(folder, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("")
    made = folder / "layers.3"
    assert made.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in made.iterdir()} == {(tmp_path / "plain" / "file").stat().st_mode}


def config(**changes):
    def change(place):
        path = place / "cfg.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(**changes):
    def change(place):
        path = place / "sae.safetensors"
        found = {**load_file(path), **{name.replace("__", "."): array for name, array in changes.items()}}
        save_file(found, path)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda place: (place / "cfg.json").unlink(),
        lambda place: (place / "cfg.json").write_text("{"),
        lambda place: (place / "sae.safetensors").write_bytes((place / "sae.safetensors").read_bytes()[:-9]),
        config(activation="groupmax"),
        config(transcode=True),
        config(skip_connection=True),
        config(k=0),
        config(k="many"),
        tensors(W_dec=np.ones((3, WIDTH), np.float32)),
        tensors(b_dec=np.full(WIDTH, np.nan, np.float32)),
    ],
)
def test_a_dictionary_that_is_missing_damaged_or_of_another_kind_is_refused_with_its_place(damage, folder):
    damage(folder / "layers.3")
    with pytest.raises(StoreError, match="Give a folder with a top-k dictionary") as refused:
        open_dictionary(folder, [3])
    assert str(folder / "layers.3") in str(refused.value)


def test_a_dictionary_for_another_model_is_refused(folder, sparse):
    states = np.ones((4, 1, WIDTH + 1), np.float32)
    with pytest.raises(StoreError, match=f"width {WIDTH}, but this model's have {WIDTH + 1}"):
        fit_direction("value", states, states, FitSettings("sae", (3,)), dictionary=open_dictionary(folder, [3]))


# In a graph


def test_the_dictionary_is_learned_once_from_all_sentences_and_kept_in_the_cache(make_resources, tmp_path, taxonomy):
    def directions(engine, **settings):
        return make_resources(engine=engine, method="sae", layers=(2,), cache=tmp_path, **settings).directions

    class Counting(FakeEngine):
        read_texts = 0

        def read(self, conversations, progress=None):
            self.read_texts += len(conversations)
            return super().read(conversations, progress)

    first, second = Counting(), Counting()
    one, other = directions(first), directions(second)
    whole = sum(2 * len(value.all_pairs) for value in taxonomy)
    assert (first.read_texts, second.read_texts) == (whole, 0)
    assert all(np.array_equal(one[value].vectors, other[value].vectors) for value in taxonomy.ids)
    (made,) = (tmp_path / "dictionaries").iterdir()
    third = directions(Counting(), dictionary=made)
    assert all(np.array_equal(one[value].vectors, third[value].vectors) for value in taxonomy.ids)


def test_a_model_is_steered_by_it(make_resources, tmp_path, taxonomy):
    engine = tiny_engine(chat=True)
    try:
        subset = taxonomy.subset(["honor", "karma"])
        resources = make_resources(engine=engine, method="sae", layers=(DEPTH - 3,), cache=tmp_path)
        resources.taxonomy = subset
        steering = resources.steering("honor")
        report = resources.chat_model.for_value("honor").invoke("What now?").response_metadata["steering"]
    finally:
        engine.close()
    assert steering.direction.method == "sae"
    assert report["magnitude"] == [0.5]
    assert report["displacement"] > 0
