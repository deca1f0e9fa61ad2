"""Laying texts out for reading: two that begin alike may share a row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vispa_graph.engine.rows import apart, laid_out, shared_rows, single_rows

PAD = 9
TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)


def seen_by(rows, text):
    """The tokens that a text's last token sees, itself included, in the order of their positions, and these positions."""
    ids, _ = laid_out(rows, PAD)
    scores, positions = apart(rows, ids.shape[1], torch.float32)
    number = next(number for number, row in enumerate(rows) if text in row.texts)
    end = rows[number].ends[rows[number].texts.index(text)]
    visible = scores[number, 0, end] == 0
    return ids[number][visible].tolist(), positions[number][visible].tolist()


@settings(deadline=None)
@given(TEXTS)
def test_every_text_is_in_one_row_and_its_last_token_sees_that_text_alone_at_its_own_positions(texts):
    for rows in (shared_rows(texts), single_rows(texts)):
        assert sorted(text for row in rows for text in row.texts) == list(range(len(texts)))
        for text, tokens in enumerate(texts):
            assert seen_by(rows, text) == (tokens, list(range(len(tokens))))


@settings(deadline=None)
@given(TEXTS)
def test_sharing_never_makes_more_tokens(texts):
    assert sum(len(row.tokens) for row in shared_rows(texts)) <= sum(map(len, texts))


def test_those_with_the_longest_common_beginning_share_a_row():
    near, nearer, nearest = [1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 6, 0], [1, 2, 3, 4, 5, 6, 7]
    together = next(row for row in shared_rows([near, nearer, nearest]) if len(row.texts) == 2)
    assert (together.texts, together.tokens) == ((1, 2), [1, 2, 3, 4, 5, 6, 0, 7])


def test_a_short_beginning_or_a_wide_row_is_not_shared():
    assert all(len(row.texts) == 1 for row in shared_rows([[1, 2, 3, 4], [1, 2, 3, 5]]))
    assert all(len(row.texts) == 1 for row in shared_rows([[1] * 10 + [2] * 60, [1] * 10 + [3] * 60]))


def test_padding_is_marked_and_comes_last():
    ids, real = laid_out(single_rows([[1, 2, 3], [4]]), PAD)
    assert ids.tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert real.tolist() == [[1, 1, 1], [1, 0, 0]]
