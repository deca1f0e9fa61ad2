"""`vispa values check`, `show` and `new`: what they tell the authors of values, and that what is shipped passes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import vispa_graph
from vispa_graph import cli
from vispa_graph.errors import TaxonomyError
from vispa_graph.taxonomy_index import FORMS, Pair, Taxonomy
from vispa_graph.taxonomy_index.check import LENGTH_RATIO, NEAR_DUPLICATE, SHARED_WORDS, check_folder, check_twins, shared_words
from vispa_graph.taxonomy_index.precomputed import encode_phrases
from vispa_graph.taxonomy_index.taxonomy import BIOETHICS, FAMILIES, SHIPPED

TIDINESS = """\
id: tidiness
name: Tidiness
family: schwartz
source: this test
aliases: [order in things]
definition: Keep things where they belong.
facets:
  - a tray in disorder
pairs:
  first_person_sentence:
    - positive: I sorted the scalpels before I went home.
      negative: I scattered the scalpels before I went home.
  third_person_sentence:
    - positive: The nurse folded all towels after the bath.
      negative: The nurse dropped all towels after the bath.
  first_person_question:
    - positive: Should I label every jar in my kitchen?
      negative: Should I jumble every jar in my kitchen?
  third_person_question:
    - positive: Would Ada put the ladder back in the shed?
      negative: Would Ada leave the ladder out of the shed?
"""
CONCERN = "- {id: a-messy-ward, phrasings: [nobody finds the bandages], central: [tidiness], relevant: [security]}\n"
LAST_FORM = TIDINESS[TIDINESS.index("  third_person_question") :]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "mine"
    made.mkdir()
    (made / "tidiness.yaml").write_text(TIDINESS)
    return made


@pytest.fixture
def vispa(monkeypatch, word_encoder):
    """Runs a command as from a shell whose output is no terminal, with an encoder that costs nothing."""
    monkeypatch.setattr("vispa_graph.resources.SentenceEncoder", lambda *_, **__: word_encoder)
    return lambda *arguments: CliRunner().invoke(cli.main, [str(a) for a in arguments], prog_name="vispa")


def line_of(text: str, file: Path) -> int:
    return next(number for number, line in enumerate(file.read_text().splitlines(), 1) if text in line)


def found_in(folder, word_encoder, **options):
    """File name, what stands in the line, and the message of each problem."""
    return [(p.file.name, p.file.read_text().splitlines()[p.line - 1].strip(), p.message) for p in check_folder(folder, word_encoder, **options)]


# The shipped values


@pytest.fixture(scope="module")
def once(encoder):
    """The real encoder, which encodes no text twice: the texts are thousands."""

    class Once:
        fingerprint = encoder.fingerprint

        def __init__(self):
            self.vectors = {}

        def encode(self, sentences):
            new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self.vectors]
            if new:
                self.vectors |= dict(zip(new, encoder.encode(new), strict=True))
            return np.stack([self.vectors[sentence] for sentence in sentences])

    return Once()


@pytest.mark.slow
@pytest.mark.parametrize("family", [SHIPPED, BIOETHICS])
def test_the_shipped_values_pass(family, once):
    assert [str(problem) for problem in check_folder(family, once)] == []


@pytest.mark.slow
def test_no_two_pairs_of_the_shipped_values_say_nearly_the_same_whatever_their_families(once):
    pairs = [pair for value in Taxonomy.load(bioethics=True) for pair in value.all_pairs]
    for texts in ([pair.positive for pair in pairs], [pair.negative for pair in pairs]):
        vectors = encode_phrases(texts, once)
        cosines = vectors @ vectors.T - 2 * np.eye(len(texts), dtype=np.float32)
        row, other = np.unravel_index(cosines.argmax(), cosines.shape)
        assert cosines.max() < NEAR_DUPLICATE, (texts[row], texts[other])


@pytest.fixture(scope="module")
def everything():
    return Taxonomy.load(bioethics=True)


def test_every_shipped_value_has_64_pairs_16_of_each_form_and_16_facets(everything):
    assert len(everything) == 41
    for value in everything:
        assert {form: len(value.pairs[form]) for form in FORMS} == dict.fromkeys(FORMS, 16), value.id
        assert len(value.facets) >= 16, value.id
        assert value.family in FAMILIES


def test_the_bank_holds_150_kinds_of_situation_in_three_wordings_each(everything):
    assert len(everything.concerns) >= 150
    assert all(len(set(concern.phrasings)) >= 3 for concern in everything.concerns)
    wordings = [phrasing for concern in everything.concerns for phrasing in concern.phrasings]
    assert len(set(wordings)) == len(wordings)
    central = {value for concern in everything.concerns for value in concern.central}
    assert central == set(everything.ids)


# Pairs without any of these words may be set in health care too, so that this counts too few rather than too many.
HEALTH = re.compile(
    r"\b(?:abortion|bedridden|prosthe|waiting room|dosage|deliri|ambulance|antidepress|bandag|biops|cancer|care home|carer|chemo|clinic|consent|dement|dentist|depress|diagnos|dialysis|diabet|dietit|disab|disease"
    r"|doctor|donor|dose|dr\b|drug|dying|embryo|epidemi|fever|genetic|gp\b|health|hearing aid|heart attack|hiv\b|hospi|illness|implant|infect|insulin"
    r"|kidney|leukaemia|liver|lung|mastectomy|matron|medic|mental|midwi|miscarr|nurs(?:e|ing)|ointment|oncolog|organ\b|outbreak|pain\b|palliat|paramedic|patient|pharmac|physician"
    r"|physio|pill|placebo|pregnan|prescri|psych|rehab|relapse|scan\b|sedat|sick|stroke|suicid|surg|tablet|therap|transfus|transplant|trial"
    r"|tumou?r|vaccin|ventilat|virus|ward\b|wheelchair|wound)",
    re.IGNORECASE,
)


def test_a_third_of_the_pairs_tell_of_health_care_and_of_no_value_much_fewer(everything):
    shares = {value.id: np.mean([bool(HEALTH.search(f"{pair.positive} {pair.negative}")) for pair in value.all_pairs]) for value in everything}
    assert np.mean([shares[value.id] for value in everything if value.family != "bioethics"]) >= 1 / 3
    assert min(shares.values()) >= 0.2, min(shares, key=lambda value: shares[value])
    assert min(shares[value.id] for value in everything if value.family == "bioethics") >= 0.5


# What the checker catches


def test_a_sound_folder_has_no_problems(folder, word_encoder):
    (folder / "concerns.yaml").write_text(CONCERN)
    assert check_folder(folder, word_encoder) == []


ONE = [
    ("unknown family", "family: schwartz", "family: shwartz", "family: shwartz", "unknown family 'shwartz'. Known: schwartz, hofstede"),
    ("missing form", LAST_FORM, "", "pairs:", "the form 'third_person_question' is missing"),
    ("empty form", LAST_FORM, "  third_person_question: []\n", "third_person_question: []", "the form 'third_person_question' is missing"),
    (
        "twins of unlike length",
        "I scattered the scalpels before I went home.",
        "I scattered the scalpels before I went home to my bed.",
        "- positive: I sorted the scalpels",
        "the twins differ in length (ratio 0.76",
    ),
    (
        "twins in different situations",
        "Should I jumble every jar in my kitchen?",
        "Could one drop all socks on the staircase?",
        "- positive: Should I label",
        "the twins share 0% of their words",
    ),
    (
        "a value named in one twin",
        "The nurse folded all towels after the bath.",
        "The nurse, for tidiness, did towels after the bath.",
        "- positive: The nurse, for tidiness",
        "only the positive twin names the value ('Tidiness')",
    ),
    (
        "an alias named in one twin",
        "Should I jumble every jar in my kitchen?",
        "Should I hate order in things in my kitchen?",
        "- positive: Should I label",
        "only the negative twin names the value ('order in things')",
    ),
    ("a key that stands twice", "source: this test\n", "source: this test\nname: Neatness\n", "name: Neatness", "'name' stands here for the second time, first in line 2"),
    (
        "a form that stands twice",
        LAST_FORM,
        LAST_FORM + "  first_person_sentence:\n    - positive: I dusted the old piano.\n      negative: I ignored the old piano.\n",
        "first_person_sentence:",
        "'first_person_sentence' stands here for the second time, first in line 10",
    ),
    ("pairs that stand twice", "pairs:\n", "pairs: {}\npairs:\n", "pairs:", "'pairs' stands here for the second time"),
    ("unreadable YAML", "facets:\n", "facets: [\n", "- a tray in disorder", "not valid YAML"),
    ("a control character", "this test", "this\x07test", "source", "it holds a control character"),
    ("a date that is none", "Keep things where they belong.", "2024-13-45", "id:", "a number or a date that is none"),
    ("what keeps a value from being read", "definition: Keep things where they belong.\n", "", "id:", "the key 'definition' is missing"),
    (
        "a near-duplicate of the same form",
        "      negative: I scattered the scalpels before I went home.\n",
        "      negative: I scattered the scalpels before I went home.\n"
        "    - positive: Before I went home, I sorted the scalpels.\n      negative: Before we met them, I hid all the scalpels.\n",
        "- positive: Before I went home",
        "says nearly the same as the pair at ",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "at", "message"), [case[1:] for case in ONE], ids=[case[0] for case in ONE])
def test_a_problem_is_told_once_with_file_and_line(folder, word_encoder, old, new, at, message):
    file = folder / "tidiness.yaml"
    assert TIDINESS.count(old) == 1
    file.write_text(TIDINESS.replace(old, new))
    found = found_in(folder, word_encoder)
    assert len(found) == 1, found
    assert found[0][0] == "tidiness.yaml"
    assert at in found[0][1]
    assert message in found[0][2]


def test_pairs_that_say_the_same_in_two_files_name_each_other(folder, word_encoder):
    other = TIDINESS.replace("tidiness", "neatness").replace("Tidiness", "Neatness")
    (folder / "neatness.yaml").write_text(other)
    found = check_folder(folder, word_encoder)
    assert [problem.file.name for problem in found] == ["tidiness.yaml"] * 4
    first = line_of("- positive: I sorted", folder / "neatness.yaml")
    assert f"the pair at {folder / 'neatness.yaml'}:{first} (cosine 1.00)" in found[0].message


def test_negative_twins_alone_are_near_duplicates_too(folder, word_encoder):
    file = folder / "tidiness.yaml"
    pair = "    - positive: We boxed every jar in my kitchen.\n      negative: Should I jumble every jar in my kitchen?\n"
    file.write_text(TIDINESS.replace("  third_person_question:\n", pair + "  third_person_question:\n"))
    (problem,) = check_folder(folder, word_encoder)
    assert problem.line == line_of("We boxed", file)


def test_an_id_used_twice_in_a_folder_is_told_with_both_files(folder, word_encoder):
    other = TIDINESS
    for old, new in (("scalpels", "letters"), ("towels", "boots"), ("jar", "shelf"), ("Ada", "Bo"), ("ladder", "rake"), ("nurse", "cook")):
        other = other.replace(old, new)
    (folder / "zeal.yaml").write_text(other)
    name, line, message = found_in(folder, word_encoder)[0]
    assert (name, line) == ("zeal.yaml", "id: tidiness")
    assert f"the id 'tidiness' is taken by {folder / 'tidiness.yaml'}" in message


@pytest.mark.parametrize("taken", ["karma", "autonomy"])
def test_the_id_of_a_shipped_value_is_taken(folder, word_encoder, taken):
    (folder / "tidiness.yaml").write_text(TIDINESS.replace("id: tidiness", f"id: {taken}"))
    ((_, line, message),) = found_in(folder, word_encoder)
    assert line == f"id: {taken}"
    assert f"is taken by {SHIPPED.parent}" in message


def test_a_concern_s_id_is_its_own_and_it_points_at_values_that_there_are(folder, word_encoder):
    bank = folder / "concerns.yaml"
    bank.write_text(CONCERN + CONCERN)
    ((name, _, message),) = found_in(folder, word_encoder)
    assert (name, message[:33]) == ("concerns.yaml", "the id 'a-messy-ward' is used twi")
    bank.write_text(CONCERN + CONCERN.replace("a-messy", "a-tidy").replace("security", "securty"))
    (problem,) = check_folder(folder, word_encoder)
    assert (problem.file, problem.line) == (bank, 2)
    assert "points at the value 'securty'" in problem.message


def test_all_problems_of_all_files_are_told_at_once_in_order(folder, word_encoder):
    (folder / "a.yaml").write_text("id: [")
    (folder / "b.yaml").write_text("id: b\nid: c\n")
    (folder / "concerns.yaml").write_text("- id: c\n")
    (folder / "tidiness.yaml").write_text(TIDINESS.replace("family: schwartz", "family: own").replace(LAST_FORM, ""))
    found = check_folder(folder, word_encoder)
    assert found == sorted(found)
    assert {problem.file.name for problem in found} == {"a.yaml", "b.yaml", "concerns.yaml", "tidiness.yaml"}
    assert sum("second time" in problem.message for problem in found) == 1
    assert [p.message[:20] for p in found if p.file.name == "tidiness.yaml"] == ["unknown family 'own'", "the form 'third_pers"]


def test_unknown_keys_and_fields_of_wrong_types_are_all_told_each_in_its_line(folder, word_encoder):
    broken = TIDINESS
    for old, new in (
        ("name: Tidiness\n", "nmae: Tidiness\n3: three\n"),
        ("source: this test", "source: [this, test]"),
        ("aliases: [order in things]", "aliases: order in things"),
        ("facets:\n  - a tray in disorder\n", "facets: 3\npolarity: 5\nalpha: much\n"),
        ("      negative: I scattered the scalpels before I went home.\n", ""),
        ("      negative: The nurse dropped all towels after the bath.\n", "      negative: 7\n"),
    ):
        assert broken.count(old) == 1
        broken = broken.replace(old, new)
    (folder / "tidiness.yaml").write_text(broken)
    assert [(line.partition(":")[0], message.partition(".")[0]) for _, line, message in found_in(folder, word_encoder)] == [
        ("id", "the key 'name' is missing"),
        ("nmae", "unknown key 'nmae'"),
        ("3", "unknown key 3"),
        ("source", "'source' must be a text that is not empty"),
        ("aliases", "'aliases' must be a list of texts"),
        ("facets", "'facets' must be a list of texts"),
        ("polarity", "'polarity' must be a text"),
        ("alpha", "'alpha' must be a number above 0"),
        ("- positive", "a pair holds exactly 'positive' and 'negative'"),
        ("- positive", "both twins must be texts that are not empty"),
    ]


@pytest.mark.parametrize("relative", [False, True])
def test_a_file_in_place_of_its_folder_is_refused_with_the_whole_path_of_the_folder_to_give(vispa, folder, monkeypatch, relative):
    monkeypatch.chdir(folder)
    file = Path("tidiness.yaml") if relative else folder / "tidiness.yaml"
    for command in (["values", "check", file], ["check", "--values", file], ["values", "--values", file]):
        result = vispa(*command)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"vispa: {file}: this is a file, and value files are read by the folder. Give the one that it lies in (`{folder}`).\n"


def test_a_family_of_one_s_own_is_no_misspelling_once_it_is_named(folder, word_encoder):
    (folder / "tidiness.yaml").write_text(TIDINESS.replace("family: schwartz", "family: own"))
    assert len(check_folder(folder, word_encoder)) == 1
    assert check_folder(folder, word_encoder, families=["own"]) == []


def test_a_file_that_contains_itself_is_refused_like_any_other(folder, word_encoder):
    (folder / "tidiness.yaml").write_text(TIDINESS.replace("facets:\n  - a tray", "facets: &all\n  - *all\n  - a tray"))
    ((_, line, message),) = found_in(folder, word_encoder)
    assert line == "facets: &all"
    assert "must be a list of texts" in message


def test_a_folder_that_is_missing_or_holds_no_values_is_refused(tmp_path, word_encoder):
    with pytest.raises(TaxonomyError, match="no such folder"):
        check_folder(tmp_path / "nowhere", word_encoder)
    (tmp_path / "concerns.yaml").write_text(CONCERN)
    with pytest.raises(TaxonomyError, match="holds no"):
        check_folder(tmp_path, word_encoder)


words = st.lists(st.sampled_from(["the", "nurse", "tidies", "a", "ward"]), min_size=1, max_size=8).map(" ".join)


@given(words, words)
def test_shared_words_are_symmetric_and_all_shared_with_the_same_words_in_another_order(one, other):
    assert shared_words(Pair(one, other)) == shared_words(Pair(other, one))
    assert 0 <= shared_words(Pair(one, other)) <= 1
    assert shared_words(Pair(one, " ".join(reversed(one.split())))) == 1


@given(words, words)
def test_twins_are_unbalanced_by_length_and_words_alone_where_nothing_is_named(taxonomy, one, other):
    told = list(check_twins(Pair(one, other), taxonomy["karma"]))
    unlike = not LENGTH_RATIO[0] <= len(one) / len(other) <= LENGTH_RATIO[1]
    assert any("differ in length" in message for message in told) == unlike
    assert any("of their words" in message for message in told) == (shared_words(Pair(one, other)) < SHARED_WORDS)
    assert len(told) <= 2


# The commands


def test_check_says_that_there_is_nothing_to_mend(vispa, folder):
    result = vispa("values", "check", folder)
    assert (result.exit_code, result.stdout) == (0, f"{folder}: no problems.\n")
    assert json.loads(vispa("values", "check", folder, "--json").stdout) == []


def test_check_tells_each_problem_in_a_line_and_fails(vispa, folder):
    file = folder / "tidiness.yaml"
    file.write_text(TIDINESS.replace("family: schwartz", "family: own").replace(LAST_FORM, ""))
    result = vispa("values", "check", folder)
    assert result.exit_code == 2
    assert result.stdout == ""
    told = result.stderr.strip().splitlines()
    assert [line.split(": ")[:2] for line in told] == [
        ["vispa", f"{file}:{line_of('family', file)}"],
        ["vispa", f"{file}:{line_of('pairs', file)}"],
    ]
    as_json = vispa("values", "check", folder, "--json")
    assert as_json.exit_code == 2
    assert [(p["file"], p["line"]) for p in json.loads(as_json.stdout)] == [(str(file), 3), (str(file), 9)]
    assert vispa("values", "check", folder, "--new-family", "own").stderr.count("\n") == 1


def test_check_as_a_process_of_its_own_shows_no_stack_trace(folder):
    (folder / "tidiness.yaml").write_text("id: tidiness\nfacets: [\n")
    environment = os.environ | {"PYTHONPATH": str(Path(vispa_graph.__file__).parents[1])}
    for arguments in (["check", folder], ["check", folder / "nowhere"]):
        run = subprocess.run([sys.executable, "-m", "vispa_graph", "values", *map(str, arguments)], capture_output=True, text=True, env=environment)
        assert run.returncode == 2
        assert run.stderr.startswith(f"vispa: {arguments[1]}")
        assert "Traceback" not in run.stderr + run.stdout


def test_show_tells_a_value_by_id_name_or_alias_also_one_s_own(vispa, folder, everything):
    for name in ("autonomy", "Autonomy"):
        shown = json.loads(vispa("values", "show", name, "--bioethics", "--json").stdout)
        assert (shown["id"], shown["family"], shown["pairs"]) == ("autonomy", "bioethics", 64)
        assert shown["facets"] == list(everything["autonomy"].facets)
    shown = vispa("values", "show", "order in things", "--values", folder).stdout
    assert "Tidiness (tidiness)" in shown
    assert "Keep things where they belong." in shown
    assert "a tray in disorder" in shown
    assert vispa("values", "order in things", "--values", folder).stdout == shown
    unknown = vispa("values", "show", "tidyness", "--values", folder)
    assert unknown.exit_code == 2
    assert "nearest are: tidiness" in unknown.stderr


NEW = ["--id", "tidiness", "--name", "Tidiness: order", "--family", "own", "--source", "this test", "--definition", 'Keep "things" # in order.']


def test_new_writes_a_file_for_which_check_tells_exactly_what_remains_to_do(vispa, folder):
    file = folder / "tidiness.yaml"
    file.unlink()
    result = vispa("values", "new", folder, *NEW)
    assert (result.exit_code, result.stdout.startswith(f"{file}: fill in")) == (0, True)
    written = yaml.safe_load(file.read_text())
    assert (written["name"], written["definition"]) == ("Tidiness: order", 'Keep "things" # in order.')
    told = [(p["line"], p["message"]) for p in json.loads(vispa("values", "check", folder, "--json").stdout)]
    remaining = {"unknown family 'own'": "family:", "a value needs at least one facet": "facets:"}
    remaining |= {f"the form '{form}' is missing": f"{form}:" for form in FORMS}
    assert {next(start for start in remaining if message.startswith(start)): line for line, message in told} == {
        start: line_of(text, file) for start, text in remaining.items()
    }
    filled = file.read_text().replace("facets: []", "facets: [a tray in disorder]")
    pairs = yaml.safe_load(TIDINESS)["pairs"]
    for form in FORMS:
        filled = filled.replace(f"{form}: []", f"{form}: {json.dumps(pairs[form])}")
    file.write_text(filled)
    assert vispa("values", "check", folder, "--new-family", "own").stdout == f"{folder}: no problems.\n"
    assert Taxonomy.load(folder)["tidiness"].definition == 'Keep "things" # in order.'


def test_new_makes_the_folder_and_overwrites_nothing(vispa, tmp_path):
    folder = tmp_path / "values" / "of mine"
    assert vispa("values", "new", folder, *NEW).exit_code == 0
    before = (folder / "tidiness.yaml").read_text()
    again = vispa("values", "new", folder, *NEW)
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    assert (folder / "tidiness.yaml").read_text() == before


@pytest.mark.parametrize("value_id", ["Tidiness", "../tidiness", "tidi ness", "-"])
def test_new_refuses_an_id_that_no_value_may_have_and_writes_nothing(vispa, tmp_path, value_id):
    result = vispa("values", "new", tmp_path / "mine", "--id", value_id, *NEW[2:])
    assert result.exit_code == 2
    assert "lower-case letters" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value_id", ["honor", "autonomy"])
def test_new_refuses_the_id_of_a_value_that_comes_with_the_package_and_writes_nothing(vispa, tmp_path, value_id):
    result = vispa("values", "new", tmp_path / "mine", "--id", value_id, *NEW[2:])
    assert result.exit_code == 2
    assert f"The id '{value_id}' is that of a value that comes with vispa_graph" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_new_without_a_terminal_names_the_options_that_are_missing(vispa, tmp_path):
    result = vispa("values", "new", tmp_path / "mine", "--id", "tidiness", "--source", " ")
    assert result.exit_code == 2
    assert "Give --name, --family, --source, --definition" in result.stderr
