"""The READMEs: the same in both languages, and true of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gpufleet import ROOT, catalog, cli
from gpufleet.preflight.plan import SUPPORTED
from gpufleet.run.only import concerns
from gpufleet.settings import Settings

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
both = pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=["English", "Chinese"])


def blocks(path: Path) -> list[str]:
    """Fenced code, without comments."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(r"[ \t]+#.*", "", block) for block in fenced]


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def tables(path: Path) -> list[list[list[str]]]:
    """Tables as rows of cells, without their heads."""
    found: list[list[list[str]]] = [[]]
    for line in prose(path).splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip("|"))
            found[-1].append([cell.strip() for cell in cells])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by their dotted names, with their defaults as Python writes them."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= leaves(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


DEFAULTS = leaves(Settings().model_dump(mode="json"))


def settings_table(path: Path) -> dict[str, str]:
    (table,) = [t for t in tables(path) if t[0][0] == "`accelerator`"]
    return {row[0].strip("`"): row[1] for row in table}


def test_both_have_the_same_sections():
    levels = [re.findall(r"^(#+) ", prose(path), re.MULTILINE) for path in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]
    assert len(levels[0]) >= 6


def test_both_have_the_same_commands():
    assert blocks(ENGLISH) == blocks(CHINESE)
    assert len(blocks(ENGLISH)) >= 4


def test_both_have_tables_of_the_same_rows():
    english, chinese = (
        [[row[0].replace("、", ", ") for row in table] for table in tables(path)]
        for path in (ENGLISH, CHINESE)
    )
    assert english == chinese
    assert len(english) >= 3


def test_each_links_to_the_other():
    assert "](README.zh-CN.md)" in ENGLISH.read_text("utf-8")
    assert "](README.md)" in CHINESE.read_text("utf-8")


@both
def test_every_link_into_the_repository_leads_somewhere(path: Path):
    targets = re.findall(r"\]\(([^)#]+)", prose(path))
    inside = [target for target in targets if "://" not in target]
    assert inside
    assert [target for target in inside if not (ROOT / target).exists()] == []


@both
def test_every_setting_is_listed_with_its_default(path: Path):
    table = settings_table(path)
    assert list(table) == list(DEFAULTS)
    quoted = {name: cell.strip("`") for name, cell in table.items() if cell.startswith("`")}
    assert quoted == {name: DEFAULTS[name] for name in quoted}
    # Everything but the one long address is spelt out.
    assert set(DEFAULTS) - set(quoted) <= {"python_env.torch_index", "mirrors.provider"}


@both
def test_every_concern_is_explained(path: Path):
    (table,) = [t for t in tables(path) if t[0][0] == "preflight"]
    named = [name for row in table for name in re.split("[,、] ?", row[0])]
    assert sorted(named) == concerns()


def words(path: Path) -> list[list[str]]:
    """Every ./fleet command line, in code and in text."""
    inline = re.findall(r"`(\./fleet [^`]+)`", prose(path))
    fenced = [line for block in blocks(path) for line in block.splitlines()]
    lines = [line for line in (*inline, *fenced) if line.startswith("./fleet ")]
    return [shlex.split(re.sub(r"[\[\]]", " ", line.replace("\\|", "|")))[1:] for line in lines]


@pytest.fixture(scope="module")
def fleet() -> Any:
    """The fleet command with all of its commands."""
    cli._register()
    return typer.main.get_command(cli.app)


@both
def test_every_command_and_option_that_is_mentioned_exists(path: Path, fleet: Any):
    for line in words(path):
        if line[0] == "COMMAND":
            continue
        command, rest = fleet, list(line)
        while hasattr(command, "commands") and rest:
            names = rest.pop(0).split("|")
            assert set(names) <= set(command.commands), " ".join(line)
            command = command.commands[names[0]]
        options = {option for param in command.params for option in param.opts} | {"--help"}
        used = {word for word in rest if re.match(r"--?[a-z]", word)}
        assert used <= options, " ".join(line)


@both
def test_the_default_model_and_every_system_that_is_named_are_known(path: Path):
    text = path.read_text("utf-8")
    assert Settings().model in catalog.names()
    for name in re.findall(r"`([a-z]+:[\d.]+)`", text):
        assert tuple(name.split(":")) in SUPPORTED, name


def test_the_ci_runs_the_documented_test_command():
    assert "./fleet test" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert any(line[0] == "test" for line in words(ENGLISH))
