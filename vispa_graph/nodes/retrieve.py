"""Find the phrases of the taxonomy nearest to the query."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.types import Overwrite

from vispa_graph.conversation import as_read, reading_notes, recall
from vispa_graph.resources import Resources
from vispa_graph.state import Candidate, State, unused_inputs

_LEFT_MODE = (
    "The mode came with the values of an earlier answer and was taken for that answer's, so it followed from the other inputs. "
    "To choose one, clear the values."
)


def retrieve(state: State, config: RunnableConfig, *, resources: Resources) -> dict[str, Any]:
    """Candidates for the selection, and a clean slate for what the run will add; none where the caller named the values."""
    earlier = state.get("turns", [])
    if not state.get("response"):  # the last turn broke off: it was never answered
        earlier = earlier[:-1]
    turns = recall(earlier, state["query"])
    read, notes = as_read(turns), reading_notes(turns)
    notes += [_LEFT_MODE if key == "mode" else f"The input key {key!r} is not known and was ignored." for key in state["ignored"]]
    notes += [f"The {state['mode']} mode does not use the input {key!r}: it was left out." for key in unused_inputs(state)]
    if resources.profile.note:
        notes.append(resources.profile.note)
    # A thread may go on for several turns: what an earlier one added must not mix with this one.
    fresh: dict[str, Any] = {
        "made_with": Overwrite(resources.made_with),
        "turns": turns,
        "values": [],
        "comments": Overwrite([]),
        "response": "",
        "distribution": None,
        "chosen": None,
        "attribution": [],
    }
    if state["asked"] is not None:
        return fresh | {"candidates": [], "notes": Overwrite(notes)}
    texts = _searched(read)
    if not all(resources.value_encoder.fits(text) for text in texts):
        text = "text" if len(read) == 1 else "text, with the earlier questions,"
        notes.append(f"The {text} is longer than the sentence encoder reads, so the values were selected by its beginning.")
    return fresh | {"candidates": _candidates(texts, config, resources), "notes": Overwrite(notes)}


def _searched(turns: list[str]) -> list[str]:
    """What is searched for: the question alone, and a follow-up also with the turns before it."""
    # The newest turn first: the encoder reads a text's beginning.
    return [turns[-1]] if len(turns) == 1 else [turns[-1], " ".join(reversed(turns))]


def _candidates(texts: list[str], config: RunnableConfig, resources: Resources) -> list[Candidate]:
    """The phrases near any of the texts, each by its highest score.

    So a follow-up is understood by what it follows, and a question that says enough alone is not blurred by what came before.
    """
    from vispa_graph.taxonomy_index.retriever import TaxonomyRetriever

    retriever = TaxonomyRetriever(index=resources.index)
    best: dict[tuple[str, str], Candidate] = {}
    for document in [document for text in texts for document in retriever.invoke(text, config)]:
        found = document.metadata
        candidate = Candidate(
            text=document.page_content, kind=found["kind"], source=found["source"], values=found["values"], score=found["score"], row=found["row"]
        )
        key = (candidate["source"], candidate["text"])
        if key not in best or candidate["score"] > best[key]["score"]:
            best[key] = candidate
    return sorted(best.values(), key=lambda candidate: -candidate["score"])
