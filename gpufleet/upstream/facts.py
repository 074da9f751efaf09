"""Facts about upstream's code on a host: its checkouts, its links, what its page answers."""

from __future__ import annotations

from pyinfra.api import FactBase, StringCommand

from gpufleet.demo.plan import Answer
from gpufleet.shell import script
from gpufleet.upstream.plan import Checkout, parse, parse_answer, program

# A file that was written, even back to the same size and time, has another ctime than git's index
# says, and is read again. Nothing is written: the index stays as it is.
_CHECKOUTS = r"""
export GIT_OPTIONAL_LOCKS=0 LC_ALL=C
for d in "$1"/upstream/*/; do
  [ -d "$d" ] || continue
  d=${d%/}
  look() { git -c safe.directory="$d" -c core.autocrlf=false -C "$d" "$@" 2>&1; }
  head=$(look rev-parse --verify --quiet HEAD)
  wrong=$(look status --porcelain --ignored --untracked-files=all | head -n 1)
  [ -n "$wrong" ] || wrong=$(find "$d" ! -type l \( ! -user root -o -perm /022 \) | head -n 1)
  printf '%s\t%s\t%s\n' "${d##*/}" "$head" "$wrong"
done
"""


class Checkouts(FactBase[dict[str, Checkout]]):
    """The checkouts below the deploy's folder, by the commit that they are named after."""

    def command(self, root: str) -> StringCommand:
        return script(_CHECKOUTS, root)

    @staticmethod
    def default() -> dict[str, Checkout]:
        return {}

    def process(self, output: list[str]) -> dict[str, Checkout]:
        return parse(output)


_LINKS = r"""
find "$1/upstream-home/hub" -type l -printf '%p\t%l\n' 2>/dev/null
:
"""


class Links(FactBase[dict[str, str]]):
    """The links of torch's hub folder: link → target."""

    def command(self, root: str) -> StringCommand:
        return script(_LINKS, root)

    @staticmethod
    def default() -> dict[str, str]:
        return {}

    def process(self, output: list[str]) -> dict[str, str]:
        return {link: to for link, _, to in (line.partition("\t") for line in output)}


class PageAnswer(FactBase[Answer]):
    """What upstream's page answers about a picture on the host; without one, whether it is there:
    `Answer`."""

    def command(
        self, address: str, picture: str | None, question: str, timeout: int, users: str = ""
    ) -> StringCommand:
        words = (address, picture or "", question, str(timeout), users)
        return script('exec python3 -c "$@"', program("ask.py"), *words)

    @staticmethod
    def default() -> Answer:
        return Answer(text=None, problem="nothing answered")

    def process(self, output: list[str]) -> Answer:
        return parse_answer(output)
