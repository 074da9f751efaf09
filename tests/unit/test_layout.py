"""The repository's own rules: imports go one way, plans are pure, nothing names a registry."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pip._internal.models.index import PyPI

from gpufleet import ROOT
from gpufleet.run.only import concerns

MODULES = sorted((ROOT / "gpufleet").rglob("*.py"))
TASKS = sorted((ROOT / "tasks").glob("*.py"))

#: What plan.py may not touch: a decision is made from values, without a host and without I/O.
IMPURE = {"pyinfra", "pyinfra_cli", "gevent", "subprocess", "socket", "requests", "paramiko", "os"}

#: Modules of a concern that decide and describe, and that another concern may import.
PURE = {
    "choice.py",
    "conda.py",
    "doctor.py",
    "files.py",
    "fixes.py",
    "forecast.py",
    "grub.py",
    "heal.py",
    "overrides.py",
    "packages.py",
    "picture.py",
    "plan.py",
    "probe.py",
    "release.py",
    "rhel.py",
    "sources.py",
    "verdict.py",
    "verify.py",
}

#: Folders of gpufleet that are no concern: what runs deploys, boots labs and talks to people.
ABOVE = {"cli", "lab", "run"}
CONCERNS = {
    path.relative_to(ROOT / "gpufleet").parts[0] for path in MODULES if path.name == "plan.py"
} - ABOVE


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; `from a import b` is a and a.b."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(path: Path, *folders: str) -> bool:
    return path.relative_to(ROOT / "gpufleet").parts[0] in folders


def test_the_concerns_are_the_known_ones():
    known = {"base", "config", "demo", "driver", "kernel", "managed", "mirrors", "preflight"}
    known |= {"python_env", "weights"}
    assert known <= CONCERNS


@pytest.mark.parametrize("path", [p for p in MODULES if p.name in PURE], ids=name_of)
class TestPlans:
    def test_import_nothing_that_reaches_a_host(self, path: Path):
        if below(path, *ABOVE):
            return
        found = {name.split(".")[0] for name in imports(path)} & IMPURE
        assert found == set()

    def test_bring_no_pyinfra_in_by_way_of_others(self, path: Path):
        if below(path, *ABOVE):
            return
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        code = f"import sys, {module}; print(*{{'pyinfra', 'gevent'}} & set(sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == []


CONCERN_FILES = [path for path in MODULES if below(path, *CONCERNS)]


@pytest.mark.parametrize("path", CONCERN_FILES, ids=name_of)
class TestConcerns:
    def test_know_nothing_of_what_is_above_them(self, path: Path):
        above = ("gpufleet.cli", "gpufleet.lab", "gpufleet.run", "tasks", "inventory", "deploy")
        assert [name for name in imports(path) if name.startswith(above)] == []

    def test_use_only_the_decisions_or_the_facts_of_another_concern(self, path: Path):
        own = path.relative_to(ROOT / "gpufleet").parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "gpufleet" and parts[1:2] and parts[1] in CONCERNS - {own}:
                pure = {module.removesuffix(".py") for module in PURE}
                assert set(parts[2:3]) <= pure | {"facts"}, name
                assert parts[2:], f"{name}: import its plan or facts by name"


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent == ROOT / "gpufleet"], ids=name_of)
def test_what_all_share_knows_no_concern(path: Path):
    upwards = [f"gpufleet.{name}" for name in CONCERNS | ABOVE]
    found = [name for name in imports(path) if name.startswith((*upwards, "tasks"))]
    assert found == []


@pytest.mark.parametrize("path", [p for p in CONCERN_FILES if p.name == "facts.py"], ids=name_of)
def test_facts_modules_define_facts_only(path: Path):
    for node in ast.parse(path.read_text("utf-8")).body:
        assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), node.name
        if isinstance(node, ast.ClassDef):
            assert [ast.unparse(base).partition("[")[0] for base in node.bases] == ["FactBase"]


@pytest.mark.parametrize("path", [p for p in CONCERN_FILES if p.name == "facts.py"], ids=name_of)
def test_every_fact_has_a_value_for_a_host_that_cannot_be_asked(path: Path):
    """pyinfra takes the default where the shell fails; None is a value of no fact here."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            assert methods >= {"command", "process", "default"}, node.name


@pytest.mark.parametrize(
    "path", [p for p in CONCERN_FILES if p.name == "operations.py"], ids=name_of
)
def test_operations_modules_define_operations_only(path: Path):
    for node in ast.parse(path.read_text("utf-8")).body:
        assert not isinstance(node, ast.ClassDef)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert [ast.unparse(d) for d in node.decorator_list] == ["operation()"], node.name
            arguments = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
            assert "name" not in arguments  # pyinfra takes it


def test_every_concern_of_the_deploy_is_one_module_with_one_deploy_of_its_name():
    for path in TASKS:
        if path.stem == "__init__":
            continue
        decorated = [
            (node.name, ast.unparse(node.decorator_list[0]))
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.decorator_list
        ]
        assert decorated == [(path.stem, f"deploy('{path.stem}')")]


def test_the_deploy_runs_every_concern_once_and_preflight_first():
    tree = ast.parse((ROOT / "deploy.py").read_text("utf-8"))
    calls = [
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    called = [name for name in calls if name != "selected"]
    assert sorted(called) == concerns()
    first = tree.body[[isinstance(node, ast.Expr) for node in tree.body].index(True, 1)]
    assert ast.unparse(first) == "preflight()"


def test_tasks_know_nothing_of_the_command_line_or_the_lab():
    for path in TASKS:
        found = [n for n in imports(path) if n.startswith(("gpufleet.cli", "gpufleet.lab"))]
        assert found == [], name_of(path)


def test_the_demo_that_runs_on_hosts_imports_nothing_of_gpufleet():
    paths = sorted((ROOT / "files" / "demo").rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            used = {name.split(".")[0] for name in names}
            assert not used & {"gpufleet", "tasks", "pyinfra"}, name_of(path)


@pytest.mark.parametrize(
    "path",
    [*MODULES, *TASKS, ROOT / "deploy.py", *sorted((ROOT / "inventory").rglob("*.py"))],
    ids=name_of,
)
def test_every_module_opens_with_what_it_is_for(path: Path):
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring, "no docstring"


def repository() -> list[Path]:
    """Every file that is or will be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = listed.stdout.decode().split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    skipped = (".venv", ".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part.startswith(skipped) for part in path.parts)
    ]


def test_no_file_names_the_host_of_the_package_registry():
    """Which one is in use is the operator's business, and pip's."""
    files = repository()
    assert len(files) > 100
    hosts = [PyPI.netloc.encode(), PyPI.file_storage_domain.encode()]
    assert all(len(host) > 6 for host in hosts)
    found = [name_of(path) for path in files if any(host in path.read_bytes() for host in hosts)]
    assert found == []


def test_no_file_names_the_folder_of_this_checkout():
    if len(ROOT.parts) < 3:  # such as /src: too short to tell
        return
    here = str(ROOT).encode()
    found = [name_of(path) for path in repository() if here in path.read_bytes()]
    assert found == []
