"""Facts about the demo on a host: its service, its application, its answer."""

from __future__ import annotations

import json

from pyinfra.api import FactBase, StringCommand

from gpufleet.demo.plan import UNIT, Answer, Service, parse, parse_answer
from gpufleet.shell import script

# The revision is read where it counts: in the running process, not in what systemd would start. A
# file that changed after the process started is not what it read.
_SHOW = r"""
systemd=/etc/systemd/system
show() {  # $1 unit, $2 its file, $3 where /healthz is asked, or empty, then files that it reads
  unit=$1 f=$2 asked=$3
  shift 3
  systemctl show "$unit" -p ActiveState,UnitFileState,NeedDaemonReload \
    -p MemoryCurrent,ActiveEnterTimestamp
  started=$(systemctl show --timestamp=us "$unit" -p ExecMainStartTimestamp --value)
  if [ -n "$started" ] && [ $# -gt 0 ]; then
    printf 'changed_since='
    find -L "$f" "$@" -name .git -prune -o -type f -newerct "$started" -print 2>/dev/null |
      head -n 1
    echo
  fi
  [ -r "$f" ] && sed -n 's/^Environment=MODELDEMO_REVISION=/revision_on_disk=/p' "$f"
  pid=$(systemctl show "$unit" -p MainPID --value)
  if [ "${pid:-0}" -gt 0 ] && [ -r "/proc/$pid/environ" ]; then
    tr '\0' '\n' < "/proc/$pid/environ" | sed -n 's/^MODELDEMO_REVISION=/revision_running=/p'
    [ "$asked" != own ] || asked=http://127.0.0.1:$(tr '\0' '\n' < "/proc/$pid/environ" |
      sed -n 's/^PORT=//p')
  fi
  if [ -n "$asked" ] && [ "$asked" != own ]; then
    printf 'health='; curl -s -m 5 "$asked/healthz" | tr '\n' ' '; echo
  fi
}
"""

# $1 the service where it is one process, $2 address that /healthz is asked at, or empty, $3 folder
# of the deploy, or empty, $4 that of the weights. Where only the files of several processes are
# there, they are what serves.
_SERVICE = (
    _SHOW
    + r"""
name=${1%.service}
if [ ! -e "$systemd/$1" ] && [ -e "$systemd/$name.target" ]; then
  for u in $(ls "$systemd/$name.target.wants" | grep @); do
    echo "unit=$u"
    show "$u" "$systemd/$name@.service" "${2:+own}"
  done
  echo unit=
  systemctl -q is-enabled "$name.target" 2>/dev/null && systemctl -q is-active "$name.target" &&
    echo target=on
  if [ -n "$2" ]; then printf 'health='; curl -s -m 5 "$2/healthz" | tr '\n' ' '; echo; fi
  exit 0
fi
show "$1" "$systemd/$1" "$2" ${3:+"$3/config" "$3/secrets" "$3/app" "$3/upstream"} \
  ${3:+${4:+"$4"}}
[ ! -e "$systemd/$name.target" ] || echo "leftover=$name.target"
"""
)


class DemoService(FactBase[Service]):
    """The demo's unit, its running revision and what /healthz answers; where several processes
    serve, all of them: `Service`."""

    def command(self, address: str = "", root: str = "", weights: str = "") -> StringCommand:
        return script(_SERVICE, UNIT, address, root, weights)

    @staticmethod
    def default() -> Service:
        return parse([])

    def process(self, output: list[str]) -> Service:
        return parse(output)


# $1 the unit of one process alone, $2 folder of the deploy, $3 that of the weights, $4 how many
# processes there shall be.
_PROCESSES = (
    _SHOW
    + r"""
name=${1%.service}
i=0
while [ "$i" -lt "$4" ]; do
  echo "unit=$name@$i.service"
  show "$name@$i.service" "$systemd/$name@.service" '' \
    "$2/config" "$2/secrets" "$2/app" "$3" "$2/processes/$i.env"
  i=$((i + 1))
done
echo unit=
systemctl -q is-enabled "$name.target" 2>/dev/null && systemctl -q is-active "$name.target" &&
  echo target=on
[ ! -e "$systemd/$1" ] || echo "leftover=$1"
for u in $(ls "$systemd/$name.target.wants" 2>/dev/null | grep @); do
  i=${u#*@}
  [ "${i%.service}" -lt "$4" ] || echo "leftover=$u"
done
"""
)


class DemoProcesses(FactBase[Service]):
    """The first COUNT processes of a host that shall run several, and what is there beside
    them: `Service`."""

    def command(self, root: str, weights: str, count: int) -> StringCommand:
        return script(_PROCESSES, UNIT, root, weights, str(count))

    @staticmethod
    def default() -> Service:
        return parse([])

    def process(self, output: list[str]) -> Service:
        return parse(output)


# $1 path, and on stdin what it shall hold: neither is that ever printed, nor a digest of it.
_SECRET = r"""
if [ -f "$1" ]; then cmp -s - "$1" && [ -O "$1" ] && stat -c 'same %a' "$1" || echo other; fi
"""


class Secret(FactBase[str]):
    """Whether a file of root's holds what stdin says, and its mode: `same 600`, `other`, or empty
    where there is no file."""

    def command(self, path: str) -> StringCommand:
        return script(_SECRET, path)

    @staticmethod
    def default() -> str:
        return ""

    def process(self, output: list[str]) -> str:
        return output[0] if output else ""


# Compiled modules are no part of it: they are not read from there (PYTHONPYCACHEPREFIX).
_APPLICATIONS = r"""
export LC_ALL=C
for d in "$1"/app/*/; do
  [ -d "$d" ] || continue
  d=${d%/}
  sum=$(cd "$d" && find * -type f ! -path '*/__pycache__/*' -print0 | sort -z |
    xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
  printf '%s\t%s\n' "${d##*/}" "$sum"
done
"""


class Applications(FactBase[dict[str, str]]):
    """The applications below the deploy's folder: digest by name → checksum of what is there."""

    def command(self, root: str) -> StringCommand:
        return script(_APPLICATIONS, root)

    @staticmethod
    def default() -> dict[str, str]:
        return {}

    def process(self, output: list[str]) -> dict[str, str]:
        return dict(line.split("\t", 1) for line in output)


# $1 address, $2 picture, $3 seconds, $4 request with the picture left out, $5 file of USER:PASSWORD
# lines, or empty. The picture goes from the disk into the request without a command line's limit,
# and the first user's password from the file without any command line.
_ASK = r"""
user=
[ -z "$5" ] || user=$(sed -n '/^[^#]/ {s/[\\"]/\\&/g; s/.*/user = "&"/p; q;}' "$5")
{ printf '%s' "${4%%PICTURE*}"; base64 -w 0 "$2"; printf '%s' "${4#*PICTURE}"; } |
  curl -sS -m "$3" -K /dev/fd/3 -H 'Content-Type: application/json' --data-binary @- \
    "$1/v1/chat/completions" 2>&1 3<<E || :
$user
E
"""


class DemoAnswer(FactBase[Answer]):
    """What the demo answers to a question, about a picture that lies on the host: `Answer`."""

    def command(
        self,
        address: str,
        model: str,
        picture: str | None,
        question: str,
        timeout: int,
        users: str = "",
    ) -> StringCommand:
        url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,PICTURE"}}
        content = [*([url] if picture else []), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        request = {"model": model, "messages": messages, "temperature": 0}
        return script(
            _ASK, address, picture or "/dev/null", str(timeout), json.dumps(request), users
        )

    @staticmethod
    def default() -> Answer:
        return Answer(text=None, problem="nothing answered")

    def process(self, output: list[str]) -> Answer:
        return parse_answer("\n".join(output))
