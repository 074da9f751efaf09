"""Operations that put the demo on a host, run it and ask it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from io import BytesIO

from pyinfra import host
from pyinfra.api import FileUploadCommand, QuoteString, StringCommand, operation

from gpufleet.demo.facts import Applications, DemoAnswer, DemoProcesses, DemoService, Secret
from gpufleet.demo.plan import (
    FRONT,
    SEVERAL,
    TARGET,
    TEMPLATE,
    UNIT,
    Application,
    instance,
    is_current,
    is_right,
    number_of,
    own_address,
)
from gpufleet.gateway.plan import Balancer
from gpufleet.managed.facts import STATE
from gpufleet.shell import Hidden, failing, script

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

# A start that fails says why: the last line that the demo itself wrote.
_WHY = r"""
why() {  # $1 unit
  line=$(journalctl "_SYSTEMD_UNIT=$1" --since "$since" -o cat | grep . | tail -n 1)
  [ -n "$line" ] || line=$(journalctl -u "$1" --since "$since" -o cat | grep . | tail -n 1)
  echo "$1 did not start: $line" >&2
  exit 1
}
since=$(date '+%Y-%m-%d %H:%M:%S')
"""

# $1 unit.
_START = (
    _WHY
    + r"""
systemctl daemon-reload
systemctl enable --quiet "$1"
systemctl reset-failed "$1" 2>/dev/null
systemctl restart "$1" 2>/dev/null || why "$1"
"""
)

# $1 units that another number of processes has, patterns among them, $2 folder of the deploy or
# empty, then their files: all that was noted of these goes too.
_RETIRE = rf"""
set -f
systemctl stop $1
for unit in $1; do
  case $unit in *[*]*) ;; *) systemctl disable --quiet "$unit" 2>/dev/null ;; esac
done
set +f
root=${{2:-/nowhere}}
shift 2
for f in "$@" "$root"/processes/*.env; do
  rm -f "$f" {STATE}/written"$f" {STATE}/originals"$f".absent
  rmdir "${{f%/*}}" {STATE}/written"${{f%/*}}" {STATE}/originals"${{f%/*}}" 2>/dev/null
done
rm -rf /var/cache/{FRONT}
[ -e /etc/systemd/system/{TARGET} ] || rm -rf /etc/systemd/system/{TARGET}.wants
systemctl daemon-reload
"""

# Units that nobody asks yet: all start at once.
_START_ALL = (
    _WHY
    + r"""
systemctl reset-failed "$@" 2>/dev/null
systemctl restart "$@" 2>/dev/null && exit 0
for unit in "$@"; do systemctl -q is-active "$unit" || why "$unit"; done
exit 1
"""
)

# $1 what tells nginx whom to ask, $2 its user, $3 address:port, $4 unit, $5 `restart`, or `stop`
# and $6 its file. It gets no more questions and ends those that it has; then it is the only one
# that is away. Where it does not come back, the others go on as they are.
_IN_TURN = (
    _WHY
    + rf"""
front() {{  # $1 drain or back
  ! systemctl -q is-active {FRONT} || runuser -u "$user" -- "$program" "$1" "$address" >/dev/null
}}
program=$1 user=$2 address=$3
trap 'front back' EXIT
trap 'exit 1' HUP INT PIPE TERM
front drain || exit 1
systemctl reset-failed "$4" 2>/dev/null
case $5 in
  stop) systemctl disable --quiet --now "$4" &&
    rm -f "$6" {STATE}/written"$6" {STATE}/originals"$6".absent ;;
  restart) systemctl restart "$4" 2>/dev/null || why "$4" ;;
esac
"""
)

# $1 path; its content comes on stdin, so that no command line shows it.
_KEEP = r"""set -e
umask 077
mkdir -p "${1%/*}"
chmod 700 "${1%/*}"
cat > "$1.gpufleet-new"
mv -f "$1.gpufleet-new" "$1"
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
def kept(*, path: str, content: Hidden | None) -> Generator[StringCommand]:
    """Keep a secret in a file that is root's alone; None: no such file.

    It travels on standard input, and nothing that is printed shows it or a digest of it.
    """
    found = host.get_fact(Secret, path=path, _stdin=content or Hidden(""))
    if content is None and not found:
        host.noop("no secret is kept")
    elif content is None:
        yield StringCommand("rm -f", QuoteString(path))
    elif found == "same 600":
        host.noop("the secret is kept")
    else:
        yield StringCommand(script(_KEEP, path), _stdin=content)


@operation()
def running(*, root: str, weights: str, revision: str) -> Generator[StringCommand]:
    """Run the service as one process, enabled, at this revision.

    It is restarted if it runs another one, or if a file of the deploy, or of the folder `weights`,
    changed after it started.
    """
    found = host.get_fact(DemoService, root=root, weights=weights)
    if is_current(found, revision):
        host.noop(f"revision {revision} runs")
        return
    if found.leftover:
        units = f"{TARGET} {TEMPLATE.replace('@', '@*')} {FRONT} {FRONT}-watch"
        yield script(_RETIRE, units, root, *SEVERAL)
    yield script(_START, UNIT)


@operation()
def rolled(*, root: str, weights: str, revision: str, front: Balancer) -> Generator[StringCommand]:
    """Run one process for each that the front asks, all of them enabled and at this revision.

    Those that serve are restarted one after the other, each once nginx sends it nothing more and
    its last answer is given; the next one waits until it is ready again.
    """
    count = len(front.backends)
    found = host.get_fact(DemoProcesses, root=root, weights=weights, count=count)
    if is_current(found, revision):
        host.noop(f"revision {revision} runs in {count} processes")
        return
    if UNIT in found.leftover:
        yield script(_RETIRE, UNIT, "", f"/etc/systemd/system/{UNIT}")
    units = [instance(number) for number in range(count)]
    yield StringCommand("systemctl daemon-reload && systemctl enable --quiet", TARGET, *units)
    working = {one.name for one in found.processes if one.active == "active"}
    if away := [unit for unit in units if unit not in working]:
        yield script(_START_ALL, *away)
    for one in found.processes:
        if one.name in working and not is_current(one, revision):
            turn = (front.program, front.user, own_address(front, one.name), one.name)
            yield script(_IN_TURN, *turn, "restart")
    for name in found.leftover:
        if name != UNIT:
            turn = (front.program, front.user, own_address(front, name), name)
            yield script(_IN_TURN, *turn, "stop", f"{root}/processes/{number_of(name)}.env")
    yield StringCommand("systemctl start", TARGET)


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
    addresses: Sequence[str],
    model: str,
    picture: str | None,
    question: str,
    expected: str | None,
    timeout: int,
    users: str = "",
) -> Generator[StringCommand]:
    """Ask the demo at each address a question; a wrong answer, or none at all, fails the host.

    `picture` is a file on the host; `expected` None takes any words. `users` is a file there of
    USER:PASSWORD lines: the first is who asks.
    """
    said = []
    for address in addresses:
        answer = host.get_fact(
            DemoAnswer,
            address=address,
            model=model,
            picture=picture,
            question=question,
            timeout=timeout,
            users=users,
        )
        if answer.text is None:
            yield failing(
                f"the demo at {address} does not answer: {answer.problem}; see fleet logs"
            )
            return
        if not is_right(answer.text, expected):
            yield failing(
                f"the demo at {address} answered {answer.text!r} to {question!r}, "
                f"expected {expected or 'words'!r}: "
                "its weights or its configuration are not what the catalogue says"
            )
            return
        said.append(answer.text)
    host.noop(f"the demo answered: {said[0]}")
