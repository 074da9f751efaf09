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
    REFUSED,
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
for p in {RECORD} {CACHE} {REFUSED}; do
  if [ -f "$p" ]; then printf 'file\t%s\n' "$p"; sed 's/^/+/' "$p"; echo; fi
done
for p in {PIP_CONF} {UV_TOML} {CONDARC} {RECORD} /etc/apt/sources.list \
    /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
  if [ -e {STATE}/written"$p" ]; then printf 'written\t%s\n' "$p"; fi
done
"""

# What may win over those files: $1 folder of the deploy, $2 the service's user. Lines as grep -Hn
# prints them, without passwords in addresses.
_OTHERS = r"""
root=$1 who=${SUDO_USER:-$(id -un)}
plain='s#://[^/@ ]*@#://#g'
show() {  # $1 kind, $2 pattern, then files
  kind=$1 pattern=$2
  shift 2
  grep -HnsE -e "$pattern" -- "$@" /dev/null | sed -e "$plain" -e "s/^/$kind\t/"
}
env='(PIP_(INDEX_URL|EXTRA_INDEX_URL|CONFIG_FILE)|UV_(INDEX|INDEX_URL|DEFAULT_INDEX|EXTRA_INDEX_URL'
env="$env|CONFIG_FILE)|CONDARC|CONDA_CHANNELS|HF_ENDPOINT|[A-Za-z]+_(proxy|PROXY)).*="
systemd=/etc/systemd/system
show env "$env" /etc/environment /etc/profile /etc/profile.d/*.sh /etc/bash.bashrc \
  /etc/zsh/zshenv /etc/environment.d/*.conf /etc/security/pam_env.conf $systemd.conf \
  $systemd.conf.d/*.conf $systemd/minigpt4-demo.service.d/*.conf
systemctl show-environment 2>/dev/null | grep -E "^$env" \
  | sed -e "$plain" -e 's/^/env\tsystemd:0:/'
show ours . @PIP_CONF@ @UV_TOML@ @CONDARC@
show uv . /etc/xdg/uv/uv.toml
show proxy '^[^/#]*Acquire.*Proxy' /etc/apt/apt.conf /etc/apt/apt.conf.d/*
show pip = "$root"/envs/*/pip.conf "$root"/conda/pip.conf
show conda . /etc/conda/condarc /etc/conda/condarc.d/* "$root"/conda/.condarc \
  "$root"/conda/condarc "$root"/conda/condarc.d/* "$root"/envs/*/.condarc
for u in root "$who" "$2"; do getent passwd "$u"; done | cut -d: -f6 | sort -u \
  | while read -r h; do
    show env "$env" "$h/.profile" "$h/.bash_profile" "$h/.bashrc" "$h/.zshrc" "$h/.zshenv" \
      "$h/.pam_environment" "$h"/.config/environment.d/*.conf
    show pip = "$h/.pip/pip.conf" "$h/.config/pip/pip.conf"
    show uv . "$h/.config/uv/uv.toml"
    show conda . "$h/.conda/.condarc" "$h/.conda/condarc" "$h/.config/conda/.condarc" \
      "$h/.condarc"
  done
true
"""
_BOTH = _SCRIPT + _OTHERS.replace("@PIP_CONF@", PIP_CONF).replace("@UV_TOML@", UV_TOML).replace(
    "@CONDARC@", CONDARC
)


class MirrorFiles(FactBase[AptSources]):
    """The host's apt sources, the mirror files that gpufleet wrote, and what may win over them:
    `AptSources`. `root` is the folder of the deploy, `user` the demo's account."""

    def command(self, root: str, user: str) -> StringCommand:
        return script(_BOTH, root, user)

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
