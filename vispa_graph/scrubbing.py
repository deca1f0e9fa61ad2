"""A scrubber on Microsoft Presidio: traces with content but without names, dates, record numbers, phones and e-mail addresses.

Needs `pip install "vispa-graph[presidio]"` and a spaCy model of the language. No recogniser finds everything: what must not leave at
all is left out by leaving `trace_content` unset.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vispa_graph.errors import SettingsError

if TYPE_CHECKING:
    from vispa_graph.privacy import Scrubber

# Numbers of medical records differ from house to house; six digits and more are rarely anything else that must stay.
_RECORD = r"\b[A-Z]{0,4}[-# ]?\d{6,12}\b"


def presidio_scrubber(*, language: str = "en", model: str = "en_core_web_lg", analyzer: Any = None) -> Scrubber:
    """What `create_graph(Settings(trace_content=True), scrubber=...)` takes; every identifier becomes its kind, such as <PERSON>.

    Args:
        language: Of the texts.
        model: The spaCy model that finds names, by name or folder; install it with `python -m spacy download`.
        analyzer: A Presidio `AnalyzerEngine` of your own, with recognisers of your own, instead of `model`.

    Raises:
        SettingsError: Presidio or the spaCy model is not installed. Neither is downloaded by itself.
    """
    try:
        import spacy
        import tldextract
        from presidio_analyzer import AnalyzerEngine, Pattern, PatternRecognizer
        from presidio_analyzer.nlp_engine import NlpEngineProvider
        from presidio_anonymizer import AnonymizerEngine
    except ImportError as error:
        raise SettingsError(f'The Presidio scrubber needs {error.name}. Install it: pip install "vispa-graph[presidio]".') from error
    if analyzer is None:
        if not spacy.util.is_package(model) and not Path(model).is_dir():
            raise SettingsError(f"The spaCy model {model} is not installed. Install it: python -m spacy download {model}.")
        configuration = {"nlp_engine_name": "spacy", "models": [{"lang_code": language, "model_name": model}]}
        analyzer = AnalyzerEngine(nlp_engine=NlpEngineProvider(nlp_configuration=configuration).create_engine(), supported_languages=[language])
        record = PatternRecognizer("RECORD_NUMBER", patterns=[Pattern("record number", _RECORD, 0.6)], supported_language=language)
        analyzer.registry.add_recognizer(record)
    # To tell an e-mail address, Presidio asks tldextract, which would fetch a list of domains from the network; it has one of its own.
    tldextract.tldextract.TLD_EXTRACTOR.suffix_list_urls = ()
    anonymizer = AnonymizerEngine()  # type: ignore[no-untyped-call]

    def scrub(text: str) -> str:
        return str(anonymizer.anonymize(text, analyzer.analyze(text, language=language)).text)

    return scrub
