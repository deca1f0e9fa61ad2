"""The taxonomy of values, and the index that finds the values a question puts at stake."""

from vispa_graph.taxonomy_index.encoder import Encoder, SentenceEncoder
from vispa_graph.taxonomy_index.index import Hit, Phrase, TaxonomyIndex
from vispa_graph.taxonomy_index.phrase_index import Entry, EntryHit, PhraseIndex
from vispa_graph.taxonomy_index.taxonomy import FORMS, Concern, Form, Pair, Situation, Taxonomy, Value

__all__ = [
    "FORMS", "Concern", "Encoder", "Entry", "EntryHit", "Form", "Hit", "Pair", "Phrase", "PhraseIndex", "SentenceEncoder", "Situation", "Taxonomy", "TaxonomyIndex", "Value",
]  # fmt: skip
