"""Fitting the directions of values from contrastive pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from vispa_graph.engine.contract import Contrast, Direction, Engine, Floats, Method, Reading, Solver
from vispa_graph.engine.dictionary import RECIPE, SparseDictionary
from vispa_graph.engine.methods import Array, fitter
from vispa_graph.engine.pairs import Mask, Prompt, Twins, digest, make_twins
from vispa_graph.engine.store import DirectionStore, StateStore
from vispa_graph.taxonomy_index.taxonomy import Value

T = TypeVar("T")

# Fixed magnitudes where neither the value nor the caller says otherwise (ConVA for mean_difference, RepE for pca).
DEFAULT_ALPHA: dict[Method, float] = {"probe": 1.0, "mean_difference": 0.5, "pca": 1.0, "sae": 0.5}
# Held-out accuracy below which a direction is said not to separate; 0.5 is chance.
SEPARATES = 0.6

# Values read at a time: enough for full batches, and what is lost when a fit breaks off.
_TOGETHER = 8
# Steps of the progress that fitting one value counts, a sentence read counting one.
_FIT_STEPS = 8


@dataclass(frozen=True)
class FitSettings:
    """How directions are fitted.

    Attributes:
        method: probe, mean_difference, pca or sae.
        layers: Zero-based blocks, ascending.
        contrast: `opposed` sets the positive twins against the negative ones, as the paper does; `opposed+others` adds the positive
            twins of all other values to the negatives, each class weighing the same; of a value that comes with vispa_graph those of the
            others that do, so that a value of one's own changes no other. `pca` always uses the opposed twins.
        reading: `raw` reads the bare sentence at its last token, as the paper does; `chat` puts it, with three others of its side,
            before a situation in a user's turn and reads at the assistant's header.
        regularisation: C of the logistic regression, on raw features; 1 is scikit-learn's default and the paper's.
        solver: Of the logistic regression. `saga` fits on 70% of the pairs, as the paper's code does, `exact` on all of them.
    """

    method: Method
    layers: tuple[int, ...]
    contrast: Contrast = "opposed"
    reading: Reading = "raw"
    regularisation: float = 1.0
    solver: Solver = "exact"


@dataclass(frozen=True)
class _Task:
    """A value to fit: what is read for it, which others it is set against, and the blocks that are not there yet."""

    value: Value
    twins: Twins
    others: tuple[str, ...]
    source: str
    layers: tuple[int, ...]


def fit_directions(
    engine: Engine | ReadOnce,
    values: Iterable[Value],
    settings: FitSettings,
    progress: Callable[[int, int], None] | None = None,
    *,
    dictionary: SparseDictionary | None = None,
    store: DirectionStore | None = None,
) -> dict[str, Direction]:
    """Fit the direction of every value, reading the contrastive pairs of several values in one batch.

    Args:
        progress: Called with (done, total) steps; not at all where nothing is left to fit.
        dictionary: Needed by the method `sae`.
        store: Holds what is fitted already, and gets each value as soon as it is fitted: a fit that broke off goes on where it was. What
            several values need is kept beside it while the fit runs.

    Returns:
        A direction for each value id, in the order of the values.
    """
    tasks = _tasks(list(values), settings, store)
    todo = [task for task in tasks if task.layers]
    fitted: dict[str, Direction] = {}
    states = None if store is None else StateStore(store.folder)
    if store is not None and todo:
        store.begin()
    for task, direction in _fit(engine, todo, {task.value.id: task.twins for task in tasks}, settings, progress, dictionary, states):
        if store is not None:
            store.add(direction, task.source)
        fitted[task.value.id] = direction
    if states is not None and todo:
        states.remove()
    if store is not None:
        fitted = {task.value.id: store.load(task.value.id, task.source, settings.method, settings.layers) for task in tasks}
    return {task.value.id: replace(fitted[task.value.id], alpha=_alpha(task.value, settings.method)) for task in tasks}


def fit_direction(
    value: str,
    positives: Floats,
    negatives: Floats,
    settings: FitSettings,
    alpha: float | None = None,
    *,
    held: tuple[Mask, Mask] | None = None,
    dictionary: SparseDictionary | None = None,
) -> Direction:
    """The direction that tells positive states from negative ones.

    Args:
        positives: [n, L, d], in the order of the pairs.
        negatives: [m, L, d]; for `pca` the twins of the positives, in the same order.
        alpha: Fixed magnitude; None for the method's own.
        held: [n] and [m], the rows to measure held-out accuracy by. `saga` does not see them; otherwise the direction is fitted on all
            rows, and the accuracy is that of another, fitted without them.
        dictionary: Of `sae`.
    """
    fit = fitter(settings.method, solver=settings.solver, regularisation=settings.regularisation, dictionary=dictionary)
    vectors = np.empty(positives.shape[1:], dtype=np.float32)
    bias, accuracy, held_out = np.zeros((3, len(vectors)), dtype=np.float32)
    for row, layer in enumerate(settings.layers):
        p, n = positives[:, row].astype(np.float64), negatives[:, row].astype(np.float64)
        apart = None
        if held is not None:
            kept = p[~held[0]], n[~held[1]]
            apart = fit(layer, *kept)
            held_out[row] = _accuracy(*apart, p[held[0]], n[held[1]])
        if apart is not None and settings.solver == "saga":
            (w, b), (p, n) = apart, kept
        else:
            w, b = fit(layer, p, n)
        vectors[row] = w
        bias[row] = b if settings.method == "probe" else 0
        accuracy[row] = _accuracy(w, b, p, n)
    chosen = DEFAULT_ALPHA[settings.method] if alpha is None else alpha
    return Direction(value, settings.method, settings.layers, vectors, bias, chosen, accuracy, None if held is None else held_out)


class ReadOnce:
    """Reads through an engine and remembers the states, [depth, width] a prompt: several fits on the same sentences read them once."""

    def __init__(self, engine: Engine) -> None:
        self.fingerprint = engine.fingerprint
        self._engine = engine
        self._states: dict[str, Floats] = {}

    def read(self, conversations: Sequence[Prompt], progress: Callable[[int], None] | None = None) -> Floats:
        """As `Engine.read`."""
        names = [json.dumps(conversation) for conversation in conversations]
        new = {name: conversation for name, conversation in zip(names, conversations, strict=True) if name not in self._states}
        if new:
            self._states |= dict(zip(new, self._engine.read(list(new.values()), progress), strict=True))
        if progress and len(new) < len(names):
            progress(len(names) - len(new))
        return np.stack([self._states[name] for name in names])


def separates(direction: Direction) -> bool:
    """Whether a direction tells sentences apart that it was not fitted on, in the mean over its blocks; True where that was not measured."""
    return direction.held_out is None or float(direction.held_out.mean()) >= SEPARATES


def read_states(engine: Engine | ReadOnce, prompts: Sequence[Prompt], layers: Sequence[int], advance: Callable[[int], None] | None = None) -> Floats:
    """The states of prompts at some blocks, [prompts, L, d]."""
    return engine.read(prompts, advance)[:, list(layers)]


def corpus_key(engine: Engine | ReadOnce, values: Iterable[Value], reading: Reading) -> dict[str, object]:
    """What a dictionary learned on the sentences of some values depends on."""
    sources = [digest(make_twins(value.all_pairs, reading), ()) for value in values]
    return {"model": engine.fingerprint, "read": sources, **RECIPE}


def read_corpus(
    engine: Engine | ReadOnce, values: Iterable[Value], reading: Reading, layers: Sequence[int], progress: Callable[[int, int], None] | None = None
) -> Floats:
    """The states [prompts, L, d] of both sides of all pairs of some values."""
    twins = [make_twins(value.all_pairs, reading) for value in values]
    prompts = [prompt for twin in twins for side in (twin.positives, twin.negatives) for prompt in side]
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, len(prompts))

    return read_states(engine, prompts, layers, advance)


def _tasks(values: Sequence[Value], settings: FitSettings, store: DirectionStore | None) -> list[_Task]:
    twins = {value.id: make_twins(value.all_pairs, settings.reading) for value in values}
    tasks = []
    for value in values:
        opposed = settings.contrast == "opposed" or settings.method == "pca"
        others = () if opposed else tuple(v.id for v in values if v.id != value.id and (v.shipped or not value.shipped))
        source = digest(twins[value.id], [twins[other] for other in others])
        there = store.layers(value.id, source) if store is not None else frozenset()
        tasks.append(_Task(value, twins[value.id], others, source, tuple(layer for layer in settings.layers if layer not in there)))
    return tasks


def _fit(
    engine: Engine | ReadOnce,
    tasks: Sequence[_Task],
    twins: Mapping[str, Twins],
    settings: FitSettings,
    progress: Callable[[int, int], None] | None,
    dictionary: SparseDictionary | None,
    states: StateStore | None,
) -> Iterable[tuple[_Task, Direction]]:
    """Each task with its direction at the blocks it lacks, as soon as it is there."""
    needed = dict.fromkeys(other for task in tasks for other in task.others)
    own = sum(len(task.twins.positives) * (1 if task.value.id in needed else 2) for task in tasks)
    total, done = own + sum(len(twins[other].positives) for other in needed) + len(tasks) * _FIT_STEPS, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    positives: dict[str, Floats] = {}
    for some in _chunks(list(needed)):
        positives |= _read_kept(engine, {other: twins[other].positives for other in some}, settings.layers, advance, states)
    for chunk in _chunks(tasks):
        new = {task.value.id: task.twins.positives for task in chunk if task.value.id not in positives}
        sides = _read_sides(engine, new | {f"-{task.value.id}": task.twins.negatives for task in chunk}, settings.layers, advance)
        for task in chunk:
            name = task.value.id
            side = sides[name] if name in sides else positives[name]
            against = np.concatenate([sides[f"-{name}"], *(positives[other] for other in task.others)])
            held = task.twins.held, np.concatenate([task.twins.held, *(twins[other].held for other in task.others)])
            rows = [settings.layers.index(layer) for layer in task.layers]
            yield (
                task,
                fit_direction(
                    name,
                    side[:, rows],
                    against[:, rows],
                    replace(settings, layers=task.layers),
                    held=held if held[0].any() else None,
                    dictionary=dictionary,
                ),
            )
            advance(_FIT_STEPS)


def _chunks(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + _TOGETHER] for start in range(0, len(items), _TOGETHER)]


def _read_kept(
    engine: Engine | ReadOnce,
    sides: Mapping[str, Sequence[Prompt]],
    layers: Sequence[int],
    advance: Callable[[int], None],
    kept: StateStore | None,
) -> dict[str, Floats]:
    """As `_read_sides`, from where a fit that broke off has kept what it read; what is read now is kept there."""
    if kept is None:
        return _read_sides(engine, sides, layers, advance)
    found = {name: states for name, prompts in sides.items() if (states := kept.load(prompts, layers)) is not None}
    if found:
        advance(sum(map(len, found.values())))
    missing = {name: prompts for name, prompts in sides.items() if name not in found}
    if missing:
        new = _read_sides(engine, missing, layers, advance)
        for name, states in new.items():
            kept.keep(missing[name], layers, states)
        found |= new
    return found


def _read_sides(
    engine: Engine | ReadOnce, sides: Mapping[str, Sequence[Prompt]], layers: Sequence[int], advance: Callable[[int], None]
) -> dict[str, Floats]:
    """The states [prompts, L, d] of several lists of prompts, read in one batch."""
    states = read_states(engine, [prompt for prompts in sides.values() for prompt in prompts], layers, advance)
    ends = np.cumsum([len(prompts) for prompts in sides.values()])
    return dict(zip(sides, np.split(states, ends[:-1]), strict=True))


def _alpha(value: Value, method: Method) -> float:
    return value.alpha if method == "mean_difference" and value.alpha is not None else DEFAULT_ALPHA[method]


def _accuracy(w: Array, b: float, positives: Array, negatives: Array) -> float:
    """Balanced accuracy of the side of the plane w.h + b = 0."""
    return float((positives @ w + b > 0).mean() + (negatives @ w + b <= 0).mean()) / 2
