"""The shipped values, and what the loader makes of files written by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vispa_graph.errors import TaxonomyError, UnknownValueError
from vispa_graph.taxonomy_index import FORMS, Concern, Pair, Taxonomy

OWN = Path(__file__).parent / "data" / "values"
GOOD = (OWN / "patience.yaml").read_text(encoding="utf-8")

FAMILIES = {
    "schwartz": "self-direction stimulation hedonism achievement power security conformity tradition benevolence universalism",
    "hofstede": "power-distance uncertainty-avoidance individualism masculinity long-term-orientation indulgence",
    "moral-theories": "commonsense-morality deontology utilitarianism justice virtue-ethics ubuntu confucianism",
    "ai-safety": "fairness truthfulness non-toxicity harmlessness",
    "non-weird": "face karma honor spirituality",
}


def line_of(text: str, content: str) -> int:
    return next(number for number, line in enumerate(content.splitlines(), 1) if text in line)


def test_the_taxonomy_is_the_paper_s_31_values_in_5_families(taxonomy):
    expected = {family: set(ids.split()) for family, ids in FAMILIES.items()}
    assert sum(map(len, expected.values())) == 31
    found = {family: {value.id for value in taxonomy if value.family == family} for family in {value.family for value in taxonomy}}
    assert found == expected


def test_every_value_has_facets_and_pairs_of_all_four_forms(taxonomy):
    for value in taxonomy:
        assert len(value.facets) >= 10, value.id
        assert len(value.all_pairs) >= 16, value.id
        sizes = {form: len(value.pairs[form]) for form in FORMS}
        assert min(sizes.values()) >= 4, (value.id, sizes)


def test_no_shipped_text_is_used_twice(taxonomy):
    for value in taxonomy:
        texts = [text for pair in value.all_pairs for text in (pair.positive, pair.negative)]
        assert len(set(texts)) == len(texts), value.id
        assert len(set(value.facets)) == len(value.facets), value.id


def test_questions_and_sentences_are_under_their_own_form(taxonomy):
    for value in taxonomy:
        for form in FORMS:
            for pair in value.pairs[form]:
                for text in (pair.positive, pair.negative):
                    assert text.rstrip("\"')").endswith("?") == form.endswith("question"), (value.id, text)


def test_the_names_of_the_paper_lead_to_the_harmless_side(taxonomy):
    assert taxonomy["toxicity"].id == "non-toxicity"
    assert taxonomy["harmfulness"].id == "harmlessness"


def test_every_concern_points_at_values_of_the_taxonomy_only(taxonomy):
    assert taxonomy.concerns
    assert len({concern.id for concern in taxonomy.concerns}) == len(taxonomy.concerns)
    for concern in taxonomy.concerns:
        assert set(concern.central + concern.relevant) <= set(taxonomy.ids), concern.id
        assert not set(concern.central) & set(concern.relevant), concern.id


@pytest.mark.parametrize("name", ["self-direction", "Self-direction", "SELF DIRECTION", "self_direction", " thinking for oneself "])
def test_a_value_is_found_by_id_name_or_alias_whatever_the_case(taxonomy, name):
    assert name in taxonomy
    assert taxonomy[name].id == "self-direction"


def test_ids_names_and_aliases_of_every_value_lead_to_it_and_ids_come_first(taxonomy):
    ids, names = set(taxonomy.ids), {value.name.lower() for value in taxonomy}
    for value in taxonomy:
        assert taxonomy[value.id] is value
        assert taxonomy[value.name] is value
        for alias in value.aliases:
            assert alias in taxonomy
            assert alias.lower().replace(" ", "-") not in ids - {value.id}, alias
            assert alias.lower() not in names - {value.name.lower()}, alias


def test_an_unknown_value_names_the_nearest(taxonomy):
    with pytest.raises(UnknownValueError, match=r"nearest are: .*security"):
        taxonomy["secuurityy"]
    assert "secuurityy" not in taxonomy
    assert 3 not in taxonomy


def test_of_several_values_each_that_is_unknown_is_told_by_its_place_with_the_nearest(taxonomy):
    with pytest.raises(UnknownValueError) as raised:
        taxonomy.find_all(["karma", "secuurityy", "Honor", "zzfairness"])
    second, fourth = str(raised.value).split("Value 4 of 4")
    assert re.match(r"Value 2 of 4 is not in the taxonomy of 31 values\. The nearest are: security\.", second)
    assert "fairness" in fourth
    assert "uurityy" not in str(raised.value)
    with pytest.raises(UnknownValueError, match=r"^A value asked for is not"):
        taxonomy.find_all(["secuurityy"])
    assert [value.id for value in taxonomy.find_all(["Karma", "honor", "karma"])] == ["karma", "honor", "karma"]


@pytest.mark.parametrize("unlike", ["foo", "xyz", "care"])
def test_no_value_is_offered_as_nearest_to_a_name_that_is_like_none(taxonomy, unlike):
    with pytest.raises(UnknownValueError) as raised:
        taxonomy[unlike]
    assert str(raised.value) == "A value asked for is not in the taxonomy of 31 values. `vispa values` lists them all."


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=12))
def test_an_unknown_value_s_message_never_repeats_what_was_typed(taxonomy, typed):
    if typed in taxonomy:
        return
    with pytest.raises(UnknownValueError) as raised:
        taxonomy[typed]
    # Made of ids and fixed words only, so nothing of what was typed can be in it.
    named = re.fullmatch(
        r"A value asked for is not in the taxonomy of 31 values\.(?: The nearest are: (.*)\.)? `vispa values` lists them all\.", str(raised.value)
    )
    assert named
    assert named[1] is None or set(named[1].split(", ")) <= set(taxonomy.ids)
    assert raised.value.__suppress_context__


def test_a_value_of_the_bioethics_family_is_known_by_id_name_and_alias_where_the_family_is_off(taxonomy):
    family = [value for value in Taxonomy.load(bioethics=True) if value.family == "bioethics"]
    names = [(name, value.id) for value in family for name in (value.id, value.name, *value.aliases) if name not in taxonomy]
    assert {value_id for _, value_id in names} == {value.id for value in family}
    for name, value_id in names:
        with pytest.raises(UnknownValueError, match=rf"\({value_id}\) belongs to the bioethics family.*bioethics=True"):
            taxonomy[name]


def test_a_folder_of_one_s_own_adds_its_values(taxonomy):
    more = Taxonomy.load(OWN)
    assert more.ids == (*taxonomy.ids, "patience")
    assert more["forbearance"].facets[0] == "sitting with someone who speaks slowly"
    assert more["patience"].all_pairs[0] == Pair("I waited until he had finished his sentence.", "I cut him off before he finished his sentence.")
    assert more["patience"].alpha is None
    assert Taxonomy.load(OWN, shipped=False).ids == ("patience",)


def test_a_bank_of_concerns_in_one_s_own_folder_is_read(tmp_path, taxonomy):
    (tmp_path / "patience.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "concerns.yaml").write_text(
        "- {id: a-slow-ward, phrasings: [a long wait], central: [patience], relevant: [power]}\n", encoding="utf-8"
    )
    added = Taxonomy.load(tmp_path).concerns[len(taxonomy.concerns) :]
    assert added == (Concern("a-slow-ward", ("a long wait",), ("patience",), ("power",)),)


BAD = [
    ("malformed YAML", "facets:", "facets: [", "facets: [", r"not valid YAML"),
    ("not a mapping", GOOD, "- id: patience\n", "- id", r"holds a mapping"),
    ("empty file", GOOD, "# nothing yet\n", "#", r"the file is empty"),
    ("missing key", 'source: "Our ward\'s house rules"\n', "", "id: patience", r"the key 'source' is missing"),
    ("unknown key", "family: own", "family: own\nfamliy: own", "famliy", r"unknown key 'famliy'.*Known keys: id, name"),
    ("blank text", "name: Patience", "name: ' '", "name:", r"'name' must be a text"),
    ("number for text", "name: Patience", "name: 3", "name:", r"'name' must be a text"),
    ("bad id", "id: patience", "id: Patience!", "id:", r"an id is lower-case letters"),
    ("no facets", GOOD[GOOD.index("facets:") : GOOD.index("pairs:")], "facets: []\n", "facets:", r"at least one facet"),
    ("facet with a bare colon", "  - sitting with", "  - one: sitting with", "facets:", r"'facets' must be a list of texts.*colon"),
    ("aliases as text", "aliases: [forbearance, taking one's time]", "aliases: forbearance", "aliases:", r"'aliases' must be a list"),
    ("alpha not above 0", "family: own", "family: own\nalpha: 0", "alpha", r"'alpha' must be a number above 0"),
    ("alpha not a number", "family: own", "family: own\nalpha: .nan", "alpha", r"'alpha' must be a number above 0"),
    ("no pairs", GOOD[GOOD.index("pairs:") :], "pairs: {}\n", "pairs:", r"must hold contrastive pairs"),
    ("empty form", GOOD[GOOD.index("pairs:") :], "pairs: {first_person_sentence: []}\n", "pairs:", r"must hold contrastive pairs"),
    ("unknown form", "third_person_question", "third_person_poem", "pairs:", r"unknown form 'third_person_poem'. The forms are: first_person_sentence"),
    ("form without a list", GOOD[GOOD.index("pairs:") :], "pairs: {first_person_sentence: yes}\n", "pairs:", r"must be a list of pairs"),
    ("pair without a twin", "      negative: Did she bake the dough before the hour was over?\n", "", "Did she let", r"a pair holds exactly 'positive' and 'negative'"),
    ("blank twin", "Did she bake the dough before the hour was over?", "''", "Did she let", r"both twins must be texts"),
    ("identical twins", "I cut him off before he finished", "I waited until he had finished", "I waited", r"the twins are the same text"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "at", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_malformed_value_file_is_refused_with_file_line_and_what_to_do(tmp_path, old, new, at, message):
    content = GOOD.replace(old, new)
    assert content != GOOD
    file = tmp_path / "patience.yaml"
    file.write_text(content, encoding="utf-8")
    # A parser notices an open bracket only after it.
    line = line_of(at, content) + (message == "not valid YAML")
    with pytest.raises(TaxonomyError, match=message) as raised:
        Taxonomy.load(tmp_path, shipped=False)
    assert str(raised.value).startswith(f"{file}:{line}: ")


def test_a_file_that_is_not_utf_8_is_refused_by_name(tmp_path):
    (tmp_path / "patience.yaml").write_bytes(GOOD.replace("Patience", "Geduld \N{LATIN SMALL LETTER U WITH DIAERESIS}").encode("latin-1"))
    with pytest.raises(TaxonomyError, match=r"patience\.yaml: the file is not UTF-8"):
        Taxonomy.load(tmp_path)


def test_an_id_used_twice_is_refused_with_both_files(tmp_path):
    for name in ("patience.yaml", "waiting.yaml"):
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
    with pytest.raises(TaxonomyError, match=r"waiting\.yaml: the id 'patience' is taken by .*patience\.yaml"):
        Taxonomy.load(tmp_path)


def test_an_empty_or_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(TaxonomyError, match=re.escape(f"{tmp_path}: the folder holds no *.yaml value files")):
        Taxonomy.load(tmp_path)
    with pytest.raises(TaxonomyError, match="there is no such folder"):
        Taxonomy.load(tmp_path / "nowhere")
    with pytest.raises(TaxonomyError, match="holds no values"):
        Taxonomy.load(shipped=False)


FIRST = "- {id: one, phrasings: [a long wait], central: [power], relevant: []}\n"


@pytest.mark.parametrize(
    ("bank", "line", "message"),
    [
        ("id: one\n", 1, "is a list of entries"),
        (FIRST + "- {id: two, phrasings: [a wait], central: [power]}\n", 2, "exactly id, phrasings, central and relevant"),
        (FIRST + "\n- two\n", 3, "exactly id, phrasings, central and relevant"),
        (FIRST + "- {id: [two], phrasings: [a wait], central: [power], relevant: []}\n", 2, "'id' must be a text"),
        (FIRST + "- {id: two, phrasings: a wait, central: [power], relevant: []}\n", 2, "must be lists of texts"),
        (FIRST + "- {id: two, phrasings: [], central: [power], relevant: []}\n", 2, "at least one phrasing"),
        (FIRST + "- {id: two, phrasings: [a wait], central: [], relevant: []}\n", 2, "at least one phrasing and one value"),
        (FIRST + FIRST, 2, "'one' is used twice"),
        (FIRST + "- {id: two, phrasings: [a wait], central: [powder], relevant: []}\n", 2, "points at the value 'powder', which no file defines"),
    ],
)
def test_a_bad_concern_is_refused_with_file_and_line(tmp_path, bank, line, message):
    (tmp_path / "patience.yaml").write_text(GOOD, encoding="utf-8")
    file = tmp_path / "concerns.yaml"
    file.write_text(bank, encoding="utf-8")
    with pytest.raises(TaxonomyError, match=message) as raised:
        Taxonomy.load(tmp_path)
    assert str(raised.value).startswith(f"{file}:{line}: ")


def test_the_fingerprint_changes_with_whatever_selection_or_steering_rests_on(taxonomy):
    value, concern = taxonomy["karma"], taxonomy.concerns[0]
    form = FORMS[0]
    twins = (Pair(value.pairs[form][0].positive + " ", value.pairs[form][0].negative), *value.pairs[form][1:])
    changes = [
        replace(value, pairs={**value.pairs, form: twins}),
        replace(value, definition="Deeds come back."),
        replace(value, facets=value.facets[::-1]),
        replace(value, alpha=0.123),
    ]
    prints = {Taxonomy([value], [concern]).fingerprint}
    prints |= {Taxonomy([changed], [concern]).fingerprint for changed in changes}
    prints.add(Taxonomy([value], [replace(concern, phrasings=("another wait",))]).fingerprint)
    prints.add(Taxonomy([value]).fingerprint)
    assert len(prints) == len(changes) + 3


def test_the_fingerprint_is_the_same_for_the_same_files(taxonomy):
    assert Taxonomy.load().fingerprint == taxonomy.fingerprint


def test_a_subset_keeps_the_concerns_that_point_at_it_and_nothing_else(taxonomy):
    some = taxonomy.subset(["karma", "Honor"])
    assert some.ids == ("karma", "honor")
    for concern in some.concerns:
        assert set(concern.central + concern.relevant) <= {"karma", "honor"}
    pointing = [c.id for c in taxonomy.concerns if {"karma", "honor"} & set(c.central + c.relevant)]
    assert [concern.id for concern in some.concerns] == pointing


def test_the_bioethics_family_alone_has_the_situations_that_are_graded_for_it_too():
    alone = Taxonomy.load(shipped=False, bioethics=True)
    assert sum(bool(situation.central) for situation in alone.situations) > 500
    assert {value for situation in alone.situations for value in situation.central} == set(alone.ids)
    assert any(not situation.central and not situation.relevant for situation in alone.situations)
