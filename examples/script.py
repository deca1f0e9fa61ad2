"""For researchers: a handful of questions over one graph, a JSON line each.

    python examples/script.py > answers.jsonl

The graph is made once: the models stay loaded, and the questions of a `batch` can share forward passes. A question that cannot be
answered gives a line with its error instead of ending the run.
"""

from __future__ import annotations

import json

from vispa_graph import Input, Settings, create_graph

QUESTIONS: list[Input] = [
    {"query": "Should a nurse tell a patient the truth when the family asks her not to?"},
    {"query": "My employer reads all our messages to catch thieves."},
    {"query": "May a surgeon refuse to operate on a smoker?", "attribute": "fairness"},
    {"query": "Should organ donation be the rule unless one objects?", "options": ["Yes", "No", "Not sure"], "population": "Spain"},
    {"query": "Should one lie to protect a friend?", "options": ["Always"]},  # one option is too few: an error, in a line of its own
]


def main() -> None:
    # Greedy decoding is the default: the same lines come out whenever this runs on the same machine.
    graph = create_graph(Settings(top_k=4, max_new_tokens=60))
    outputs = graph.batch(QUESTIONS, return_exceptions=True)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        if isinstance(output, Exception):
            line = {"query": question["query"], "error": type(output).__name__, "message": str(output)}
        else:
            line = {
                "query": question["query"],
                "mode": output["mode"],
                "values": {value["id"]: value["score"] for value in output["values"]},
                "comments": {comment["value"]: comment["text"] for comment in output["comments"]},
                "response": output["response"],
                "distribution": output["distribution"],
                "notes": output["notes"],
            }
        print(json.dumps(line), flush=True)
    graph.close()


if __name__ == "__main__":
    main()
