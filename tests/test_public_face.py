"""What users import, what importing costs, and what the package never does."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vispa_graph
from vispa_graph import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vispa_graph"
HEAVY = {"torch", "transformers", "faiss", "sentence_transformers", "langgraph", "langchain_core", "sklearn"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after some code."""
    code += "\nimport sys\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_heavy_library():
    loaded = modules_after("import vispa_graph")
    assert "vispa_graph" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "statement",
    ["from vispa_graph import Settings, FakeEngine, Engine, VispaError, Taxonomy", "import vispa_graph.engine.contract, vispa_graph.state"],
)
def test_nor_do_the_parts_that_need_no_model(statement):
    assert not modules_after(statement) & {"torch", "transformers", "faiss", "sentence_transformers", "sklearn"}


def test_the_public_names_are_sorted_and_each_can_be_imported():
    assert vispa_graph.__all__ == sorted(vispa_graph.__all__)
    assert len(set(vispa_graph.__all__)) == len(vispa_graph.__all__)
    for name in vispa_graph.__all__:
        assert getattr(vispa_graph, name).__name__ == name
        assert name in dir(vispa_graph)


def test_every_public_name_has_a_docstring():
    for name in vispa_graph.__all__:
        assert inspect.getdoc(getattr(vispa_graph, name)), name


def test_public_functions_name_every_option():
    for name in vispa_graph.__all__:
        public = getattr(vispa_graph, name)
        if inspect.isfunction(public):
            kinds = {parameter.kind for parameter in inspect.signature(public).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vispa_graph.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["nodes", "taxonomy_index", "prompts"])
def test_the_links_at_the_root_lead_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("vispa_graph") / name
    assert link.resolve() == (PACKAGE / name).resolve()
    assert (link / "__init__.py").is_file()


def test_every_error_is_in_the_tree_that_its_module_draws_and_under_its_parent():
    drawn = {}
    path = []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"((?:\|   |    )*)(\+-- )?(\w+Error)\b", line):
            depth = len(found[1]) // 4 + bool(found[2])
            path[depth:] = [found[3]]
            drawn[found[3]] = path[depth - 1] if depth else "Exception"
    defined = {name: error.__bases__[0].__name__ for name, error in vars(errors).items() if inspect.isclass(error)}
    assert drawn == defined
    assert all(issubclass(getattr(errors, name), errors.VispaError) for name in defined)


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts]


def calls_in(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_nothing_but_the_command_line_prints():
    assert len(modules()) > 20
    printing = {path.name for path in modules() if any(call in ("print", "sys.stdout.write", "sys.stderr.write") for call in calls_in(path))}
    assert printing <= {"cli.py"}


def test_only_the_settings_read_the_environment():
    reading = {path.name for path in modules() if re.search(r"\bos\.(environ|getenv)\b|from os import", path.read_text(encoding="utf-8"))}
    assert reading <= {"settings.py"}


def test_nothing_is_pickled():
    for path in modules():
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib)\b", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


def test_only_the_engine_imports_the_model_library():
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if re.search(r"^\s*(import|from) transformers\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importing <= {
        "engine/huggingface.py",
        "engine/decoding.py",
        "engine/fingerprint.py",
        "engine/cache.py",
        "quiet.py",
        "taxonomy_index/nli.py",
    }


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
