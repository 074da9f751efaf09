"""Facts about the weight files of a host."""

from __future__ import annotations

from pyinfra.api import FactBase, FactProcessError, StringCommand

from gpufleet.demo.plan import UNIT
from gpufleet.shell import script
from gpufleet.weights.plan import STORED, Stored, parse

# $1 folder of the deploy, $2 whether to read all (deep) or empty, then digests of the contents that
# are wanted. Only those are read that no record vouches for, on all cores.
_SCRIPT = (
    STORED
    + r"""
deep=$2; shift 2
for s in "$@"; do
  [ -f "$b/$s" ] || continue
  [ -z "$deep" ] && grep -qxF "$(cd "$b" && stat -c '%n %s %.9Z %i' "$s")" "$v" && continue
  printf '%s\n' "$s"
done | (cd "$b" 2>/dev/null && xargs -r -P "$(nproc)" -n 1 sh -c '
  was=$(stat -c "%n %s %.9Z %i" "$1")
  printf "hash\t%s\t%s\t%s\n" "$1" "$(sha256sum < "$1" | cut -d" " -f1)" "$was"' sh)
:
"""
)


class WeightsOnHost(FactBase[Stored]):
    """What a host holds of weights, the contents that are wanted verified: `Stored`."""

    def command(self, root: str, wanted: tuple[str, ...], deep: bool = False) -> StringCommand:
        return script(_SCRIPT, root, "deep" if deep else "", *wanted)

    @staticmethod
    def default() -> Stored:
        return Stored()

    def process(self, output: list[str]) -> Stored:
        try:
            return parse(output)
        except ValueError as error:
            raise FactProcessError(f"unexpected output of the weights script: {error}") from error


# $1 folder of the deploy, $2 unit, whose instances are what runs where there are several.
_IN_USE = r"""
systemd=/etc/systemd/system unit=/etc/systemd/system/$2 running=$2 current=current
if [ ! -e "$unit" ]; then
  unit=$systemd/${2%.service}@.service
  running=$(ls "$systemd/${2%.service}.target.wants" 2>/dev/null | grep @)
fi
for one in $running; do
  started=$(systemctl show --timestamp=us "$one" -p ExecMainStartTimestamp --value)
  [ "$(systemctl is-active "$one")" = active ] && [ -n "$started" ] &&
    [ -z "$(find "$unit" "$1/config" -type f -newerct "$started" 2>/dev/null | head -n 1)" ] ||
    current=
done
[ -z "$running" ] || [ -z "$current" ] || echo current
cat "$unit" "$1"/config/*.yaml 2>/dev/null | grep -o "$1/weights/[A-Za-z0-9._-]*" | sort -u |
  sed 's|.*/|version\t|'
:
"""


class WeightsInUse(FactBase[frozenset[str] | None]):
    """Versions that the demo's unit and configuration name; None unless the process that runs
    has read those."""

    def command(self, root: str) -> StringCommand:
        return script(_IN_USE, root, UNIT)

    @staticmethod
    def default() -> frozenset[str] | None:
        return None

    def process(self, output: list[str]) -> frozenset[str] | None:
        if "current" not in output:
            return None
        return frozenset(line.partition("\t")[2] for line in output if line != "current")
