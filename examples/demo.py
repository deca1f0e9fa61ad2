"""The three modes on one question, with the models that come with the installation.

python examples/demo.py
"""

from __future__ import annotations

import textwrap
import time

from rich.console import Console
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from vispa_graph import Input, Output, create_graph

QUERY = "Should my father, 84, have an operation he does not want?"
ASKED: dict[str, Input] = {
    "Overton: one answer that covers all perspectives": {"query": QUERY},
    'Steerable: an answer that speaks for "self-direction"': {"query": QUERY, "attribute": "self-direction"},
    "Distributional: a probability for every option": {"query": QUERY, "options": ["Yes", "No", "It depends"]},
}
HONEST = (
    "The texts above were written by a language model that is tiny, so that it fits into the installation: they show how the pipeline "
    'works, not what it can say; its probabilities are near chance. For a real model: vispa ask --model Qwen/Qwen3-4B "...", or Settings(model="Qwen/Qwen3-4B").'
)


def show_comments(console: Console, output: Output) -> None:
    """The values at stake and what was said from each: in all modes the same."""
    heard = Table("Value heard", "Score", "Why")
    for value in output["values"]:
        heard.add_row(escape(value["name"]), f"{value['score']:.2f}", escape(value["reason"]))
    console.print(heard)
    console.print("[bold]Comments, in short[/]")
    said = Table.grid(padding=(0, 2))
    for comment in output["comments"]:
        said.add_row(f"[cyan]{escape(comment['name'])}[/]", escape(textwrap.shorten(comment["text"], 140, placeholder=" ...")))
    console.print(said)


def show_answer(console: Console, output: Output) -> None:
    console.print("[bold]Answer[/]")
    console.print(escape(output["response"]))
    if output["chosen"]:
        console.print(f"It rests on the comment from {escape(output['chosen']['value'])}: {escape(output['chosen']['reason'])}.")
    if output["distribution"]:
        bars = Table.grid(padding=(0, 1))
        for option, probability in output["distribution"].items():
            bars.add_row(escape(option), ProgressBar(total=1, completed=probability, width=40), f"{probability:.1%}")
        console.print(bars)
    for note in output["notes"]:
        console.print(f"Note: {escape(note)}")


def main() -> None:
    console = Console(highlight=False, emoji=False)
    console.print(
        "Loading the sentence encoder, the index of values and the embedded language model; this takes some seconds, up to a minute the first time ..."
    )
    started = time.perf_counter()
    graph = create_graph()
    # The graph would load them when it first runs; here the time of each is to be seen.
    _ = graph.resources.index, graph.resources.directions
    console.print(f"Loaded in {time.perf_counter() - started:.1f} s.\n\n[bold]{escape(QUERY)}[/]")
    for number, (title, given) in enumerate(ASKED.items()):
        console.print()
        console.rule(f"[bold]{escape(title)}[/]", align="left")
        if number == 0:
            console.print("[dim]Finding the values at stake, then writing a comment from each of them, all at once ...[/]")
        started = time.perf_counter()
        output = graph.invoke(given)
        seconds = time.perf_counter() - started
        if number == 0:
            show_comments(console, output)
        show_answer(console, output)
        console.print(f"[dim]{output['mode']}: {seconds:.1f} s[/]")
    graph.close()
    console.print(f"\n{escape(HONEST)}")


if __name__ == "__main__":
    main()
