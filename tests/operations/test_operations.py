"""Operations: what each yields for what a host's shell printed, as data in MODULE.OPERATION/*.yaml.

A case gives `arguments` of the operation and, by name, the `facts` that it may ask for: their
`arguments` and the `output` of their command, which the fact itself reads. It expects either the
whole list of `commands` or a `noop`. A script of the operation's module stands under its name.
A fact with `after` prints that once the first command ran, and is asked a second time for it.
pyinfra-testing's own cases cannot hold facts that are objects, hence this reader.

A case of the driver gives instead what was `seen` of kernels and GPUs, once for each time that the
operation looks, and the `choice`; both only as far as they differ from pictures.yaml.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import yaml
from pydantic import TypeAdapter
from pyinfra.api import Config, Inventory, State, StringCommand
from pyinfra.api.command import (
    FileUploadCommand,
    FunctionCommand,
    PyinfraCommand,
    RsyncCommand,
)
from pyinfra.context import ctx_host, ctx_state

from gpufleet import catalog
from gpufleet.driver import heal
from gpufleet.driver import operations as driver
from gpufleet.driver.picture import GpuPicture
from gpufleet.driver.plan import Choice
from gpufleet.kernel.picture import KernelPicture
from gpufleet.python_env import operations as environments
from gpufleet.python_env import wheelhouse
from gpufleet.python_env.plan import UV_LOCK, lock_for
from gpufleet.shell import script

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*.*/*.yaml"))


def plain(argument: Any) -> Any:
    """An argument of a call as a case writes it: a function by its name, of a value what is not
    its default."""
    if callable(argument):
        return argument.__name__
    if is_dataclass(argument):
        given = {field.name: getattr(argument, field.name) for field in fields(argument)}
        usual = {field.name: field.default for field in fields(argument)}
        return {name: plain(value) for name, value in given.items() if value != usual[name]}
    if isinstance(argument, list | tuple):
        return [plain(one) for one in argument]
    return TypeAdapter(Any).dump_python(argument, mode="json")


def as_data(command: PyinfraCommand, module: ModuleType) -> Any:
    """A command as a case writes it."""
    if isinstance(command, FileUploadCommand):
        command.src.seek(0)
        content = command.src.read()
        text = content.decode() if isinstance(content, bytes) else content
        return {"upload": text, "to": command.dest}
    if isinstance(command, RsyncCommand):
        return {"rsync": command.src, "to": command.dest, "flags": command.flags}
    if isinstance(command, FunctionCommand):
        return {"call": command.function.__name__, "arguments": [plain(a) for a in command.args]}
    assert isinstance(command, StringCommand)
    line = command.get_raw_value()
    scripts = {text: name for name, text in vars(module).items() if isinstance(text, str)}
    words = shlex.split(line)
    if words[:2] == ["sh", "-c"]:
        assert words[3] == "sh"
        return {"script": scripts[words[2]], "arguments": words[4:]}
    return line


def show(case: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Have the driver's operations see what a case says: what their facts' commands print."""
    given = yaml.safe_load((HERE / "pictures.yaml").read_text("utf-8"))
    printed = {}
    for fact, kind, of in (
        (driver.KernelFacts, KernelPicture, "kernels"),
        (driver.GpuFacts, GpuPicture, "gpus"),
    ):
        seen = [
            TypeAdapter(kind).validate_python({**given[of], **one.get(of, {})})
            for one in case["seen"]
        ]
        monkeypatch.setattr(fact, "process", lambda _, output, seen=seen: seen.pop(0))
        printed[fact().command().get_masked_value()] = "anything"
    choice = TypeAdapter(Choice).validate_python({**given["choice"], **case.get("choice", {})})
    monkeypatch.setattr(heal, "choose", lambda *_: choice)
    monkeypatch.setattr(heal, "allowed", lambda *_: frozenset({"open", "proprietary"}))
    monkeypatch.setattr(
        heal, "kernel_packages", lambda _, kernels, release: (f"linux-headers-{release}",)
    )
    return printed


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_an_operation_yields_exactly_these_commands(
    path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    concern, _, name = path.parent.name.partition(".")
    module = import_module(f"gpufleet.{concern}.operations")
    function = getattr(module, name)._inner
    text = path.read_text("utf-8")
    for mark, value in {"HERE": path.parent, "CACHE": cache, "UV": UV_LOCK.digest}.items():
        text = text.replace(f"@{mark}@", str(value))
    case = yaml.safe_load(text)
    known = {"arguments", "facts", "wheelhouses", "seen", "choice", "commands", "noop"}
    assert set(case) <= known
    assert ("commands" in case) != ("noop" in case)

    for digest in case.get("wheelhouses", []):
        (wheelhouse.cache() / digest).mkdir(parents=True)
        (wheelhouse.cache() / digest / ".whole").touch()
    hints = get_type_hints(function)
    arguments = {
        key: TypeAdapter(hints[key]).validate_python(value)
        for key, value in case["arguments"].items()
    }
    if "report" in hints:

        def report(progress: object) -> None:
            """Nobody is told."""

        arguments["report"] = report
    if "drivers" in hints and "drivers" not in arguments:
        arguments["drivers"] = catalog.drivers()
    shown = show(case, monkeypatch) if "seen" in case else {}
    printed, after = {}, {}
    for fact, given in case.get("facts", {}).items():
        if fact == "Command":  # a constant of the module, or a script of it with its arguments
            constant, *words = given["arguments"]["command"].split()
            text = vars(module)[constant]
            line = script(text, *words).get_raw_value() if words else text
            given["arguments"] = {"command": line}
        command = StringCommand(getattr(module, fact)().command(**given["arguments"]))
        printed[command.get_masked_value()] = given["output"]
        if "after" in given:
            after[command.get_masked_value()] = given["after"]

    state = State(Inventory((["@fake/host"], {})), Config())
    host = state.inventory.get_host("@fake/host")
    host.connector.data = {
        "fake_responses": {**shown, **printed},
        "fake_delay": 0,
        "fake_delay_jitter": 0,
    }
    host.connect()
    with ctx_state.use(state), ctx_host.use(host), caplog.at_level(logging.DEBUG, "pyinfra"):
        commands = []
        for command in function(**arguments):
            commands.append(as_data(command, module))
            host.connector.data["fake_responses"] = {**shown, **printed, **after}

    noops = [m.partition("noop: ")[2] for m in caplog.messages if "noop: " in m]
    assert commands == case.get("commands", [])
    assert commands or noops == [case["noop"]]
    # Every fact once, with the arguments of the case, and nothing else; twice if it has an `after`,
    # kernels and GPUs as often as the case shows them.
    asked = Counter(host.connector.executed_commands)
    assert max((asked.pop(line, 0) for line in shown), default=0) == len(case.get("seen", []))
    assert asked == Counter([*printed, *after])


@pytest.fixture
def environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Iterator[PyinfraCommand]]:
    """What makes an environment whose wheels pip cannot find anywhere."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    state = State(Inventory((["@fake/host"], {})), Config())
    host = state.inventory.get_host("@fake/host")
    host.connector.data = {"fake_delay": 0, "fake_delay_jitter": 0}
    host.connect()
    with ctx_state.use(state), ctx_host.use(host):
        yield environments.environment._inner(
            root="/opt/x", lock=lock_for("cpu"), from_index=False, torch_index="file:///nowhere"
        )


def test_finding_out_that_an_environment_is_missing_starts_no_download(
    environment: Iterator[PyinfraCommand], cache: Path
):
    """pyinfra takes the first command and no more when it only asks what would change."""
    assert str(next(environment)).startswith("mkdir -p /opt/x/incoming/")
    assert not cache.exists()


def test_wheels_that_cannot_be_had_fail_the_host_with_one_line(
    environment: Iterator[PyinfraCommand],
):
    _, last = environment
    assert isinstance(last, StringCommand)
    said, message = shlex.split(last.get_raw_value().removesuffix(">&2; exit 1"))
    assert said == "echo"
    assert message.startswith("pip cannot download uv.lock (")
    assert "\n" not in message


def test_every_operation_has_cases_that_change_and_cases_that_do_not():
    covered: dict[str, set[str]] = {}
    for path in CASES:
        case = yaml.safe_load(path.read_text("utf-8"))
        covered.setdefault(path.parent.name, set()).update({"commands", "noop"} & set(case))
    root = Path(import_module("gpufleet").__file__ or "").parent
    operations = {
        f"{path.parent.name}.{name}"
        for path in root.glob("*/operations.py")
        for name, value in vars(import_module(f"gpufleet.{path.parent.name}.operations")).items()
        if hasattr(value, "_inner") and value.__module__.startswith("gpufleet.")
    }
    assert covered == {operation: {"commands", "noop"} for operation in operations}
