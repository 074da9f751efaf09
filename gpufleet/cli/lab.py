"""fleet lab: throwaway fleets of containers or virtual machines on this machine.

The document of `fleet lab list --json` (`version` 1), and of `fleet lab up --json` with the one
lab it brought up:

    {"version": 1, "labs": [{"name": LAB, "image": IMAGE, "vm": BOOL, "walled": BOOL,
                             "subnet": CIDR, "key": FILE, "known_hosts": FILE,
                             "mirror": null or {"name", "address", "running"} of a walled lab,
                             "hosts": [{"name": HOST, "address": IP, "running": BOOL}, …]}, …]}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpufleet.cli import options
from gpufleet.errors import FleetError

if TYPE_CHECKING:
    from gpufleet.lab import Host, Lab, Progress

VERSION = 1

app = typer.Typer(
    help="Throwaway fleets of full Debian or Ubuntu hosts on this machine (needs root).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Option(metavar="NAME", help="The lab's name.")]


@app.command()
def up(
    hosts: Annotated[int, typer.Option(help="How many hosts; a running lab only grows.")] = 2,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE", help="debian:12 (default), debian:13, ubuntu:22.04 or ubuntu:24.04."
        ),
    ] = None,
    name: Name = "lab",
    vm: Annotated[
        bool, typer.Option("--vm", help="Virtual machines: kernel, GRUB and reboots of their own.")
    ] = False,
    walled: Annotated[
        bool,
        typer.Option(
            "--walled", help="No way out but to a mirror host of the lab: apt, PyPI, torch, conda."
        ),
    ] = False,
    pci: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            help="A PCI device of each virtual machine, as in 10de:20b5:0302; may be repeated.",
        ),
    ] = None,
    disk_mib: Annotated[
        int | None, typer.Option(metavar="MIB", help="Give each new host a disk of this size.")
    ] = None,
    gpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECORDING",
            help="Show each new container a recorded host's GPUs (the GPU double), such as h100x8, "
            "mixed, lost, mismatch, nouveau, none or bare; several are taken in turn.",
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(metavar="RELEASE", help="What uname -r says on each new container."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Boot a lab, or what is missing of it; its hosts are called NAME-1, NAME-2, …"""
    from gpufleet import lab

    with showing(quiet=as_json) as progress:
        fleet = lab.up(
            name,
            hosts,
            image,
            vm=vm,
            walled=walled,
            pci=pci or (),
            disk_mib=disk_mib,
            gpus=gpus or (),
            kernel=kernel,
            progress=progress,
        )
    _show([fleet], as_json)


@app.command()
def down(
    name: Name = "lab",
    every: Annotated[bool, typer.Option("--all", help="Every lab of this machine.")] = False,
) -> None:
    """Stop a lab's hosts and remove all it has on this machine."""
    from gpufleet import lab

    for each in lab.names() if every else [name]:
        with showing() as progress:
            there = lab.down(each, progress=progress)
        print(f"lab {each} is down" if there else f"no lab {each} was up")


@app.command("list")
def list_labs(as_json: options.Json = False) -> None:
    """List the labs of this machine and their hosts."""
    from gpufleet import lab

    _show(lab.labs(), as_json)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def ssh(
    host: Annotated[str, typer.Argument(metavar="HOST", help="As in lab-1.")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND", help="A login shell when absent.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The lab's name, HOST's own by default.")
    ] = None,
) -> None:
    """Log in to a host as root, or run a command there."""
    from gpufleet import lab

    fleet = lab.load(name or host.rpartition("-")[0] or host)
    call = fleet.ssh_command(host, *command or ())
    if not os.access(fleet.key, os.R_OK):
        raise FleetError(f"{fleet.key}: only root may use it: run the command with sudo")
    os.execvp(call[0], call)


@contextmanager
def showing(quiet: bool = False) -> Iterator[Progress]:
    """Shows steps: a bar on a terminal, a line each in a pipe, nothing when `quiet`."""
    if quiet:
        yield lambda step, fraction: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar() as progress:
            yield progress
    else:
        yield lambda step, fraction: print(step, file=sys.stderr, flush=True)


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def progress(step: str, fraction: float | None) -> None:
            known = None if fraction is None else 1.0
            bars.update(task, description=step, total=known, completed=fraction or 0.0)

        yield progress


def _show(fleets: list[Lab], as_json: bool) -> None:
    from gpufleet.cli import output

    if as_json:
        document = {"version": VERSION, "labs": [_document(fleet) for fleet in fleets]}
        print(json.dumps(document, ensure_ascii=False))
    elif not fleets:
        print("no lab is up")
    else:
        output.print_rows(
            ["LAB", "IMAGE", "HOST", "ADDRESS", "STATE"],
            [
                [fleet.name, _image(fleet), host.name, host.address, _state(host.running)]
                for fleet in fleets
                for host in (*fleet.hosts, *filter(None, [fleet.mirror_host]))
            ],
        )


def _image(fleet: Lab) -> str:
    kind = " (vm)" * fleet.vm + " (walled)" * (fleet.mirror_host is not None)
    return fleet.image + kind


def _state(running: bool) -> str:
    return "running" if running else "stopped"


def _document(fleet: Lab) -> dict[str, Any]:
    return {
        "name": fleet.name,
        "image": fleet.image,
        "vm": fleet.vm,
        "walled": fleet.mirror_host is not None,
        "subnet": fleet.subnet,
        "key": str(fleet.key),
        "known_hosts": str(fleet.known_hosts),
        "mirror": _host_document(fleet.mirror_host) if fleet.mirror_host else None,
        "hosts": [_host_document(host) for host in fleet.hosts],
    }


def _host_document(host: Host) -> dict[str, Any]:
    return {"name": host.name, "address": host.address, "running": host.running}
