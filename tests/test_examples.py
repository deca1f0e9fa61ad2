"""The examples run offline as they stand, and the README says nothing the package does not take."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from ast import literal_eval
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage

from vispa_graph import Settings
from vispa_graph.cli import main as vispa
from vispa_graph.graph import create_graph
from vispa_graph.state import Input, Output
from vispa_graph.taxonomy_index import Taxonomy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = r"\d+\.\d+"

# Put on the path as sitecustomize: the process notes every attempt to leave the machine, and gets nowhere.
NO_NETWORK = """
import os, socket

def refuse(*arguments, **options):
    open(os.environ["NETWORK_LOG"], "a").write(repr(arguments) + "\\n")
    raise OSError("there is no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture
def run(cache, tmp_path):
    """Runs Python offline with the package on its path and gives back what it printed."""

    def run(*arguments: str) -> str:
        (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
        log = tmp_path / "network"
        hidden = {"LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2", "COLUMNS", "FORCE_COLOR"}
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "NETWORK_LOG": str(log), "VISPA_CACHE": str(cache)}
        done = subprocess.run([sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not log.exists(), log.read_text()
        return done.stdout

    return run


def section(text: str, start: str, stop: str) -> str:
    """What stands between two headings."""
    return text[text.index(start) : text.index(stop)]


@pytest.mark.slow
def test_the_demo_shows_the_three_modes_with_values_comments_answer_and_time(run):
    printed = run(str(ROOT / "examples" / "demo.py"))
    assert printed.startswith("Loading")
    assert re.search(rf"Loaded in {NUMBER} s", printed)
    modes = {
        "overton": section(printed, "Overton:", "Steerable:"),
        "steerable": section(printed, "Steerable:", "Distributional:"),
        "distributional": printed[printed.index("Distributional:") :],
    }
    parts = [modes["overton"].index(title) for title in ("Value heard", "Comments, in short", "Answer")]
    assert parts == sorted(parts)
    # The values and what was said from them are the same in all modes: they are shown once.
    assert len(re.findall(r"│ (0\.\d\d|1\.00) ", printed)) == Settings().top_k
    for mode, shown in modes.items():
        assert "Answer" in shown
        assert re.search(rf"^{mode}: {NUMBER} s$", shown, re.MULTILINE)
    assert "It rests on the comment from self-direction" in modes["steerable"]
    bars = re.findall(r"^(Yes|No|It depends) .*?(\d+\.\d)%$", modes["distributional"], re.MULTILINE)
    assert [option for option, _ in bars] == ["Yes", "No", "It depends"]
    assert sum(float(share) for _, share in bars) == pytest.approx(100, abs=0.15)
    assert "Finding the values at stake" in modes["overton"].partition("Value heard")[0]
    assert "tiny" in printed
    assert "--model" in printed


@pytest.mark.slow
def test_the_script_prints_a_json_line_for_every_question_also_for_one_that_fails(run):
    lines = [json.loads(line) for line in run(str(ROOT / "examples" / "script.py")).splitlines()]
    assert [line.get("mode") for line in lines] == ["overton", "overton", "steerable", "distributional", None]
    for line in lines[:-1]:
        assert len(line["values"]) == 4
        assert set(line["comments"]) == set(line["values"])
        assert line["response"]
    assert set(lines[2]["values"]) >= {"fairness"}
    assert sum(lines[3]["distribution"].values()) == pytest.approx(1)
    assert lines[4]["error"] == "OptionsError"


@pytest.mark.slow
def test_the_agent_is_told_what_was_wrong_with_its_call_then_gets_answer_and_artifact(run):
    turns = re.split(r"^--- ", run(str(ROOT / "examples" / "agent_tool.py")), flags=re.MULTILINE)[1:]
    assert [turn.split()[0] for turn in turns] == ["human", "ai", "tool", "ai", "tool", "ai"]
    assert "options" in turns[2]
    assert "artifact" not in turns[2]
    assert "Values heard: " in turns[4]
    assert f"artifact: {', '.join(sorted(Output.__annotations__))}" in turns[4]


@pytest.mark.slow
def test_the_health_care_assistant_runs_offline_and_calls_the_tool_that_each_question_needs(run):
    printed = run(str(ROOT / "examples" / "health_care_assistant.py"))
    assert printed.startswith("All medicines and recommendations here are invented.")
    fact, values, both = printed.split("\n=== ")[1:]
    assert re.findall("calls (.+)", fact) == ["look_up"]
    assert "above 75 years 5 mg" in fact
    assert re.findall("calls (.+)", values) == ["plural_answer"]
    assert "Values heard: " in values
    assert re.findall("calls (.+)", both) == ["look_up", "plural_answer"]
    assert "does not lengthen life" in both
    assert re.search(r"It depends: \d+%", both)


def module_of(example: str):
    """An example as a module."""
    spec = spec_from_file_location(example, ROOT / "examples" / f"{example}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def assistant():
    return module_of("health_care_assistant")


def test_the_assistant_takes_any_chat_model_and_tells_it_when_a_question_is_one_of_values(assistant, fake_graph):
    class Model(FakeMessagesListChatModel):
        seen: list = []  # noqa: RUF012

        def bind_tools(self, tools, **options):
            self.seen.extend(tools)
            return self

        def _generate(self, messages, *given, **options):
            self.seen.append(messages)
            return super()._generate(messages, *given, **options)

    call = AIMessage("", tool_calls=[{"name": "plural_answer", "args": {"query": "May he refuse?", "values": ["karma"]}, "id": "1"}])
    model = Model(responses=[call, AIMessage("Ask his doctor.")])
    messages = assistant.make_assistant(fake_graph, model).invoke({"messages": [{"role": "user", "content": "May he refuse?"}]})["messages"]
    assert [tool.name for tool in model.seen[:2]] == ["look_up", "plural_answer"]
    assert "Use plural_answer for value questions" in model.seen[2][0].text
    assert "Values heard: Karma." in messages[2].text
    assert messages[-1].text == "Ask his doctor."


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("velotrin", "lowers blood pressure"),
        ("feeding by a tube", "feeding by hand"),
        ("aspirin", "nothing on this"),
        ('" OR *', "nothing on this"),
        ("?", "at least one word"),
    ],
)
def test_the_look_up_finds_invented_facts_and_bears_any_words(assistant, words, found):
    assert found in assistant.make_look_up().invoke({"words": words})


@pytest.mark.slow
def test_a_host_with_packages_tracing_threads_and_a_loop_of_its_own_embeds_the_graph_as_a_node(run):
    host = ROOT / "examples" / "host_app"
    lines = run(str(host / "main.py")).splitlines()
    assert lines[:3] == [
        f"prompts from {host / 'prompts' / '__init__.py'}",
        f"nodes from {host / 'nodes' / '__init__.py'}",
        f"vispa_graph from {ROOT / 'vispa_graph' / '__init__.py'}",
    ]
    steps = [line.strip() for line in lines if line.startswith(("host: ", "  inside plural: "))]
    inner = ["retrieve", "rerank", *["steer"] * Settings().top_k, "overton"]
    assert steps == ["host: triage", *[f"inside plural: {step}" for step in inner], "host: plural", "host: reply"]
    assert "threads and event loop give the same replies: True" in lines
    assert "7 traces of the host, each with one run of ours and all inside it: True" in lines
    assert "the messages are in our part of the host's traces: False" in lines
    assert lines[-1].startswith("(Values heard: ")


def test_the_viewer_example_sends_a_run_to_a_server_that_it_starts_reads_it_back_and_stops_it(monkeypatch, capsys, make_resources, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("PHOENIX_PORT", str(port))
    program = tmp_path / "phoenix"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "tests" / "phoenix_stand_in.py"}" "$@"\n')
    program.chmod(0o755)
    viewer = module_of("phoenix_viewer")
    monkeypatch.setattr(viewer, "create_graph", lambda settings: create_graph(resources=make_resources(top_k=settings.top_k)))
    try:
        viewer.main(str(program), stay=False)
    finally:
        viewer.LangChainInstrumentor().uninstrument()
    *tree, last = capsys.readouterr().out.splitlines()
    assert last == "The question is in what Phoenix holds: False"
    assert tree[0] == "vispa (CHAIN)"
    assert [line.strip() for line in tree if line.startswith("  ") and not line.startswith("    ")] == [
        f"{node} (CHAIN)" for node in ("retrieve", "rerank", "steer", "steer", "steer", "overton")
    ]
    assert len([line for line in tree if re.match(r"    steer [a-z-]+ \(LLM\), \d+ tokens$", line)]) == 3
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"^(\w+=\S+ )+| < \S+$", "", line) for line in lines]  # without variables before, or a redirection behind
    return [line for line in found if line.startswith("vispa ")]


@pytest.mark.slow
def test_the_python_of_the_readme_that_needs_no_download_runs_as_it_stands(run, tmp_path):
    runnable = [block for block in blocks("python") if "Qwen" not in block]
    assert len(runnable) >= 4
    (tmp_path / "my_values").mkdir()
    (tmp_path / "my_values" / "patience.yaml").write_text((ROOT / "tests" / "data" / "values" / "patience.yaml").read_text())
    (tmp_path / "readme.py").write_text("\n".join(runnable))
    run(str(tmp_path / "readme.py"))


def test_no_snippet_of_the_readme_gives_another_s_name_a_new_meaning():
    given = [
        {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for block in blocks("python")
    ]
    names = [name for block in given for name in block]
    assert "graph" in names
    assert sorted(names) == sorted(set(names))


def test_the_value_file_of_the_readme_is_read_as_it_stands(tmp_path):
    (tmp_path / "quiet.yaml").write_text(*blocks("yaml"), encoding="utf-8")
    assert Taxonomy.load(tmp_path, shipped=False).ids == ("quiet",)


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_is_one_that_the_command_line_takes(line):
    command, name, arguments = vispa, "vispa", shlex.split(line, comments=True)[1:]
    parent = None
    while True:
        parent = command.make_context(name, list(arguments), parent=parent)  # raises a usage error for an unknown option or a bad value
        arguments = [*parent._protected_args, *parent.args]
        if not arguments:
            break
        name, command, arguments = command.resolve_command(parent, arguments)


def test_the_readme_names_every_command_setting_input_and_output():
    shown = set(re.findall(r"`([a-z_]+)`", README))
    assert {line.split()[1] for line in commands()} == set(vispa.commands)
    assert set(Settings.model_fields) <= shown
    assert set(Input.__annotations__) | set(Output.__annotations__) <= shown


def test_the_readme_gives_every_setting_its_default():
    table = section(README, "## Settings", "## Traces")
    told = dict(re.findall(r"^\| `([a-z_]+)` \| (.+?) \|", table, re.MULTILINE))
    assert list(told) == list(Settings.model_fields)
    for name, default in told.items():
        actual = Settings.model_fields[name].default
        if default == "none" or default.startswith("the model's own"):
            assert not actual, name
        elif name != "cache":
            assert literal_eval(default.strip("`")) == actual, name
