"""The commands for readers and authors of values: `vispa values`, and its `show`, `check` and `new`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vispa_graph.cli_common import (
    Refused,
    bioethics_option,
    json_option,
    load_taxonomy,
    on_a_terminal,
    open_console,
    print_facts,
    print_json,
    print_table,
    print_text,
    print_title,
    progress,
    read_query,
    send_traces,
    settings_of,
    text,
    value_facts,
    values_option,
)

if TYPE_CHECKING:
    from vispa_graph.settings import Settings
    from vispa_graph.taxonomy_index import Value

_BIOETHICS = "bioethics"
_SCAFFOLD = """\
{header}
aliases: []
# What the positive twin does and the negative one does not.
polarity: ""
# What someone who holds the value cares about, short phrases from all of life, 16 or so: questions are found by them.
facets: []
# Twins in the same situation, with the same grammar and length: the positive one lives the value, the negative one acts against it.
# Neither names the value. 16 or so of each form, such as
#   - positive: I asked the patient first and waited for her answer.
#     negative: I asked the patient last and ignored her answer.
pairs:
  first_person_sentence: []
  third_person_sentence: []
  first_person_question: []
  third_person_question: []
"""


class _ShowsByDefault(click.Group):
    """A group in which what is no command is the id of a value to show."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command named, or `show` with all the arguments."""
        if self.get_command(ctx, args[0]) is None:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


@click.group("values", cls=_ShowsByDefault, invoke_without_command=True, subcommand_metavar="[ID | COMMAND ...]")
@click.option("--query", type=text, help='Show which values a text puts at stake; "-" reads it from stdin.')
@click.option("--top-k", type=int, help="With --query: how many at most.")
@click.option("--family", type=text, help="Only the values of this family.")
@values_option
@bioethics_option
@json_option
@click.pass_context
def values_group(
    ctx: click.Context, query: str | None, top_k: int | None, family: str | None, values: tuple[Path, ...], bioethics: bool, as_json: bool
) -> None:
    """List the values, or those a text puts at stake; show, check or make one.

    `vispa values ID` is short for `vispa values show ID`.
    """
    if ctx.invoked_subcommand is not None:
        if query is not None or top_k is not None or family is not None:
            raise click.UsageError("Give --query, --top-k and --family without an ID or a command, not both. A text of several words goes in quotes.")
        ctx.obj = (values, as_json, bioethics)
        return
    if top_k is not None and query is None:
        raise click.UsageError("--top-k needs --query.")
    settings = settings_of(values=values, top_k=top_k, bioethics=bioethics or family == _BIOETHICS)
    if query is not None:
        read = read_query(query)
        try:
            _show_selection(read, settings, family, as_json)
        finally:  # not before the values are shown
            send_traces()
    else:
        _show_taxonomy(_of_family(list(load_taxonomy(settings)), family), as_json)


@values_group.command()
@click.argument("value_id", metavar="ID", type=text)
@values_option
@bioethics_option
@json_option
@click.pass_obj
def show(before: tuple[tuple[Path, ...], bool, bool], value_id: str, values: tuple[Path, ...], bioethics: bool, as_json: bool) -> None:
    """Show the value with this ID, name or alias."""
    taxonomy = load_taxonomy(settings_of(values=before[0] + values, bioethics=before[2] or bioethics))
    value = taxonomy.find(value_id, f"The value {value_id!r}")
    if as_json or before[1]:
        print_json(value_facts(value))
        return
    console = open_console()
    print_title(console, f"{value.name} ({value.id})")
    facts = {"family": value.family, "source": value.source, "pairs": len(value.all_pairs), "aliases": list(value.aliases), "file": str(value.file)}
    print_facts(console, facts)
    print_text(console, f"\n{value.definition}\n")
    for facet in value.facets:
        print_text(console, f"- {facet}")


@values_group.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--new-family", multiple=True, type=text, metavar="NAME", help="A family of your own, which is no misspelling. Repeatable.")
@json_option
@click.pass_obj
def check(before: tuple[tuple[Path, ...], bool, bool], folder: Path, new_family: tuple[str, ...], as_json: bool) -> None:
    """Check the value files in FOLDER as a careful editor would; every problem comes with file and line.

    Unknown and duplicate keys, fields of wrong types, duplicate ids, unknown families, missing forms, twins that differ in length or share
    too few words, a value named in one twin only, pairs that say nearly the same.
    """
    from vispa_graph.resources import Resources
    from vispa_graph.taxonomy_index.check import check_folder

    settings = settings_of(top_k=1)
    with progress() as tell:
        tell("checking")
        problems = check_folder(folder, Resources(settings).encoder, families=new_family)
    if as_json or before[1]:
        print_json([{"file": str(p.file), "line": p.line, "message": p.message} for p in problems])
        click.get_current_context().exit(2 if problems else 0)
    if problems:
        raise Refused("\nvispa: ".join(map(str, problems)))
    click.echo(f"{folder}: no problems.")


@values_group.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--id", "value_id", help="Lower-case letters and digits, words joined by hyphens; also the name of the file.")
@click.option("--name", help="As people write it.")
@click.option("--family", help="The school or survey it belongs to.")
@click.option("--source", help="Where it comes from.")
@click.option("--definition", help="One or two sentences.")
def new(folder: Path, **given: str | None) -> None:
    """Make a value file in FOLDER to fill in. What no option says is asked for on a terminal."""
    import yaml

    from vispa_graph.taxonomy_index.taxonomy import check_id, shipped_ids

    asked = {"value_id": "Id", "name": "Name", "family": "Family", "source": "Source", "definition": "Definition"}
    missing = [name for name in asked if not (given[name] or "").strip()]
    if missing and not on_a_terminal():
        options = ", ".join("--" + name.removeprefix("value_") for name in missing)
        raise click.UsageError(f"Give {options}: without a terminal nothing is asked for.")
    answers = {}
    for name, question in asked.items():
        answers[name] = (given[name] or "").strip() or click.prompt(question, err=True).strip()
        if name == "value_id":  # before anything else is asked for
            check_id(answers[name])
            if answers[name] in shipped_ids():
                raise Refused(f"The id {answers[name]!r} is that of a value that comes with vispa_graph. Choose another id.")
    header = {"id": answers["value_id"], **{name: answers[name] for name in ("name", "family", "source", "definition")}}
    content = _SCAFFOLD.format(header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=140).rstrip())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{answers['value_id']}.yaml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise Refused(f"{path}: the file is there already, and stays as it is. Choose another id, or edit the file.") from None
    click.echo(f"{path}: fill in facets and pairs, then run `vispa values check {folder}`.")


def _of_family(values: Sequence[Value], family: str | None) -> list[Value]:
    """The values of a family; all where it is None."""
    found = [value for value in values if family in (None, value.family)]
    if not found:
        raise Refused(f"No value is of that family. The families are: {', '.join(dict.fromkeys(value.family for value in values))}.")
    return found


def _show_selection(query: str, settings: Settings, family: str | None, as_json: bool) -> None:
    from vispa_graph.resources import Resources
    from vispa_graph.select import select_values
    from vispa_graph.settings import end_tracing_with_the_process

    end_tracing_with_the_process()
    with progress() as tell:
        tell("selecting values")
        resources = Resources(settings)
        resources.check_top_k()
        allowed = {value.id for value in _of_family(list(resources.taxonomy), family)}
        selected = select_values(query, settings.top_k if family is None else len(resources.taxonomy), resources=resources)
    chosen = [s for s in selected if s.value in allowed][: settings.top_k]
    named: list[dict[str, Any]] = [{"id": s.value, "name": resources.taxonomy[s.value].name, "score": s.score, "reason": s.reason} for s in chosen]
    if as_json:
        print_json(named)
    elif named:
        print_table(open_console(), ["Value", "Score", "Reason"], [[v["name"], f"{v['score']:.2f}", v["reason"]] for v in named])
    else:
        click.echo(f"No value scores at least {settings.min_score:g}: none is at stake.", err=True)


def _show_taxonomy(values: Sequence[Value], as_json: bool) -> None:
    if as_json:
        print_json([value_facts(value) for value in values])
        return
    families = list(dict.fromkeys(value.family for value in values))
    ordered = sorted(values, key=lambda value: families.index(value.family))
    rows = [[v.family, v.id, v.name, str(len(v.facets)), str(len(v.all_pairs))] for v in ordered]
    print_table(open_console(), ["Family", "Id", "Name", "Facets", "Pairs"], rows)
