"""Operations that bring upstream's code to a host, as it was committed, and ask its page."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from io import BytesIO

from pyinfra import host
from pyinfra.api import FileUploadCommand, QuoteString, StringCommand, operation

from gpufleet.demo.plan import is_right
from gpufleet.errors import FleetError
from gpufleet.shell import failing, script
from gpufleet.upstream.facts import Checkouts, Links, PageAnswer
from gpufleet.upstream.plan import linked
from gpufleet.upstream.relay import relayed

# A checkout is made aside, from objects that are named by their content and read again (fsck), and
# gets its name when it is whole. What the host has of it already is tried first: healing needs no
# network. $1 folder of the deploy, $2 name, $3 commit to check out, $4 yes where a pack came,
# $5 address, then git's options.
_CHECK_OUT = r"""
umask 022
root=$1 name=$2 head=$3 came=$4 url=$5; shift 5
place=$root/upstream/$name new=$root/incoming/upstream-$name pack=$root/incoming/upstream-$name.pack
log=$root/incoming/upstream-$name.log
export GIT_TERMINAL_PROMPT=0 LC_ALL=C
begin() {
  rm -rf "$new"; mkdir -p "$new" "$root/upstream" && cd "$new" || exit
  git init --quiet . && git config core.autocrlf false
}
finish() {
  git cat-file -e "$head^{commit}" && echo "$head" > .git/shallow &&
    git fsck --no-progress --no-dangling && git checkout --quiet --force --detach "$head"
}
made() {
  chmod -R u=rX,go=rX "$new" && rm -rf "$root/incoming/upstream-old" || exit
  [ ! -e "$place" ] || mv -T "$place" "$root/incoming/upstream-old" || exit
  mv -T "$new" "$place" && rm -rf "$root/incoming/upstream-old" "$pack" "$log"
  exit
}
if [ -d "$place/.git/objects" ]; then
  begin
  cp -R "$place/.git/objects" .git/ 2> "$log" && chmod -R u+w .git && finish > "$log" 2>&1 && made
fi
begin
if [ "$came" = yes ]; then
  git index-pack --stdin < "$pack" > "$log" 2>&1 && finish >> "$log" 2>&1 && made
  echo "upstream's code did not arrive whole: $(tail -n 1 "$log"); apply again" >&2
else
  slow="-c http.lowSpeedLimit=1000 -c http.lowSpeedTime=60"
  { timeout 1800 git $slow "$@" fetch --quiet --depth 1 --no-tags "$url" "$head" ||
    timeout 1800 git $slow "$@" fetch --quiet --no-tags "$url" '+refs/heads/*:refs/heads/*'; } \
    > "$log" 2>&1 && finish >> "$log" 2>&1 && made
  echo "upstream's code does not come from $url: $(grep . "$log" | tail -n 1); set \
mirrors.git_proxy or upstream.git to a mirror, or upstream.source to a copy on the laptop" >&2
fi
rm -rf "$new"
exit 1
"""

# $1 link, $2 target, and so on.
_LINK = r"""set -e
umask 022
while [ $# -gt 0 ]; do
  mkdir -p "${1%/*}"; ln -sfnT "$2" "$1.new"; mv -fT "$1.new" "$1"
  shift 2
done
"""


@operation()
def checked_out(
    *,
    root: str,
    commit: str,
    head: str,
    address: str,
    options: Sequence[str] = (),
    source: str | None = None,
    sha256: str | None = None,
) -> Generator[FileUploadCommand | StringCommand]:
    """Have the commit at ROOT/upstream/COMMIT, whole, root's, and exactly as it was committed.

    `head` is what git checks out. `source` is a copy on the operator's machine, with the `sha256`
    of a tarball; without one the host fetches from `address`, with these options of git.
    """
    found = host.get_fact(Checkouts, root=root).get(commit)
    if found is not None and found.head == head and not found.wrong:
        host.noop(f"upstream's code {commit[:7]} is there")
        return
    if source is not None:
        try:
            pack = relayed(source, commit, sha256).pack
        except FleetError as error:
            yield failing(str(error))
            return
        yield StringCommand("mkdir -p", QuoteString(f"{root}/incoming"))
        yield FileUploadCommand(BytesIO(pack), f"{root}/incoming/upstream-{commit}.pack")
    came = "no" if source is None else "yes"
    yield script(_CHECK_OUT, root, commit, head, came, address, *options)


@operation()
def links(*, root: str, wanted: dict[str, str]) -> Generator[StringCommand]:
    """Have these links lead where they shall: link → target."""
    wrong = linked(wanted, host.get_fact(Links, root=root))
    if not wrong:
        host.noop("the links lead to the weights")
        return
    yield script(_LINK, *(word for link in wrong for word in (link, wanted[link])))


@operation()
def prune(*, root: str, keep: str) -> Generator[StringCommand]:
    """Remove checkouts that no service uses any more; `keep` is the one that is in use."""
    others = sorted(host.get_fact(Checkouts, root=root).keys() - {keep})
    if not others:
        host.noop("no other checkouts")
        return
    yield StringCommand("rm -rf", *(QuoteString(f"{root}/upstream/{name}") for name in others))


@operation()
def answers(
    *,
    address: str,
    picture: str | None,
    question: str,
    expected: str | None,
    timeout: int,
    users: str = "",
) -> Generator[StringCommand]:
    """Ask upstream's page a question about a picture on the host; without one, see that it is
    there. `expected` None takes any words: upstream draws lots for its answers. `users` is the file
    on the host with USER:PASSWORD lines, where the page asks for one."""
    answer = host.get_fact(
        PageAnswer,
        address=address,
        picture=picture,
        question=question,
        timeout=timeout,
        users=users,
    )
    if not answer.text:
        yield failing(
            f"upstream's page at {address} does not answer: {answer.problem or 'no words'}; see "
            "fleet logs"
        )
    elif picture is not None and not is_right(answer.text, expected):
        yield failing(
            f"upstream's page answered {answer.text!r} to {question!r}, expected {expected!r}: its "
            "weights are not what the catalogue says"
        )
    else:
        host.noop(f"upstream's page answered: {answer.text}")
