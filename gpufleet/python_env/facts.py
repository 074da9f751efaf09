"""Facts about the Python environments of a host."""

from __future__ import annotations

from pyinfra.api import FactBase, StringCommand

from gpufleet.managed.facts import STATE
from gpufleet.python_env.conda import SHELL_FILES
from gpufleet.python_env.doctor import Seen, read
from gpufleet.python_env.plan import Environments, parse
from gpufleet.shell import script

# An environment is whole when the marker that is written last holds its own name; a name beside it
# is a link to it. Conda's marker holds the checksum of its installer.
_SCRIPT = r"""
for d in "$1"/envs/*/; do
  d=${d%/}; n=${d##*/}
  if [ ! -d "$d" ] || [ -L "$d" ]; then continue; fi
  if [ "$(cat "$d/.whole" 2>/dev/null)" = "$n" ] && [ -x "$d/bin/python" ]
  then printf 'whole\t%s\n' "$n"; else printf 'half\t%s\n' "$n"; fi
done
c=$1/conda
if [ -s "$c/.whole" ] && [ -x "$c/bin/conda" ] && [ -x "$c/bin/python" ]
then printf 'conda\t%s\n' "$(cat "$c/.whole")"; elif [ -e "$c" ]; then printf 'conda\thalf\n'; fi
shift
for p in "$@"; do [ ! -f "$p" ] || printf 'written\t%s\n' "$p"; done
"""


class EnvironmentsOnHost(FactBase[Environments]):
    """The environments below the deploy's folder, conda, and what login shells have: one command,
    `Environments`."""

    def command(self, root: str) -> StringCommand:
        return script(_SCRIPT, root, *(f"{STATE}/written{path}" for path in SHELL_FILES))

    @staticmethod
    def default() -> Environments:
        return Environments(frozenset(), frozenset())

    def process(self, output: list[str]) -> Environments:
        return parse(output)


# What is in each environment, without starting its python: names and versions of packages, the CUDA
# that torch says it is built with, and the libraries of bitsandbytes. $1 folder of the deploy.
_INSIDE = r"""
for d in "$1"/envs/*/; do
  d=${d%/}; n=${d##*/}
  if [ ! -d "$d" ] || [ -L "$d" ]; then continue; fi
  printf 'environment\t%s\n' "$n"
  [ "$(cat "$d/.whole" 2>/dev/null)" = "$n" ] && echo whole
  if [ -x "$d/bin/python" ]; then echo python
  else printf 'gone\t%s\n' "$(readlink "$d/bin/python" || echo "$d/bin/python")"; fi
  for s in "$d"/lib/python3*/site-packages; do
    [ -d "$s" ] || continue
    (cd "$s" && printf 'package\t%s\n' *.dist-info)
    [ -r "$s/torch/version.py" ] && printf 'torch\t%s\n' \
      "$(sed -n "s/^cuda[^=]*= *['\"]\([0-9.]*\)['\"].*/\1/p" "$s/torch/version.py")"
    for l in "$s"/bitsandbytes/libbitsandbytes_*.so; do
      [ -e "$l" ] && printf 'library\t%s\n' "${l##*/}"
    done
  done
done
exit 0
"""


class InsideEnvironments(FactBase[tuple[Seen, ...]]):
    """What is in each of the host's environments: `Seen`s."""

    def command(self, root: str) -> StringCommand:
        return script(_INSIDE, root)

    @staticmethod
    def default() -> tuple[Seen, ...]:
        return ()

    def process(self, output: list[str]) -> tuple[Seen, ...]:
        return read(output)


# $1 CUDA such as 11.8.
_TOOLKIT = r"""
p=cuda-toolkit-$(echo "$1" | tr . -)
dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed ||
  { echo missing; exit; }
if ldconfig -p | grep -q "/usr/local/cuda-$1/"; then echo ready; else echo unlinked; fi
"""


class CudaToolkit(FactBase[str]):
    """Whether a CUDA toolkit is installed: `missing`, `unlinked` (the dynamic linker does not know
    its libraries) or `ready`."""

    def command(self, version: str) -> StringCommand:
        return script(_TOOLKIT, version)

    @staticmethod
    def default() -> str:
        return "missing"

    def process(self, output: list[str]) -> str:
        return output[-1].strip()
