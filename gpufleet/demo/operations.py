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

# A process of our own lets nobody in any more and ends once it has answered those that it has;
# any other one is left as it is.
_LAST_ANSWERS = r"""
shares() {  # $1 unit; its process is then $pid
  pid=$(systemctl show "$1" -p MainPID --value)
  tr '\0' '\n' 2>/dev/null < "/proc/${pid:-0}/cmdline" | grep -qxe --share-port
}
last_answers() {  # $1 unit, $2 seconds
  shares "$1" || return 1
  kill -QUIT "$pid" || return 1
  end=$(($(date +%s) + $2))
  while [ -e "/proc/$pid" ] && [ "$(date +%s)" -lt "$end" ]; do sleep 0.2; done
}
"""

# $1 unit, $2 seconds for its last answers.
_START = (
    _WHY
    + _LAST_ANSWERS
    + r"""
systemctl daemon-reload
systemctl enable --quiet "$1"
systemctl reset-failed "$1" 2>/dev/null
trap 'systemctl restart --no-block "$1"; exit 1' HUP INT PIPE TERM
last_answers "$1" "$2"
systemctl restart "$1" 2>/dev/null || why "$1"
"""
)

# $1 unit of one process alone, $2 seconds for its last answers, $3 what tells nginx whom to ask,
# $4 its user. nginx listens beside it before it goes. One that does not share its port goes first.
_HAND_OVER = (
    _WHY
    + _LAST_ANSWERS
    + rf"""
front() {{
  systemctl daemon-reload
  systemctl reset-failed {FRONT} 2>/dev/null
  systemctl start {FRONT} 2>/dev/null || why {FRONT}
  runuser -u "$user" -- "$program" once >/dev/null || exit 1
}}
program=$3 user=$4
if shares "$1"; then
  front
  last_answers "$1" "$2"
  systemctl stop "$1"
else
  systemctl stop "$1"
  front
fi
"""
)

# $1 unit of one process alone, $2 seconds for its last answers, $3 what tells nginx whom to ask,
# $4 its user, $5 the first of several, which has the one's GPU, $6 its address:port. While the one
# loads, the others answer; then it listens beside nginx, which goes once it has handed on the last
# answer. Where nginx does not run or does not share its port, all of them go first.
_TAKE_OVER = (
    _WHY
    + _LAST_ANSWERS
    + rf"""
front() {{ runuser -u "$user" -- "$program" "$@" >/dev/null; }}
start() {{
  systemctl daemon-reload
  systemctl enable --quiet "$unit"
  systemctl reset-failed "$unit" 2>/dev/null
  last_answers "$unit" "$seconds"
  systemctl restart "$unit" 2>/dev/null || why "$unit"
}}
back() {{
  code=$?
  trap - EXIT
  [ "$code" != 0 ] || exit 0
  systemctl disable --quiet --now "$unit"
  systemctl start "$first" {FRONT} {FRONT}-watch
  front back "$address"
  exit "$code"
}}
unit=$1 seconds=$2 program=$3 user=$4 first=$5 address=$6
systemctl -q is-active {FRONT} && grep -q '^ *listen .* reuseport;' /run/{FRONT}/nginx.conf || {{
  systemctl stop {TARGET} '{TEMPLATE.replace("@", "@*")}' {FRONT} {FRONT}-watch
  start
  exit
}}
trap back EXIT
trap 'exit 1' HUP INT PIPE TERM
front drain "$address" || exit 1
systemctl stop "$first"
start
systemctl stop {FRONT}-watch
front end
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
[ -e /etc/systemd/system/{TARGET} ] || rm -rf /etc/systemd/system/{TARGET}.wants /var/cache/{FRONT}
systemctl daemon-reload
"""

# Units that nobody asks yet: all start at once.
_START_ALL = (
    _WHY
    + r"""
systemctl daemon-reload
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
def running(*, root: str, weights: str, revision: str, front: Balancer) -> Generator[StringCommand]:
    """Run the service as one process, enabled, at this revision.

    It is restarted if it runs another one, or if a file of the deploy, or of the folder `weights`,
    changed after it started; its last answers are given before. `front` is what stands before
    several processes: where these serve, they do so until the one can.
    """
    found = host.get_fact(DemoService, root=root, weights=weights)
    if is_current(found, revision):
        host.noop(f"revision {revision} runs")
        return
    about = (str(front.drain_seconds), front.program, front.user)
    if found.leftover:
        yield script(_TAKE_OVER, UNIT, *about, instance(0), front.backends[0].address)
        units = f"{TARGET} {TEMPLATE.replace('@', '@*')} {FRONT} {FRONT}-watch"
        yield script(_RETIRE, units, root, *SEVERAL)
        return
    yield script(_START, UNIT, about[0])


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
    units = [instance(number) for number in range(count)]
    working = {one.name for one in found.processes if one.active == "active"}
    away = [unit for unit in units if unit not in working]
    if UNIT in found.leftover:
        # One alone has the first GPU: the others come beside it, and the first takes its place.
        if beside := [unit for unit in away if unit != units[0]]:
            yield script(_START_ALL, *beside)
        yield script(_HAND_OVER, UNIT, str(front.drain_seconds), front.program, front.user)
        yield script(_RETIRE, UNIT, "", f"/etc/systemd/system/{UNIT}")
        away = [unit for unit in away if unit == units[0]]
    yield StringCommand("systemctl daemon-reload && systemctl enable --quiet", TARGET, *units)
    if away:
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
