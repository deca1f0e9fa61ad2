"""Presidio as a scrubber of traces."""

from __future__ import annotations

import pytest
import spacy
from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.nlp_engine import SpacyNlpEngine

from vispa_graph.errors import SettingsError
from vispa_graph.scrubbing import presidio_scrubber


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A spaCy model that knows one name, installed nowhere; models that know many are not in the package index."""
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Zebedee"}])
    folder = tmp_path_factory.mktemp("spacy") / "names"
    nlp.to_disk(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("text", "gone", "kept"),
    [
        ("Should Zebedee go home?", "Zebedee", "Should <PERSON> go home?"),
        ("Write to zebedee@example.org.", "zebedee@", "Write to"),
        ("Call 212-555-0182 at noon.", "0182", "Call"),
        ("Seen on 12/05/2024 by his doctor.", "2024", "by his doctor."),
        ("Record MRN-1234567 says no.", "1234567", "says no."),
        ("He is 84 and takes 2 pills.", "nothing", "He is 84 and takes 2 pills."),
    ],
)
def test_identifiers_are_taken_out_and_the_rest_stays(model, text, gone, kept):
    scrubbed = presidio_scrubber(model=model)(text)
    assert gone not in scrubbed
    assert kept in scrubbed


def test_an_analyzer_of_one_s_own_is_used(model):
    engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "blank"}])
    engine.nlp = {"en": spacy.blank("en")}
    scrub = presidio_scrubber(analyzer=AnalyzerEngine(nlp_engine=engine, supported_languages=["en"]))
    assert scrub("Zebedee, zebedee@example.org") == "Zebedee, <EMAIL_ADDRESS>"


def test_a_model_that_is_not_installed_is_refused_not_downloaded():
    with pytest.raises(SettingsError, match="python -m spacy download en_core_web_lg"):
        presidio_scrubber()


def test_without_presidio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(SettingsError, match=r"vispa-graph\[presidio\]"):
        presidio_scrubber()
