"""Facts about managed files: one round trip for any number of them."""

from __future__ import annotations

from pyinfra.api import FactBase, QuoteString, StringCommand

from gpufleet.managed.plan import Files, parse

#: What gpufleet remembers on a host: originals it replaced and digests of what it wrote.
STATE = "/var/lib/gpufleet"

_SCRIPT = (
    'do if [ -f "$p" ]; then printf \'file\\t%s\\t%s\\t%s\\n\' "$p" '
    '"$(stat -c \'%a\t%U\t%G\' "$p")" "$(sha256sum < "$p" | cut -d\' \' -f1)"; fi; '
    f'r={STATE}/written"$p"; '
    'if [ -f "$r" ]; then printf \'record\\t%s\\t%s\\n\' "$p" "$(cat "$r")"; fi; done'
)


class ManagedFiles(FactBase[Files]):
    """What lies at the given paths and what gpufleet wrote there: `Files`."""

    def command(self, paths: tuple[str, ...]) -> StringCommand:
        return StringCommand("for p in", *(QuoteString(p) for p in paths), ";", _SCRIPT)

    @staticmethod
    def default() -> Files:
        return Files({}, {})

    def process(self, output: list[str]) -> Files:
        return parse(output)
