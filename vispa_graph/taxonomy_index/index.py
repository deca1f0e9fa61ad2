"""The FAISS index over the phrases that point at values, built on first use and cached.

A phrase is a value's definition, one of its facets, one phrasing of a concern, or a graded situation; of a value of one's own, at which no
situation points, also the positive twins of its pairs. Each points at values with a weight; a plain question points at none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as read_safetensors
from safetensors.numpy import save

from vispa_graph.errors import StoreError
from vispa_graph.storage import atomic_folder
from vispa_graph.taxonomy_index import kernel
from vispa_graph.taxonomy_index.encoder import Encoder, Floats
from vispa_graph.taxonomy_index.precomputed import encode_phrases, solved
from vispa_graph.taxonomy_index.taxonomy import Concern, Situation, Taxonomy
from vispa_graph.taxonomy_index.vectors import VectorIndex

Kind = Literal["definition", "facet", "sentence", "concern", "situation"]

_FORMAT = 5
_INDEX, _WEIGHTS, _MANIFEST = "index.faiss", "weights.safetensors", "manifest.json"
CENTRAL, RELEVANT = 1.0, 0.5
# A sentence that lives a value is near many questions in which others are at stake. Chosen on the tuning half, like the kernel's constants.
LIVED = 0.7
OWN: frozenset[Kind] = frozenset({"definition", "facet", "sentence"})  # kinds whose source is their value


@dataclass(frozen=True)
class Phrase:
    """A text that points at values.

    Attributes:
        source: Id of the value or concern it belongs to; "situation" for a graded situation.
        weights: How much it speaks for each value id: 1 for its own value or those that are central to it, .7 from a sentence, .5 for relevant ones.
    """

    text: str
    kind: Kind
    source: str
    weights: Mapping[str, float]


class Hit(NamedTuple):
    """A phrase near a query. A tuple, since a query makes hundreds.

    Attributes:
        score: Its cosine to the query, -1..1.
        row: Its place in the index.
    """

    phrase: Phrase
    score: float
    row: int


def phrases_of(taxonomy: Taxonomy) -> list[Phrase]:
    """All phrases of a taxonomy, in a fixed order."""
    phrases: list[Phrase] = []
    for value in taxonomy:
        phrases.append(Phrase(value.definition, "definition", value.id, {value.id: 1.0}))
        phrases += [Phrase(facet, "facet", value.id, {value.id: 1.0}) for facet in value.facets]
        if not value.shipped:
            phrases += [Phrase(pair.positive, "sentence", value.id, {value.id: LIVED}) for pair in value.all_pairs]
    for concern in taxonomy.concerns:
        phrases += [Phrase(phrasing, "concern", concern.id, _weights(concern)) for phrasing in concern.phrasings]
    return phrases + [Phrase(situation.text, "situation", "situation", _weights(situation)) for situation in taxonomy.situations]


def _weights(labelled: Concern | Situation) -> dict[str, float]:
    return dict.fromkeys(labelled.relevant, RELEVANT) | dict.fromkeys(labelled.central, CENTRAL)


def _digest(phrases: Sequence[Phrase], values: Sequence[str]) -> str:
    """SHA-256 over all that an index is made of, beside the encoder."""
    content = [list(values), [[p.text, p.kind, p.source, p.weights] for p in phrases]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


class TaxonomyIndex:
    """Search over the phrases of a taxonomy. Immutable; safe to share between threads.

    Attributes:
        phrases: The phrases, by row.
        pull: How much each phrase pulls toward each value, [phrases, values], the values in the order of the taxonomy.
        centroids: The mean vector of each value's own phrases, [values, dimensions].
    """

    def __init__(self, taxonomy: Taxonomy, encoder: Encoder, index: VectorIndex, pull: Floats, centroids: Floats) -> None:
        """Hold an index whose row i is the i-th phrase; use `build` or `open` to get one."""
        self.taxonomy = taxonomy
        self.encoder = encoder
        self.phrases: Sequence[Phrase] = phrases_of(taxonomy)
        self.pull = pull
        self.centroids = centroids
        self._index = index

    @classmethod
    def build(cls, taxonomy: Taxonomy, encoder: Encoder) -> TaxonomyIndex:
        """Embed all phrases, index them, and solve for their pull."""
        phrases = phrases_of(taxonomy)
        vectors = encode_phrases([phrase.text for phrase in phrases], encoder)
        pull = solved(index_name(taxonomy, encoder))
        if pull is None:
            pull = solve_pull(taxonomy, vectors)
        source = np.array([phrase.source if phrase.kind in OWN else "" for phrase in phrases])
        centroids = np.stack([vectors[source == value].mean(axis=0) for value in taxonomy.ids])
        return cls(taxonomy, encoder, VectorIndex.build(vectors), pull, centroids)

    @classmethod
    def open(cls, taxonomy: Taxonomy, encoder: Encoder, cache: Path) -> TaxonomyIndex:
        """The cached index of this taxonomy and encoder, built and saved where there is none yet.

        Raises:
            StoreError: The cached index is damaged or belongs to something else.
        """
        folder = cache / "index" / index_name(taxonomy, encoder)
        if folder.exists():
            return cls.load(taxonomy, encoder, folder)
        built = cls.build(taxonomy, encoder)
        built.save(folder)
        return built

    def save(self, folder: Path) -> None:
        """Write index, pull and manifest; the folder appears whole or not at all."""
        import faiss

        with atomic_folder(folder) as temporary:
            (temporary / _INDEX).write_bytes(faiss.serialize_index(self._index.faiss).tobytes())
            (temporary / _WEIGHTS).write_bytes(save({"pull": self.pull, "centroids": self.centroids, "scale": np.array([self._index.scale])}))
            sums = {name: hashlib.sha256((temporary / name).read_bytes()).hexdigest() for name in (_INDEX, _WEIGHTS)}
            manifest = _key(self.taxonomy, self.encoder) | {"phrases": len(self.phrases), "sha256": sums}
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
            content = {name: (folder / name).read_bytes() for name in (_INDEX, _WEIGHTS)}
            for name, read in content.items():
                if hashlib.sha256(read).hexdigest() != manifest["sha256"][name]:
                    raise StoreError(f"The index in {folder} is damaged: the checksum of {name} differs from the manifest's. {remedy}")
            for name, expected in _key(taxonomy, encoder).items():
                if manifest[name] != expected:
                    raise StoreError(f"The index in {folder} belongs to another {name}. {remedy}")
            index = faiss.deserialize_index(np.frombuffer(content[_INDEX], dtype=np.uint8))
            weights = read_safetensors(content[_WEIGHTS])
            found = cls(taxonomy, encoder, VectorIndex(index, float(weights["scale"][0])), weights["pull"], weights["centroids"])
            if index.ntotal != len(found.phrases) or found.pull.shape != (len(found.phrases), len(taxonomy)):
                raise StoreError(f"The index in {folder} holds {index.ntotal} phrases, not the taxonomy's {len(found.phrases)}. {remedy}")
            return found
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise StoreError(f"The index in {folder} cannot be read ({type(error).__name__}). {remedy}") from error

    def search(self, query: str, n: int) -> list[Hit]:
        """The n phrases nearest to a query, best first; equal scores in the order of the taxonomy, any of them left out where the n end."""
        return self.search_vector(self.encoder.encode([query]), n)

    def search_vector(self, vector: Floats, n: int) -> list[Hit]:
        """The same for an encoded query, [1, dimensions]."""
        scores, rows = self._index.search(vector, n)
        # Rounded, so that the last bits of a float, which differ between batches and machines, decide nothing.
        ranked = sorted(zip((-np.round(scores[0].astype(np.float64), 5)).tolist(), rows[0].tolist(), strict=True))
        return [Hit(self.phrases[row], -score, row) for score, row in ranked if row >= 0]

    def likeness(self, values: Sequence[str]) -> Floats:
        """How like values are, 0..1, [values, values]: the cosine of what sets their phrases apart from all values', at least 0."""
        place = {value: number for number, value in enumerate(self.taxonomy.ids)}
        apart = (self.centroids - self.centroids.mean(axis=0))[[place[value] for value in values]]
        unit = apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-9)
        return np.asarray((unit @ unit.T).clip(0, 1), dtype=np.float32)


def solve_pull(taxonomy: Taxonomy, vectors: Floats) -> Floats:
    """The pull of a taxonomy's phrases, [phrases, values], from their vectors, [phrases, dimensions]."""
    phrases = phrases_of(taxonomy)
    labels = np.array([[phrase.weights.get(value, 0.0) for value in taxonomy.ids] for phrase in phrases], dtype=np.float32)
    return kernel.solve(vectors, labels, np.array([phrase.kind not in OWN for phrase in phrases]))


def index_name(taxonomy: Taxonomy, encoder: Encoder) -> str:
    """What an index is kept under: a digest of all it depends on."""
    return hashlib.sha256(json.dumps(_key(taxonomy, encoder), sort_keys=True).encode()).hexdigest()[:24]


def _key(taxonomy: Taxonomy, encoder: Encoder) -> dict[str, Any]:
    constants = [kernel.TEMPERATURE, kernel.RIDGE, kernel.FILLING_TEMPERATURE, kernel.FILLING_RIDGE]
    return {"format": _FORMAT, "taxonomy": _digest(phrases_of(taxonomy), taxonomy.ids), "encoder": encoder.fingerprint, "kernel": constants}
