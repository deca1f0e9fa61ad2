"""What the door of the graph lets in, what it makes of it, and how it refuses the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vispa_graph.errors import EmptyQueryError, InputError, ModeInputError, OptionsError, UnknownModeError, VispaError
from vispa_graph.state import LETTERS, MODES, check_input, check_options, resolve_mode

QUERY = "May I lie to my mother?"
PRIVATE = "Okafor"  # stands for a patient's words in every bad input below

maybe_text = st.none() | st.sampled_from(["a nurse", "Ghana"])
maybe_options = st.none() | st.just(["Yes", "No"])


def test_a_query_alone_is_completed_to_a_full_input():
    assert check_input({"query": f"  {QUERY}\n"}) == {
        "query": QUERY,
        "mode": "overton",
        "attribute": None,
        "population": None,
        "options": None,
        "asked": None,
        "ignored": [],
    }


def test_everything_given_is_kept():
    door = check_input({"query": QUERY, "mode": "distributional", "population": " Ghana ", "options": ("Yes ", "No"), "values": ("karma", "Honor")})
    assert door["mode"] == "distributional"
    assert door["population"] == "Ghana"
    assert door["options"] == ["Yes", "No"]
    assert door["asked"] == ["karma", "Honor"]


def test_none_counts_as_not_given():
    door = check_input({"query": QUERY, "mode": None, "attribute": None, "population": None, "options": None, "values": None})
    assert (door["mode"], door["attribute"], door["asked"]) == ("overton", None, None)


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u2003"])
@pytest.mark.parametrize("key", ["attribute", "population"])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_blank_input_is_refused_by_name_in_every_mode_instead_of_deciding_it(key, blank, mode):
    with pytest.raises(InputError, match=rf"^'{key}' is blank\. Write it out or leave it out\.$"):
        check_input({"query": QUERY, "mode": mode, "options": ["Yes", "No"], key: blank})


BAD = [
    ({}, EmptyQueryError),
    ({"query": None}, EmptyQueryError),
    ({"query": " \n\t"}, EmptyQueryError),
    ({"query": [PRIVATE]}, InputError),
    ({"query": QUERY, "attribute": {PRIVATE: 1}}, InputError),
    ({"query": QUERY, "population": 84}, InputError),
    ({"query": QUERY, "values": PRIVATE}, InputError),
    ({"query": QUERY, "values": [PRIVATE, 3]}, InputError),
    ({"query": QUERY, "values": []}, InputError),
    ({"query": QUERY, "options": PRIVATE}, InputError),
    ({"query": QUERY, "options": [PRIVATE, None]}, InputError),
    ({"query": QUERY, "options": []}, OptionsError),
    ({"query": QUERY, "options": [PRIVATE]}, OptionsError),
    ({"query": QUERY, "options": [PRIVATE, "  "]}, OptionsError),
    ({"query": QUERY, "options": [PRIVATE, "No", PRIVATE.upper() + " "]}, OptionsError),
    ({"query": QUERY, "options": [f"{PRIVATE} {n}" for n in range(27)]}, OptionsError),
    ({"query": QUERY, "mode": PRIVATE}, UnknownModeError),
    ({"query": QUERY, "mode": ""}, UnknownModeError),
    ({"query": QUERY, "mode": [PRIVATE]}, UnknownModeError),
    ({"query": PRIVATE, "mode": "steerable"}, ModeInputError),
    ({"query": PRIVATE, "mode": "steerable", "options": ["Yes", "No"]}, ModeInputError),
    ({"query": PRIVATE, "mode": "distributional"}, ModeInputError),
    ({"query": PRIVATE, "population": "Ghana"}, ModeInputError),
    (PRIVATE, InputError),
    (None, InputError),
]


@pytest.mark.parametrize(("data", "error"), BAD)
def test_bad_input_is_refused_with_its_own_error_and_without_repeating_it(data, error):
    with pytest.raises(error) as raised:
        check_input(data)
    assert isinstance(raised.value, VispaError)
    assert isinstance(raised.value, ValueError)
    assert PRIVATE.lower() not in str(raised.value).lower()
    assert len(str(raised.value).split()) >= 5


def test_an_options_error_says_which_option():
    with pytest.raises(OptionsError, match=r"Option 2 is blank\."):
        check_options(["a", "", "c"])
    with pytest.raises(OptionsError, match=r"Options 1 and 3 are the same\."):
        check_options(["a", "b", "A "])
    with pytest.raises(OptionsError, match="options, and 27 came"):
        check_options([f"option {n}" for n in range(27)])


@pytest.mark.parametrize("size", [2, len(LETTERS)])
def test_the_smallest_and_the_largest_number_of_options_pass(size):
    assert check_options([f"option {n}" for n in range(size)]) == [f"option {n}" for n in range(size)]


@given(st.lists(st.text(max_size=8), max_size=28))
def test_checking_options_only_strips_them_and_is_idempotent(options):
    try:
        cleaned = check_options(options)
    except OptionsError:
        return
    assert cleaned == [option.strip() for option in options]
    assert check_options(cleaned) == cleaned


@given(attribute=maybe_text, population=maybe_text, options=maybe_options)
def test_a_mode_that_is_not_named_follows_from_the_inputs(attribute, population, options):
    if attribute:
        expected = "steerable"
    elif options:
        expected = "distributional"
    elif population:
        with pytest.raises(ModeInputError, match="options"):
            resolve_mode(None, attribute=attribute, population=population, options=options)
        return
    else:
        expected = "overton"
    assert resolve_mode(None, attribute=attribute, population=population, options=options) == expected


@given(mode=st.sampled_from(MODES), attribute=maybe_text, population=maybe_text, options=maybe_options)
def test_a_mode_that_is_named_is_taken_or_refused_but_never_changed(mode, attribute, population, options):
    lacks = (mode == "steerable" and not attribute) or (mode == "distributional" and not options)
    if lacks:
        with pytest.raises(ModeInputError):
            resolve_mode(mode, attribute=attribute, population=population, options=options)
    else:
        assert resolve_mode(mode, attribute=attribute, population=population, options=options) == mode


@given(st.text().filter(lambda text: text not in MODES))
def test_any_other_mode_is_unknown(mode):
    with pytest.raises(UnknownModeError, match="overton, steerable, distributional"):
        resolve_mode(mode, attribute="a nurse", population=None, options=["Yes", "No"])


def test_misspelt_keys_are_told_apart_from_the_state_of_a_host_graph():
    door = check_input({"query": QUERY, "atribute": "a nurse", "option": ["Yes", "No"], "messages": [], "user_id": 7, "notes": ["kept by the host"]})
    assert door["ignored"] == ["atribute", "option"]
    assert door["mode"] == "overton"


LEFT = [{"id": "karma", "reason": "as asked"}]


@given(mode=st.sampled_from(MODES), attribute=maybe_text, population=maybe_text, options=maybe_options)
def test_a_mode_that_came_with_the_values_of_an_earlier_answer_follows_from_the_inputs_and_is_told_where_it_changes(
    mode, attribute, population, options
):
    inputs = {"query": QUERY, "attribute": attribute, "population": population, "options": options}
    try:
        alone = check_input(inputs)
    except VispaError as error:
        with pytest.raises(type(error)):
            check_input({**inputs, "mode": mode, "values": LEFT})
        return
    found = check_input({**inputs, "mode": mode, "values": LEFT})
    assert found == {**alone, "ignored": ["mode"] if alone["mode"] != mode else []}


def test_a_mode_that_no_answer_of_ours_could_have_left_is_refused():
    with pytest.raises(UnknownModeError):
        check_input({"query": QUERY, "mode": PRIVATE, "values": LEFT})
