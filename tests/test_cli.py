"""The command line: what it prints where, and how it refuses."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import get_args

import anyio
import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, tiny_model

import vispa_graph
from vispa_graph import cli
from vispa_graph.cli_common import settings_with_model
from vispa_graph.engine.contract import Contrast, Method, Reading, Solver
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.engine.folder import is_fetched
from vispa_graph.engine.layers import default_layers
from vispa_graph.errors import ModelNotFoundError, NonFiniteError, SettingsError
from vispa_graph.graph import create_graph
from vispa_graph.resources import embedded_folder
from vispa_graph.settings import Distribution, Settings
from vispa_graph.state import MODES, Output
from vispa_graph.taxonomy_index import Taxonomy

QUERY = "Should my father, 84, have surgery he does not want?"
FITTING = "vispa: fitting directions, which may take minutes; they are kept, and not fitted again.\n"
OWN_VALUE = """
id: {id}
name: {id}
family: mine
source: "this test"
definition: Sort the instruments by size.
facets: [sorting instruments, a tray in disorder]
pairs:
  first_person_sentence:
    - {{positive: I sort the tray., negative: I leave the tray in disorder.}}
    - {{positive: I put every scalpel in its place., negative: I throw the scalpels together.}}
"""


@pytest.fixture
def engine(monkeypatch, word_encoder):
    """The engine that commands run on: no model, and no sentence encoder beside it."""
    fake = FakeEngine()
    monkeypatch.setattr("vispa_graph.resources.Resources._load_engine", lambda self: fake)
    monkeypatch.setattr("vispa_graph.resources.Resources.check_model", lambda self: None)
    monkeypatch.setattr("vispa_graph.resources.SentenceEncoder", lambda *_, **__: word_encoder)
    return fake


@pytest.fixture
def vispa(engine):
    """Runs a command as from a shell whose output is no terminal."""
    return run


@pytest.fixture
def own_values(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "tidiness.yaml").write_text(OWN_VALUE.format(id="tidiness"))
    return folder


def run(*arguments, stdin=None, env=None, charset="utf-8"):
    return CliRunner(charset=charset).invoke(cli.main, [str(a) for a in arguments], input=stdin, env=env, prog_name="vispa")


def refused(result, *fragments):
    """Exit code 2, nothing on stdout, and a message that says what the fragments say."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for fragment in fragments:
        assert fragment in result.stderr
    return True


def problems(result):
    """What stands on stderr beside the word that a fit has begun: which test of a session fits first is all the same."""
    return result.stderr.replace(FITTING, "")


def start(*arguments, stdin=None, stdout=subprocess.PIPE):
    """Python as a process of its own, with this vispa_graph and the settings of the tests."""
    environment = os.environ | {"PYTHONPATH": str(Path(vispa_graph.__file__).parents[1])}
    return subprocess.Popen([sys.executable, *arguments], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)


def process(*arguments):
    """Exit code, stdout and stderr of Python as a process of its own."""
    with start(*arguments) as child:
        output, errors = child.communicate()
    return child.returncode, output, errors


# Starting


def test_help_costs_no_heavy_import():
    heavy = ["rich", "numpy", "pydantic", "yaml", "langchain_core", "langgraph", "torch", "transformers", "faiss"]
    code = f"import sys, vispa_graph.cli; print([module for module in {heavy} if module in sys.modules])"
    assert process("-c", code) == (0, "[]\n", "")


def test_help_and_version_answer_within_half_a_second_of_processor_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, helped, _ = process("-m", "vispa_graph", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert status == 0
    assert all(command in helped for command in ("ask", "values", "fit", "check", "graph"))
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert process("-m", "vispa_graph", "--version") == (0, f"vispa, version {vispa_graph.__version__}\n", "")


def test_the_choices_written_out_are_those_of_the_library():
    assert cli.MODES == MODES
    dtypes = Settings.model_fields["dtype"].annotation
    choices = {
        cli.DTYPES: dtypes,
        cli.METHODS: Method,
        cli.CONTRASTS: Contrast,
        cli.READINGS: Reading,
        cli.SOLVERS: Solver,
        cli.DISTRIBUTIONS: Distribution,
    }
    assert [get_args(named) for named in choices.values()] == list(choices)


def test_the_defaults_written_out_are_those_of_the_settings():
    helped = {option.name: option.help for option in cli.ask.params if isinstance(option, click.Option)}
    for name in ("top_k", "strength", "seed"):
        assert f"; {Settings.model_fields[name].default:g} by default." in helped[name]


# ask


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ([], "overton"),
        (["--attribute", "power"], "steerable"),
        (["--option", "yes", "--option", "no"], "distributional"),
        (["--option", "yes", "--option", "no", "--population", "Denmark"], "distributional"),
        (["--option", "yes", "--option", "no", "--attribute", "a nurse"], "steerable"),
        (["--mode", "overton", "--attribute", "power"], "overton"),
    ],
)
def test_json_is_the_whole_output_and_nothing_else(vispa, options, mode):
    result = vispa("ask", QUERY, "--top-k", 3, "--json", *options)
    assert result.exit_code == 0
    output = json.loads(result.stdout)
    assert set(output) == set(Output.__annotations__)
    assert output["mode"] == mode
    assert len(output["comments"]) == 3
    assert problems(result) == ""


def test_an_answer_is_told_with_its_values_comments_distribution_and_ground(vispa):
    options = ["--option", "yes", "--option", "no", "--attribute", "Power", "--value", "honor", "--json"]
    output = json.loads(vispa("ask", QUERY, *options).stdout)
    told = vispa("ask", QUERY, *options[:-1]).stdout
    assert "Answer (steerable)" in told
    assert output["response"] in told
    for value, comment in zip(output["values"], output["comments"], strict=True):
        assert value["name"] in told
        assert value["reason"] in told
        assert comment["text"] in told
    assert f"yes     {output['distribution']['yes']:.1%}" in told
    assert f"Power: {output['chosen']['reason']}" in told


def test_an_answer_without_comments_has_no_heading_for_them(vispa):
    question = ["ask", QUERY, *option("yes", "no"), "--value", "honor"]
    assert "Comments" in vispa(*question).stdout
    told = vispa(*question, "--distribution", "direct").stdout
    assert "Distribution" in told
    assert "Comments" not in told


def test_notes_reach_the_reader(vispa, engine):
    engine._answer = lambda request: "" if request.steering.direction.value == "power" else "Consider it."
    result = vispa("ask", QUERY, "--value", "power", "--value", "honor")
    assert "- The model had nothing to say from Power." in result.stdout


def test_without_a_terminal_there_are_no_colours_bars_or_progress_and_no_line_is_cut(vispa):
    command = ["ask", QUERY, "--option", "an answer that goes on " * 20, "--option", "no"]
    result = vispa(*command)
    assert problems(result) == ""
    assert "\x1b" not in result.stdout
    assert "━" not in result.stdout
    assert ("an answer that goes on " * 20).strip() in result.stdout


def test_on_a_terminal_progress_goes_to_stderr_and_bars_to_stdout(vispa):
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"}
    result = vispa("ask", QUERY, "--top-k", 4, "--option", "yes", "--option", "no", env=terminal)
    assert "comments 4/4" in result.stderr
    assert "comments" not in result.stdout
    assert "━" in result.stdout
    assert "\x1b[1m" in result.stdout
    as_json = vispa("ask", QUERY, "--top-k", 4, "--json", env=terminal)
    assert "comments 4/4" in as_json.stderr
    assert "\x1b" not in as_json.stdout


@pytest.mark.parametrize("fetched", [False, True])
def test_waiting_for_a_hub_is_told_where_the_model_is_not_in_its_cache(monkeypatch, tmp_path, fetched):
    def load(*_, **__):
        raise ModelNotFoundError("There is no network.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("vispa_graph.engine.huggingface.HuggingFaceEngine.load", load)
    if fetched:
        cached(tmp_path, "model.safetensors")
    result = run("check", "someone/some-model", env={"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"})
    assert "There is no network." in result.stderr
    assert ("fetching someone/some-model from the hub" in result.stderr) is not fetched


@pytest.mark.parametrize(
    ("files", "whole"),
    [
        ({}, False),
        ({"config.json": "{}"}, False),
        ({"model.safetensors": ""}, True),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', "1.safetensors": ""}, False),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors"}}', "1.safetensors": ""}, True),
        ({"model.safetensors.index.json": "{", "1.safetensors": ""}, False),
    ],
)
def test_a_model_counts_as_fetched_once_all_its_weights_are_in_the_cache(monkeypatch, tmp_path, files, whole):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, content in files.items():
        cached(tmp_path, name, content)
    assert is_fetched("someone/some-model") is whole
    assert not is_fetched("someone/some-model", "another-revision")
    assert not is_fetched("no name")
    assert is_fetched(str(tmp_path))


def cached(folder, name, content=""):
    """A file of a model in a cache of the hub's making."""
    model = folder / "models--someone--some-model"
    for file, text in ((model / "refs" / "main", "abc"), (model / "snapshots" / "abc" / name, content)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_what_a_model_says_cannot_steer_the_terminal(vispa, engine):
    engine._answer = lambda request: "Look \x1b[2J\x9b31m[bold]here[/bold]\a."
    result = vispa("ask", QUERY, "--value", "power")
    assert "\x1b" not in result.stdout
    assert "\x9b" not in result.stdout
    assert "\a" not in result.stdout
    assert "[bold]here[/bold]" in result.stdout


def test_a_dash_reads_the_query_from_stdin(vispa, engine):
    assert vispa("ask", "-", "--value", "power", stdin="Does Åse want this?\n").exit_code == 0
    assert "Does Åse want this?" in str(engine.requests[0].messages)


def test_options_reach_the_engine(vispa, engine):
    chosen = ["--layers", "1-2,4", "--method", "pca", "--strength", 0.5, "--max-new-tokens", 7, "--seed", 5, "--temperature", 0.3]
    assert vispa("ask", QUERY, "--value", "power", *chosen).exit_code == 0
    request = engine.requests[0]
    assert request.steering.direction.layers == (1, 2, 4)
    assert request.steering.direction.method == "pca"
    assert request.steering.strength == 0.5
    assert (request.max_new_tokens, request.seed, request.temperature) == (7, 5, 0.3)


def test_an_option_left_out_does_not_hide_its_variable(vispa, own_values):
    env = {"VISPA_TOP_K": "2", "VISPA_STRENGTH": "0", "VISPA_VALUES": str(own_values)}
    output = json.loads(vispa("ask", QUERY, "--json", env=env).stdout)
    assert len(output["values"]) == 2
    assert output["comments"][0]["steering"] is None
    assert len(json.loads(vispa("ask", QUERY, "--json", "--top-k", 3, env=env).stdout)["values"]) == 3
    assert [v["id"] for v in json.loads(vispa("values", "--json", env=env).stdout)][-1] == "tidiness"


def test_own_values_are_heard(vispa, own_values):
    output = json.loads(vispa("ask", QUERY, "--values", own_values, "--value", "tidiness", "--json").stdout)
    assert [comment["value"] for comment in output["comments"]] == ["tidiness"]


def test_json_survives_a_terminal_that_knows_only_ascii(vispa):
    result = vispa("ask", QUERY, "--value", "power", "--option", "ça va", "--option", "no", "--json", charset="ascii")
    assert list(json.loads(result.stdout)["distribution"]) == ["ça va", "no"]
    assert "?a va" in vispa("ask", QUERY, "--value", "power", "--option", "ça va", "--option", "no", charset="ascii").stdout


@pytest.mark.slow
def test_as_a_process_on_the_embedded_models_it_prints_json_and_nothing_else():
    status, output, errors = process("-m", "vispa_graph", "ask", QUERY, "--value", "power", "--strength", "0", "--max-new-tokens", "8", "--json")
    assert (status, errors) == (0, "")
    assert json.loads(output)["mode"] == "overton"


# The trace


SECRET = "Zebedee"
SECRETS = [f"Should {SECRET} go home?", "--attribute", f"{SECRET}'s aunt", "--population", SECRET, "--option", SECRET, "--option", "no"]


def children(tree):
    return [tree, *(run for child in tree["children"] for run in children(child))]


def test_a_trace_holds_every_step_and_none_of_the_texts(vispa, engine, tmp_path):
    engine._answer = lambda request: f"{SECRET} may go."
    file = tmp_path / "trace.json"
    assert vispa("ask", *SECRETS, "--top-k", 2, "--trace", file).exit_code == 0
    assert SECRET not in file.read_text()
    assert QUERY not in file.read_text()
    tree = json.loads(file.read_text())
    assert tree["name"] == "vispa"
    runs = children(tree)
    assert {"retrieve", "rerank", "steer", "steerable"} <= {run["name"] for run in runs}
    assert sum(run["run_type"] == "llm" and run["name"].startswith("steer ") for run in runs) == 2
    assert tree["inputs"]["query"] == tree["outputs"]["response"] == "redacted"
    assert all(run["start"] <= run["end"] for run in runs)
    assert [run["metadata"]["value"] for run in runs if run["name"].startswith("steer ")]


def test_a_trace_holds_the_texts_when_asked(vispa, engine, tmp_path):
    engine._answer = lambda request: f"{SECRET} may go."
    file = tmp_path / "trace.json"
    assert vispa("ask", *SECRETS, "--top-k", 2, "--trace", file, "--trace-content").exit_code == 0
    tree = json.loads(file.read_text())
    assert tree["inputs"]["query"] == SECRETS[0]
    assert tree["outputs"]["comments"][0]["text"] == f"{SECRET} may go."


@pytest.mark.parametrize("content", [False, True])
def test_a_run_that_fails_leaves_a_trace_with_its_error_hidden_unless_asked(vispa, engine, tmp_path, content):
    engine._fail = NonFiniteError(f"{SECRET} became NaN.")
    file = tmp_path / "trace.json"
    result = vispa("ask", *SECRETS, "--value", "power", "--trace", file, *(["--trace-content"] if content else []))
    assert refused(result, f"vispa: {SECRET} became NaN.")
    assert (SECRET in file.read_text()) is content
    errors = [run["error"] for run in children(json.loads(file.read_text())) if run["error"]]
    assert errors
    assert all("NonFiniteError" in error for error in errors)
    assert content or all("redacted" in error for error in errors)


def test_a_trace_ends_with_the_error_that_kept_the_model_from_being_ready(vispa, tmp_path):
    file = tmp_path / "trace.json"
    assert refused(vispa("ask", QUERY, "--value", "power", "--layers", "99", "--trace", file, "--trace-content"), "Layer 99")
    assert json.loads(file.read_text())["error"].startswith("LayerError")


def test_a_trace_replaces_the_old_one_whole_and_leaves_nothing_beside_it(vispa, tmp_path):
    file = tmp_path / "trace.json"
    file.write_text("old")
    (tmp_path / "link.json").symlink_to(file)
    assert vispa("ask", QUERY, "--value", "power", "--trace", tmp_path / "link.json").exit_code == 0
    assert json.loads(file.read_text())["name"] == "vispa"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "trace.json"]
    assert vispa("ask", QUERY, "--value", "power", "--trace", os.devnull).exit_code == 0
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_trace_that_cannot_be_written_is_refused_before_any_work(vispa, engine, tmp_path):
    assert refused(vispa("ask", QUERY, "--trace", tmp_path / "no" / "trace.json"), "there is no folder")
    assert refused(vispa("ask", QUERY, "--trace", ""), "is a folder")
    assert engine.requests == []


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")


@FULL
@pytest.mark.parametrize("as_json", [False, True])
def test_a_trace_for_which_there_is_no_space_is_told_by_name_and_the_answer_is_not_lost(vispa, as_json):
    command = ["ask", QUERY, "--value", "power", *["--json"] * as_json]
    whole = vispa(*command)
    result = vispa(*command, "--trace", "/dev/full")
    assert (result.exit_code, result.stdout) == (1, whole.stdout)
    assert problems(result) == "vispa: /dev/full cannot be written: No space left on device. Check its permissions and the space left.\n"


@FULL
def test_a_failed_run_whose_trace_cannot_be_written_ends_with_its_own_error(vispa):
    result = vispa("ask", QUERY, "--value", "power", "--layers", "99", "--trace", "/dev/full")
    assert refused(result, "vispa: /dev/full cannot be written", "Layer 99")


@FULL
def test_a_picture_for_which_there_is_no_space_is_told_by_name_with_exit_code_1(vispa, tmp_path):
    (tmp_path / "graph.mmd").symlink_to("/dev/full")
    result = vispa("graph", "--output", tmp_path / "graph.mmd")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"vispa: {tmp_path / 'graph.mmd'} cannot be written: No space left on device" in result.stderr


# values


def test_values_are_listed_family_by_family(vispa, taxonomy, own_values):
    rows = [line.split() for line in vispa("values", "--values", own_values).stdout.splitlines()[1:]]
    assert sorted(row[1] for row in rows) == sorted([*taxonomy.ids, "tidiness"])
    blocks = [family for family, _ in itertools.groupby(row[0] for row in rows)]
    assert sorted(blocks) == sorted({value.family for value in taxonomy} | {"mine"})


def test_values_as_json_are_complete(vispa, taxonomy):
    listed = json.loads(vispa("values", "--json").stdout)
    assert [value["id"] for value in listed] == list(taxonomy.ids)
    assert [value["pairs"] for value in listed] == [len(value.all_pairs) for value in taxonomy]


def test_one_value_is_shown_by_id_or_name_with_all_its_facets(vispa, taxonomy):
    power = taxonomy["power"]
    shown = vispa("values", "POWER").stdout
    assert all(text in shown for text in (power.definition, power.source, *power.facets, str(len(power.all_pairs))))
    assert json.loads(vispa("values", "power", "--json").stdout)["facets"] == list(power.facets)


def test_values_at_stake_in_a_text_are_those_the_library_selects(vispa, make_resources, word_encoder):
    from vispa_graph import select_values
    from vispa_graph.resources import Resources

    expected = select_values(QUERY, 4, resources=Resources(make_resources().settings, encoder=word_encoder))
    found = json.loads(vispa("values", "--query", QUERY, "--top-k", 4, "--json").stdout)
    assert [(v["id"], v["score"], v["reason"]) for v in found] == [(s.value, s.score, s.reason) for s in expected]
    assert found == json.loads(vispa("values", "--query", "-", "--top-k", 4, "--json", stdin=QUERY).stdout)
    assert found[0]["reason"] in vispa("values", "--query", QUERY, "--top-k", 4).stdout


# The bioethics family


def test_the_bioethics_family_is_switched_on_alike_for_every_command(vispa, taxonomy):
    with_family = Taxonomy.load(bioethics=True)
    assert [v["id"] for v in json.loads(vispa("values", "--bioethics", "--json").stdout)] == list(with_family.ids)
    for arguments in (["values", "autonomy", "--bioethics"], ["values", "--bioethics", "autonomy"]):
        assert "Autonomy (autonomy)" in vispa(*arguments).stdout
    heard = json.loads(vispa("ask", QUERY, "--bioethics", "--value", "autonomy", "--json").stdout)
    assert [comment["value"] for comment in heard["comments"]] == ["autonomy"]
    fitted = json.loads(vispa("fit", "--bioethics", "--layers", "2", "--method", "mean_difference", "--json").stdout)
    assert list(fitted["accuracy"]) == list(with_family.ids)
    for unknown in (["values", "nosuch"], ["ask", QUERY, "--value", "nosuch"]):
        assert refused(vispa(*unknown), f"taxonomy of {len(taxonomy)} values")
        assert refused(vispa(*unknown, "--bioethics"), f"taxonomy of {len(with_family)} values")


def test_the_bioethics_family_switched_on_by_its_variable_needs_no_option(vispa):
    assert vispa("values", "autonomy", env={"VISPA_BIOETHICS": "true"}).exit_code == 0


@pytest.mark.parametrize("command", [["values"], ["ask", QUERY, "--value"]])
@pytest.mark.parametrize("name", ["autonomy", "Informed Consent"])
def test_a_value_of_the_bioethics_family_that_is_off_is_refused_with_how_to_switch_it_on(vispa, command, name):
    assert refused(vispa(*command, name), "bioethics family", "Settings(bioethics=True)", "VISPA_BIOETHICS=true", "--bioethics")


# fit


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_without_a_terminal_a_fit_is_told_in_one_line_when_it_begins_and_nothing_where_all_is_there(vispa, own_values, tmp_path, as_json):
    command = ["ask", QUERY, "--values", own_values, "--value", "tidiness", *as_json]
    first, second = (vispa(*command, env={"VISPA_CACHE": str(tmp_path / "cache")}) for _ in range(2))
    assert first.stderr == FITTING
    assert second.stderr == ""
    assert first.stdout == second.stdout


def test_fitting_tells_the_accuracy_of_every_value_and_is_done_once(vispa, engine, taxonomy, tmp_path, monkeypatch):
    monkeypatch.setenv("VISPA_CACHE", str(tmp_path))
    reads = []
    read = engine.read
    engine.read = lambda texts, *rest: reads.extend(texts) or read(texts, *rest)
    arguments = ["fit", "--layers", "2", "--method", "mean_difference"]
    first = vispa(*arguments, "--json", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    fitted = json.loads(first.stdout)
    assert {key: fitted[key] for key in ("model", "method", "layers")} == {"model": "fake", "method": "mean_difference", "layers": [2]}
    assert list(fitted["accuracy"]) == list(taxonomy.ids)
    assert all(0 <= accuracy <= 1 for accuracy in fitted["accuracy"].values())
    assert "fitting directions" in first.stderr
    told = vispa(*arguments)
    assert f"{fitted['accuracy']['honor']:.1%}" in next(line for line in told.stdout.splitlines() if line.startswith("Honor "))
    assert len(reads) == sum(2 * len(value.all_pairs) for value in taxonomy)


def test_fitting_tells_accuracies_by_block_and_warns_of_what_does_not_separate(vispa, engine, taxonomy, tmp_path):
    """The states of the fake engine are random: nothing separates."""
    result = vispa("fit", "--layers", "2,3", "--method", "mean_difference", "--json", env={"VISPA_CACHE": str(tmp_path)})
    fitted = json.loads(result.stdout)
    for value in taxonomy.ids:
        for kind in ("accuracy", "held_out"):
            blocks = fitted["by_block"][value][kind]
            assert len(blocks) == 2
            assert fitted[kind][value] == pytest.approx(sum(blocks) / 2, abs=1e-4)
    assert fitted["not_separating"]
    assert all(fitted["held_out"][value] < 0.6 for value in fitted["not_separating"])
    assert all(fitted["held_out"][value] >= 0.6 for value in set(taxonomy.ids) - set(fitted["not_separating"]))
    assert problems(result).startswith("vispa: warning: ")
    assert taxonomy[fitted["not_separating"][0]].name in result.stderr


def test_contrast_reading_and_solver_can_be_chosen_for_a_fit(vispa, engine, own_values):
    read, heard = engine.read, []
    engine.read = lambda texts, *rest: heard.extend(texts) or read(texts, *rest)
    arguments = ["fit", "--contrast", "opposed+others", "--reading", "chat", "--solver", "saga", "--layers", "1", "--values", own_values, "--json"]
    fitted = json.loads(vispa(*arguments, env={"VISPA_SHIPPED_VALUES": "false"}).stdout)
    assert {key: fitted[key] for key in ("contrast", "reading")} == {"contrast": "opposed+others", "reading": "chat"}
    assert heard
    assert all(turn[0]["role"] == "user" for turn in heard)


def test_a_fit_that_broke_off_goes_on_with_what_is_missing(vispa, engine, taxonomy, tmp_path):
    read, heard = engine.read, []

    def breaks(texts, *rest):
        heard.extend(texts)
        if len(heard) > 2000:
            raise NonFiniteError("The activations are not finite. Try another dtype.")
        return read(texts, *rest)

    engine.read = breaks
    arguments, env = ["fit", "--layers", "2", "--method", "pca", "--json"], {"VISPA_CACHE": str(tmp_path)}
    assert refused(vispa(*arguments, env=env), "not finite")
    engine.read, heard[:] = lambda texts, *rest: heard.extend(texts) or read(texts, *rest), []
    assert list(json.loads(vispa(*arguments, env=env).stdout)["accuracy"]) == list(taxonomy.ids)
    whole = sum(2 * len(value.all_pairs) for value in taxonomy)
    assert 0 < len(heard) < whole - 900


def test_a_small_taxonomy_of_ones_own_can_be_fitted(vispa, own_values):
    result = vispa("fit", "--values", own_values, "--json", env={"VISPA_SHIPPED_VALUES": "false"})
    assert list(json.loads(result.stdout)["accuracy"]) == ["tidiness"]


# check


@pytest.mark.parametrize("command", [("ask", QUERY), ("fit",), ("check", "embedded")])
def test_device_and_precision_reach_the_settings(command, monkeypatch):
    seen = []

    def note(**given):
        seen.append(settings_with_model(**given))
        raise SettingsError("far enough")

    monkeypatch.setattr(cli, "settings_with_model", note)
    refused(run(*command, "--device", "cuda:7", "--dtype", "bfloat16"), "far enough")
    assert [(settings.device, settings.dtype) for settings in seen] == [("cuda:7", "bfloat16")]


def test_a_precision_without_a_model_to_check_is_refused(own_values):
    refused(run("check", "--values", own_values, "--dtype", "bfloat16"), "give a MODEL with them")


@pytest.mark.parametrize("chat", [False, True])
def test_check_says_what_was_found_in_a_model(tmp_path, chat):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    byte_tokenizer(chat=chat).save_pretrained(tmp_path)
    found = json.loads(run("check", tmp_path, "--json").stdout)["model"]
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["blocks"] == "LlamaDecoderLayer"
    assert (found["depth"], found["width"]) == (model.config.num_hidden_layers, model.config.hidden_size)
    assert found["adds_exactly"] is found["same_alone_and_in_a_batch"] is found["generated_positions"] is True
    assert found["dtype"] == "float32"
    assert found["default_layers"] == list(default_layers(found["depth"]))
    assert found["chat_template"] is chat
    assert f"chat template: {'yes' if chat else 'no'}" in run("check", tmp_path).stdout


def test_check_tells_the_layers_that_a_run_would_steer():
    profile = json.loads((embedded_folder() / "profile.json").read_text(encoding="utf-8"))
    assert json.loads(run("check", "embedded", "--json").stdout)["model"]["default_layers"] == profile["layers"]
    assert json.loads(run("check", "embedded", "--json", env={"VISPA_LAYERS": "2-3"}).stdout)["model"]["default_layers"] == [2, 3]


def test_check_refuses_a_model_that_cannot_be_steered_with_the_reason(tmp_path):
    tiny_model("mamba").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    refused(run("check", tmp_path), "MambaForCausalLM cannot be steered: what block 0 returns")


def test_check_says_whether_generated_positions_alone_can_be_steered(tmp_path):
    tiny_model("jamba").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "generated positions: no" in run("check", tmp_path).stdout


def test_check_says_which_values_a_folder_holds(vispa, own_values):
    (found,) = json.loads(vispa("check", "--values", own_values, "--json").stdout)["values"]
    assert (found["id"], found["pairs"]) == ("tidiness", 2)
    assert "tidiness" in vispa("check", "--values", own_values).stdout


def test_check_tells_all_that_is_wrong_in_a_folder_at_once(vispa, own_values):
    (own_values / "a.yaml").write_text("id: [")
    (own_values / "b.yaml").write_text("id: b\n")
    (own_values / "concerns.yaml").write_text("- id: c\n")
    result = vispa("check", "--values", own_values)
    assert refused(result, "a.yaml:", "b.yaml:", "concerns.yaml:")
    assert all(line.startswith("vispa: ") for line in result.stderr.splitlines())


def test_check_finds_an_id_that_is_taken(vispa, own_values):
    (own_values / "power.yaml").write_text(OWN_VALUE.format(id="power"))
    assert refused(vispa("check", "--values", own_values), "power.yaml", "is taken")


# graph


def test_the_graph_is_printed_as_mermaid(vispa):
    graph = create_graph().get_graph()
    assert vispa("graph").stdout.strip() == graph.draw_mermaid().strip()
    assert "review" not in vispa("graph").stdout
    assert "rerank --> review" in vispa("graph", "--review").stdout
    assert json.loads(vispa("graph", "--json").stdout) == json.loads(json.dumps(graph.to_json()))


def test_the_graph_is_written_as_mermaid(vispa, tmp_path):
    assert vispa("graph", "--output", tmp_path / "graph.mmd").stdout == ""
    assert (tmp_path / "graph.mmd").read_text() == create_graph().get_graph().draw_mermaid()


@pytest.fixture
def graphviz(tmp_path, monkeypatch):
    """A `dot` that writes its options and what it was given, in place of any that is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "dot"
    program.write_text('#!/bin/sh\necho "$@"\nwhile read -r line; do echo "$line"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    return program


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_pictures_are_drawn_by_graphviz_from_every_node_and_edge(vispa, graphviz, tmp_path, kind):
    assert vispa("graph", "--review", "--output", tmp_path / f"graph.{kind}").exit_code == 0
    options, *drawing = (tmp_path / f"graph.{kind}").read_text().splitlines()
    assert options == f"-T{kind}"
    graph = create_graph(review=True).get_graph()
    assert all(any(line.startswith(f'"{node}" [') for line in drawing) for node in graph.nodes)
    for edge in graph.edges:
        assert f'"{edge.source}" -> "{edge.target}"{" [style=dashed]" if edge.conditional else ""};' in drawing


def test_a_png_is_drawn_by_pygraphviz_where_it_is_installed(vispa, graphviz, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: name == "pygraphviz")
    monkeypatch.setattr("langchain_core.runnables.graph.Graph.draw_png", lambda self, path: b"a picture")
    assert vispa("graph", "--output", tmp_path / "graph.png").exit_code == 0
    assert (tmp_path / "graph.png").read_bytes() == b"a picture"


def test_without_graphviz_a_picture_is_refused_with_what_to_install(vispa, graphviz, tmp_path):
    graphviz.unlink()
    assert refused(vispa("graph", "--output", tmp_path / "graph.svg"), "vispa: ", "install graphviz", ".mmd")
    assert not (tmp_path / "graph.svg").exists()


def test_a_graphviz_that_fails_leaves_no_file(vispa, graphviz, tmp_path):
    graphviz.write_text("#!/bin/sh\nexit 3\n")
    assert refused(vispa("graph", "--output", tmp_path / "graph.svg"), "exit code 3")
    assert not (tmp_path / "graph.svg").exists()


# What is refused


def option(*answers):
    return [part for answer in answers for part in ("--option", answer)]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ["Usage"]),
        (["ask"], ["QUERY"]),
        (["ask", ""], ["blank"]),
        (["ask", " \n "], ["blank"]),
        (["ask", "\udcff"], ["not valid UTF-8"]),
        (["ask", QUERY, "--mode", "majority"], ["overton", "steerable", "distributional"]),
        (["ask", QUERY, "--mode", "steerable"], ["needs an attribute"]),
        (["ask", QUERY, "--mode", "distributional"], ["needs answer options"]),
        (["ask", QUERY, "--population", "Denmark"], ["needs answer options"]),
        (["ask", QUERY, "--attribute", " "], ["--attribute", "blank"]),
        (["ask", QUERY, *option("yes")], ["options, and 1 came"]),
        (["ask", QUERY, *option(*map(str, range(27)))], ["options, and 27 came"]),
        (["ask", QUERY, *option("yes", "no", "Yes ")], ["Options 1 and 3 are the same"]),
        (["ask", QUERY, *option("yes", " ")], ["--option", "blank"]),
        (["ask", QUERY, "--value", "honours"], ["vispa: The value 'honours' is not in the taxonomy", "nearest are: honor"]),
        (["ask", QUERY, "--value", "foo"], ["vispa: The value 'foo' is not in the taxonomy of 31 values. `vispa values` lists them all."]),
        (["ask", "May", "I", "lie"], ["(I lie)", 'in quotes, as in: vispa ask "May I lie?"']),
        (["ask", QUERY, "--top-k", "0"], ["top_k", "greater than or equal to 1"]),
        (["ask", QUERY, "--top-k", "99"], ["top_k is 99", "1 to 31"]),
        (["ask", QUERY, "--top-k", "many"], ["--top-k"]),
        (["ask", QUERY, "--value", "power", "--layers", "99"], ["Layer 99 does not exist", "0 to 7"]),
        (["ask", QUERY, "--layers", "ten"], ["--layers", "10-25 or 3,4,5"]),
        (["ask", QUERY, "--layers", "25-10"], ["--layers", "ascending"]),
        (["ask", QUERY, "--layers", "3,,4"], ["--layers"]),
        (["ask", QUERY, "--layers", "0-99999999999"], ["--layers"]),
        (["ask", QUERY, "--layers", "-1"], ["--layers"]),
        (["ask", QUERY, "--layers", ""], ["--layers"]),
        (["ask", QUERY, "--method", "guess"], ["probe", "mean_difference", "pca"]),
        (["ask", QUERY, "--layers", "0.8-0.3", "--value", "power"], ["ascending from 0 to 1"]),
        (["ask", QUERY, "--strength", "-101"], ["strength"]),
        (["ask", QUERY, "--strength", "nan"], ["strength"]),
        (["ask", QUERY, "--temperature", "inf"], ["temperature"]),
        (["ask", QUERY, "--seed", "-1"], ["seed"]),
        (["ask", QUERY, "--seed", "9" * 30], ["seed"]),
        (["ask", QUERY, "--max-new-tokens", "0"], ["max_new_tokens"]),
        (["ask", QUERY, "--values", "/no/such/folder"], ["/no/such/folder", "no such folder"]),
        (["ask", QUERY, "--trace-content"], ["--trace FILE"]),
        (["values", "kindnes"], ["The value 'kindnes' is not", "nearest are"]),
        (["values", "--query", "May", "I", "lie"], ["goes in quotes"]),
        (["values", "--top-k", "3"], ["--query"]),
        (["values", "--query", " "], ["blank"]),
        (["values", "--query", QUERY, "--top-k", "99"], ["1 to 31"]),
        (["values", "--values", "/no/such/folder"], ["no such folder"]),
        (["fit", "--layers", "99"], ["Layer 99 does not exist"]),
        (["check"], ["MODEL"]),
        (["check", "--values", "/no/such/folder"], ["no such folder"]),
        (["graph", "--output", "graph.jpg"], [".mmd, .png or .svg"]),
        (["graph", "--output", "graph.mmd", "--json"], ["--output"]),
        (["graph", "--output", "/no/such/folder/graph.mmd"], ["no folder"]),
        (["retell"], ["retell"]),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_a_message(vispa, engine, arguments, fragments):
    assert refused(vispa(*arguments), *fragments)
    assert engine.requests == []


@pytest.mark.parametrize("command", [["ask", "-"], ["values", "--query", "-"]])
@pytest.mark.parametrize(("stdin", "fragment"), [(b"", "the text is blank"), (b" \n", "the text is blank"), (b"\xff\xfe", "not UTF-8")])
def test_stdin_without_a_readable_query_is_refused(vispa, command, stdin, fragment):
    assert refused(vispa(*command, stdin=stdin), "vispa: stdin", fragment)


@pytest.mark.parametrize("command", [["ask", "-"], ["values", "--query", "-"]])
def test_on_a_terminal_it_is_said_that_stdin_is_waited_for(command):
    keyboard, terminal = os.openpty()
    with start("-m", "vispa_graph", *command, stdin=terminal) as child:
        first = child.stderr.readline()
        os.write(keyboard, b"\n\x04")
        output, rest = child.communicate(timeout=60)
    os.close(keyboard)
    os.close(terminal)
    assert first.startswith("vispa: waiting for the text on stdin; end it with Ctrl-D")
    assert (child.returncode, output, rest) == (2, "", "vispa: stdin: the text is blank. Write it out.\n")


def closing(stream):
    """Code that runs the command line with a stream closed: 0 is stdin, 1 stdout."""
    return f"import os, sys; os.close({stream}); os.execv(sys.executable, [sys.executable, '-m', 'vispa_graph', *sys.argv[1:]])"


@pytest.mark.parametrize(
    ("command", "message"),
    [(["ask", "-"], "vispa: stdin is closed"), (["values", "new", "mine"], "without a terminal"), (["mcp"], "vispa: stdin or stdout is closed")],
)
def test_a_closed_stdin_is_refused_in_one_line(command, message):
    status, output, errors = process("-c", closing(0), *command)
    assert (status, output) == (2, "")
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", [["values"], ["values", "--json"]])
def test_a_closed_stdout_is_no_error_worth_a_stack_trace(command):
    assert process("-c", closing(1), *command) == (0, "", "")


@pytest.mark.parametrize("command", [["ask", QUERY], ["values"], ["fit"], ["check"]])
@pytest.mark.parametrize(
    ("file", "content", "fragment"),
    [
        ("broken.yaml", "id: [a\nname: b", "broken.yaml:2: not valid YAML"),
        ("part.yaml", "id: part\n", "part.yaml:1: the key 'name' is missing"),
        ("power.yaml", OWN_VALUE.format(id="power"), "is taken"),
        ("concerns.yaml", "- {id: a, phrasings: [b], central: [nowhere], relevant: []}", "'nowhere'"),
    ],
)
def test_a_malformed_folder_of_values_is_refused_with_its_place(vispa, own_values, command, file, content, fragment):
    (own_values / file).write_text(content)
    assert refused(vispa(*command, "--values", own_values), "vispa: ", fragment)


def test_an_empty_folder_of_values_is_refused(vispa, tmp_path):
    assert refused(vispa("values", "--values", tmp_path), "holds no *.yaml")


@pytest.mark.parametrize("command", [["ask", QUERY, "--value", "power", "--model"], ["fit", "--model"], ["check"]])
@pytest.mark.parametrize("kind", ["missing", "empty", "not json", "no weights", "damaged weights"])
def test_a_folder_that_holds_no_model_is_refused(tmp_path, command, kind):
    folder = tmp_path / "model"
    if kind != "missing":
        folder.mkdir()
    if kind == "not json":
        (folder / "config.json").write_text("{")
    if "weights" in kind:
        tiny_model().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.unlink() if kind == "no weights" else weights.write_bytes(weights.read_bytes()[:1000])
    assert refused(run(*command, folder), f"vispa: The{'re is no' if kind == 'missing' else ''} folder {folder}")


@pytest.mark.parametrize("command", [["ask", QUERY, "--model"], ["fit", "--model"], ["check"], ["mcp", "--model"]])
@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_folder_that_holds_no_model_is_refused_before_anything_is_loaded(vispa, monkeypatch, tmp_path, command, kind):
    monkeypatch.setattr("vispa_graph.resources.Resources.__init__", None)  # calling it would be a TypeError
    folder = tmp_path / "model"
    if kind == "empty":
        folder.mkdir()
    assert refused(vispa(*command, folder), str(folder), "no folder" if kind == "missing" else "holds no config.json")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--option", "yes"], ["options, and 1 came"]),
        (["--option", "yes", "--option", "Yes"], ["Options 1 and 2 are the same"]),
        (["--mode", "steerable"], ["needs an attribute"]),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_before_stdin_is_read_and_anything_is_made(monkeypatch, arguments, fragments):
    monkeypatch.setattr("vispa_graph.resources.Resources.__init__", None)  # calling it would be a TypeError
    assert refused(run("ask", "-", *arguments, stdin=b"\xff"), *fragments)


@pytest.fixture
def unloadable(monkeypatch):
    """Neither encoder nor model can be loaded."""

    def load(*_, **__):
        raise RuntimeError("something was loaded")

    monkeypatch.setattr("vispa_graph.resources.SentenceEncoder._load", load)
    monkeypatch.setattr("vispa_graph.engine.huggingface.AutoModelForCausalLM.from_pretrained", load)


@pytest.mark.parametrize(
    ("arguments", "env", "fragments"),
    [
        (["--value", "honor", "--value", "pwer", "--value", "securty"], {}, ["Value 2 of 3 is not", "power", "Value 3 of 3 is not", "security"]),
        (["--layers", "2,6"], {}, ["Layer 6 does not exist: this model has 6 (0 to 5)"]),
        (["--layers", "0.8-0.3"], {}, ["ascending from 0 to 1"]),
        ([], {"VISPA_DEVICE": "abacus"}, ["'abacus' cannot be used", "cpu"]),
    ],
)
def test_what_can_be_told_without_a_model_is_refused_before_encoder_or_model_are_loaded(unloadable, monkeypatch, arguments, env, fragments):
    monkeypatch.setitem(sys.modules, "vispa_graph.engine.huggingface", None)  # importing it, and with it transformers, would fail
    assert refused(run("ask", QUERY, *arguments, env=env), *fragments)
    if "--value" not in arguments:
        assert refused(run("fit", *arguments, env=env), *fragments)


def test_layers_that_nothing_is_steered_at_are_no_reason_to_refuse(unloadable):
    result = run("ask", QUERY, "--layers", "6", "--strength", "0")
    assert "something was loaded" in str(result.exception.original)


def test_the_configuration_of_a_folder_tells_its_layers_before_its_weights_are_read(unloadable, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert refused(run("fit", "--model", tmp_path, "--layers", "99"), "Layer 99 does not exist: this model has 5")


def test_a_folder_in_the_home_of_nobody_is_refused():
    assert refused(run("check", "~nobody-of-this-name/model"), "There is no folder ~nobody-of-this-name/model")


def test_checking_a_folder_of_value_files_as_a_model_points_at_the_checks_of_values(own_values):
    assert refused(run("check", own_values), "no config.json", f"`vispa check --values {own_values}`", f"`vispa values check {own_values}`")


def test_a_model_that_does_not_generate_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert refused(run("check", tmp_path), "not a causal language model")


def test_a_device_that_is_not_there_is_refused():
    assert refused(run("check", "embedded", env={"VISPA_DEVICE": "abacus"}), "abacus")


@pytest.mark.parametrize(("name", "text"), [("VISPA_TOP_K", "few"), ("VISPA_LAYERS", "ten"), ("VISPA_METHOD", "guess"), ("VISPA_VALUES", "[")])
def test_a_variable_that_makes_no_sense_is_refused_by_name(vispa, name, text):
    assert refused(vispa("values", env={name: text}), "vispa: ", name, name.removeprefix("VISPA_").lower())


@pytest.mark.parametrize("command", [["ask", QUERY], ["values", "--query", QUERY]])
def test_a_top_k_beyond_the_taxonomy_is_laid_to_the_environment_only_where_it_came_from_there(vispa, command):
    assert refused(vispa(*command, env={"VISPA_TOP_K": "99"}), "vispa: top_k (from VISPA_TOP_K) is 99", "1 to 31")
    assert refused(vispa(*command, "--top-k", "99"), "vispa: top_k is 99", "1 to 31")


@pytest.mark.parametrize("command", [["values", "power"], ["ask", QUERY, "--value", "power"], ["check", "--values", "/no/such/folder"]])
def test_a_variable_whose_name_is_nearly_ours_is_told_in_one_line_and_is_no_error(vispa, command):
    known = {"VISPA_MCP_TOKEN": "secret", "VISPA_CACHE": os.environ["VISPA_CACHE"], "VISPA_XQZ": "1"}
    before, after = (vispa(*command, env=known | more) for more in ({}, {"VISPA_TOPK": "3"}))
    assert (after.exit_code, after.stdout) == (before.exit_code, before.stdout)
    line = "vispa: warning: the variable VISPA_TOPK is not known and does nothing. Did you mean VISPA_TOP_K?\n"
    assert problems(after) == line + problems(before)


@pytest.mark.parametrize("command", [["ask", QUERY, "--value", "power"], ["values", "--query", QUERY], ["fit"], ["fit", "--method", "sae"]])
def test_a_cache_that_cannot_be_used_is_refused_as_the_cache_with_where_it_was_set(vispa, engine, tmp_path, monkeypatch, command):
    monkeypatch.setattr(engine, "read", None)  # calling it would be a TypeError: nothing is read that could not be kept
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "inside"):
        result = vispa(*command, env={"VISPA_CACHE": f"{cache}/"})
        assert refused(result, f"vispa: The cache folder {cache} (from VISPA_CACHE) cannot be used: Not a directory", str(tmp_path / "file"))
    monkeypatch.delenv("VISPA_CACHE")
    result = vispa(*command, env={"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert refused(result, f"vispa: The cache folder {tmp_path / 'file' / 'vispa_graph'} (from XDG_CACHE_HOME) cannot be used")


def test_an_error_of_ours_that_nobody_foresaw_is_not_hidden(vispa, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_run", fail)
    assert isinstance(vispa("ask", QUERY).exception, ZeroDivisionError)


# Leaving


def test_an_interrupt_ends_with_exit_code_130_and_no_stack_trace(vispa, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    before = signal.getsignal(signal.SIGINT)
    result = vispa("ask", QUERY)
    assert result.exit_code == 130
    assert result.stderr == "vispa: interrupted.\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ask", "interrupted."),
        ("fit", "interrupted."),
        ("fit --model embedded", "interrupted. What is fitted is kept, and the same command goes on from there."),
    ],
)
def test_control_c_ends_the_process_though_a_thread_is_at_work_and_says_what_is_kept_if_anything_is(monkeypatch, tmp_path, command, said):
    monkeypatch.setenv("VISPA_CACHE", str(tmp_path))
    (tmp_path / "directions" / "before").mkdir(parents=True)
    (tmp_path / "directions" / "before" / "0.safetensors").touch()
    code = """
import os, pathlib, sys, threading, time
from vispa_graph import cli, resources
def work(*_, **__):
    if "--model" in sys.argv:
        pathlib.Path(os.environ["VISPA_CACHE"], "directions", "before", "1.safetensors").touch()
    thread = threading.Thread(target=time.sleep, args=(60,))
    thread.start()
    print("at work", flush=True)
    thread.join()
cli._run = resources.Resources = work
cli.main(sys.argv[1:])
"""
    with start("-c", code, *command.split(), *(["x"] if command == "ask" else [])) as child:
        assert child.stdout.readline() == "at work\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert errors == f"vispa: {said}\n"


@pytest.mark.parametrize("arguments", [["values"], ["values", "--json"], ["values", "power"]])
def test_a_reader_that_goes_away_is_no_error_worth_a_stack_trace(arguments):
    with start("-m", "vispa_graph", *arguments) as child:
        child.stdout.close()
        errors = child.stderr.read()
    assert errors == ""


@FULL
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["values"], ["values", "--json"], ["values", "power"], ["ask", "--help"], ["--version"]])
def test_a_stdout_that_is_full_is_told_in_one_line_with_exit_code_1(monkeypatch, arguments, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full, start("-m", "vispa_graph", *arguments, stdout=full) as child:
        _, errors = child.communicate()
    assert (child.returncode, errors) == (1, "vispa: the output cannot be written: No space left on device. Check the space left where it goes.\n")


# Layers


@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 30)), min_size=1, max_size=5))
def test_ranges_of_layers_are_spelled_out_in_the_order_given(ranges):
    ranges = [(first, min(first + more, 9999)) for first, more in ranges]
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    assert cli.block_numbers(text) == tuple(number for first, last in ranges for number in range(first, last + 1))


def test_layers_may_be_chosen_by_fraction_of_the_depth():
    assert cli.block_numbers("0.25-0.75") == (0.25, 0.75)


# Serving


@pytest.fixture
def served(monkeypatch):
    """What the command would serve over HTTP."""
    found = {}

    def serve(server, port, token, ready):
        found.update(server=server.name, port=port, token=token)
        listed = anyio.run(server.call_tool, "list_values", {}).structured_content["values"]
        found["values"] = [value["id"] for value in listed]
        ready(f"http://127.0.0.1:{port}/mcp")

    monkeypatch.setattr("vispa_graph.mcp_server.serve_http", serve)
    return found


def test_a_token_that_is_given_is_used_and_not_shown(vispa, served, monkeypatch):
    monkeypatch.setenv("VISPA_MCP_TOKEN", "my secret")
    done = vispa("mcp", "--http", "8765")
    assert {key: served[key] for key in ("server", "port", "token")} == {"server": "vispa", "port": 8765, "token": "my secret"}
    assert done.stdout == ""
    assert done.stderr == "vispa: serving on http://127.0.0.1:8765/mcp\n"


def test_the_taxonomy_that_is_served_is_chosen_as_for_a_question(vispa, served, own_values):
    assert vispa("mcp", "--http", "0", "--bioethics", "--values", own_values).exit_code == 0
    assert served["values"] == [*Taxonomy.load(bioethics=True).ids, "tidiness"]
    assert vispa("mcp", "--http", "0").exit_code == 0
    assert served["values"] == list(Taxonomy.load().ids)


def test_a_token_that_is_not_given_is_made_up_and_shown(vispa, served):
    shown = [vispa("mcp", "--http", "0").stderr.split()[-1] for _ in range(2)]
    assert shown[1] == served["token"]
    assert len(set(shown)) == 2
    assert all(len(token) >= 32 for token in shown)


def test_a_port_that_is_taken_is_refused_with_how_to_choose_another(vispa):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(vispa("mcp", "--http", port), f"vispa: Port {port} cannot be served on: Address already in use. Choose another one")


def test_without_its_package_the_server_says_what_to_install(vispa, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    done = vispa("mcp")
    assert done.exit_code == 2
    assert "pip install 'vispa_graph[mcp]'" in done.stderr


@pytest.mark.slow
def test_a_cache_found_to_be_no_folder_in_the_midst_of_a_run_is_told_with_its_place(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VISPA_CACHE", str(tmp_path / "file" / "cache"))
    code, out, errors = process("-m", "vispa_graph", "ask", QUERY)
    assert (code, out) == (2, "")
    assert str(tmp_path / "file") in errors
    assert "Not a directory" in errors
    assert "redacted" not in errors
    assert "Traceback" not in errors
