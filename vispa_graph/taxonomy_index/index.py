"""The FAISS index over the phrases that point at values, built on first use and cached.

A phrase is a value's definition, one of its facets, or one phrasing of a concern. Each points at one or more values with a weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vispa_graph.errors import StoreError
from vispa_graph.storage import atomic_folder
from vispa_graph.taxonomy_index.encoder import Encoder
from vispa_graph.taxonomy_index.taxonomy import Taxonomy

Kind = Literal["definition", "facet", "concern"]

_FORMAT = 1
_INDEX, _MANIFEST = "index.faiss", "manifest.json"
CENTRAL, RELEVANT = 1.0, 0.5


@dataclass(frozen=True)
class Phrase:
    """A text that points at values.

    Attributes:
        source: Id of the value or concern it belongs to.
        weights: How much it speaks for each value id: 1 for a facet's own value and the central values of a concern, .5 for relevant ones.
    """

    text: str
    kind: Kind
    source: str
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Hit:
    """A phrase and its cosine to the query, -1..1."""

    phrase: Phrase
    score: float


def phrases_of(taxonomy: Taxonomy) -> list[Phrase]:
    """All phrases of a taxonomy, in a fixed order."""
    phrases: list[Phrase] = []
    for value in taxonomy:
        phrases.append(Phrase(value.definition, "definition", value.id, {value.id: 1.0}))
        phrases += [Phrase(facet, "facet", value.id, {value.id: 1.0}) for facet in value.facets]
    for concern in taxonomy.concerns:
        weights = dict.fromkeys(concern.relevant, RELEVANT) | dict.fromkeys(concern.central, CENTRAL)
        phrases += [Phrase(phrasing, "concern", concern.id, weights) for phrasing in concern.phrasings]
    return phrases


class TaxonomyIndex:
    """Exact inner-product search over the phrases of a taxonomy. Immutable; safe to share between threads."""

    def __init__(self, taxonomy: Taxonomy, encoder: Encoder, index: Any) -> None:
        """Hold an index whose row i is the i-th phrase; use `build` or `open` to get one."""
        self.taxonomy = taxonomy
        self.encoder = encoder
        self.phrases: Sequence[Phrase] = phrases_of(taxonomy)
        self._index = index

    @classmethod
    def build(cls, taxonomy: Taxonomy, encoder: Encoder) -> TaxonomyIndex:
        """Embed all phrases and index them."""
        import faiss

        vectors = encoder.encode([phrase.text for phrase in phrases_of(taxonomy)])
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return cls(taxonomy, encoder, index)

    @classmethod
    def open(cls, taxonomy: Taxonomy, encoder: Encoder, cache: Path) -> TaxonomyIndex:
        """The cached index of this taxonomy and encoder, built and saved where there is none yet.

        Raises:
            StoreError: The cached index is damaged or belongs to something else.
        """
        key = {"format": _FORMAT, "taxonomy": taxonomy.fingerprint, "encoder": encoder.fingerprint}
        folder = cache / "index" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        if folder.exists():
            return cls.load(taxonomy, encoder, folder)
        built = cls.build(taxonomy, encoder)
        built.save(folder)
        return built

    def save(self, folder: Path) -> None:
        """Write index and manifest; the folder appears whole or not at all."""
        import faiss

        with atomic_folder(folder) as temporary:
            faiss.write_index(self._index, str(temporary / _INDEX))
            manifest = {
                "format": _FORMAT,
                "taxonomy": self.taxonomy.fingerprint,
                "encoder": self.encoder.fingerprint,
                "phrases": len(self.phrases),
                "sha256": hashlib.sha256((temporary / _INDEX).read_bytes()).hexdigest(),
            }
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, taxonomy: Taxonomy, encoder: Encoder, folder: Path) -> TaxonomyIndex:
        """Read an index back.

        Raises:
            StoreError: It is damaged or belongs to another taxonomy or encoder.
        """
        import faiss

        remedy = f"Remove the folder {folder} and it is built again."
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            content = (folder / _INDEX).read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
                raise StoreError(f"The index in {folder} is damaged: its checksum differs from the manifest's. {remedy}")
            for name, expected in (("format", _FORMAT), ("taxonomy", taxonomy.fingerprint), ("encoder", encoder.fingerprint)):
                if manifest[name] != expected:
                    raise StoreError(f"The index in {folder} belongs to another {name}. {remedy}")
            index = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
            found = cls(taxonomy, encoder, index)
            if index.ntotal != len(found.phrases):
                raise StoreError(f"The index in {folder} holds {index.ntotal} phrases, not the taxonomy's {len(found.phrases)}. {remedy}")
            return found
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StoreError(f"The index in {folder} cannot be read ({type(error).__name__}). {remedy}") from error

    def search(self, query: str, n: int) -> list[Hit]:
        """The n phrases nearest to a query, best first; equal scores in the order of the taxonomy."""
        scores, rows = self._index.search(self.encoder.encode([query]), min(n, len(self.phrases)))
        # Rounded, so that the last bits of a float, which differ between batches and machines, decide nothing.
        ranked = sorted((-round(float(s), 5), int(r)) for s, r in zip(scores[0], rows[0], strict=True) if r >= 0)
        return [Hit(self.phrases[row], -score) for score, row in ranked]
