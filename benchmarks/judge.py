"""A judge that does not use the language model: the value whose sentences, written apart from all training text, are nearest by MiniLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from vispa_graph.taxonomy_index import Encoder

SENTENCES = Path(__file__).parent / "data" / "judge_sentences.yaml"
NEAREST = 3


class Judge:
    """Scores texts against every value; ids in the order of `values`."""

    def __init__(self, encoder: Encoder, values: Sequence[str]) -> None:
        sentences = yaml.safe_load(SENTENCES.read_text(encoding="utf-8"))
        self.values = list(values)
        self._encoder = encoder
        self._vectors = [encoder.encode(sentences[value]) for value in values]

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Mean cosine to the three nearest sentences of each value, [texts, values]."""
        embedded = self._encoder.encode(list(texts))
        return np.stack([np.sort(embedded @ vectors.T, axis=1)[:, -NEAREST:].mean(axis=1) for vectors in self._vectors], axis=1)
