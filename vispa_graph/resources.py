"""What the nodes of one graph work with: taxonomy, index, engine, directions and models, each made on first use."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import resources as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vispa_graph.attributes import attribute_value
from vispa_graph.engine.contract import Contrast, Direction, Engine, Method, Reading, Steering
from vispa_graph.errors import EngineClosedError, SelectionSizeError, SettingsError, StoreError
from vispa_graph.settings import EMBEDDED, Settings, cache_origin, origin
from vispa_graph.taxonomy_index import Encoder, SentenceEncoder, Taxonomy, TaxonomyIndex, Value

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from vispa_graph.chat_model import SteeredChatModel
    from vispa_graph.engine.dictionary import SparseDictionary
    from vispa_graph.engine.directions import FitSettings, ReadOnce
    from vispa_graph.privacy import Privacy, Scrubber
    from vispa_graph.taxonomy_index.selection import Selector

T = TypeVar("T")
# Room for an aggregated answer, as in the paper.
_SUMMARY_TOKENS = 300
_EMBEDDED_NAME = "vispa-embedded"
# How many attributes' directions are held in memory.
_ATTRIBUTES = 64
_CLOSED = "The graph is closed, and loads no model again. Create a new graph."
_log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Profile:
    """A model's own defaults, for settings left at None.

    The defaults of this class are the paper's, but for `fits_attributes`. `layers` None stands for the paper's fractions of the depth.
    """

    method: Method = "probe"
    contrast: Contrast = "opposed"
    reading: Reading = "raw"
    regularisation: float = 1.0
    layers: tuple[float, ...] | None = None
    target_probability: float = 0.9
    max_new_tokens: int = 200
    fits_attributes: bool = True  # knows enough of the world to be steered toward what is in no taxonomy
    note: str = ""  # what every reader of its answers must know
    composes: bool = False  # too small to write summaries: answers are composed of the comments' own sentences


class Resources:
    """Makes and holds what a graph needs. Safe to share between threads and graphs.

    Args:
        settings: Chosen once for all of it.
        engine: An engine to use instead of the one the settings name; it stays the caller's to close.
        encoder: Likewise a sentence encoder.
        value_encoder: Likewise the one that finds the values at stake; None for `encoder` where that is given.
        taxonomy: Likewise a taxonomy.
        main_llm: The chat model that aggregates; None for the local model, unsteered.
        scrubber: Takes identifiers out of the texts that traces hold where `trace_content` is set.
        progress: Called with (what, done, total) while the model is fetched or loaded, and directions are fitted; a total of 0 is unknown.

    Raises:
        SettingsError: `settings` is no `Settings`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engine: Engine | None = None,
        encoder: Encoder | None = None,
        value_encoder: Encoder | None = None,
        taxonomy: Taxonomy | None = None,
        main_llm: BaseChatModel | None = None,
        scrubber: Scrubber | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(settings, Settings):
            raise SettingsError(f"Settings are expected, and {type(settings).__name__} was given. A model is named in them: Settings(model=...).")
        self.settings = settings
        self.main_llm = main_llm
        self._scrubber = scrubber
        self._progress = progress
        self._lock = threading.Lock()  # held for moments only
        self._locks: dict[str, threading.Lock] = {}  # one for each thing that is made, held while it is
        self._attribute_lock = threading.Lock()
        self._made: dict[str, Any] = {}
        self._owns_engine, self._closed = engine is None, False
        if engine is not None:
            self._made["engine"] = engine
        self.encoder: Encoder = encoder or SentenceEncoder(settings.encoder)
        # Two questions are alike there if they put the same values at stake; two sentences say the same only in the other.
        adapted = encoder is None and settings.encoder == EMBEDDED
        self.value_encoder: Encoder = value_encoder or (SentenceEncoder(adapted=True) if adapted else self.encoder)
        self.taxonomy = taxonomy or Taxonomy.load(*settings.values, shipped=settings.shipped_values, bioethics=settings.bioethics)
        self._attribute_direction = lru_cache(_ATTRIBUTES)(self._find_attribute_direction)

    @property
    def profile(self) -> Profile:
        """The defaults of the model in use."""
        return self._once("profile", self._read_profile)

    @property
    def privacy(self) -> Privacy:
        """What traces get to see."""
        from vispa_graph.privacy import Privacy

        return self._once("privacy", lambda: Privacy.of(self.taxonomy, trace_content=self.settings.trace_content, scrubber=self._scrubber))

    @property
    def index(self) -> TaxonomyIndex:
        """The taxonomy index, from the cache where it is there."""
        return self._once("index", self._open_index)

    @property
    def made_with(self) -> dict[str, Any]:
        """Everything that decides what a run says, the engine's weights apart: plain data."""
        from vispa_graph.provenance import describe

        return self._once("made_with", lambda: describe(self))

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
            return self.privacy.model(self.main_llm)
        local = self.chat_model
        return local.model_copy(update={"max_new_tokens": max(_SUMMARY_TOKENS, local.max_new_tokens)})

    def check_top_k(self) -> None:
        """Refuse to hear more values than there are.

        Raises:
            SelectionSizeError: `top_k` is larger than the taxonomy.
        """
        k, size = self.settings.top_k, len(self.taxonomy)
        if k > size:
            raise SelectionSizeError(f"top_k{origin('top_k', str(k))} is {k}, but the taxonomy holds {size} values. Choose 1 to {size}.")

    def check_model(self) -> None:
        """Refuse a model, a device or layers that the settings name but that there are not, before anything is loaded.

        Reads no more than the model's configuration, and nothing of an engine that was given.

        Raises:
            LayerError, ModelNotFoundError, NotCausalError, SettingsError: Says which.
        """
        from vispa_graph.engine.checks import check_device
        from vispa_graph.engine.folder import depth_of
        from vispa_graph.engine.layers import check_layers

        if not self._owns_engine:
            return
        s = self.settings
        if s.device_map is None:
            check_device(s.device)
        depth = depth_of(self._model_folder)
        if depth is None:
            from vispa_graph.engine.huggingface import configured_depth  # imports transformers, which costs seconds

            depth = configured_depth(self._model_folder, revision=s.revision, trust_remote_code=s.trust_remote_code)
        if depth is not None and s.layers is not None and s.strength:
            check_layers(s.layers, depth)

    def steering(self, value: str) -> Steering | None:
        """The steering toward a value; None where the strength is 0.

        Raises:
            UnknownValueError: The taxonomy does not hold it.
        """
        value_id = self.taxonomy[value].id
        return self._steering(self.directions[value_id]) if self.settings.strength else None

    def attribute_steering(self, attribute: str) -> Steering:
        """The steering toward an attribute outside the taxonomy, from the cache or fitted now on pairs made from templates."""
        with self._attribute_lock:  # an attribute asked for twice is fitted once
            direction = self._attribute_direction(attribute)
        return self._steering(direction)

    def steers_toward(self, attribute: str) -> bool:
        """Whether the direction fitted for an attribute tells held-out sentences apart."""
        from vispa_graph.engine.directions import separates

        return separates(self.attribute_steering(attribute).direction)

    def attribute_value(self, attribute: str | None) -> Value | None:
        """The value that an attribute is: of the taxonomy, or made of templates so that it can be steered to; None if neither may be."""
        if not attribute:
            return None
        if attribute in self.taxonomy:
            return self.taxonomy[attribute]
        asked = self.settings.fit_attributes
        fits = self.profile.fits_attributes if asked is None else asked
        return attribute_value(attribute) if fits and self.settings.strength else None

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
            solver=chosen.solver,
        )

    @property
    def method(self) -> str:
        """How comments are steered, as traces name it."""
        if not self.settings.strength:
            return "unsteered"
        return f"{self.settings.method or self.profile.method}{'-generated' if self.settings.positions == 'generated' else ''}"

    def close(self) -> None:
        """Close the engine, if it was loaded here, for good: it is not loaded again. Idempotent, and waits for no load or fit."""
        with self._lock:
            self._closed = True
            engine = self._made.get("engine") if self._owns_engine else None
        if engine is not None:
            engine.close()

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._made:
            with self._lock:
                lock = self._locks.setdefault(name, threading.Lock())
            with lock:
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

    @contextmanager
    def _using_the_cache(self) -> Iterator[None]:
        """Has an error of the system that comes from the cache say so.

        Raises:
            StoreError: The cache cannot be read or written; the message says where it was set.
        """
        cache = self.settings.cache
        try:
            yield
        except OSError as error:
            place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
            if place is None or not (place.is_relative_to(cache) or cache.is_relative_to(place)):
                raise
            raise StoreError(
                f"The cache folder {cache}{cache_origin(cache)} cannot be used: {error.strerror or error}, at {place}. "
                "Check its permissions and the space left, or choose another folder: Settings(cache=...) or VISPA_CACHE."
            ) from error

    def _open_index(self) -> TaxonomyIndex:
        with self._using_the_cache():
            return TaxonomyIndex.open(self.taxonomy, self.value_encoder, self.settings.cache)

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

    @property
    def _model_folder(self) -> str:
        """Where the model lies, or its name on the hub."""
        return str(embedded_folder()) if self.settings.model == EMBEDDED else self.settings.model

    def _load_engine(self) -> Engine:
        from vispa_graph.engine.huggingface import HuggingFaceEngine

        if self._closed:
            raise EngineClosedError(_CLOSED)
        s = self.settings
        if self._progress:
            from vispa_graph.engine.folder import is_fetched

            here = is_fetched(self._model_folder, s.revision)
            self._progress("loading the model" if here else f"fetching {s.model} from the hub", 0, 0)
        engine = HuggingFaceEngine.load(
            self._model_folder,
            name=_EMBEDDED_NAME if s.model == EMBEDDED else s.model,
            device=s.device,
            dtype=s.dtype,
            device_map=s.device_map,
            revision=s.revision,
            trust_remote_code=s.trust_remote_code,
            linger=s.linger_ms / 1000,
            capacity=s.batch_tokens,
            queue_size=s.queue_size,
            timeout=s.timeout,
            packed_bytes=int(s.packed_gigabytes * 1e9),
        )
        with self._lock:
            if not self._closed:
                self._made["engine"] = engine
                return engine
        engine.close()  # the graph was closed while it loaded
        raise EngineClosedError(_CLOSED)

    def _steering(self, direction: Direction) -> Steering:
        target = self.settings.target_probability
        p0 = self.profile.target_probability if target is None else target
        return Steering(direction, self.settings.strength, p0, self.settings.positions)

    def _find_directions(self) -> dict[str, Direction]:
        from vispa_graph.engine.directions import separates

        directions = self._fit(self.taxonomy, self.fit_settings())
        if weak := [value for value, direction in directions.items() if not separates(direction)]:
            _log.warning(
                "%d of %d directions do not tell held-out sentences apart, such as that of %s: comments steered by them may not speak for their values. "
                "`vispa fit` shows all; another reading, method or choice of layers may help.",
                len(weak),
                len(directions),
                weak[0],
            )
        return directions

    def _find_attribute_direction(self, attribute: str) -> Direction:
        # Other values' sentences would differ from the templates in wording alone.
        value = attribute_value(attribute)
        return self._fit([value], replace(self.fit_settings(), contrast="opposed"))[value.id]

    def _fit(self, values: Iterable[Value], fit: FitSettings) -> dict[str, Direction]:
        """The directions of values, from the store where they are there."""
        from vispa_graph.engine.directions import ReadOnce, fit_directions
        from vispa_graph.engine.store import DirectionStore, folder_name, manifest_key

        reader: Engine | ReadOnce = self.engine
        progress = partial(self._progress, "fitting directions") if self._progress else None
        with self._using_the_cache():
            dictionary, name = None, None
            if fit.method == "sae":  # what the dictionary is learned from is read again to fit
                reader = once = ReadOnce(self.engine)
                dictionary, name = self._find_dictionary(fit, once)
            key = manifest_key(self.engine, fit, revision=self.settings.revision, dictionary=name)
            folder = self.settings.cache / "directions" / folder_name(key)
            store = DirectionStore(folder, key, model_name=self.engine.name, shipped=embedded_folder() / "directions")
            return fit_directions(reader, values, fit, progress, dictionary=dictionary, store=store)

    def _find_dictionary(self, fit: FitSettings, reader: ReadOnce) -> tuple[SparseDictionary, str]:
        """The sparse dictionary of the settings, or one learned from the states of the taxonomy's sentences and kept in the cache.

        With it what tells it from others.
        """
        from vispa_graph.engine.dictionary import learn_dictionary, open_dictionary
        from vispa_graph.engine.directions import corpus_key, read_corpus
        from vispa_graph.engine.store import folder_name

        if self.settings.dictionary is not None:
            given = open_dictionary(self.settings.dictionary, fit.layers)
            return given, given.fingerprint
        folder = self.settings.cache / "dictionaries" / folder_name(corpus_key(reader, self.taxonomy, fit.reading))
        reading = partial(self._progress, "reading for the dictionary") if self._progress else None
        learning = partial(self._progress, "learning the dictionary") if self._progress else None
        learned = learn_dictionary(folder, fit.layers, lambda layers: read_corpus(reader, self.taxonomy, fit.reading, layers, reading), learning)
        return learned, folder.name

    def _make_chat_model(self) -> SteeredChatModel:
        from vispa_graph.chat_model import SteeredChatModel

        s = self.settings
        return SteeredChatModel(
            engine=self.engine,
            find_steering=self.steering,
            max_new_tokens=s.max_new_tokens or self.profile.max_new_tokens,
            temperature=s.temperature,
            seed=s.seed,
            privacy=self.privacy,
        )


def embedded_folder() -> Path:
    """Where the embedded language model lies."""
    return Path(str(package_files.files("vispa_graph.embedded")))
