"""Facts about a host's package sources."""

from __future__ import annotations

from pyinfra.api import FactBase, StringCommand

from gpufleet.managed.facts import STATE
from gpufleet.mirrors.plan import CONDARC, PIP_CONF, RECORD, UV_TOML, AptSources, parse_sources
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
if [ -f {RECORD} ]; then printf 'file\t%s\n' {RECORD}; sed 's/^/+/' {RECORD}; echo; fi
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
