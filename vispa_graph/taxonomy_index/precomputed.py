"""What comes with the package for the shipped phrases, their vectors and their pull: making them would take the first use minutes.

`python -m training.phrase_vectors` makes the file again. A text that is not in it, or an encoder that it was not made with, is encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vispa_graph.taxonomy_index.encoder import Encoder, Floats

FILE = Path(__file__).parent / "phrase_vectors.safetensors"
PULL = "pull."


def encode_phrases(texts: Sequence[str], encoder: Encoder) -> Floats:
    """Unit vectors of the texts, [texts, dimensions]; those that come with the package are not encoded again."""
    digests, vectors = _shipped(encoder)
    keys = digest(texts)
    places = np.searchsorted(digests, keys).clip(max=max(len(digests) - 1, 0))
    known = digests[places] == keys if len(digests) else np.zeros(len(texts), dtype=bool)
    encoded = encoder.encode([text for text, is_known in zip(texts, known, strict=True) if not is_known]) if not known.all() else vectors[:0]
    result = np.empty((len(texts), (encoded if len(encoded) else vectors).shape[1]), dtype=np.float32)
    result[~known] = encoded
    if known.any():  # vectors of another encoder have no dimensions to tell
        result[known] = vectors[places[known]]
    return np.ascontiguousarray(result / np.linalg.norm(result, axis=1, keepdims=True))


def digest(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """The first eight bytes of each text's SHA-256."""
    return np.array([int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True) for text in texts], dtype=np.int64)


def solved(name: str) -> Floats | None:
    """The pull [phrases, values] of an index of that name; None where it does not come with the package."""
    from safetensors import safe_open

    if not FILE.exists():
        return None
    with safe_open(FILE, framework="np") as file:
        key = f"{PULL}{name}"
        return np.asarray(file.get_tensor(key), dtype=np.float32) if key in file.keys() else None  # noqa: SIM118, the file is no mapping


def _shipped(encoder: Encoder) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """Ascending digests and the vectors that belong to them; none where they are another encoder's."""
    from safetensors import safe_open

    nothing = np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.float16)
    if not FILE.exists():
        return nothing
    with safe_open(FILE, framework="np") as file:
        if (file.metadata() or {}).get("encoder") != encoder.fingerprint:
            return nothing
        return file.get_tensor("digests"), file.get_tensor("vectors")
