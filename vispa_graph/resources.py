"""What the nodes of one graph work with: taxonomy, index, engine, directions and models, each made on first use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vispa_graph.engine.contract import Contrast, Direction, Engine, Method, Reading, Steering
from vispa_graph.settings import EMBEDDED, Settings
from vispa_graph.taxonomy_index import Encoder, SentenceEncoder, Taxonomy, TaxonomyIndex

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from vispa_graph.chat_model import SteeredChatModel
    from vispa_graph.engine.directions import FitSettings
    from vispa_graph.taxonomy_index.selection import Selector

T = TypeVar("T")
# Room for an aggregated answer, as in the paper.
_SUMMARY_TOKENS = 300
_EMBEDDED_NAME = "vispa-embedded"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Profile:
    """A model's own defaults, for settings left at None.

    The defaults of this class are the paper's. `layers` None stands for the paper's fractions of the depth.
    """

    method: Method = "probe"
    contrast: Contrast = "opposed"
    reading: Reading = "raw"
    regularisation: float = 1.0
    layers: tuple[int, ...] | None = None
    target_probability: float = 0.9
    max_new_tokens: int = 200
    note: str = ""  # what every reader of its answers must know
    composes: bool = False  # too small to write summaries: answers are composed of the comments' own sentences


class Resources:
    """Makes and holds what a graph needs. Safe to share between threads and graphs.

    Args:
        settings: Chosen once for all of it.
        engine: An engine to use instead of the one the settings name; it stays the caller's to close.
        encoder: Likewise a sentence encoder.
        taxonomy: Likewise a taxonomy.
        main_llm: The chat model that aggregates; None for the local model, unsteered.
        progress: Called with (what, done, total) while directions are fitted.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engine: Engine | None = None,
        encoder: Encoder | None = None,
        taxonomy: Taxonomy | None = None,
        main_llm: BaseChatModel | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.main_llm = main_llm
        self._progress = progress
        self._lock = threading.RLock()
        self._made: dict[str, Any] = {}
        self._owns_engine = engine is None
        if engine is not None:
            self._made["engine"] = engine
        self.encoder: Encoder = encoder or SentenceEncoder(settings.encoder)
        self.taxonomy = taxonomy or Taxonomy.load(*settings.values, shipped=settings.shipped_values, bioethics=settings.bioethics)

    @property
    def profile(self) -> Profile:
        """The defaults of the model in use."""
        return self._once("profile", self._read_profile)

    @property
    def index(self) -> TaxonomyIndex:
        """The taxonomy index, from the cache where it is there."""
        return self._once("index", lambda: TaxonomyIndex.open(self.taxonomy, self.encoder, self.settings.cache))

    @property
    def selector(self) -> Selector:
        """What judges the values at stake, as the settings' `reranker` says."""
        return self._once("selector", self._make_selector)

    @property
    def engine(self) -> Engine:
        """The steering engine; loading it takes seconds."""
        return self._once("engine", self._load_engine)

    @property
    def directions(self) -> dict[str, Direction]:
        """The directions of all values, shipped, from the cache, or fitted now and cached."""
        return self._once("directions", self._find_directions)

    @property
    def chat_model(self) -> SteeredChatModel:
        """The local model, unsteered."""
        return self._once("chat_model", self._make_chat_model)

    @property
    def composes(self) -> bool:
        """Whether answers are composed of the comments' sentences instead of generated."""
        if self.settings.aggregation == "auto":
            return self.main_llm is None and self.profile.composes
        return self.settings.aggregation == "compose"

    @property
    def summariser(self) -> BaseChatModel:
        """The main language model: the caller's, or the local one unsteered."""
        if self.main_llm is not None:
            return self.main_llm
        local = self.chat_model
        return local.model_copy(update={"max_new_tokens": max(_SUMMARY_TOKENS, local.max_new_tokens)})

    def steering(self, value: str) -> Steering | None:
        """The steering toward a value; None where the strength is 0.

        Raises:
            UnknownValueError: The taxonomy does not hold it.
        """
        value_id = self.taxonomy[value].id
        if self.settings.strength == 0:
            return None
        target = self.settings.target_probability
        return Steering(self.directions[value_id], self.settings.strength, self.profile.target_probability if target is None else target)

    def fit_settings(self) -> FitSettings:
        """How directions are fitted: the settings, completed by the model's defaults.

        Raises:
            LayerError: A layer the model does not have.
        """
        from vispa_graph.engine.directions import FitSettings
        from vispa_graph.engine.layers import check_layers, default_layers

        chosen, profile = self.settings, self.profile
        layers = chosen.layers if chosen.layers is not None else profile.layers
        depth = self.engine.depth
        return FitSettings(
            method=chosen.method or profile.method,
            layers=default_layers(depth) if layers is None else check_layers(layers, depth),
            contrast=chosen.contrast or profile.contrast,
            reading=chosen.reading or profile.reading,
            regularisation=chosen.regularisation or profile.regularisation,
        )

    def steering_fingerprint(self) -> str:
        """A digest of everything, beside model and value, that decides what a steered comment says."""
        s = self.settings
        chosen = [
            s.strength,
            s.target_probability,
            s.max_new_tokens,
            s.temperature,
            s.seed,
            s.dtype,
            s.method,
            s.contrast,
            s.reading,
            s.regularisation,
            s.layers,
        ]
        return hashlib.sha256(json.dumps([*chosen, self.taxonomy.fingerprint]).encode()).hexdigest()[:16]

    def close(self) -> None:
        """Close the engine, if it was loaded here. Idempotent."""
        with self._lock:
            engine = self._made.pop("engine", None) if self._owns_engine else None
            self._made.pop("chat_model", None)
        if engine is not None:
            engine.close()

    def _once(self, name: str, make: Callable[[], T]) -> T:
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return cast(T, self._made[name])

    def _read_profile(self) -> Profile:
        if self.settings.model != EMBEDDED or not (self._owns_engine or self.engine.name == _EMBEDDED_NAME):
            return Profile()
        data = json.loads((embedded_folder() / "profile.json").read_text(encoding="utf-8"))
        if data.get("layers") is not None:
            data["layers"] = tuple(data["layers"])
        return Profile(**data)

    def _make_selector(self) -> Selector:
        from vispa_graph.taxonomy_index.selection import PhraseSelector

        default = PhraseSelector(self.index)
        kind, _, model = self.settings.reranker.partition(":")
        if kind == "nli":
            from vispa_graph.taxonomy_index.nli import NLISelector

            return NLISelector(model, self.taxonomy, default, device=self.settings.device)
        if kind == "cross-encoder":
            from vispa_graph.taxonomy_index.cross_encoder import CrossEncoderSelector

            return CrossEncoderSelector(model, self.taxonomy, default, device=self.settings.device)
        if kind == "llm":
            from vispa_graph.taxonomy_index.llm import LLMSelector

            return LLMSelector(lambda: self.summariser, self.taxonomy, default)
        return default

    def _load_engine(self) -> Engine:
        from vispa_graph.engine.huggingface import HuggingFaceEngine

        s = self.settings
        return HuggingFaceEngine.load(
            str(embedded_folder()) if s.model == EMBEDDED else s.model,
            name=_EMBEDDED_NAME if s.model == EMBEDDED else s.model,
            device=s.device,
            dtype=s.dtype,
            device_map=s.device_map,
            revision=s.revision,
            trust_remote_code=s.trust_remote_code,
            linger=s.linger_ms / 1000,
            capacity=s.batch_tokens,
        )

    def _find_directions(self) -> dict[str, Direction]:
        from vispa_graph.engine.directions import fit_directions
        from vispa_graph.engine.store import folder_name, is_for, load_directions, manifest_key, save_directions

        fit = self.fit_settings()
        key = manifest_key(self.engine.fingerprint, self.taxonomy.fingerprint, fit)
        shipped = embedded_folder() / "directions"
        if is_for(shipped, key):
            return load_directions(shipped, key)
        folder = self.settings.cache / "directions" / folder_name(key)
        if folder.exists():
            return load_directions(folder, key)
        progress = partial(self._progress, "fitting directions") if self._progress else None
        directions = fit_directions(self.engine, self.taxonomy, fit, progress)
        save_directions(folder, directions, key, model_name=self.engine.name)
        return directions

    def _make_chat_model(self) -> SteeredChatModel:
        from vispa_graph.chat_model import SteeredChatModel

        s = self.settings
        return SteeredChatModel(
            engine=self.engine,
            find_steering=self.steering,
            max_new_tokens=s.max_new_tokens or self.profile.max_new_tokens,
            temperature=s.temperature,
            seed=s.seed,
        )


def embedded_folder() -> Path:
    """Where the embedded language model lies."""
    return Path(str(package_files.files("vispa_graph.embedded")))
