"""The taxonomy of values: one YAML file a value, read and checked.

A value file holds `id`, `name`, `family`, `source`, `aliases`, `definition`, `polarity`, `facets` and `pairs`, and may hold
`alpha`, the fixed magnitude that `mean_difference` steering uses for this value.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from vispa_graph.errors import TaxonomyError, UnknownValueError

Form = Literal["first_person_sentence", "third_person_sentence", "first_person_question", "third_person_question"]
FORMS: tuple[Form, ...] = get_args(Form)
SHIPPED = Path(__file__).parent / "values"
BIOETHICS = Path(__file__).parent / "bioethics"
CONCERNS = Path(__file__).parent / "concerns.yaml"
# The families of the shipped values.
FAMILIES = ("schwartz", "hofstede", "moral-theories", "ai-safety", "non-weird", "bioethics")
SITUATIONS = Path(__file__).parent / "situations.json"
PLAIN_QUESTIONS = Path(__file__).parent / "plain_questions.txt"

_REQUIRED = ("id", "name", "family", "source", "definition", "facets", "pairs")
_OPTIONAL = ("aliases", "polarity", "alpha")
# How much of two names must be the same for one to be taken for a slip of the other, 0..1.
_ALIKE = 0.6
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_BAD_ID = "an id is lower-case letters and digits, words joined by hyphens."
_NO_PAIRS = f"'pairs' must hold contrastive pairs under at least one of: {', '.join(FORMS)}. Without them the value cannot be steered to."


@dataclass(frozen=True)
class Pair:
    """Twins: the same situation with the protagonist promoting the value, and acting against it."""

    positive: str
    negative: str


@dataclass(frozen=True)
class Value:
    """One value of the taxonomy.

    Attributes:
        id: Lower case, words joined by hyphens; unique in a taxonomy.
        family: The school or survey it belongs to, such as "schwartz".
        facets: What someone who holds the value cares about, short phrases.
        pairs: Contrastive pairs by form; a user's value needs at least one form.
        alpha: Magnitude of `mean_difference` steering for this value, a multiple of the difference of means; None for the method's own.
        file: Where the value was read from.
    """

    id: str
    name: str
    family: str
    source: str
    definition: str
    facets: tuple[str, ...]
    pairs: Mapping[Form, tuple[Pair, ...]]
    aliases: tuple[str, ...] = ()
    polarity: str = ""
    alpha: float | None = None
    file: Path | None = field(default=None, compare=False)

    @property
    def shipped(self) -> bool:
        """Whether it comes with vispa_graph."""
        return self.file is not None and self.file.parent in (SHIPPED, BIOETHICS)

    @property
    def all_pairs(self) -> tuple[Pair, ...]:
        """The pairs of all forms, in the order of `FORMS`."""
        return tuple(pair for form in FORMS for pair in self.pairs.get(form, ()))


@dataclass(frozen=True)
class Concern:
    """A kind of situation and the values it bears on.

    Attributes:
        phrasings: Short descriptions of the situation in different words.
        central: Ids of the values squarely at stake.
        relevant: Ids of the values also at stake.
        where: File and line it was read from.
    """

    id: str
    phrasings: tuple[str, ...]
    central: tuple[str, ...]
    relevant: tuple[str, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Situation:
    """A text as people write it and the values that are at stake in it; none for a plain question such as "2+2"."""

    text: str
    central: tuple[str, ...] = ()
    relevant: tuple[str, ...] = ()


class Taxonomy:
    """An immutable, ordered collection of values, with the concerns and situations that point at them.

    Iterating gives the values in order; `taxonomy["self-direction"]` looks one up by id, name or alias.
    """

    def __init__(self, values: Sequence[Value], concerns: Sequence[Concern] = (), situations: Sequence[Situation] = ()) -> None:
        """Check and hold the values.

        Raises:
            TaxonomyError: There are no values, or two share an id.
        """
        if not values:
            raise TaxonomyError("The taxonomy holds no values. Give it at least one value file.")
        self._values: dict[str, Value] = {}
        for value in values:
            if value.id in self._values:
                other = self._values[value.id]
                raise TaxonomyError(
                    f"{value.file or 'a value'}: the id {value.id!r} is taken by {other.file or 'another value'}. Give each value an id of its own."
                )
            self._values[value.id] = value
        self._names = _names(values)
        self.concerns = tuple(concerns)
        self.situations = tuple(situations)

    @classmethod
    def load(cls, *folders: Path | str, shipped: bool = True, bioethics: bool = False) -> Taxonomy:
        """Read value files, one folder after the other.

        Args:
            *folders: Folders of the user's own `*.yaml` value files; a file `concerns.yaml` in one is read as a bank of concerns.
            shipped: Whether the 31 values of vispa_graph come first.
            bioethics: Whether the ten values of the bioethics family follow them.

        Raises:
            TaxonomyError: A folder is missing or empty, or a file is malformed; the message names file and line.
        """
        values: list[Value] = []
        concerns: list[Concern] = []
        own = [SHIPPED] * shipped + [BIOETHICS] * bioethics
        for folder in (*own, *map(Path, folders)):
            check_is_folder(folder)
            files = sorted(path for path in folder.glob("*.yaml") if path.name != CONCERNS.name)
            if not files:
                raise TaxonomyError(f"{folder}: the folder holds no *.yaml value files. Add one, or leave the folder out.")
            values += [read_value(path) for path in files]
            bank = CONCERNS if folder == SHIPPED else folder / CONCERNS.name
            if bank.is_file():
                concerns += read_concerns(bank)
        known = {value.id for value in values}
        # The shipped bank points at the bioethics family whether or not it is switched on.
        switched_off = {path.stem for path in BIOETHICS.glob("*.yaml")} - known if shipped else set()
        for concern in concerns:
            for value_id in (*concern.central, *concern.relevant):
                if value_id not in known | switched_off:
                    raise TaxonomyError(
                        f"{concern.where}: concern {concern.id!r} points at the value {value_id!r}, which no file defines. Mend the id or add the value."
                    )
        return cls(values, _pointing_at(known, concerns), _labelled_with(known, read_situations() if own else ()))

    def __iter__(self) -> Iterator[Value]:
        return iter(self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _key(name) in self._names

    def __getitem__(self, name: str) -> Value:
        """The value with this id, name or alias, whatever its case.

        Raises:
            UnknownValueError: No such value; the message names the nearest, if any are near, or says how to switch the bioethics family on.
        """
        return self.find(name)

    def find(self, name: str, which: str = "A value asked for") -> Value:
        """The same, with words of the caller's for it where it is unknown.

        Raises:
            UnknownValueError: See `__getitem__`; the message begins with `which`.
        """
        try:
            return self._values[self._names[_key(name)]]
        except KeyError:
            # What the caller typed stays out of the message: a mistyped argument may hold a patient's words.
            if switched_off := _bioethics_names().get(_key(name)):
                raise UnknownValueError(
                    f"{which} ({switched_off}) belongs to the bioethics family, which is not part of this taxonomy. "
                    "Switch it on: Settings(bioethics=True), VISPA_BIOETHICS=true, or the option --bioethics."
                ) from None
            near = difflib.get_close_matches(_key(name), list(self._names), n=3, cutoff=_ALIKE)
            nearest = ", ".join(dict.fromkeys(self._names[match] for match in near))
            raise UnknownValueError(
                f"{which} is not in the taxonomy of {len(self)} values.{f' The nearest are: {nearest}.' if near else ''} `vispa values` lists them all."
            ) from None

    def find_all(self, names: Sequence[str]) -> list[Value]:
        """The values with these ids, names or aliases, in this order.

        Raises:
            UnknownValueError: There is no such value as some of them; the message tells each by its place, with the nearest.
        """
        if len(names) == 1:
            return [self.find(names[0])]
        found, problems = [], []
        for number, name in enumerate(names, 1):
            try:
                found.append(self.find(name, f"Value {number} of {len(names)}"))
            except UnknownValueError as error:
                problems.append(str(error))
        if problems:
            raise UnknownValueError(" ".join(problems))
        return found

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids in order."""
        return tuple(self._values)

    def subset(self, ids: Sequence[str]) -> Taxonomy:
        """The taxonomy of some of the values; concerns and situations keep only what points at them."""
        chosen = self.find_all(ids)
        known = {value.id for value in chosen}
        return Taxonomy(chosen, _pointing_at(known, self.concerns), _labelled_with(known, self.situations))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the values and concerns, as 64 hex digits."""
        content: list[Any] = [[v.id, v.name, v.definition, v.facets, v.alpha, [[p.positive, p.negative] for p in v.all_pairs]] for v in self]
        content.append([[c.id, c.phrasings, c.central, c.relevant] for c in self.concerns])
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _pointing_at(known: set[str], concerns: Sequence[Concern]) -> list[Concern]:
    """The concerns with only these values; those left with none are dropped."""
    kept = [replace(c, central=tuple(v for v in c.central if v in known), relevant=tuple(v for v in c.relevant if v in known)) for c in concerns]
    return [concern for concern in kept if concern.central or concern.relevant]


def _labelled_with(known: set[str], situations: Iterable[Situation]) -> list[Situation]:
    """The situations with only these values; one in which none of them is at stake says so, and stays."""
    return [Situation(s.text, tuple(v for v in s.central if v in known), tuple(v for v in s.relevant if v in known)) for s in situations]


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def _names(values: Sequence[Value]) -> dict[str, str]:
    """Ids by the keys of ids, names and aliases."""
    # What comes later overwrites: an id beats a name, which beats another value's alias; of aliases the first wins.
    aliases = {_key(alias): value.id for value in reversed(values) for alias in reversed(value.aliases)}
    return aliases | {_key(value.name): value.id for value in values} | {_key(value.id): value.id for value in values}


@cache
def _bioethics_names() -> dict[str, str]:
    return _names([read_value(path) for path in sorted(BIOETHICS.glob("*.yaml"))])


def shipped_ids() -> set[str]:
    """The ids of the values that come with vispa_graph, those of the bioethics family among them. A value's file has its id for a name."""
    return {path.stem for folder in (SHIPPED, BIOETHICS) for path in folder.glob("*.yaml")}


def check_is_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        TaxonomyError: It is a file, or not there.
    """
    if folder.is_file():
        raise TaxonomyError(
            f"{folder}: this is a file, and value files are read by the folder. Give the one that it lies in (`{folder.resolve().parent}`)."
        )
    if not folder.is_dir():
        raise TaxonomyError(f"{folder}: there is no such folder of values. Check the path.")


def check_id(value_id: str) -> None:
    """Refuse an id that no value may have.

    Raises:
        TaxonomyError: It is not lower-case letters and digits, words joined by hyphens.
    """
    if not _ID.fullmatch(value_id):
        raise TaxonomyError(_BAD_ID)


def read_value(path: Path) -> Value:
    """Read and check one value file.

    Raises:
        TaxonomyError: The file cannot be read or does not describe a value; the message names file and line.
    """
    node, data = read_yaml(path)
    for line, message in value_problems(node, data):
        raise TaxonomyError(f"{path}:{line}: {message}")
    pairs = {form: tuple(Pair(twins["positive"], twins["negative"]) for twins in entries) for form, entries in data["pairs"].items()}
    if not any(pairs.values()):
        raise TaxonomyError(f"{path}:{_lines(node)['pairs']}: {_NO_PAIRS}")
    alpha = data.get("alpha")
    return Value(
        id=data["id"],
        name=data["name"].strip(),
        family=data["family"].strip(),
        source=data["source"].strip(),
        definition=data["definition"].strip(),
        facets=tuple(data["facets"]),
        pairs=pairs,
        aliases=tuple(data.get("aliases", [])),
        polarity=data.get("polarity", "").strip(),
        alpha=None if alpha is None else float(alpha),
        file=path,
    )


def value_problems(node: yaml.Node, data: Any) -> Iterator[tuple[int, str]]:
    """All that keeps a file from being read as a value, with lines from 1, but for pairs that are not written yet."""
    if not isinstance(data, dict):
        yield 1, f"a value file holds a mapping with the keys {', '.join(_REQUIRED)}; this one holds something else."
        return
    lines = _lines(node)
    for key in _REQUIRED:
        if key not in data:
            yield 1, f"the key {key!r} is missing. Add it."
    for key in data:
        if key not in _REQUIRED + _OPTIONAL:
            yield lines.get(str(key), 1), f"unknown key {key!r}. Known keys: {', '.join(_REQUIRED + _OPTIONAL)}."
    for key, problem in _field_problems(data):
        yield lines.get(key, 1), problem
    if "pairs" in data:
        yield from _pair_problems(node, data["pairs"], lines.get("pairs", 1))


def _field_problems(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields of wrong types, and what is wrong with them, but for pairs."""
    for key in ("id", "name", "family", "source", "definition"):
        if key in data and (not isinstance(data[key], str) or not data[key].strip()):
            yield key, f"{key!r} must be a text that is not empty."
        elif key == "id" and key in data and not _ID.fullmatch(data[key]):
            yield key, _BAD_ID
    for key in ("facets", "aliases"):
        entries = data.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(e, str) and e.strip() for e in entries):
            yield key, f"{key!r} must be a list of texts. Quote a text that holds a colon."
        elif key == "facets" and key in data and not entries:
            yield key, "a value needs at least one facet: facets are how questions find it."
    if not isinstance(data.get("polarity", ""), str):
        yield "polarity", "'polarity' must be a text. Write it out, or leave it out."
    alpha = data.get("alpha")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf")):
        yield "alpha", "'alpha' must be a number above 0."


def _pair_problems(node: yaml.Node, pairs: Any, line: int) -> Iterator[tuple[int, str]]:
    if not isinstance(pairs, dict):
        yield line, _NO_PAIRS
        return
    rows = pair_lines(node)
    for form, entries in pairs.items():
        if form not in FORMS:
            yield line, f"unknown form {form!r}. The forms are: {', '.join(FORMS)}."
        elif not isinstance(entries, list):
            yield line, f"{form!r} must be a list of pairs, each with 'positive' and 'negative'."
        else:
            for number, entry in enumerate(entries):
                if problem := _twins_problem(entry):
                    yield rows.get((form, number), line), problem


def _twins_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"positive", "negative"}:
        return "a pair holds exactly 'positive' and 'negative'."
    if not all(isinstance(text, str) and text.strip() for text in entry.values()):
        return "both twins must be texts that are not empty. Quote a text that holds a colon."
    if entry["positive"] == entry["negative"]:
        return "the twins are the same text; the negative one must act against the value."
    return None


def read_concerns(path: Path) -> list[Concern]:
    """Read and check a bank of concerns.

    Raises:
        TaxonomyError: The file cannot be read or an entry is malformed; the message names file and line.
    """
    node, data = read_yaml(path)
    if not isinstance(data, list) or not isinstance(node, yaml.SequenceNode):
        raise TaxonomyError(f"{path}:1: a bank of concerns is a list of entries with id, phrasings, central and relevant.")
    concerns: list[Concern] = []
    seen: set[str] = set()
    for entry, item in zip(data, node.value, strict=True):
        where = f"{path}:{item.start_mark.line + 1}"
        if not isinstance(entry, dict) or set(entry) != {"id", "phrasings", "central", "relevant"}:
            raise TaxonomyError(f"{where}: a concern holds exactly id, phrasings, central and relevant.")
        if not isinstance(entry["id"], str) or not entry["id"].strip():
            raise TaxonomyError(f"{where}: 'id' must be a text that is not empty.")
        lists = [entry[key] for key in ("phrasings", "central", "relevant")]
        if not all(isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts) for texts in lists):
            raise TaxonomyError(f"{where}: phrasings, central and relevant must be lists of texts.")
        if not entry["phrasings"] or not (entry["central"] or entry["relevant"]):
            raise TaxonomyError(f"{where}: a concern needs at least one phrasing and one value.")
        if entry["id"] in seen:
            raise TaxonomyError(f"{where}: the id {entry['id']!r} is used twice. Give each concern an id of its own.")
        seen.add(entry["id"])
        phrasings, central, relevant = (tuple(texts) for texts in lists)
        concerns.append(Concern(entry["id"], phrasings, central, relevant, where))
    return concerns


def read_situations() -> list[Situation]:
    """The labelled situations of the package, and its plain questions, in which nothing is at stake."""
    data = json.loads(SITUATIONS.read_text(encoding="utf-8"))
    ids = data["values"]
    labelled = [Situation(text, tuple(ids[i] for i in central), tuple(ids[i] for i in relevant)) for text, central, relevant in data["situations"]]
    return labelled + [Situation(text) for text in PLAIN_QUESTIONS.read_text(encoding="utf-8").splitlines()]


def read_yaml(path: Path) -> tuple[yaml.Node, Any]:
    """The YAML node (for line numbers) and the data of a file.

    Raises:
        TaxonomyError: The file cannot be read, is empty or is no YAML; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
        if node is None:
            raise TaxonomyError(f"{path}:1: the file is empty. Fill it or remove it.")
        return node, yaml.load(text, Loader=yaml.CSafeLoader)
    except OSError as error:
        raise TaxonomyError(f"{path}: the file cannot be read ({error.strerror}). Check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise TaxonomyError(f"{path}: the file is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except yaml.reader.ReaderError as error:
        line = text.encode()[: error.position].count(b"\n") + 1
        raise TaxonomyError(f"{path}:{line}: not valid YAML: it holds a control character. Remove it.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise TaxonomyError(f"{path}:{line}: not valid YAML: {problem}. Quote texts that hold a colon or begin with a quote.") from error
    except ValueError as error:
        raise TaxonomyError(
            f"{path}:1: not valid YAML: it holds a number or a date that is none ({error}). Quote texts that look like one."
        ) from error


def _lines(node: yaml.Node) -> dict[str, int]:
    """Line (from 1) of each top-level key."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: key.start_mark.line + 1 for key, _ in node.value}


def pair_lines(node: yaml.Node) -> dict[tuple[str, int], int]:
    """Line (from 1) of each pair, by form and number."""
    found: dict[tuple[str, int], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, forms in node.value:
            if key.value == "pairs" and isinstance(forms, yaml.MappingNode):
                for form, entries in forms.value:
                    if isinstance(entries, yaml.SequenceNode):
                        for number, entry in enumerate(entries.value):
                            found[form.value, number] = entry.start_mark.line + 1
    return found
