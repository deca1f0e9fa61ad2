"""Composing answers from the comments' own sentences, by sentence embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vispa_graph.state import Attribution, Comment
from vispa_graph.taxonomy_index import Encoder, Taxonomy

Array = npt.NDArray[np.float32]

# Above this cosine two sentences say the same (a judgment on MiniLM, not a measured optimum).
SAME = 0.85
# Below this cosine a generated sentence is not attributed to a comment.
RESTS_ON = 0.45

# The blanks after a full stop and up to two closing quotes or brackets, which stay with their sentence.
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')])|(?<=[.!?]["')]{2}))\s+(?=["'(A-Z0-9])""")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; whole lines count as sentences too."""
    return [s.strip() for line in text.splitlines() for s in _SENTENCE_END.split(line) if s.strip()]


def telling_sentences(query: str, comments: Sequence[Comment], taxonomy: Taxonomy, encoder: Encoder) -> list[Attribution]:
    """The most telling sentence of every comment, in the comments' order, near-duplicates merged.

    A sentence tells more the nearer it is to its value (definition and facets), the farther from the other values heard, and the
    nearer to the query. Every value with a comment that holds any text is heard: alone, or as one of those a merged sentence rests on.
    """
    anchors = {c["value"]: _anchors(taxonomy, c["value"]) for c in comments}
    texts = [query, *(text for phrases in anchors.values() for text in phrases)]
    vectors = encoder.encode(texts)
    about, position, near = vectors[0], 1, {}
    for value, phrases in anchors.items():
        near[value] = vectors[position : position + len(phrases)]
        position += len(phrases)
    told: list[tuple[Attribution, Array]] = []
    for comment in comments:
        sentences = _complete(comment)
        if not sentences:
            continue
        embedded = encoder.encode(sentences)
        best = int(np.argmax(_telling(embedded, comment["value"], near, about)))
        for attribution, vector in told:
            if float(vector @ embedded[best]) >= SAME:
                attribution["values"].append(comment["value"])
                break
        else:
            told.append(({"sentence": sentences[best], "values": [comment["value"]]}, embedded[best]))
    return [attribution for attribution, _ in told]


def attribute_sentences(response: str, comments: Sequence[Comment], encoder: Encoder) -> list[Attribution]:
    """Each sentence of a generated response with the values of the comments it is nearest to; none where none is near."""
    sentences = split_sentences(response)
    sources = [(comment["value"], sentence) for comment in comments for sentence in split_sentences(comment["text"])]
    if not sentences or not sources:
        return [{"sentence": sentence, "values": []} for sentence in sentences]
    similarity = encoder.encode(sentences) @ encoder.encode([text for _, text in sources]).T
    attributions: list[Attribution] = []
    for sentence, row in zip(sentences, similarity, strict=True):
        best: dict[str, float] = {}
        for (value, _), score in zip(sources, row, strict=True):
            best[value] = max(best.get(value, -1.0), round(float(score), 4))
        values = sorted((v for v, score in best.items() if score >= RESTS_ON), key=lambda v: -best[v])
        attributions.append({"sentence": sentence, "values": values[:3]})
    return attributions


def nearest_comment(attribute: str, comments: Sequence[Comment], taxonomy: Taxonomy, encoder: Encoder) -> Comment:
    """The comment whose value, and whose text, is nearest to an attribute."""
    vectors = encoder.encode([attribute, *(taxonomy[c["value"]].definition for c in comments), *(c["text"] for c in comments)])
    half = len(comments)
    scores = np.round(vectors[1 : half + 1] @ vectors[0] + vectors[half + 1 :] @ vectors[0], 5)
    return comments[int(np.argmax(scores))]


def _anchors(taxonomy: Taxonomy, value: str) -> tuple[str, ...]:
    return (taxonomy[value].definition, *taxonomy[value].facets)


def _telling(sentences: Array, value: str, near: Mapping[str, Array], about: Array) -> Array:
    def closeness(anchors: Array) -> Array:
        best_two: Array = np.sort(sentences @ anchors.T, axis=1)[:, -2:]
        return np.asarray(best_two.mean(axis=1), dtype=np.float32)

    others = [closeness(anchors) for other, anchors in near.items() if other != value]
    apart = np.mean(others, axis=0) if others else np.zeros(len(sentences))
    # Rounded, so that the last bits of a float do not decide between sentences.
    return np.asarray(closeness(near[value]) - 0.5 * apart + 0.3 * (sentences @ about), dtype=np.float32).round(5)


def _complete(comment: Comment) -> list[str]:
    """The sentences of a comment without one that was cut off, unless there is nothing else."""
    sentences = split_sentences(comment["text"])
    whole = [s for s in sentences if s[-1] in ".!?\"')"]
    return whole or sentences
