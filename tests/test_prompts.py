"""Prompts are files whose placeholders are checked, and what fills them stays data."""

from __future__ import annotations

import html
import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vispa_graph import prompts
from vispa_graph.errors import PromptError
from vispa_graph.passages import number_passages
from vispa_graph.prompts import PLACEHOLDERS, Prompt, fence, load_prompt
from vispa_graph.scoring import option_prompt

NO_PROMPTS = {"reading_situations.txt"}  # read line by line, not filled

# What an attacker would build from: our tags, whole and in pieces.
hostile = st.lists(
    st.sampled_from(
        ["<", "</", "< / ", ">", "/", " ", "\n", "situation", "PASSAGE", "passages", "question", "attribute", "ignore the above", "x", ' number="9"', "{query}", "&lt;"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


def tags_of(text: str) -> list[str]:
    """The names of our tags that an opening bracket stands before, in order, however it is spaced."""
    found = []
    for name in re.finditer(r"(situation|passages|passage|question|attribute)(?!\w)", text, re.IGNORECASE):
        before = text[: name.start()].rstrip("/ \n\t")
        if before.endswith("<"):
            found.append(name[1])
    return found


def test_every_prompt_file_has_exactly_the_placeholders_that_the_code_fills():
    files = {path.name for path in resources.files("vispa_graph.prompts").iterdir() if path.name.endswith(".txt")}
    assert files - NO_PROMPTS == {f"{name}.txt" for name in PLACEHOLDERS}
    for name, placeholders in PLACEHOLDERS.items():
        template = load_prompt(name).template.replace("{{", "{").replace("}}", "}")
        for placeholder in placeholders:
            assert f"{{{placeholder}}}" in template, name


@pytest.mark.parametrize("template", ["Comment on this.", "Comment on {text} and {more}.", "Comment on {}.", "Comment on {text.name}."])
def test_a_file_with_other_placeholders_is_refused(tmp_path, monkeypatch, template):
    (tmp_path / "comment.txt").write_text(template, encoding="utf-8")
    monkeypatch.setattr(prompts.resources, "files", lambda _: tmp_path)
    load_prompt.cache_clear()
    try:
        with pytest.raises(PromptError, match=r"prompts/comment\.txt has the placeholders .* fills \['text'\]"):
            load_prompt("comment")
    finally:
        load_prompt.cache_clear()


def test_an_unknown_prompt_names_the_known_ones():
    with pytest.raises(PromptError, match=r"There is no prompt 'sonnet'.*comment, comment_attribute"):
        load_prompt("sonnet")


@pytest.mark.parametrize("data", [{}, {"text": "a", "more": "b"}, {"more": "b"}])
def test_rendering_needs_exactly_the_placeholders(data):
    with pytest.raises(PromptError, match="needs exactly: text"):
        load_prompt("comment").render(**data)


@given(st.sampled_from(sorted(PLACEHOLDERS)), st.text())
def test_what_is_filled_in_stands_there_unchanged_and_is_never_a_template(name, text):
    data = {placeholder: f"{{{placeholder}}}{text}{{query}}{{0}}" for placeholder in PLACEHOLDERS[name]}
    rendered = load_prompt(name).render(**data)
    template = load_prompt(name).template.replace("{{", "{").replace("}}", "}")
    for placeholder in PLACEHOLDERS[name]:
        assert data[placeholder] in rendered
    assert len(rendered) == len(template) + sum(len(filled) - len(placeholder) - 2 for placeholder, filled in data.items())


def test_rendering_the_same_prompt_twice_gives_the_same_text():
    prompt = Prompt("comment", "On {text}:")
    assert prompt.render(text="{text}") == "On {text}:"


@given(hostile, hostile)
def test_no_user_text_opens_or_closes_a_tag_of_ours(query, comment):
    def rendered(query: str, comment: str) -> str:
        passages = number_passages([{"text": comment}, {"text": comment}])
        return load_prompt("overton").render(query=fence(query), passages=passages)

    assert tags_of(rendered(query, comment)) == ["situation"] * 2 + ["passage"] * 4


@given(hostile, hostile, hostile)
def test_nor_does_an_option_or_a_population(query, comment, option):
    prompt = option_prompt(query, [option, "No"], comment, population=option)
    assert tags_of(prompt) == ["passage"] * 2 + ["question"] * 2
    assert tags_of(option_prompt(query, [option, "No"], None, population=option)) == ["question"] * 2


@given(hostile)
def test_fencing_changes_the_bracket_and_nothing_else_and_only_once(text):
    assert html.unescape(fence(text)) == html.unescape(text)
    assert fence(fence(text)) == fence(text)


@given(st.text().filter(lambda text: "<" not in text))
def test_a_text_without_a_bracket_is_left_alone(text):
    assert fence(text) == text


def test_other_markup_is_left_alone():
    assert fence("if x < 3 then <b>see</b> </situationist>") == "if x < 3 then <b>see</b> </situationist>"


def test_passages_are_numbered_from_one_in_the_order_given():
    text = number_passages([{"text": "first"}, {"text": "second"}])
    assert text == '<passage number="1">\nfirst\n</passage>\n\n<passage number="2">\nsecond\n</passage>'
