"""Reads inventories: checks a file before pyinfra runs, and loads one into this process."""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from gpufleet import ROOT, catalog, settings
from gpufleet.errors import FleetError, UsageError
from gpufleet.run.targets import Target, target

if TYPE_CHECKING:
    from pyinfra.api import Inventory, State
    from pyinfra.api.host import Host


def check_file(path: Path) -> None:
    """Raise UsageError unless the file exists and is Python."""
    if not path.exists():
        raise UsageError(f"{path}: no such inventory file; see inventory/example.py for one")
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{path}: an inventory is a Python file; see inventory/example.py for one")
    try:
        ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as error:
        raise UsageError(f"{path} line {error.lineno}: {error.msg}; correct it") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot read it: {error}") from None


def group_data(path: Path) -> list[Path]:
    """The folders to give pyinfra as --group-data for the inventory at `path`.

    pyinfra finds the group_data beside an inventory by itself. An inventory elsewhere needs the
    defaults of this checkout too; as pyinfra takes --group-data in last, the inventory's own
    folder is named again after them, so that its values win.
    """
    defaults, beside = ROOT / "inventory" / "group_data", path.resolve().parent / "group_data"
    if beside == defaults:
        return []
    return [folder for folder in (defaults, beside) if folder.is_dir()]


def split(names: Sequence[str]) -> list[str]:
    """--limit's values, split at commas."""
    return [part for name in names for part in name.split(",") if part]


def empty(inventory: Inventory) -> list[str]:
    """A line for an inventory without hosts."""
    return [] if len(inventory) else ["no hosts: it needs a list such as hosts = ['10.0.0.1']"]


def unmatched(inventory: Inventory, patterns: Sequence[str]) -> list[str]:
    """A line for each pattern that means no host, by pyinfra's own rule."""
    names = ", ".join(host.name for host in inventory)
    return [
        f"--limit {pattern}: no such host or group; hosts: {names}"
        for pattern in patterns
        if not _chosen(inventory, [pattern])
    ]


def check_host(host: Host) -> tuple[Target, list[str]]:
    """The host's target, and a line for everything that is wrong with its data."""
    problems, demo = [], None
    try:
        parsed = settings.parse(host.data.dict(), host.name)
        demo = parsed.demo
        catalog.model(parsed.model)
    except FleetError as error:
        problems.append(f"{host.name}: {str(error).removeprefix(f'{host.name}: ')}")
    # pyinfra ends the whole run at a key file that is not there.
    key = host.data.get("ssh_key")
    if key and not Path(key).expanduser().is_file():
        problems.append(f"{host.name}: setting ssh_key: no such file {key}")
    return target(host, demo), problems


def load(path: Path, limit: Sequence[str] = ()) -> State:
    """The inventory as pyinfra's state in this process, not yet connected.

    Only the hosts that `limit` means are in state.limit_hosts. Raises UsageError for an inventory
    or limit that is invalid.
    """
    check_file(path)
    from pyinfra import logger
    from pyinfra.api import Config, State
    from pyinfra.api.exceptions import PyinfraError
    from pyinfra.context import ctx_config, ctx_inventory, ctx_state
    from pyinfra_cli.exceptions import (  # type: ignore[import-untyped]
        CliError,
        UnexpectedExternalError,
    )
    from pyinfra_cli.inventory import make_inventory  # type: ignore[import-untyped]

    # Errors reach the caller as values; nothing is to be printed beside them.
    for quiet in (logger, logging.getLogger("paramiko")):
        quiet.addHandler(logging.NullHandler())
        quiet.propagate = False
    state = State(check_for_changes=False)
    state.cwd = str(ROOT)
    ctx_state.set(state)
    config = Config()
    ctx_config.set(config)
    try:
        inventory = make_inventory(
            str(path), cwd=state.cwd, group_data_directories=[str(f) for f in group_data(path)]
        )
    except UnexpectedExternalError as error:
        cause = error.exception
        what = cause if isinstance(cause, FleetError) else f"{type(cause).__name__}: {cause}"
        raise UsageError(f"{error.filename}: {what}") from None
    except (CliError, PyinfraError, FleetError) as error:
        raise UsageError(f"{path}: {error}") from None
    if problems := empty(inventory) or unmatched(inventory, limit):
        raise UsageError(f"{path}: {'; '.join(problems)}")
    ctx_inventory.set(inventory)
    state.init(inventory, config, initial_limit=_chosen(inventory, limit) if limit else None)
    return state


def hosts(state: State) -> list[Host]:
    """The hosts that the state's limit leaves, in the inventory's order."""
    return [host for host in state.inventory if state.is_host_in_limit(host)]


def find(path: Path | None, name: str) -> Target:
    """The target of one host of an inventory; without one, of the running lab that has it.

    Raises UsageError if there is no such host or several.
    """
    if path is None:
        path = _lab_inventory(name)
    state = load(path, [name])
    found = hosts(state)
    if len(found) != 1:
        names = ", ".join(host.name for host in found)
        raise UsageError(f"{name} is more than one host of {path}: {names}; name one")
    goal, problems = check_host(found[0])
    if problems:
        raise UsageError("; ".join(problems))
    if goal.connector != "ssh":
        raise UsageError(f"{name} is not reached over SSH but through {goal}: nothing to tunnel")
    return goal


def _lab_inventory(name: str) -> Path:
    from gpufleet.lab import labs

    for lab in labs():
        if any(host.name == name for host in lab.hosts):
            os.environ["GPUFLEET_LAB"] = lab.name
            return ROOT / "inventory" / "lab.py"
    raise UsageError(f"no running lab has a host {name}; name its inventory with -i")


def _chosen(inventory: Inventory, patterns: Sequence[str]) -> list[Host]:
    return [
        host
        for host in inventory
        if any(p == "all" or p in host.groups or fnmatch(host.name, p) for p in patterns)
    ]
