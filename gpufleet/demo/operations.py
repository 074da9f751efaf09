"""Operations that put the demo on a host, run it and ask it."""

from __future__ import annotations

from collections.abc import Generator
from io import BytesIO

from pyinfra import host
from pyinfra.api import FileUploadCommand, QuoteString, StringCommand, operation

from gpufleet.demo.facts import Applications, DemoAnswer, DemoService
from gpufleet.demo.plan import UNIT, Application, is_current, is_right
from gpufleet.shell import failing, script

# $1 folder of the deploy, $2 digest. The rename makes the application whole or absent.
_UNPACK = r"""set -e
umask 022
new=$1/incoming/app-$2
rm -rf "$new" "$1/app/$2"; mkdir -p "$new" "$1/app"
tar -xf "$new.tar" -C "$new" --no-same-owner
chmod -R u=rwX,go=rX "$new"
mv -T "$new" "$1/app/$2"
rm -f "$new.tar"
"""

# $1 unit. A start that fails says why: the last line that the demo itself wrote.
_START = r"""
systemctl daemon-reload
systemctl enable --quiet "$1"
systemctl reset-failed "$1" 2>/dev/null
since=$(date '+%Y-%m-%d %H:%M:%S')
systemctl restart "$1" 2>/dev/null && exit 0
line=$(journalctl "_SYSTEMD_UNIT=$1" --since "$since" -o cat | grep . | tail -n 1)
[ -n "$line" ] || line=$(journalctl -u "$1" --since "$since" -o cat | grep . | tail -n 1)
echo "$1 did not start: $line" >&2
exit 1
"""


@operation()
def application(*, root: str, app: Application) -> Generator[FileUploadCommand | StringCommand]:
    """Put the demo's code at ROOT/app/DIGEST, unless it is there, unchanged."""
    if host.get_fact(Applications, root=root).get(app.digest) == app.checksum:
        host.noop(f"application {app.digest} is there")
        return
    yield StringCommand("mkdir -p", QuoteString(f"{root}/incoming"))
    yield FileUploadCommand(BytesIO(app.archive), f"{root}/incoming/app-{app.digest}.tar")
    yield script(_UNPACK, root, app.digest)


@operation()
def running(*, root: str, weights: str, revision: str) -> Generator[StringCommand]:
    """Run the service, enabled, at this revision.

    It is restarted if it runs another one, or if a file of the deploy, or of the folder `weights`,
    changed after it started.
    """
    if is_current(host.get_fact(DemoService, root=root, weights=weights), revision):
        host.noop(f"revision {revision} runs")
        return
    yield script(_START, UNIT)


@operation()
def prune(*, root: str, keep: str) -> Generator[StringCommand]:
    """Remove applications that no service uses any more; `keep` is the one that is in use."""
    others = sorted(host.get_fact(Applications, root=root).keys() - {keep})
    if not others:
        host.noop("no other applications")
        return
    yield StringCommand("rm -rf", *(QuoteString(f"{root}/app/{digest}") for digest in others))


@operation()
def answers(
    *,
    address: str,
    model: str,
    picture: str | None,
    question: str,
    expected: str | None,
    timeout: int,
) -> Generator[StringCommand]:
    """Ask the running demo a question; a wrong answer, or none at all, fails the host.

    `picture` is a file on the host; `expected` None takes any words.
    """
    answer = host.get_fact(
        DemoAnswer,
        address=address,
        model=model,
        picture=picture,
        question=question,
        timeout=timeout,
    )
    if answer.text is not None and is_right(answer.text, expected):
        host.noop(f"the demo answered: {answer.text}")
    elif answer.text is not None:
        yield failing(
            f"the demo answered {answer.text!r} to {question!r}, expected {expected or 'words'!r}: "
            "its weights or its configuration are not what the catalogue says"
        )
    else:
        yield failing(f"the demo at {address} does not answer: {answer.problem}; see fleet logs")
