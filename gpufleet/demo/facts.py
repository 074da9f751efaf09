"""Facts about the demo on a host: its service, its application, its answer."""

from __future__ import annotations

import json

from pyinfra.api import FactBase, StringCommand

from gpufleet.demo.plan import UNIT, Answer, Service, parse, parse_answer
from gpufleet.shell import script

# $1 unit, $2 address that /healthz is asked at, or empty, $3 folder of the deploy, or empty, $4
# that of the weights: a file that changed there after the process started is not what the process
# read. The revision is read where it counts: in the running process, not in what systemd would
# start.
_SERVICE = r"""
systemctl show "$1" -p ActiveState,UnitFileState,NeedDaemonReload \
  -p MemoryCurrent,ActiveEnterTimestamp
f=/etc/systemd/system/$1
started=$(systemctl show --timestamp=us "$1" -p ExecMainStartTimestamp --value)
if [ -n "$started" ] && [ -n "$3" ]; then
  printf 'changed_since='
  find -L "$f" "$3/config" ${4:+"$4"} "$3/app" -type f -newerct "$started" 2>/dev/null |
    head -n 1
  echo
fi
[ -r "$f" ] && sed -n 's/^Environment=MODELDEMO_REVISION=/revision_on_disk=/p' "$f"
pid=$(systemctl show "$1" -p MainPID --value)
if [ "${pid:-0}" -gt 0 ] && [ -r "/proc/$pid/environ" ]; then
  tr '\0' '\n' < "/proc/$pid/environ" | sed -n 's/^MODELDEMO_REVISION=/revision_running=/p'
fi
if [ -n "$2" ]; then printf 'health='; curl -s -m 5 "$2/healthz" | tr '\n' ' '; echo; fi
"""


class DemoService(FactBase[Service]):
    """The demo's unit, its running revision and what /healthz answers: `Service`."""

    def command(self, address: str = "", root: str = "", weights: str = "") -> StringCommand:
        return script(_SERVICE, UNIT, address, root, weights)

    @staticmethod
    def default() -> Service:
        return parse([])

    def process(self, output: list[str]) -> Service:
        return parse(output)


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


# $1 address, $2 picture or nothing, $3 seconds, $4 request with the picture left out. The picture
# goes from the disk into the request without a command line's limit.
_ASK = r"""
if [ -z "$2" ]; then printf '%s' "$4"
else printf '%s' "${4%%PICTURE*}"; base64 -w 0 "$2"; printf '%s' "${4#*PICTURE}"; fi |
  curl -sS -m "$3" -H 'Content-Type: application/json' --data-binary @- \
    "$1/v1/chat/completions" 2>&1 || :
"""


class DemoAnswer(FactBase[Answer]):
    """What the demo answers to a question, about a picture that lies on the host: `Answer`."""

    def command(
        self, address: str, model: str, picture: str | None, question: str, timeout: int
    ) -> StringCommand:
        url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,PICTURE"}}
        content = [*([url] if picture else []), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        request = {"model": model, "messages": messages, "temperature": 0}
        return script(_ASK, address, picture or "", str(timeout), json.dumps(request))

    @staticmethod
    def default() -> Answer:
        return Answer(text=None, problem="nothing answered")

    def process(self, output: list[str]) -> Answer:
        return parse_answer("\n".join(output))
