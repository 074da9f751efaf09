"""fleet test: run every test that this machine can run, and say what was left out and why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated
from xml.etree import ElementTree

import typer

from gpufleet import ROOT

DEMO_ENVIRONMENT = ROOT / ".venv-demo"
OPERATIONS = "tests/operations"

#: Looks at all that a lab leaves on the machine: nothing else may come or go meanwhile.
ALONE = "tests/lab/test_lab_hosts.py"

#: Two processes: hosts that boot and answer leave a core idle most of the time.
SIDE_BY_SIDE = ("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")

#: Tells the last pytest, which prints it at its end, what failed before it.
FAILED_BEFORE = "GPUFLEET_FAILED_BEFORE"

#: pytest's exit status when no test was selected.
NO_TESTS = 5


class Part(str, Enum):
    """What can be asked for."""

    unit = "unit"
    lab = "lab"
    vm = "vm"
    browser = "browser"
    long = "long"


#: What runs without being asked for; `long` takes as long as all of it.
DEFAULT = (Part.unit, Part.lab, Part.vm, Part.browser)

#: Where each part's tests are; those of the demo run in its own environment, and the operations'
#: in a process that pyinfra has patched.
FOLDERS = {
    Part.unit: ("tests/unit",),
    Part.lab: ("tests/lab",),
    Part.vm: ("tests/vm",),
    Part.browser: ("tests/browser",),
    Part.long: (
        "tests/lab/test_hosts_driver.py",
        "tests/lab/test_hosts_driver_faults.py",
        "tests/lab/test_hosts_nginx.py",
        "tests/lab/test_hosts_processes.py",
        "tests/lab/test_hosts_push.py",
        "tests/lab/test_hosts_swarm.py",
        "tests/lab/test_hosts_ubuntu.py",
        "tests/unit/test_upstream_pages.py",
        "tests/vm/test_kernel_story.py",
    ),
}


def run_tests(
    parts: Annotated[
        list[Part] | None,
        typer.Argument(metavar="[unit|lab|vm|browser|long]...", help="Default: all but long."),
    ] = None,
    expression: Annotated[
        str | None, typer.Option("-k", metavar="EXPR", help="Only tests that match, as pytest -k.")
    ] = None,
) -> None:
    """Run every test that this machine can run.

    Says what was left out and why. unit: ruff, mypy, the demo's own tests, unit and operation
    tests. lab: real hosts; needs root on Debian or Ubuntu. vm: real kernels and reboots in QEMU.
    browser: the page in Chromium. long, only if asked for: builds the real driver with DKMS,
    upgrades Ubuntu's kernels and a virtual machine's, breaks pushes of weights in every way; over
    an hour. The last line is pytest's.
    """
    wanted = parts or list(DEFAULT)
    skipped = {part: why for part in wanted if (why := _missing(part))}
    chosen = [part for part in wanted if part not in skipped]
    results: list[_Result] = []
    first = [ALONE] if Part.lab in chosen and Part.long not in chosen else []
    if Part.unit in chosen:
        results += [_run(*check) for check in _checks()]
        first.insert(0, OPERATIONS)
    with ThreadPoolExecutor(1) as beside:
        # They compute; the others wait for hosts most of the time.
        demo = beside.submit(_demo_tests, expression) if Part.unit in chosen else None
        for one in first:
            results.append(_run(one, _pytest(Path(sys.executable), [one], expression)))
        results += demo.result() if demo else []
    if Part.long not in wanted:
        print("left out long: it builds the real driver; ./fleet test long runs it", flush=True)
    for part, why in skipped.items():
        print(f"skipped {part.value}: {why}", flush=True)
    for result in results:
        state = "ok" if result.ok else "FAILED"
        print(f"{state:6} {result.name} ({result.seconds:.0f} s)", flush=True)
        for test in result.failed:
            print(f"       {test}", flush=True)
    if not chosen:
        raise typer.Exit(1)
    # What takes longest begins first, so that both processes end at about the same time.
    ordered = sorted(chosen, key=lambda part: part is Part.unit)
    folders = [folder for part in ordered for folder in FOLDERS[part]]
    command = _pytest(Path(sys.executable), folders, expression)
    if Part.long not in chosen:
        command += ["-m", "not long", f"--ignore={ALONE}", *SIDE_BY_SIDE]
    # pytest has the last word: it repeats what failed before it.
    red = [result for result in results if not result.ok]
    said = [line for result in red for line in (result.name, *result.failed)]
    results.append(_run(" ".join(folders), command, {FAILED_BEFORE: "\n".join(said)}))
    raise typer.Exit(0 if all(result.ok for result in results) else 1)


@dataclass(frozen=True)
class _Result:
    name: str
    ok: bool
    seconds: float
    failed: tuple[str, ...] = ()


def _run(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str] = MappingProxyType({}),
    *,
    beside: bool = False,
) -> _Result:
    """Run a command; one that runs beside others shows what it printed when it has ended."""
    if not beside:
        print(f"--- {name}", flush=True)
    started = time.monotonic()
    # The demo's package is not installed in either environment.
    path = os.pathsep.join(filter(None, [str(ROOT / "files" / "demo"), os.getenv("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [*command, f"--junitxml={report}"] if "pytest" in command else command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            check=False,
            stdout=subprocess.PIPE if beside else None,
            stderr=subprocess.STDOUT if beside else None,
            text=True,
        )
        failed = tuple(_failures(report)) if report.exists() else ()
    if beside:
        print(f"--- {name}\n{done.stdout}", end="", flush=True)
    allowed = (0, NO_TESTS) if "-k" in command else (0,)
    return _Result(name, done.returncode in allowed, time.monotonic() - started, failed)


def _failures(report: Path) -> Iterator[str]:
    """What failed by pytest's report in JUnit's XML, a line each: the test and how."""
    for case in ElementTree.parse(report).iter("testcase"):
        for bad in (*case.findall("failure"), *case.findall("error")):
            how = " ".join(bad.get("message", "").split())[:200]
            yield f"{case.get('classname')}::{case.get('name')}: {how}"


def _checks() -> list[tuple[str, list[str]]]:
    python = [sys.executable, "-m"]
    return [
        ("ruff check", [*python, "ruff", "check", "."]),
        ("ruff format", [*python, "ruff", "format", "--check", "."]),
        ("mypy", [*python, "mypy", "--no-error-summary"]),
    ]


def _pytest(
    python: Path, folders: Sequence[str], expression: str | None, cut: str = ""
) -> list[str]:
    command = [str(python), "-m", "pytest", *folders]
    if cut:
        # tests/conftest.py is for the operator's environment.
        command.append(f"--confcutdir=tests/{cut}")
    return [*command, "-k", expression] if expression else command


def _missing(part: Part) -> str | None:
    """Why this machine cannot run a part, after installing what it may install; None if it can."""
    from gpufleet.errors import FleetError

    if part is Part.unit:
        return None
    system = _system()
    if os.geteuid() != 0 or not system & {"debian", "ubuntu"}:
        return "it boots hosts, which needs root on Debian or Ubuntu"
    if part in (Part.lab, Part.long):
        return None
    from gpufleet.lab import machine, qemu

    try:
        if part is Part.vm:
            qemu.ensure_packages()
        elif not all(map(shutil.which, ("chromium", "chromedriver"))):
            if "debian" not in system or "ubuntu" in system:
                return "no chromium and chromedriver on PATH"
            machine.install(["chromium", "chromium-driver"])
    except FleetError as error:
        return str(error)
    return None


def _system() -> set[str]:
    """ID and ID_LIKE of os-release, empty where there is none."""
    try:
        lines = Path("/etc/os-release").read_text("utf-8").splitlines()
    except OSError:
        return set()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    return {word for key in ("ID", "ID_LIKE") for word in values.get(key, "").strip('"').split()}


def _demo_tests(expression: str | None) -> list[_Result]:
    """Run tests/demo in the demo's own environment; no result where there is no Python for it."""
    from gpufleet.errors import FleetError
    from gpufleet.python_env.plan import PYTHON

    try:
        python = demo_python()
    except FleetError as error:
        print(f"{DEMO_ENVIRONMENT.name}: {error}", flush=True)
        return [_Result("tests/demo", ok=False, seconds=0)]
    if python is None:
        print(f"skipped tests/demo: no {PYTHON}, which its environment is locked for", flush=True)
        return []
    return [_run("tests/demo", _pytest(python, ["tests/demo"], expression, "demo"), beside=True)]


def demo_python() -> Path | None:
    """The interpreter of the demo's own environment, made if need be; None without its Python.

    Raises FleetError, one line, if it cannot be made.
    """
    from gpufleet.python_env.plan import PYTHON

    own = f"python{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = sys.executable if own == PYTHON else shutil.which(PYTHON)
    if interpreter is None:
        return None
    _make_demo_environment(interpreter)
    return DEMO_ENVIRONMENT / "bin" / "python"


def _make_demo_environment(interpreter: str) -> None:
    """Make .venv-demo what the demo's locks say. Raises FleetError, one line, if it cannot."""
    from gpufleet.errors import FleetError
    from gpufleet.python_env.plan import PYTHON, Lock, lock_for
    from gpufleet.python_env.wheelhouse import build
    from gpufleet.settings import PythonEnv

    locks = [lock_for("cpu"), Lock(ROOT / "requirements" / "demo-test.lock", PYTHON)]
    stamp = DEMO_ENVIRONMENT / ".installed-from"
    made_from = " ".join(lock.digest for lock in locks)
    if stamp.is_file() and stamp.read_text("utf-8") == made_from:
        return
    print(f"--- making {DEMO_ENVIRONMENT.name} (once; torch is large)", flush=True)
    houses = [build(lock, PythonEnv().torch_index) for lock in locks]
    finding = [option for house in houses for option in ("--find-links", str(house))]
    python = str(DEMO_ENVIRONMENT / "bin" / "python")
    files = [str(lock.path) for lock in locks]
    uv = [sys.executable, "-m", "uv", "--quiet", "--no-config", "--no-python-downloads"]
    venv = ["venv", "--clear", "--python", interpreter, str(DEMO_ENVIRONMENT)]
    sync = ["pip", "sync", "--python", python, "--require-hashes", "--no-index", *finding, *files]
    for command in (venv, sync):
        done = subprocess.run([*uv, *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise FleetError(f"uv {command[0]} failed: {' '.join(done.stderr.split())[:300]}")
    stamp.write_text(made_from, "utf-8")
