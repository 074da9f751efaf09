"""fleet demo: boot a throwaway fleet, deploy to it, and say how to open the demo.

The document of `fleet demo --json` (`version` 1), times in seconds:

    {"version": 1, "command": "demo", "exit_code": 0|1|2|130, "apply": {as of fleet apply},
     "strays": null or {HOST: PACKETS that it sent past the wall of a walled lab, …},
     "hosts": [{"name": HOST, "url": URL, "tunnel": COMMAND or null}, …],
     "check": null or [{"host": HOST, "error": LINE or null, "passed": BOOL, "asked": N,
                        "accuracy": 0…1, "kinds": {KIND: {"right": N, "asked": N}, …},
                        "latency": {"median": S, "p95": S},
                        "wrong": [{"question", "expected", "answer", "error"}, …]}, …]}
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpufleet.cli import options

if TYPE_CHECKING:
    from gpufleet.demo.check import Report
    from gpufleet.run.pyinfra import Result
    from gpufleet.run.targets import Target

#: The first host's port on this machine; the others follow.
LOCAL = 6006


def demo(
    hosts: Annotated[int, typer.Option(min=1, max=200, help="How many hosts.")] = 2,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="debian:12 (default) or another system.")
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="The lab's name.")] = "lab",
    walled: Annotated[
        bool,
        typer.Option(
            "--walled",
            help="The hosts have no way out but to a mirror host: proves that no deploy needs one.",
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Ask every host about pictures with known answers.")
    ] = False,
    pictures: Annotated[
        int, typer.Option(min=40, max=10_000, help="How many pictures --check asks about.")
    ] = 40,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Boot a throwaway fleet here and deploy the demo.

    Says how to open it. Run again, it continues where it stopped. The fleet stays up until
    ./fleet lab down.
    """
    from gpufleet import ROOT
    from gpufleet.cli import output
    from gpufleet.cli.lab import showing
    from gpufleet.lab import strays, up
    from gpufleet.run import pyinfra
    from gpufleet.run.targets import Target

    with showing(quiet=as_json) as progress:
        fleet = up(name, hosts, image, walled=walled, progress=progress)
    # Which lab inventory/lab.py stands for.
    os.environ["GPUFLEET_LAB"] = name
    inventory = ROOT / "inventory" / "lab.py"
    with output.watching(as_json, verbose) as watch:
        result = pyinfra.apply(inventory, watch=watch, output=sys.stderr if verbose else None)
    targets = [Target(**host.target) for host in result.hosts if host.ok]
    reports: list[Report] | None = None
    exit_code = result.exit_code
    if not as_json:
        _print_times(result)
        exit_code = output.finish(result, as_json=False)
    if check and result.exit_code == 0:
        reports = _check(targets, pictures, as_json)
        exit_code = 0 if all(report.passed for report in reports) else 1
    sent = strays(name) if fleet.mirror_host else None
    if sent and any(sent.values()):
        exit_code = exit_code or 1
    if as_json:
        document = _document(result, targets, reports, sent, exit_code)
        print(json.dumps(document, ensure_ascii=False))
    else:
        if reports is not None:
            _print_reports(reports)
        if sent is not None and result.exit_code == 0:
            _print_strays(sent)
        if result.exit_code == 0:
            _print_next(targets, name)
    raise typer.Exit(exit_code)


def _check(targets: list[Target], pictures: int, quiet: bool) -> list[Report]:
    """Ask all hosts at once, each its questions one after the other."""
    from concurrent.futures import ThreadPoolExecutor

    from gpufleet.demo import check
    from gpufleet.errors import FleetError
    from gpufleet.run.forward import forwarded

    asked = check.questions(pictures)
    done = 0

    def progress() -> None:
        nonlocal done
        done += 1
        if not quiet and sys.stderr.isatty():
            total = len(asked) * len(targets)
            end = "\n" if done == total else ""
            print(f"\rasked {done} of {total}", end=end, file=sys.stderr, flush=True)

    def one(goal: Target) -> Report:
        try:
            with forwarded(goal) as url:
                return check.report(url, asked, goal.name, progress)
        except FleetError as error:
            return check.Report(goal.name, (), str(error))

    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(one, targets))


def _url(goal: Target, local: int) -> str:
    """Where the page opens on this machine: directly, or through the tunnel."""
    if goal.demo_is_local:
        return f"http://127.0.0.1:{local}"
    return f"http://{goal.address}:{goal.demo_port}"


def _tunnel(goal: Target, local: int) -> str:
    return f"./fleet tunnel {goal.name} --local {local}"


def _print_times(result: Result) -> None:
    """A row a host: how long each concern took."""
    from gpufleet.cli import output

    concerns = list(dict.fromkeys(name for host in result.hosts for name in host.concerns))
    rows = [
        [
            host.name,
            *(
                output.duration(host.concerns[name].seconds) if name in host.concerns else "-"
                for name in concerns
            ),
        ]
        for host in result.hosts
    ]
    if concerns:
        output.print_rows(["HOST", *concerns], rows)


def _print_reports(reports: list[Report]) -> None:
    from gpufleet.cli import output
    from gpufleet.demo.check import REQUIRED

    kinds = list(dict.fromkeys(kind for report in reports for kind in report.kinds))
    rows = []
    for report in reports:
        median, p95 = report.latency()
        counts = [f"{r}/{n}" for r, n in (report.kinds.get(kind, (0, 0)) for kind in kinds)]
        times = [f"{median * 1000:.0f} ms", f"{p95 * 1000:.0f} ms"]
        verdict = "ok" if report.passed else f"below {REQUIRED:.0%}"
        verdict = "no answers" if report.error else verdict
        rows.append([report.host, *counts, f"{report.accuracy:.1%}", *times, verdict])
    output.print_rows(["HOST", *kinds, "RIGHT", "MEDIAN", "P95", "CHECK"], rows)
    for report in reports:
        if report.error:
            print(report.error, file=sys.stderr)
        for answer in report.answers:
            if not answer.right:
                asked = answer.question
                said = f"said {answer.text.strip()!r}" if not answer.error else answer.error
                print(f"{report.host}: {asked.text} Right: {asked.expected!r}; {said}")


def _print_strays(sent: dict[str, int]) -> None:
    """Whether the wall was ever touched, a line for each host that did."""
    for host, packets in sent.items():
        if packets:
            print(
                f"{host}: sent {packets} packets to others than the mirror: something on it does "
                "not know the mirror; `fleet lab down` forgets the count",
                file=sys.stderr,
            )
    if not any(sent.values()):
        print(f"{', '.join(sent)}: no packet to anything but the mirror since the lab was made")


def _print_next(targets: list[Target], name: str) -> None:
    """What a newcomer does now."""
    print()
    for local, goal in enumerate(targets, LOCAL):
        if goal.demo_is_local:
            print(f"{goal.name}: {_tunnel(goal, local)}   then open {_url(goal, local)}")
        else:
            print(f"{goal.name}: open {_url(goal, local)}")
    option = "" if name == "lab" else f" --name {name}"
    print("Upload a picture there and ask about it. When you are done: ./fleet lab down" + option)


def _document(
    result: Result,
    targets: list[Target],
    reports: list[Report] | None,
    sent: dict[str, int] | None,
    exit_code: int,
) -> dict[str, Any]:
    from gpufleet.cli import output

    return {
        "version": output.VERSION,
        "command": "demo",
        "exit_code": exit_code,
        "apply": output.document(result),
        "strays": sent,
        "hosts": [
            {
                "name": goal.name,
                "url": _url(goal, local),
                "tunnel": _tunnel(goal, local) if goal.demo_is_local else None,
            }
            for local, goal in enumerate(targets, LOCAL)
        ],
        "check": None if reports is None else [dict(report.as_dict()) for report in reports],
    }
