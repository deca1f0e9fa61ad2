"""Telling people from values, rights and duties in the attribute of a steerable question."""

from __future__ import annotations

import pytest

from vispa_graph.attributes import read_attribute


@pytest.mark.parametrize(
    "text",
    [
        "a nurse",
        "An engineer",
        "the elderly",
        "people from Ghana",
        "Someone who fasts",
        "men over 60",
        "members of a union",
        "people with a duty to report",
    ],
)
def test_people_are_a_group(text):
    assert read_attribute(text).kind == "group"
    assert read_attribute(text).text == text


@pytest.mark.parametrize(
    "text",
    [
        "honesty",
        "Right to life",
        "Duty of care",
        "autonomy",
        "menace avoidance",
        "the right to refuse treatment",
        "a duty to tell the truth",
        "the value of life",
    ],
)
def test_values_rights_and_duties_are_not_a_group(text):
    assert read_attribute(text).kind == "vrd"
    assert read_attribute(text).text == text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("POLPARTY_Democrat", "political party: Democrat"),
        ("POLIDEOLOGY_Very conservative", "political ideology: Very conservative"),
        ("RELIG_Roman Catholic", "religion: Roman Catholic"),
        ("RACE_Asian", "race: Asian"),
        ("EDUCATION_College graduate/some postgrad", "education: College graduate/some postgrad"),
        ("INCOME_$100,000 or more", "income: $100,000 or more"),
        ("CREGION_South", "region in the United States: South"),
        ("SEX_Female", "sex: Female"),
    ],
)
def test_opinionqa_codes_are_spelt_out_as_groups(code, text):
    assert read_attribute(code).kind == "group"
    assert read_attribute(code).text == text


@pytest.mark.parametrize("text", ["SEX_", "SHOE_Size", "_"])
def test_what_only_looks_like_a_code_is_left_alone(text):
    assert read_attribute(text).text == text
