"""The wheel built from the sdist holds everything, and works wherever it is imported from."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT = "import vispa_graph, sys; from vispa_graph import create_graph; create_graph(); print(vispa_graph.__file__)"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist of a copy of the tree, without build isolation: nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    subprocess.run([*build, "--sdist", str(copy)], check=True, capture_output=True)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
        archive.extractall(folder / "unpacked", **safely)
    (unpacked,) = (folder / "unpacked").iterdir()
    subprocess.run([*build, "--wheel", str(unpacked)], check=True, capture_output=True)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.mark.slow
def test_the_wheel_from_the_sdist_holds_every_package_prompt_value_and_weight(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vispa_graph/")}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "vispa_graph").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert wanted - packed == set()
    assert any(name.endswith("self-direction.yaml") for name in packed)
    assert any(name.endswith("model.safetensors") for name in packed)


@pytest.mark.slow
def test_the_tests_find_the_training_code_also_where_pytest_does_not_add_the_folder_it_runs_in():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", "tests/test_training.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_holds_nothing_but_the_package(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vispa_graph"}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["root", "elsewhere", "beside foreign packages"])
def test_the_installed_package_is_the_one_imported(installed, tmp_path, place):
    path = [str(installed)]
    if place == "beside foreign packages":
        for name in ("prompts", "nodes", "taxonomy_index"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the foreign {name} was imported')")
        path.insert(0, str(tmp_path))
    # In the root, the source tree stands first on the path of `python -c`, as it does for whoever works there.
    result = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=ROOT if place == "root" else tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent.name == "vispa_graph"
    if place != "root":
        assert Path(result.stdout.strip()).is_relative_to(installed)
