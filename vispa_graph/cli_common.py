"""What the commands share: refusals, options, and what the screen shows."""

from __future__ import annotations

import atexit
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

    from vispa_graph.settings import Settings
    from vispa_graph.taxonomy_index import Taxonomy, Value

Show = Callable[..., None]

# Stages with which a fit begins.
_FITTING = ("reading for the dictionary", "fitting directions")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Refused(click.ClickException):
    """Something the user can mend: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the message."""
        click.echo(f"vispa: {self.message}", err=True)


class Unwritten(Refused):
    """A file that cannot be written: one line on stderr, exit code 1."""

    exit_code = 1


# Options


def text(value: str) -> str:
    """Text that is not blank. Bytes the terminal could not decode arrive as lone surrogates, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("the text is not valid UTF-8.") from None
    if not value.strip():
        raise click.BadParameter("the text is blank. Write it out.")
    return value


values_option = click.option("--values", type=click.Path(path_type=Path), multiple=True, metavar="FOLDER", help="Your own value files. Repeatable.")
bioethics_option = click.option("--bioethics", is_flag=True, help="With the ten values of the bioethics family, for health care.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")


def settings_of(**given: Any) -> Settings:
    """Settings of the options and flags that were given: the others must not hide VISPA_* variables."""
    from vispa_graph.settings import Settings

    _tell_misspelt()
    return Settings(**{name: value for name, value in given.items() if value is not None and value is not False and value != ()})


def _tell_misspelt() -> None:
    """Say once a command which variables of the environment are nearly ours: they are no errors, for programs share prefixes."""
    from vispa_graph.settings import misspelt_variables

    told = click.get_current_context().meta.setdefault(f"{__name__}.misspelt", set())
    for variable, nearest in misspelt_variables().items():
        if variable not in told:
            told.add(variable)
            click.echo(f"vispa: warning: the variable {variable} is not known and does nothing. Did you mean {nearest}?", err=True)


def settings_with_model(**given: Any) -> Settings:
    """The same, refused at once where they name a folder that holds no model: all else takes seconds to load."""
    from vispa_graph.engine.folder import find_model
    from vispa_graph.settings import EMBEDDED

    settings = settings_of(**given)
    if settings.model != EMBEDDED:
        find_model(settings.model)
    return settings


def read_query(text: str) -> str:
    """The text, or what stdin holds where it is a dash."""
    if text != "-":
        return text
    if sys.stdin is None:
        raise Refused("stdin is closed, so no text can be read from it. Give the text as an argument, or pipe it in.")
    if on_a_terminal():
        click.echo("vispa: waiting for the text on stdin; end it with Ctrl-D on a line of its own (Ctrl-Z and Enter on Windows).", err=True)
    try:
        query = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"stdin is not UTF-8 text (byte {error.start}). Save the text as UTF-8.") from error
    if not query.strip():
        raise Refused("stdin: the text is blank. Write it out.")
    return query


def on_a_terminal() -> bool:
    """Whether somebody could type what is read from stdin."""
    return sys.stdin is not None and sys.stdin.isatty()


# Traces


def send_traces(seconds: float = 1.0) -> None:
    """Give the tracing that the environment asks for a moment to send what it holds; an endpoint that does not answer gets no more."""
    from langsmith import run_trees

    client = run_trees._CLIENT
    if client is None:
        return
    until = time.monotonic() + seconds
    client.flush(timeout=seconds)
    if client.otel_exporter is not None:
        from opentelemetry import trace

        provider: Any = trace.get_tracer_provider()
        flush = threading.Thread(target=provider.force_flush, daemon=True)
        flush.start()
        flush.join(max(0.0, until - time.monotonic()))
        atexit.unregister(provider.shutdown)  # it would wait for the endpoint once more


# Values


def load_taxonomy(settings: Settings) -> Taxonomy:
    from vispa_graph.taxonomy_index.taxonomy import Taxonomy

    return Taxonomy.load(*settings.values, shipped=settings.shipped_values, bioethics=settings.bioethics)


def value_facts(value: Value) -> dict[str, Any]:
    return {
        "id": value.id,
        "name": value.name,
        "family": value.family,
        "source": value.source,
        "aliases": list(value.aliases),
        "definition": value.definition,
        "facets": list(value.facets),
        "pairs": len(value.all_pairs),
        "file": str(value.file),
    }


# The screen


@contextmanager
def progress() -> Iterator[Show]:
    """Gives show(what, done, total), which tells on stderr what is going on; where that is no terminal, only that a fit has begun."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        stage, told = "", False

        def show(what: str, done: int = 0, total: int | None = None) -> None:
            nonlocal stage, told
            if what in _FITTING and not told and not console.is_terminal:
                told = True
                click.echo("vispa: fitting directions, which may take minutes; they are kept, and not fitted again.", err=True)
            if what != stage:  # each stage has its own clock
                stage = what
                progress.reset(task)
            count = f" {done}/{total}" if total else ""
            progress.update(task, description=f"{what}{count}", completed=done, total=total or None)

        yield show


def open_console() -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def print_json(data: Any) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or ""  # None where stdout is closed
    text = json.dumps(data, indent=2, ensure_ascii=not encoding.lower().startswith("utf"))
    click.echo(text)


def print_title(console: Console, text: str) -> None:
    console.print(clean(text), style="bold", soft_wrap=not console.is_terminal)


def print_text(console: Console, text: str) -> None:
    console.print(clean(text), soft_wrap=not console.is_terminal)


def print_tree(tree: Tree) -> None:
    """A tree whose lines no width cuts where stdout is no terminal."""
    from rich.console import Console

    console = open_console()
    wide = console if console.is_terminal else Console(markup=False, highlight=False, emoji=False, width=1000)
    for line in wide.render_lines(tree, pad=False):
        click.echo(clean("".join(segment.text for segment in line)).rstrip())


def print_facts(console: Console, facts: dict[str, Any]) -> None:
    """Names and values, one a line."""
    for name, fact in facts.items():
        print_text(console, f"{name.replace('_', ' ')}: {in_words(fact)}")


def in_words(fact: Any) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return ", ".join(map(str, fact)) if isinstance(fact, list) else str(fact)


def print_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere columns that no width cuts."""
    cleaned = [[clean(cell).replace("\n", " ") for cell in row] for row in rows]
    if console.is_terminal:
        from rich.table import Table

        table = Table(*titles)
        for row in cleaned:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(titles, *cleaned, strict=True)]
    for line in (titles, *cleaned):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_bars(console: Console, distribution: dict[str, float]) -> None:
    if not console.is_terminal:
        print_table(console, ["Option", "Probability"], [[option, f"{p:.1%}"] for option, p in distribution.items()])
        return
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    for option, probability in distribution.items():
        grid.add_row(clean(option), ProgressBar(total=1, completed=probability, width=30), f"{probability:.1%}")
    console.print(grid)


def clean(text: str) -> str:
    """The text without control characters: what a model or a file says must not steer the terminal."""
    return _CONTROL.sub("", text)
