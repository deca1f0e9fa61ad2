"""The sentence encoders: MiniLM as it was published, and with the adapter for the values at stake."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index import SentenceEncoder, Taxonomy
from vispa_graph.taxonomy_index.encoder import ADAPTER
from vispa_graph.taxonomy_index.index import index_name, phrases_of
from vispa_graph.taxonomy_index.precomputed import FILE, digest, solved

OPERATION = "Should my father, 84, have an operation he does not want?"
SAME_WORDS = "How long does an operation take on a man of 84?"
SAME_VALUES = "Grandma says no to dialysis and her doctors keep pressing her."


def test_the_adapter_adds_its_thin_matrices_to_the_weights_they_are_named_after_and_to_no_others(encoder, value_encoder):
    thin = load_file(ADAPTER)
    plain, adapted = (e.model[0].auto_model.state_dict() for e in (encoder, value_encoder))
    changed = {key.rpartition(".")[0] for key in thin}
    assert len(thin) == 2 * len(changed) == 2 * 6 * 6  # six blocks of six linear layers
    for name, weight in plain.items():
        layer = name.removesuffix(".weight")
        added = thin[f"{layer}.up"].float() @ thin[f"{layer}.down"].float() if layer in changed and name.endswith(".weight") else 0
        assert np.allclose(adapted[name], weight + added, atol=1e-6)


def test_with_the_adapter_what_puts_the_same_values_at_stake_is_near_and_not_what_has_the_same_words(encoder, value_encoder):
    for one, words_count in ((encoder, True), (value_encoder, False)):
        asked, words, values = one.encode([OPERATION, SAME_WORDS, SAME_VALUES])
        nearer, farther = (words, values) if words_count else (values, words)
        assert asked @ nearer > asked @ farther + 0.1


def test_both_give_unit_vectors_and_have_fingerprints_of_their_own(encoder, value_encoder):
    for one in (encoder, value_encoder):
        assert np.allclose(np.linalg.norm(one.encode([OPERATION, "", "?"]), axis=1), 1, atol=1e-5)
    assert encoder.fingerprint != value_encoder.fingerprint
    assert value_encoder.fingerprint == SentenceEncoder(adapted=True).fingerprint


def test_another_encoder_gets_no_adapter():
    assert SentenceEncoder("someone/else", adapted=True).fingerprint == SentenceEncoder("someone/else").fingerprint == "someone/else"


@pytest.mark.parametrize("given", ["encoder", "value_encoder"])
def test_an_encoder_that_is_given_finds_the_values_too_unless_another_is_given_for_that(given, word_encoder, taxonomy):
    resources = Resources(Settings(), taxonomy=taxonomy, **{given: word_encoder})
    assert resources.value_encoder is word_encoder
    assert (resources.encoder is word_encoder) is (given == "encoder")


@pytest.mark.parametrize("bioethics", [False, True])
def test_vectors_and_pull_of_all_shipped_phrases_come_with_the_package(value_encoder, bioethics):
    taxonomy = Taxonomy.load(bioethics=bioethics)
    texts = [phrase.text for phrase in phrases_of(taxonomy)]
    with safe_open(FILE, framework="np") as file:
        assert file.metadata()["encoder"] == value_encoder.fingerprint
        assert set(digest(texts).tolist()) <= set(file.get_tensor("digests").tolist())
    assert solved(index_name(taxonomy, value_encoder)).shape == (len(texts), len(taxonomy)), "run python -m training.phrase_vectors"
