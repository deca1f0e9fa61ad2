"""Selection by natural language inference, the paper's gate (VISPA, arXiv 2601.12758): zero-shot entailment, value by value."""

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

HYPOTHESIS = "This text is relevant to the value of {value}."
_BATCH = 32


class NLISelector:
    """Scores each value by the probability that the text entails that it is relevant to the value.

    Args:
        model: A folder or a name on the hub; the paper's is sileod/deberta-v3-base-tasksource-nli.
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
        self._loaded: tuple[Any, Any, int] | None = None

    def rank(self, query: str, hits: Sequence[Hit], config: RunnableConfig | None = None) -> list[Selected]:
        """The values considered, by their probability of entailment; equal ones in the default selector's order.

        Raises:
            ModelNotFoundError: The model is not here and cannot be fetched.
            NotARerankerError: Its labels name no entailment.
            NonFiniteError: Its probabilities are no numbers.
        """
        candidates = considered(self._default.rank(query, hits, config))
        hypotheses = [HYPOTHESIS.format(value=self._taxonomy[s.value].name.lower()) for s in candidates]
        probabilities = self._entailment(query, hypotheses)
        return in_order(
            [
                Selected(selected.value, calibrated_score(f"nli:{self._name}", p), f"entailed with probability {p:.2f}; {selected.reason}")
                for selected, p in zip(candidates, probabilities, strict=True)
            ]
        )

    def _entailment(self, premise: str, hypotheses: Sequence[str]) -> list[float]:
        """The probability of entailment among the model's labels, per hypothesis."""
        import torch

        found: list[float] = []
        with self._lock, torch.inference_mode():
            tokenizer, model, label = self._load()
            for start in range(0, len(hypotheses), _BATCH):
                batch = list(hypotheses[start : start + _BATCH])
                # A text that is too long is cut, the hypothesis never.
                longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))
                pairs = ([premise] * len(batch), batch)
                inputs = tokenizer(*pairs, truncation="only_first", max_length=longest, padding=True, return_tensors="pt").to(self._device)
                found += model(**inputs).logits.float().softmax(dim=-1)[:, label].tolist()
        return found

    def _load(self) -> tuple[Any, Any, int]:
        """Tokenizer, model and the place of its label for entailment; the caller holds the lock."""
        if self._loaded is None:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            try:
                with quiet():
                    tokenizer = AutoTokenizer.from_pretrained(self._name)
                    model = AutoModelForSequenceClassification.from_pretrained(self._name).eval().to(self._device)
            except (OSError, ValueError) as error:
                raise ModelNotFoundError(
                    f"The NLI model {self._name} is neither a folder here nor a model that could be fetched. Check the name and the network."
                ) from error
            labels = [place for name, place in model.config.label2id.items() if name.lower().startswith("entail")]
            if len(labels) != 1:
                raise NotARerankerError(
                    f"The model {self._name} has the labels {', '.join(map(str, model.config.id2label.values()))}, none of them entailment. Choose a model trained on NLI."
                )
            self._loaded = (tokenizer, model, labels[0])
        return self._loaded
