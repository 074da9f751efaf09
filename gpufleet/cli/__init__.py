"""The fleet command: one module a command; they parse, call and print."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from gpufleet.errors import FleetError

DEBUG_ENV = "GPUFLEET_DEBUG"

app = typer.Typer(
    name="fleet",
    help="From bare GPU servers to a running model demo, over SSH, from a laptop.",
    epilog="Exit codes: 0 done or healthy, 1 something failed, 2 usage or invalid input, "
    "3 (plan) changes pending, 4 (forecast) unsafe to reboot, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options that go before the command."""
    if debug:
        os.environ[DEBUG_ENV] = "1"


def _register() -> None:
    # Each module is light: what a command needs is imported when it runs.
    from gpufleet.cli import (
        apply,
        demo,
        doctor,
        forecast,
        lab,
        logs,
        mirrors,
        plan,
        status,
        test,
        tunnel,
        weights,
    )

    app.command("demo")(demo.demo)
    app.command("plan")(plan.plan)
    app.command("apply")(apply.apply)
    app.command("status")(status.status)
    app.command("doctor")(doctor.doctor)
    app.command("forecast")(forecast.forecast)
    app.command("tunnel")(tunnel.tunnel)
    app.command("logs")(logs.logs)
    app.add_typer(lab.app, name="lab")
    app.add_typer(mirrors.app, name="mirrors")
    app.add_typer(weights.app, name="weights")
    app.command("test")(test.run_tests)


def main() -> None:
    """Run the command line; an error becomes one line on stderr and an exit code."""
    _register()
    try:
        app(prog_name="fleet")
    except FleetError as error:
        _fail(str(error), error.exit_code, error)
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _fail(f"internal error: {what}; fleet --debug … shows where", 1, error)


def _fail(line: str, code: int, error: BaseException) -> None:
    if os.environ.get(DEBUG_ENV):
        raise error
    print(f"fleet: {line}", file=sys.stderr)
    sys.exit(code)
