"""How labelled phrases are turned into a pull toward values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vispa_graph.taxonomy_index import kernel

LABELS = (0.0, 0.5, 1.0)


def unit(random, count, width=24):
    vectors = random.standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def evidence(query, vectors, pull):
    return kernel.kernel(vectors @ query) @ pull


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_a_phrase_labelled_with_all_values_speaks_for_none_that_it_does_not_point_at(seed, count, values):
    random = np.random.default_rng(seed)
    labels = random.choice(LABELS, size=(count, values)).astype(np.float32)
    complete = random.random(count) < 0.7
    pull = kernel.solve(unit(random, count), labels, complete)
    assert np.isfinite(pull).all()
    assert (pull[complete][labels[complete] == 0] <= 0).all()


def test_a_query_that_is_a_phrase_gets_most_of_what_that_phrase_points_at_and_nothing_else():
    random = np.random.default_rng(0)
    vectors, labels = unit(random, 30), np.eye(3, dtype=np.float32)[random.integers(0, 3, 30)]
    pull = kernel.solve(vectors, labels, np.ones(30, dtype=bool))
    for vector, label in zip(vectors, labels, strict=True):
        found = evidence(vector, vectors, pull)
        assert found[label == 1] > 0.6
        assert (found[label == 0] < 0.1).all()


def test_near_questions_that_put_nothing_at_stake_nothing_is():
    random = np.random.default_rng(1)
    plain, dilemmas = unit(random, 12), unit(random, 12)
    plain = plain + 2 * plain[0]  # questions of one kind, near each other
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    vectors = np.concatenate([plain, dilemmas]).astype(np.float32)
    labels = np.concatenate([np.zeros((12, 2)), random.choice(LABELS, size=(12, 2))]).astype(np.float32)
    pull = kernel.solve(vectors, labels, np.ones(24, dtype=bool))
    asked = plain.mean(0) / np.linalg.norm(plain.mean(0))
    assert (evidence(asked.astype(np.float32), vectors, pull) < 0.05).all()


def test_a_phrase_of_one_values_own_is_filled_in_with_what_complete_phrases_near_it_say():
    random = np.random.default_rng(2)
    about = unit(random, 1)[0]
    near = about + 0.1 * unit(random, 8)
    vectors = np.concatenate([near, about[None]])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels = np.array([[0, 1]] * 8 + [[1, 0]], dtype=np.float32)  # the last says nothing about the second value
    pull = kernel.solve(vectors, labels, np.array([True] * 8 + [False]))
    found = evidence(vectors[-1], vectors, pull)
    assert found[1] > 0.5


def test_beyond_the_exact_size_landmarks_say_nearly_the_same(monkeypatch):
    random = np.random.default_rng(3)
    centres = unit(random, 4)
    which = random.integers(0, 4, 300)
    vectors = centres[which] + 0.15 * unit(random, 300)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels, complete = np.eye(4, dtype=np.float32)[which], np.ones(300, dtype=bool)
    exact = kernel.solve(vectors, labels, complete)
    monkeypatch.setattr(kernel, "EXACT_UP_TO", 100)
    monkeypatch.setattr(kernel, "LANDMARKS", 100)
    fewer = kernel.solve(vectors, labels, complete)
    assert (np.abs(fewer).sum(axis=1) > 0).sum() <= 100
    for centre, value in zip(centres, range(4), strict=True):
        assert evidence(centre, vectors, fewer) == pytest.approx(evidence(centre, vectors, exact), abs=0.15)
        assert evidence(centre, vectors, fewer).argmax() == value
