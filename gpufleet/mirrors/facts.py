"""Facts about a host's package sources."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

from pyinfra.api import FactBase, QuoteString, StringCommand

from gpufleet.managed.facts import STATE
from gpufleet.mirrors.plan import (
    CACHE,
    CONDARC,
    PIP_CONF,
    RECORD,
    UV_TOML,
    AptSources,
    parse_sources,
)
from gpufleet.mirrors.probe import Kept, read
from gpufleet.shell import script

# A source file that gpufleet replaced is read as it was before, so that a second apply, or a
# change of site, starts from the same text.
_SCRIPT = rf"""
. /etc/os-release
printf 'os\t%s\t%s\n' "$ID" "${{VERSION_CODENAME-}}"
for p in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
  o={STATE}/originals"$p"
  if [ -e "$o" ] && [ -e {STATE}/written"$p" ]; then src=$o; else src=$p; fi
  if [ -f "$src" ]; then printf 'file\t%s\n' "$p"; sed 's/^/+/' "$src"; echo; fi
done
printf 'host\t%s\t%s\n' "${{VERSION_ID-}}" "$(date +%s)"
for p in {RECORD} {CACHE}; do
  if [ -f "$p" ]; then printf 'file\t%s\n' "$p"; sed 's/^/+/' "$p"; echo; fi
done
for p in {PIP_CONF} {UV_TOML} {CONDARC} {RECORD} /etc/apt/sources.list \
    /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
  if [ -e {STATE}/written"$p" ]; then printf 'written\t%s\n' "$p"; fi
done
"""


class MirrorFiles(FactBase[AptSources]):
    """The host's apt sources and the mirror files that gpufleet wrote: `AptSources`."""

    def command(self) -> StringCommand:
        return script(_SCRIPT)

    @staticmethod
    def default() -> AptSources:
        return AptSources("", "", {}, ())

    def process(self, output: list[str]) -> AptSources:
        return parse_sources(output)


# Packed, because a command line of a shell within a shell is quoted again and again.
_PROBE = base64.b64encode(zlib.compress((Path(__file__).parent / "on_host.py").read_bytes(), 9))


class MirrorProbe(FactBase[Kept]):
    """What the host finds of the sites that a plan of `probe.plan` names: `Kept`.

    The host remembers it in `CACHE`; nothing else is changed. Nothing is found where the host has
    no python3.
    """

    def command(self, plan: str) -> StringCommand:
        load = "import base64,zlib;exec(zlib.decompress(base64.b64decode('{}')))"
        code = QuoteString(load.format(_PROBE.decode()))
        return StringCommand("python3 -I -c", code, QuoteString(plan))

    @staticmethod
    def default() -> Kept:
        return Kept()

    def process(self, output: list[str]) -> Kept:
        return read(output[-1])
