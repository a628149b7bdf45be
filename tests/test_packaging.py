"""What is installed: the files of the distributions, their metadata, and errors that name the missing extra."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import depthkv
from depthkv.cli import main
from tiny import tiny_checkpoint, tiny_text

ROOT = Path(__file__).parent.parent
FILES = (
    "CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md mkdocs.yml pyproject.toml".split()
)
FOLDERS = ("benchmarks", "docs", "src", "tests")
EXTRAS = {"dev", "docs", "eval", "serve", "train", "vllm"}
OPTIONAL = ("tensorboard", "fastapi", "uvicorn", "prometheus_client", "lm_eval", "vllm", "mkdocs", "pytest")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[set[str], Path, Path]]:
    """The files of a clean tree with some litter, then the source distribution and the wheel made of it."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    for litter in ("src/depthkv/__pycache__/a.pyc", "tests/__pycache__/a.pyc", "demo-out/a.png", "docs/raw/a.jsonl"):
        (tree / litter).parent.mkdir(exist_ok=True)
        (tree / litter).touch()
    code = "from setuptools import build_meta as b; b.build_sdist('../out'); b.build_wheel('../out')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield files, next((folder / "out").glob("*.tar.gz")), next((folder / "out").glob("*.whl"))


def test_wheel_has_the_package_and_nothing_else(built: tuple[set[str], Path, Path]) -> None:
    files, _, wheel = built
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("depthkv-")}
    assert names == {name.removeprefix("src/") for name in files if name.startswith("src/")}
    assert {"depthkv/py.typed", "depthkv/texts/fallback.txt", "depthkv/serve/page/index.html"} <= names
    assert "depthkv/adapters/smollm2-135m-depthkv/adapter_model.safetensors" in names


def test_source_distribution_has_all_but_the_measured_figures(built: tuple[set[str], Path, Path]) -> None:
    files, source, _ = built
    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names if name not in ("PKG-INFO", "setup.cfg") and ".egg-info/" not in name}
    assert names == {name for name in files if not name.startswith("docs/raw/")}


def test_metadata(built: tuple[set[str], Path, Path]) -> None:
    _, _, wheel = built
    archive = zipfile.ZipFile(wheel)
    prefix = f"depthkv-{depthkv.__version__}.dist-info/"
    metadata = HeaderParser().parsestr(archive.read(prefix + "METADATA").decode())
    assert metadata["Version"] == depthkv.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    assert str(metadata.get_payload()).startswith("# depthkv")
    assert prefix + "licenses/LICENSE" in archive.namelist()
    scripts = archive.read(prefix + "entry_points.txt").decode()
    assert "depthkv = depthkv.cli:main" in scripts and "depthkv = depthkv.vllm_plugin:register" in scripts


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == depthkv.__version__ and citation["license"] == "Apache-2.0"
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == depthkv.__version__


def test_version_names_what_a_report_of_a_bug_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    shown = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["depthkv"] == depthkv.__version__
    assert shown.keys() >= {"python", "torch", "transformers", "peft", "system", "devices"} and all(shown.values())


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [
        ("tensorboard", "train", "adapt MODEL --data TEXT --out out --report-to tensorboard"),
        ("fastapi", "serve", "serve MODEL --port 0"),
        ("uvicorn", "serve", "serve MODEL --port 0"),
        ("prometheus_client", "serve", "serve MODEL --port 0"),
        ("vllm", "vllm", "serve MODEL --engine vllm"),
    ],
)
def test_a_missing_extra_is_named(
    missing: str,
    extra: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {"MODEL": str(tiny_checkpoint(tmp_path / "model")), "TEXT": str(tiny_text(tmp_path / "text.txt"))}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]  # as Python marks what cannot be imported
    assert main([known.get(word, word) for word in command.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and f"(pip install 'depthkv[{extra}]'), got n" in shown.err
    assert not (tmp_path / "out").exists()


def python(code: str) -> Any:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_missing_harness_is_named() -> None:
    code = "import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module('depthkv.lm_eval', run_name='__main__')"
    done = python(code)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install 'depthkv[eval]'" in done.stderr


def test_the_command_line_imports_no_extra() -> None:
    done = python(f"import sys, depthkv.cli; print(*(name for name in {OPTIONAL} if name in sys.modules))")
    assert done.returncode == 0 and done.stdout.split() == [], done.stderr


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms(name: str) -> None:
    path = ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml"
    if not path.parent.is_dir():
        pytest.skip("a source distribution has none")
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form.keys() >= {"name", "description", "body"}
    fields = [field["attributes"] for field in form["body"]]
    assert all(attributes["label"] for attributes in fields)
    assert name != "bug_report" or any("`depthkv --version`" in a.get("description", "") for a in fields)
