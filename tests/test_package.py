"""What the package as a whole promises: one page of public names, short modules, a quick import."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_LINES = 400
SOURCES = sorted((ROOT / "src").rglob("*.py"))

OPTIONAL = set(
    "accelerate datasets fastapi gguf jinja2 lm_eval matplotlib peft prometheus_client rich scipy sklearn typer".split()
)
"""What `import depthkv` must not import; torch and transformers bring some of the others, such as numpy."""


@functools.cache
def tree(module: str) -> ast.Module | None:
    """Read, not imported: some modules need packages that are optional."""
    path = ROOT / "src" / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


def exported(module: str) -> list[str]:
    """`__all__`, or nothing."""
    found = tree(module)
    assert found is not None
    values = [n.value for n in found.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return [name for value in values for name in ast.literal_eval(value)]


def origin(module: str, name: str) -> tuple[str, str]:
    """The module that defines what `module` calls `name`, and its docstring ("" without one)."""
    found = tree(module)
    assert found is not None
    following = zip(found.body, [*found.body[1:], None], strict=True)
    for node, after in reversed(list(following)):  # of overloads the last has the docstring
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return origin(str(node.module), name)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return f"{module}.{name}", ast.get_docstring(node) or ""
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            return f"{module}.{name}", str(ast.literal_eval(after.value)) if described else ""  # type: ignore[union-attr]
    raise AssertionError(f"{module} has no {name}")


def documented() -> list[tuple[str, str]]:
    """Module and name of everything that docs/reference.md lists."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    found = []
    for target, members in re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\]\n)?", text, re.MULTILINE):
        if tree(target) is not None:
            assert members, f"expected the members of the module {target} to be listed, got none"
            found += [(target, name) for name in members.split(", ")]
        else:
            module, _, name = target.rpartition(".")
            found.append((module, name))
    return found


def test_the_reference_lists_what_is_exported_and_no_more() -> None:
    names = documented()
    listed = [origin(*name)[0] for name in names]
    assert len(listed) == len(set(listed)), "expected each name once"
    modules = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in SOURCES]
    modules = [module.removesuffix(".__init__") for module in modules if not module.startswith("depthkv.cli")]
    every = {origin(module, name)[0] for module in modules for name in exported(module)}
    assert every == set(listed)
    for module, name in names:
        assert name in exported(module), f"expected {name} in __all__ of {module}"


@pytest.mark.parametrize(("module", "name"), documented())
def test_what_is_public_has_a_docstring(module: str, name: str) -> None:
    assert origin(module, name)[1]


def test_modules_are_short() -> None:
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_import_brings_in_nothing_optional() -> None:
    code = "import sys, torch, transformers; before = set(sys.modules); import depthkv; "
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = set(done.stdout.split())
    assert "depthkv" in brought and not brought & OPTIONAL


def test_the_readme_leads_to_where_a_follower_reads_its_source() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = readme.split("\n## Where to read the code\n")[1].split("\n## ")[0]
    attention = tree("depthkv.attention")
    assert attention is not None
    cache = next(n for n in attention.body if isinstance(n, ast.ClassDef) and n.name == "LayerCache")
    update = next(n for n in cache.body if isinstance(n, ast.FunctionDef) and n.name == "update")
    assert "pair = step.pairs[source]" in text and "pair = step.pairs[source]" in ast.unparse(update)
    for module, name in (("sharing", "share"), ("sharing", "SharedModel"), ("attention", "attention_forward")):
        assert f"src/depthkv/{module}.py" in text and name in text and origin(f"depthkv.{module}", name)
