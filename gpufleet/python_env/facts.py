"""Facts about the Python environments of a host."""

from __future__ import annotations

from pyinfra.api import FactBase, StringCommand

from gpufleet.python_env.plan import Environments, parse
from gpufleet.shell import script

# An environment is whole when the marker that is written last holds its own name.
_SCRIPT = r"""
for d in "$1"/envs/*/; do
  [ -d "$d" ] || continue
  d=${d%/}; n=${d##*/}
  if [ "$(cat "$d/.whole" 2>/dev/null)" = "$n" ] && [ -x "$d/bin/python" ]
  then printf 'whole\t%s\n' "$n"; else printf 'half\t%s\n' "$n"; fi
done
"""


class EnvironmentsOnHost(FactBase[Environments]):
    """The environments below the deploy's folder: `Environments`."""

    def command(self, root: str) -> StringCommand:
        return script(_SCRIPT, root)

    @staticmethod
    def default() -> Environments:
        return Environments(frozenset(), frozenset())

    def process(self, output: list[str]) -> Environments:
        return parse(output)
