"""What is wrong with value files, beyond what keeps them from being read: each problem with file and line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vispa_graph.errors import TaxonomyError
from vispa_graph.taxonomy_index.encoder import Encoder
from vispa_graph.taxonomy_index.precomputed import encode_phrases
from vispa_graph.taxonomy_index.taxonomy import (
    BIOETHICS,
    CONCERNS,
    FAMILIES,
    FORMS,
    SHIPPED,
    Concern,
    Pair,
    Value,
    check_is_folder,
    pair_lines,
    read_concerns,
    read_value,
    read_yaml,
    value_problems,
)

# Characters of the positive twin for each of the negative.
LENGTH_RATIO = (0.8, 1.25)
# Words that the twins share, of the longer one's.
SHARED_WORDS = 0.4
# Cosine from which two pairs say the same.
NEAR_DUPLICATE = 0.95

_WORD = re.compile(r"[\w'’]+")


@dataclass(frozen=True, order=True)
class Problem:
    """Something to mend.

    Attributes:
        line: From 1.
    """

    file: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class _Placed:
    """A pair and where it stands."""

    pair: Pair
    value: Value
    file: Path
    line: int


def check_folder(folder: Path, encoder: Encoder, *, families: Collection[str] = ()) -> list[Problem]:
    """Everything wrong with the value files of a folder, by file and line.

    Checked are duplicate YAML keys, whatever keeps a file from being read (such as unknown keys and fields of wrong types), duplicate ids (also of shipped values and among concerns),
    concerns that point at no value, unknown families, missing forms, and of the pairs: twins of unlike length, that share too few words, or of which only one names the
    value, and pairs that say nearly the same as another of the folder.

    Args:
        folder: Holds value files and perhaps a bank of concerns.
        encoder: Tells which pairs say the same.
        families: Families beside those of the shipped values.

    Raises:
        TaxonomyError: There is no such folder, it is a file, or it holds no value files.
    """
    check_is_folder(folder)
    paths = sorted(folder.glob("*.yaml"))
    if not [path for path in paths if path.name != CONCERNS.name]:
        raise TaxonomyError(f"{folder}: the folder holds no *.yaml value files. Add one, or name another folder.")
    known = (*FAMILIES, *families)
    problems: list[Problem] = []
    values: list[tuple[Value, yaml.Node]] = []
    concerns: list[Concern] = []
    for path in paths:
        try:
            node, data = read_yaml(path)
            problems += _duplicate_keys(path, node)
            if path.name == CONCERNS.name:
                concerns = read_concerns(path)
                continue
            if isinstance(data, dict):
                problems += _gaps(path, node, data, known)
            unread = [Problem(path, line, message) for line, message in value_problems(node, data)]
            problems += unread
            if not unread:
                values.append((read_value(path), node))
        except TaxonomyError as error:
            problems.append(_as_problem(path, str(error)))
    shipped = {path.stem: path for own in (SHIPPED, BIOETHICS) if not own.samefile(folder) for path in own.glob("*.yaml")}
    problems += _ids(values, shipped)
    problems += _pointing_nowhere(concerns, {value.id for value, _ in values} | set(shipped))
    placed: list[_Placed] = []
    for value, node in values:
        file, lines = value.file or folder, pair_lines(node)
        for form, pairs in value.pairs.items():
            placed += [_Placed(pair, value, file, lines.get((form, number), _line(node, "pairs"))) for number, pair in enumerate(pairs)]
    for one in placed:
        problems += [Problem(one.file, one.line, message) for message in check_twins(one.pair, one.value)]
    return sorted({*problems, *_near_duplicates(placed, encoder)})


def check_twins(pair: Pair, value: Value) -> Iterator[str]:
    """What is wrong with a pair in itself."""
    ratio = len(pair.positive) / len(pair.negative)
    if not LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1]:
        yield f"the twins differ in length (ratio {ratio:.2f}, not {LENGTH_RATIO[0]} to {LENGTH_RATIO[1]}). Make them about equally long."
    shared = shared_words(pair)
    if shared < SHARED_WORDS:
        yield f"the twins share {shared:.0%} of their words, less than {SHARED_WORDS:.0%}. Tell the same situation in both."
    for name in dict.fromkeys((value.name, *value.aliases)):
        named = [bool(re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)) for text in (pair.positive, pair.negative)]
        if named[0] != named[1]:
            yield f"only the {'positive' if named[0] else 'negative'} twin names the value ({name!r}). Leave the name out, or use it in both."


def shared_words(pair: Pair) -> float:
    """The share of the longer twin's words that stand in the other, 0..1; a word that stands twice counts twice."""
    one, other = (Counter(_WORD.findall(text.lower())) for text in (pair.positive, pair.negative))
    return (one & other).total() / max(one.total(), other.total(), 1)


def _duplicate_keys(path: Path, root: yaml.Node) -> Iterator[Problem]:
    """Keys that stand twice in one mapping: YAML readers keep the last and drop the first without a word."""
    left, visited = [root], set()
    while left:
        node = left.pop()
        if id(node) in visited:  # an alias; one may even lead back to what it stands in
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: dict[Any, int] = {}
            for key, child in node.value:
                line = key.start_mark.line + 1
                if key.value in seen:
                    yield Problem(path, line, f"the key {key.value!r} stands here for the second time, first in line {seen[key.value]}. Keep one.")
                seen.setdefault(key.value, line)
                left.append(child)


def _gaps(path: Path, node: yaml.Node, data: Mapping[str, Any], families: Sequence[str]) -> Iterator[Problem]:
    """An unknown family and missing forms, also of a file that cannot be read as a value yet: its author hears of all at once."""
    family, pairs = data.get("family"), data.get("pairs")
    if isinstance(family, str) and family.strip() not in families:
        yield Problem(
            path,
            _line(node, "family"),
            f"unknown family {family.strip()!r}. Known: {', '.join(families)}. For one of your own: --new-family {family.strip()}.",
        )
    forms = next((child for key, child in node.value if key.value == "pairs"), node)
    for form in FORMS:
        if not isinstance(pairs, dict) or not pairs.get(form):
            line = _line(forms, form, default=_line(node, "pairs"))
            yield Problem(path, line, f"the form {form!r} is missing. Give each value pairs of all four forms.")


def _ids(values: Sequence[tuple[Value, yaml.Node]], shipped: Mapping[str, Path]) -> Iterator[Problem]:
    taken = dict(shipped)
    for value, node in values:
        file = value.file or Path()
        if value.id in taken:
            yield Problem(file, _line(node, "id"), f"the id {value.id!r} is taken by {taken[value.id]}. Give each value an id of its own.")
        taken.setdefault(value.id, file)


def _pointing_nowhere(concerns: Sequence[Concern], known: Collection[str]) -> Iterator[Problem]:
    for concern in concerns:
        file, _, line = concern.where.rpartition(":")
        for value_id in (*concern.central, *concern.relevant):
            if value_id not in known:
                yield Problem(Path(file), int(line), f"concern {concern.id!r} points at the value {value_id!r}, which no file defines. Mend the id.")


def _near_duplicates(placed: Sequence[_Placed], encoder: Encoder) -> Iterator[Problem]:
    """Pairs whose positive or whose negative twins are nearly the same."""
    if not placed:
        return
    nearest = np.full(len(placed), -1)
    highest = np.full(len(placed), NEAR_DUPLICATE)
    for texts in ([one.pair.positive for one in placed], [one.pair.negative for one in placed]):
        vectors = encode_phrases(texts, encoder)
        for row in range(1, len(placed)):
            cosines = vectors[:row] @ vectors[row]
            best = int(cosines.argmax())
            if cosines[best] >= highest[row]:
                nearest[row], highest[row] = best, cosines[best]
    for row, other in enumerate(nearest):
        if other >= 0:
            one, first = placed[row], placed[other]
            yield Problem(
                one.file, one.line, f"says nearly the same as the pair at {first.file}:{first.line} (cosine {highest[row]:.2f}). Replace one."
            )


def _as_problem(path: Path, message: str) -> Problem:
    """The problem in an error message that begins with the file and, where known, the line."""
    found = re.match(re.escape(str(path)) + r"(?::(\d+))?: ", message)
    return Problem(path, int(found[1] or 1), message[found.end() :]) if found else Problem(path, 1, message)


def _line(node: yaml.Node, key: str, default: int = 1) -> int:
    entries = node.value if isinstance(node, yaml.MappingNode) else []
    return next((k.start_mark.line + 1 for k, _ in entries if k.value == key), default)
