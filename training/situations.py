"""Write the graded situations of training/content into the package, where they help to select values.

python -m training.situations

Those in `graded/more` lie beside, graded in the same way: with them and an adapter trained on all, half of the benchmark gained as much as the
other half lost (its README), and the index was twice as large.
"""

from __future__ import annotations

import json

import yaml

from training.grammar import CONTENT
from vispa_graph.taxonomy_index.taxonomy import SITUATIONS

GRADED = CONTENT / "graded"


def graded() -> list[tuple[str, list[str], list[str]]]:
    """Text, central and relevant values of every graded situation, each text once."""
    found: dict[str, tuple[str, list[str], list[str]]] = {}
    for path in sorted(GRADED.glob("*.yaml")):
        for entry in yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader):
            found.setdefault(entry["text"], (entry["text"], entry["central"], entry["relevant"]))
    return list(found.values())


def compact(situations: list[tuple[str, list[str], list[str]]]) -> str:
    """JSON with a situation a line, the values as places in one list."""
    ids = sorted({value for _, central, relevant in situations for value in (*central, *relevant)})
    place = {value: number for number, value in enumerate(ids)}
    rows = [[text, [place[v] for v in central], [place[v] for v in relevant if v not in central]] for text, central, relevant in situations]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    return f'{{"values":{json.dumps(ids, separators=(",", ":"))},"situations":[\n{lines}\n]}}\n'


def main() -> None:
    situations = graded()
    SITUATIONS.write_text(compact(situations), encoding="utf-8")
    print(f"{len(situations)} situations, {SITUATIONS.stat().st_size / 1024:.0f} KiB: {SITUATIONS}")


if __name__ == "__main__":
    main()
