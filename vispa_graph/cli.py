"""The command `vispa`. Results go to stdout, progress and errors to stderr; bad input ends with exit code 2.

Everything heavy is imported inside the commands, so that `vispa --help` answers at once.
"""

from __future__ import annotations

import atexit
import errno
import gc
import io
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import click

from vispa_graph import __version__
from vispa_graph.cli_common import (
    Refused,
    Show,
    Unwritten,
    bioethics_option,
    json_option,
    load_taxonomy,
    open_console,
    print_bars,
    print_facts,
    print_json,
    print_table,
    print_text,
    print_title,
    print_tree,
    progress,
    read_query,
    send_traces,
    settings_of,
    settings_with_model,
    text,
    value_facts,
    values_option,
)
from vispa_graph.cli_values import values_group
from vispa_graph.errors import ModelNotFoundError, TaxonomyError, VispaError

if TYPE_CHECKING:
    from langchain_core.runnables.graph import Graph
    from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

    from vispa_graph.engine.contract import Direction
    from vispa_graph.engine.huggingface import HuggingFaceEngine
    from vispa_graph.plural_graph import PluralGraph
    from vispa_graph.resources import Resources
    from vispa_graph.settings import Settings
    from vispa_graph.state import Output

F = TypeVar("F", bound=Callable[..., Any])

# Written out, because the modules that define them are slow to import; a test compares.
MODES = ("overton", "steerable", "distributional")
DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("probe", "mean_difference", "pca", "sae")
CONTRASTS = ("opposed", "opposed+others")
READINGS = ("raw", "chat")
SOLVERS = ("exact", "saga")
DISTRIBUTIONS = ("comments", "direct", "decoding")


# Under which a command keeps, in click's context, what tells whether an interrupt leaves something to go on from.
_KEPT = f"{__name__}.kept"

# Errors and interrupts


class Asks(click.Command):
    """A command that takes one text, and says how to give one of several words."""

    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but for the message where there is more than one."""
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            ctx.fail(f'Got unexpected extra arguments ({" ".join(rest)}). Put the question in quotes, as in: {ctx.command_path} "May I lie?"')
        return rest


class Commands(click.Group):
    """A group whose commands end with a message instead of a stack trace."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program; output that cannot be written, as to a full disk, ends it with one line and exit code 1."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not _in_output(error):
                raise
            with suppress(OSError):
                click.echo(f"vispa: the output cannot be written: {error.strerror or error}. Check the space left where it goes.", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again at exit, with a message and an exit code of its own
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; every failure the user can mend becomes `Refused`."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows a question mark
                stream.reconfigure(errors="replace")
        _leave_at_once(ctx, signal.SIGINT)
        atexit.register(gc.freeze)  # else the process ends with a last collection over all of torch, which takes longer than the rest of its exit
        try:
            return super().invoke(ctx)
        except VispaError as error:
            raise Refused(str(error)) from error
        except KeyboardInterrupt:
            click.echo(_farewell(ctx), err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE or _in_output(error):  # click ends quietly, `main` with a line
                raise
            error = getattr(error, "original", error)  # without the words that traces must not hold
            place = f"{error.filename}: " if error.filename else ""
            raise Refused(f"{place}{error.strerror or error}. Check the path, its permissions and the space left.") from error


def _in_output(error: BaseException) -> bool:
    """Whether an error came from printing, and not from a file: from the stream itself, which has no frame, as click or rich called it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] in ("click", "rich")


def _farewell(ctx: click.Context) -> str:
    kept = ctx.meta.get(_KEPT)
    return "vispa: interrupted. What is fitted is kept, and the same command goes on from there." if kept and kept() else "vispa: interrupted."


def _fitted_since_now(cache: Path) -> Callable[[], bool]:
    """Tells whether directions have been kept in a cache from now on."""

    def kept() -> set[Path]:
        return set(cache.glob("directions/*/*.safetensors"))

    before = kept()
    return lambda: kept() > before


def _leave_at_once(ctx: click.Context, number: signal.Signals, last: Callable[[], None] | None = None) -> None:
    """Make a signal end the process: unwinding would first wait for the batch that is running, which may take minutes.

    Args:
        last: What is still done, for two seconds at most.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def leave(*_: object) -> NoReturn:
        if sys.stderr:
            shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # the progress display hides the cursor
            shown += _farewell(ctx) + "\n" if number == signal.SIGINT else ""
            with suppress(OSError):  # past the buffer, which the signal may have come in the midst of writing to
                os.write(sys.stderr.fileno(), shown.encode())
        if last:  # in a thread of its own: the signal may have come while this one holds a lock that it needs
            thread = threading.Thread(target=last, daemon=True)
            thread.start()
            thread.join(2)
        os._exit(128 + number)

    before = signal.signal(number, leave)
    ctx.call_on_close(lambda: signal.signal(number, before))


# Options


def block_numbers(value: str) -> tuple[float, ...]:
    """Block numbers and ascending ranges, or a range of fractions of the depth."""
    from vispa_graph.settings import parse_layers

    try:
        return parse_layers(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


def _added(options: Sequence[Callable[[F], F]], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def _running_options(command: F) -> F:
    options = [
        click.option(
            "--device", type=text, help='Where the model runs, such as "cpu", "cuda" or "mps"; the CPU by default. VISPA_DEVICE_MAP overrides it.'
        ),
        click.option("--dtype", type=click.Choice(DTYPES), help="Precision of the model; float32 by default."),
    ]
    return _added(options, command)


def _model_options(command: F) -> F:
    options = [
        click.option("--model", type=text, help='"embedded", the folder of a model, or its name on the Hugging Face hub.'),
        _running_options,
        click.option("--method", type=click.Choice(METHODS), help="How directions are found."),
        click.option(
            "--layers",
            type=block_numbers,
            metavar="N,N-N",
            help="Decoder blocks to steer, from 0: 10-25 or 3,4,5; or by fraction of the depth: 0.3-0.8.",
        ),
    ]
    return _added(options, command)


# Commands


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Whatever no option sets is read from VISPA_* variables, such as VISPA_MODEL, VISPA_DEVICE or VISPA_CACHE.",
)
@click.version_option(__version__, prog_name="vispa")
def main() -> None:
    """Plural answers to value-laden questions, by steering the activations of a language model."""


@main.command(cls=Asks)
@click.argument("query", type=text)
@click.option("--mode", type=click.Choice(MODES), help="How comments become an answer; by default it follows from the other options.")
@click.option("--attribute", type=text, help="Whom to speak for: a value, a right, a duty or a group.")
@click.option("--population", type=text, help="A country or people whose distribution is asked for.")
@click.option("--option", "options", multiple=True, type=text, help="An answer to choose between. Repeatable, 2 to 26.")
@click.option("--value", "asked", multiple=True, type=text, help="A value to hear, by id or name, instead of selected ones. Repeatable.")
@click.option("--top-k", type=int, help="How many values are heard at most; 6 by default.")
@_model_options
@click.option("--strength", type=float, help="Multiple of the method's own magnitude; 0 does not steer, below 0 suppresses; 1 by default.")
@click.option("--max-new-tokens", type=int, help="Longest comment, in tokens.")
@click.option("--seed", type=int, help="Seed of the sampling, where the temperature is above 0; 0 by default.")
@click.option("--temperature", type=float, help="0 for greedy decoding.")
@click.option("--distribution", type=click.Choice(DISTRIBUTIONS), help="What a distribution is read after: comments, or the steered question itself.")
@values_option
@bioethics_option
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the run as a tree of JSON, without its texts; vispa trace FILE shows it.",
)
@click.option("--trace-content", is_flag=True, help="Keep the texts, which may be private, in traces.")
@json_option
def ask(
    query: str,
    mode: str | None,
    attribute: str | None,
    population: str | None,
    options: tuple[str, ...],
    asked: tuple[str, ...],
    top_k: int | None,
    model: str | None,
    device: str | None,
    dtype: str | None,
    method: str | None,
    layers: tuple[float, ...] | None,
    strength: float | None,
    max_new_tokens: int | None,
    seed: int | None,
    temperature: float | None,
    distribution: str | None,
    values: tuple[Path, ...],
    bioethics: bool,
    trace: Path | None,
    trace_content: bool,
    as_json: bool,
) -> None:
    """Answer QUERY, a question or a situation, plurally; "-" reads it from stdin.

    The answer rests on a comment from each of the values at stake. Without --mode: an attribute speaks for someone (steerable),
    options alone ask for a distribution (distributional), else all perspectives are told (overton).
    """
    if trace_content and not trace:
        raise click.UsageError("--trace-content needs --trace FILE. For the traces of a viewer set VISPA_TRACE_CONTENT.")
    if trace:
        _check_target(trace)
    settings = settings_with_model(
        model=model,
        device=device,
        dtype=dtype,
        method=method,
        layers=layers,
        strength=strength,
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        distribution=distribution,
        top_k=top_k,
        values=values,
        bioethics=bioethics,
        trace_content=trace_content,
    )
    from vispa_graph.state import check_input

    given: dict[str, Any] = {"query": query, "mode": mode, "attribute": attribute, "population": population}
    given |= {"options": list(options) or None, "values": list(asked) or None}
    check_input(given)  # before stdin is read and anything imported
    given["query"] = read_query(query)
    tracer: RunCollectorCallbackHandler | None = None
    try:
        with progress() as show:
            tracer = _tracer() if trace else None
            output = _run(settings, given, show, tracer)
        if as_json:
            print_json(output)
        else:
            _print_answer(output)
    finally:  # not before the answer is shown
        written = _write_trace(trace, tracer)
        send_traces()
    if not written:
        click.get_current_context().exit(Unwritten.exit_code)


@main.command("trace")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def trace_command(file: Path, as_json: bool) -> None:
    """Print the run that `vispa ask --trace FILE` wrote as a tree: what was found, what moved, and what steering did."""
    from vispa_graph.tracing import draw, read_trace

    run = read_trace(file)
    if as_json:
        print_json(run.model_dump(mode="json"))
    else:
        print_tree(draw(run))


@main.command()
@_model_options
@click.option("--contrast", type=click.Choice(CONTRASTS), help="What positive twins are set against.")
@click.option("--reading", type=click.Choice(READINGS), help="Whether sentences are read bare or in a chat.")
@click.option("--solver", type=click.Choice(SOLVERS), help="How probes are solved.")
@values_option
@bioethics_option
@json_option
def fit(
    model: str | None,
    device: str | None,
    dtype: str | None,
    method: str | None,
    layers: tuple[float, ...] | None,
    contrast: str | None,
    reading: str | None,
    solver: str | None,
    values: tuple[Path, ...],
    bioethics: bool,
    as_json: bool,
) -> None:
    """Fit the directions of all values, keep them in the cache, and show how well each tells its sentences apart.

    What is in the cache is not fitted again, so that a fit that was broken off goes on where it was.
    """
    # top_k plays no part in fitting, but must fit a small taxonomy of one's own.
    running = {"model": model, "device": device, "dtype": dtype}
    fitting = {"method": method, "layers": layers, "contrast": contrast, "reading": reading, "solver": solver}
    settings = settings_with_model(**running, **fitting, values=values, bioethics=bioethics, top_k=1)
    from vispa_graph.engine.directions import SEPARATES, separates
    from vispa_graph.resources import Resources

    click.get_current_context().meta[_KEPT] = _fitted_since_now(settings.cache)
    logging.getLogger("vispa_graph").addHandler(logging.NullHandler())  # the warnings are told below
    with progress() as show, closing(Resources(settings, progress=show)) as resources:
        show("loading the model")
        resources.check_model()
        name, taxonomy = resources.engine.name, resources.taxonomy
        fitted = resources.fit_settings()
        show("directions")
        directions = resources.directions
    weak = [value for value, direction in directions.items() if not separates(direction)]
    facts = {"model": name, "method": fitted.method, "contrast": fitted.contrast, "reading": fitted.reading, "layers": list(fitted.layers)}
    if as_json:
        print_json(facts | _accuracies(directions) | {"not_separating": weak})
    else:
        console = open_console()
        print_facts(console, facts)
        shares = [(taxonomy[value].name, d.accuracy.mean(), None if d.held_out is None else d.held_out.mean()) for value, d in directions.items()]
        rows = [[of, f"{seen:.1%}", "-" if unseen is None else f"{unseen:.1%}"] for of, seen, unseen in shares]
        print_table(console, ["Value", "Mean accuracy", "Held out"], rows)
    if weak:
        names = ", ".join(taxonomy[value].name for value in weak)
        click.echo(
            f"vispa: warning: below {SEPARATES:.0%} of the sentences held out are told apart by: {names}. Steering by these may do nothing.", err=True
        )


def _accuracies(directions: dict[str, Direction]) -> dict[str, Any]:
    """Mean accuracies by value, and those of every block."""

    def numbers(array: Any) -> list[float] | None:
        return None if array is None else [round(float(number), 4) for number in array]

    return {
        "accuracy": {value: round(float(d.accuracy.mean()), 4) for value, d in directions.items()},
        "held_out": {value: None if d.held_out is None else round(float(d.held_out.mean()), 4) for value, d in directions.items()},
        "by_block": {value: {"accuracy": numbers(d.accuracy), "held_out": numbers(d.held_out)} for value, d in directions.items()},
    }


@main.command()
@click.argument("model", required=False, type=text)
@_running_options
@values_option
@json_option
def check(model: str | None, device: str | None, dtype: str | None, values: tuple[Path, ...], as_json: bool) -> None:
    """Check that MODEL can be steered, or that folders of value files can be used."""
    if model is None and not values:
        raise click.UsageError("Give a MODEL to check, or --values FOLDER, or both.")
    if model is None and (device or dtype):
        raise click.UsageError("--device and --dtype say how a model runs: give a MODEL with them.")
    found: dict[str, Any] = {}
    if values:
        found["values"] = _check_values(values)
    if model is not None:
        found["model"] = _check_model(model, device, dtype)
    if as_json:
        print_json(found)
        return
    console = open_console()
    if values:
        print_table(console, ["Value", "Pairs", "File"], [[v["id"], str(v["pairs"]), v["file"]] for v in found["values"]])
    if model is not None:
        print_facts(console, found["model"])


@main.command("graph")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a .mmd, .png or .svg file instead.")
@click.option("--review", is_flag=True, help="With the stop at which a person edits the values.")
@json_option
def graph_command(output: Path | None, review: bool, as_json: bool) -> None:
    """Print the graph as a Mermaid diagram, or write it as a picture. Needs no network."""
    if output is not None and as_json:
        raise click.UsageError("--json prints to stdout: leave --output out.")
    if output is not None and output.suffix not in (".mmd", ".png", ".svg"):
        raise click.UsageError("--output must end in .mmd, .png or .svg.")
    if output is not None:
        _check_target(output)
    from vispa_graph.graph import create_graph

    drawn = create_graph(settings_of(), review=review).get_graph()
    if as_json:
        print_json(drawn.to_json())
    elif output is None:
        click.echo(drawn.draw_mermaid())
    else:
        _write(output, drawn.draw_mermaid().encode() if output.suffix == ".mmd" else _picture(drawn, output.suffix[1:]))
        click.echo(f"Wrote {output}.", err=True)


@main.command()
@click.option(
    "--http", "port", type=click.IntRange(0, 65535), metavar="PORT", help="Serve over HTTP on this machine instead of stdio; 0 for any port."
)
@click.option(
    "--token", type=text, envvar="VISPA_MCP_TOKEN", show_envvar=True, help="With --http: what clients must send; made up and shown if left out."
)
@click.option("--top-k", type=int, help="How many values are heard at most; 6 by default.")
@_model_options
@values_option
@bioethics_option
def mcp(
    port: int | None,
    token: str | None,
    top_k: int | None,
    model: str | None,
    device: str | None,
    dtype: str | None,
    method: str | None,
    layers: tuple[float, ...] | None,
    values: tuple[Path, ...],
    bioethics: bool,
) -> None:
    """Serve the graph to MCP clients: tools to ask, to list values and to explain a run. Needs vispa_graph[mcp].

    Over stdio unless --http is given. Give the token in VISPA_MCP_TOKEN: others on the machine can read a command line.
    """
    if not find_spec("mcp"):
        raise Refused("The MCP server needs the package mcp: pip install 'vispa_graph[mcp]'.")
    if port is None and (sys.stdin is None or sys.stdout is None):
        raise Refused("stdin or stdout is closed, and over stdio both are needed. Leave them open, or serve over HTTP with --http PORT.")
    from vispa_graph.mcp_server import create_server, serve_http, serve_stdio
    from vispa_graph.resources import Resources
    from vispa_graph.settings import end_tracing_with_the_process

    secret = token or secrets.token_urlsafe(32)

    def ready(url: str) -> None:
        click.echo(f"vispa: serving on {url}" + ("" if token else f" with the token {secret}"), err=True)

    end_tracing_with_the_process()
    for number in (signal.SIGINT, signal.SIGTERM):  # how a server over HTTP ends
        _leave_at_once(click.get_current_context(), number, send_traces)
    settings = settings_with_model(
        model=model, device=device, dtype=dtype, method=method, layers=layers, values=values, bioethics=bioethics, top_k=top_k
    )
    with closing(Resources(settings)) as resources:
        server = create_server(resources)
        try:
            if port is None:
                serve_stdio(server)
            else:
                serve_http(server, port, secret, ready)
        finally:
            send_traces()


main.add_command(values_group)


# Running the graph


def _run(settings: Settings, given: dict[str, Any], show: Show, tracer: RunCollectorCallbackHandler | None) -> Output:
    """Run the graph."""
    from vispa_graph.graph import create_graph
    from vispa_graph.plural_graph import check_question
    from vispa_graph.resources import Resources
    from vispa_graph.settings import end_tracing_with_the_process

    end_tracing_with_the_process()
    with closing(create_graph(resources=Resources(settings, progress=show))) as graph:
        show("loading")
        if len(asked := given["values"] or []) == 1:  # an error of the library repeats nothing that was typed
            graph.resources.taxonomy.find(asked[0], f"The value {asked[0]!r}")
        check_question(given, graph.resources)
        graph.resources.check_model()
        return _follow(graph, given, {"callbacks": [tracer] if tracer else []}, show)


def _tracer() -> RunCollectorCallbackHandler:
    from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

    return RunCollectorCallbackHandler()


def _write_trace(path: Path | None, tracer: RunCollectorCallbackHandler | None) -> bool:
    """Write the run that was traced, if any, also where it failed; tells where it cannot be written, and returns whether all went well."""
    if path and tracer and tracer.traced_runs:
        from vispa_graph.tracing import TracedRun

        try:
            _write(path, TracedRun.of(tracer.traced_runs[-1]).to_json())
        except Unwritten as error:
            error.show()
            return False
    return True


def _follow(graph: PluralGraph, given: dict[str, Any], config: Any, show: Show) -> Output:
    """The output of a run, its steps shown as they pass. Model and directions are made between two steps, where they can be named."""
    resources, output, written, heard = graph.resources, None, 0, 0
    # Without output_keys the values would be the whole state, not the output.
    parts = graph.stream(given, config, stream_mode=["updates", "custom", "values"], output_keys=graph.output_channels)
    with closing(cast("Generator[tuple[str, Any]]", parts)) as parts:
        for kind, part in parts:
            if kind == "values":
                output = part
            elif kind == "custom" and part.get("step") == "comment":
                written += 1
                show("comments", written, heard)
            elif kind == "updates" and "retrieve" in part:
                show("selecting values")
            elif kind == "updates" and "rerank" in part:
                heard = len(part["rerank"]["values"])
                try:
                    _make_ready(resources, show)
                except VispaError as error:
                    parts.throw(error)  # the run itself has failed, and its trace must say so
                if resources.settings.distribution == "comments":
                    show("comments", 0, heard)
                else:  # there may be none to count
                    show("answering")
    return cast("Output", output)


def _make_ready(resources: Resources, show: Show) -> None:
    show("loading the model")
    _ = resources.engine
    if resources.settings.strength:
        show("directions")
        _ = resources.directions


# Checks


def _check_values(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The values in the folders, once every file has been read: all that is wrong is said at once."""
    from vispa_graph.taxonomy_index.taxonomy import CONCERNS, read_concerns, read_value

    problems = []
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            try:
                read_concerns(path) if path.name == CONCERNS.name else read_value(path)
            except TaxonomyError as error:
                problems.append(str(error))
    if problems:
        raise Refused("\nvispa: ".join(problems))
    taxonomy = load_taxonomy(settings_of(values=tuple(folders)))
    return [value_facts(value) for value in taxonomy if value.file and value.file.parent in folders]


def _check_model(model: str, device: str | None, dtype: str | None) -> dict[str, Any]:
    try:
        settings = settings_with_model(model=model, device=device, dtype=dtype, top_k=1)
    except ModelNotFoundError as error:
        if any(Path(os.path.expanduser(model)).glob("*.yaml")):
            raise Refused(f"{error} To check value files: `vispa check --values {model}`, or more strictly `vispa values check {model}`.") from error
        raise
    from vispa_graph.resources import Resources

    with progress() as show:
        show("loading the model")
        with closing(Resources(settings, progress=show)) as resources:
            facts = cast("HuggingFaceEngine", resources.engine).describe()
            return facts | {"default_layers": list(resources.fit_settings().layers)}  # a model may have defaults of its own


# Pictures of the graph


def _picture(drawn: Graph, kind: str) -> bytes:
    """The graph as PNG or SVG, made on this machine.

    Raises:
        Refused: Graphviz is not installed, or failed.
    """
    if kind == "png" and find_spec("pygraphviz"):
        return drawn.draw_png(None)
    program = shutil.which("dot")
    if program is None:
        raise Refused(
            f"A .{kind} file is drawn by Graphviz, which is not installed. "
            "Install it (apt-get install graphviz, brew install graphviz), or write Mermaid to a .mmd file."
        )
    done = subprocess.run([program, f"-T{kind}"], input=_dot(drawn).encode(), capture_output=True, check=False)
    if done.returncode:
        raise Refused(f"Graphviz failed with exit code {done.returncode}. Check its installation, or write Mermaid to a .mmd file.")
    return done.stdout


def _dot(drawn: Graph) -> str:
    """The graph in Graphviz's language; edges that are chosen at run time are dashed."""
    nodes = [f"  {json.dumps(node.id)} [label={json.dumps(node.name.strip('_'))}];" for node in drawn.nodes.values()]
    edges = [f"  {json.dumps(edge.source)} -> {json.dumps(edge.target)}{' [style=dashed]' if edge.conditional else ''};" for edge in drawn.edges]
    return "\n".join(["digraph vispa {", '  node [shape=box, style=rounded, fontname="sans-serif"];', *nodes, *edges, "}", ""])


# Files


def _check_target(path: Path) -> None:
    """Refuse a file that cannot be written before any work is done for it."""
    if path.is_dir():  # click takes a blank name for a file, and pathlib for the folder that we are in
        raise Refused(f"{path} is a folder. Give the name of a file.")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise Refused(f"{path}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK):
        raise Refused(f"{path}: the folder {folder} cannot be written to. Choose another one.")


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; devices and pipes are written to directly.

    Raises:
        Unwritten: It cannot be written; the message names it.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        target = path.resolve()
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise Unwritten(f"{path} cannot be written: {error.strerror or error}. Check its permissions and the space left.") from error


# The answer


def _print_answer(output: Output) -> None:
    console = open_console()
    print_title(console, f"Answer ({output['mode']})")
    print_text(console, output["response"])
    print_title(console, "\nValues heard")
    print_table(console, ["Value", "Score", "Reason"], [[v["name"], f"{v['score']:.2f}", v["reason"]] for v in output["values"]])
    if output["comments"]:  # a distribution may be read without any
        print_title(console, "\nComments")
    for comment in output["comments"]:
        cut = " (cut off at the longest length)" if comment["finish"] == "length" else ""
        print_title(console, f"{comment['name']}{cut}")
        print_text(console, comment["text"])
    if output["distribution"]:
        print_title(console, "\nDistribution")
        print_bars(console, output["distribution"])
    if output["chosen"]:
        print_title(console, "\nRests on")
        names = {comment["value"]: comment["name"] for comment in output["comments"]}
        print_text(console, f"{names[output['chosen']['value']]}: {output['chosen']['reason']}")
    if output["notes"]:
        print_title(console, "\nNotes")
        for note in output["notes"]:
            print_text(console, f"- {note}")


if __name__ == "__main__":
    main()
