"""Selection by a cross-encoder, which reads text and value together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig

from vispa_graph.errors import ModelNotFoundError, NotARerankerError
from vispa_graph.quiet import quiet
from vispa_graph.taxonomy_index.calibration import calibrated_score
from vispa_graph.taxonomy_index.index import Hit
from vispa_graph.taxonomy_index.selection import Selected, Selector, considered, in_order
from vispa_graph.taxonomy_index.taxonomy import Taxonomy


class CrossEncoderSelector:
    """Scores each value by a sentence-transformers cross-encoder over the text and the value's name and definition.

    Args:
        model: A folder or a name on the hub, such as cross-encoder/ms-marco-MiniLM-L6-v2.
        taxonomy: The values.
        default: Says which values are considered where there are many.
        device: Where the model runs.
    """

    def __init__(self, model: str, taxonomy: Taxonomy, default: Selector, *, device: str = "cpu") -> None:
        self._name = model
        self._taxonomy = taxonomy
        self._default = default
        self._device = device
        self._lock = threading.Lock()
        self._model: Any = None

    def rank(self, query: str, hits: Sequence[Hit], config: RunnableConfig | None = None) -> list[Selected]:
        """The values considered, by the sigmoid of the model's score; equal ones in the default selector's order.

        Raises:
            ModelNotFoundError: The model is not here and cannot be fetched.
            NotARerankerError: It gives no score for a pair, or more than one.
            NonFiniteError: Its scores are no numbers.
        """
        import torch

        candidates = considered(self._default.rank(query, hits, config))
        values = [self._taxonomy[s.value] for s in candidates]
        with self._lock:
            scores = self._load().predict(
                [(query, f"{value.name}: {value.definition}") for value in values], activation_fn=torch.nn.Sigmoid(), show_progress_bar=False
            )
        return in_order(
            [
                Selected(s.value, calibrated_score(f"cross-encoder:{self._name}", float(p)), f"cross-encoder score {p:.2f}; {s.reason}")
                for s, p in zip(candidates, scores, strict=True)
            ]
        )

    def _load(self) -> Any:
        """The model; the caller holds the lock."""
        if self._model is None:
            from sentence_transformers import CrossEncoder

            try:
                with quiet():
                    model = CrossEncoder(self._name, device=self._device)
            except (OSError, ValueError) as error:
                raise ModelNotFoundError(
                    f"The cross-encoder {self._name} is neither a folder here nor a model that could be fetched. Check the name and the network."
                ) from error
            kinds = getattr(model.config, "architectures", None) or ["no architecture"]
            if not kinds[0].endswith(("ForSequenceClassification", "ForCausalLM")):  # anything else is given a head of random weights
                raise NotARerankerError(f"The model {self._name} is a {kinds[0]}, which scores no pairs. Choose a reranking cross-encoder.")
            if model.num_labels != 1:
                raise NotARerankerError(
                    f"The model {self._name} gives {model.num_labels} scores for a pair, not one. "
                    f'Choose a reranking cross-encoder, or reranker="nli:{self._name}" if it was trained on NLI.'
                )
            self._model = model
        return self._model
