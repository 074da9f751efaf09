"""Says how the real clients prove on a host that a choice of mirrors works: a shell script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from shlex import quote

from gpufleet.apt_sources import parse
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.mirrors.choice import Choice, Pick
from gpufleet.mirrors.plan import CONDARC, PIP_CONF, REFUSED, UV_TOML, AptSources

#: The small wheel, of any Python 3, that pip and uv download: the version that the lock names, so
#: that an index which stopped being updated does not pass, checked by the lock's hashes.
PACKAGE = "idna"

#: Environment variables that win over the files which are to be checked. Proxies and certificates
#: stay: the host needs them to reach anything.
_WINNING = (
    "PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE PIP_FIND_LINKS PIP_NO_INDEX PIP_CONSTRAINT "
    "UV_INDEX UV_DEFAULT_INDEX UV_INDEX_URL UV_EXTRA_INDEX_URL UV_FIND_LINKS UV_NO_INDEX "
    "UV_CONFIG_FILE UV_NO_CONFIG UV_OFFLINE CONDARC CONDA_CHANNELS CONDA_DEFAULT_CHANNELS "
    "CONDA_CHANNEL_ALIAS CONDA_PREFIX XDG_CONFIG_HOME"
)

# Gets five values for each file that changed, the second being its path; checks the clients whose
# files are among them. HOME is empty, so that nobody's own files stand in for the host's.
# apt: lists of its own, no hooks; what it says of addresses that are not the choice's is not held
# against the choice.
_CLIENTS = rf"""
apt= pip= uv= conda= checked=
while [ $# -gt 0 ]; do
  case $2 in
    /etc/apt/*) apt=1 ;;
    {PIP_CONF}) pip=1 ;;
    {UV_TOML}) uv=1 ;;
    {CONDARC}) conda=1 ;;
  esac
  shift 5
done
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
trap 'exit 1' HUP INT PIPE TERM
chmod 755 "$t"
cd "$t"
unset {_WINNING}
export LC_ALL=C HOME="$t"
fail() {{  # $1 client, $2 site, $3 what to do, $4 what it said, $5 exit status
  case $5 in 124) set -- "$1" "$2" "$3" "no end within the time given" ;; esac
  said=$(printf '%s' "$4" | tr -s '[:space:]' ' ' | cut -c1-300)
  echo "gpufleet: $1 cannot use $2 (${{said:-it said nothing}}); \
what was in force before is in force again; $3" >&2
  case $1 in
    apt) service=apt measured=$apt_measured ;;
    conda) service=conda measured=$conda_measured ;;
    *) service=pypi measured=$pypi_measured ;;
  esac
  if [ -n "$measured" ]; then
    {{
      awk -F '\t' -v s="$service" -v h="$2" '$2 != s || $3 != h' {REFUSED} 2>/dev/null || true
      printf '%s\t%s\t%s\t%s: %s\n' "$(date +%s)" "$service" "$2" "$1" "$said"
    }} > {REFUSED}.new
    mv -f {REFUSED}.new {REFUSED}
  fi
  exit 1
}}
if [ -n "$apt" ]; then
  mkdir -p lists/partial
  cat > apt.conf <<END
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Update::Error-Mode "any";
APT::Sandbox::User "root";
Acquire::Retries "1";
Acquire::Languages "none";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
Dir::State::lists "$t/lists";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
END
  code=0
  timeout 300 apt-get -q -c "$t/apt.conf" update > said 2>&1 || code=$?
  awk -v ours="$apt_addresses" '
    BEGIN {{ n = split(ours, ours_, " ") }}
    !/^[EW]: / || /index files failed to download|configured multiple times/ {{ next }}
    {{ mine = n == 0 || $0 !~ /https?:\/\// }}
    {{ for (i = 1; i <= n; i++) if (index($0, ours_[i])) mine = 1 }}
    mine
  ' said > ours
  if [ -s ours ] || {{ [ "$code" != 0 ] && ! grep -q '^[EW]: ' said; }}; then
    fail apt "$apt_site" "$apt_todo" "$(cat ours said | head -n 1)" "$code"
  fi
  checked="$checked apt"
fi
if [ -n "$pip" ]; then
  for python in python3 "$root/conda/bin/python"; do
    "$python" -m pip --version > /dev/null 2>&1 || continue
    code=0
    timeout 180 "$python" -m pip download -vv --no-deps --only-binary :all: --no-input \
      --no-cache-dir --disable-pip-version-check --timeout 20 --retries 1 --require-hashes \
      --dest "$t/pip" --requirement wheel > said 2>&1 || code=$?
    if [ "$code" != 0 ]; then
      line=$(grep -m 1 -o 'Could not fetch URL.*' said || grep -m 1 '^ *WARNING: Retrying' said \
        || grep '^ERROR: ' said | grep -v -m 1 Exception: || tail -n 1 said)
      fail pip "$pypi_site" "$pypi_todo" "$line" "$code"
    fi
    checked="$checked pip"
    break
  done
fi
if [ -n "$uv" ] && uv --version > /dev/null 2>&1; then
  code=0
  UV_SYSTEM_CERTS=1 UV_NO_PROGRESS=1 UV_HTTP_TIMEOUT=20 UV_HTTP_RETRIES=1 \
    timeout 180 uv pip install --quiet --no-deps --only-binary :all: --no-cache --require-hashes \
    --python "$(command -v python3)" --target "$t/uv" --requirement wheel > said 2>&1 || code=$?
  [ "$code" = 0 ] || fail uv "$pypi_site" "$pypi_todo" "$(cat said)" "$code"
  checked="$checked uv"
fi
if [ -n "$conda" ] && [ -x "$root/conda/bin/conda" ]; then
  code=0
  export CONDA_REMOTE_READ_TIMEOUT_SECS=30 CONDA_REMOTE_MAX_RETRIES=1
  {{ timeout 60 "$root/conda/bin/conda" clean --index-cache --yes --quiet &&
    timeout 900 "$root/conda/bin/conda" create --dry-run --yes --quiet --prefix "$t/env" python
  }} > said 2>&1 || code=$?
  if [ "$code" != 0 ]; then
    line=$(grep -m 1 -E '^[A-Za-z_.]*[A-Z][A-Za-z]+: ' said || grep . said | tail -n 1)
    fail conda "$conda_site" "$conda_todo" "$line" "$code"
  fi
  checked="$checked conda"
fi
echo "works with:${{checked:- no client is there yet}}"
"""


_FORGET = """
if [ -x "$conda" ]; then timeout 60 "$conda" clean --index-cache --yes --quiet || true; fi
"""


def script(
    root: str,
    requirement: str,
    choice: Choice,
    files: Iterable[ManagedFile],
    gone: Iterable[str],
    sources: AptSources,
) -> str:
    """The check of one switch, for `managed.operations.switched`.

    `files` are what the choice writes, `gone` the paths that it puts back.
    """
    sites = {service: choice.site(service) for service in ("apt", "pypi", "conda")}
    texts = {file.path: file.content for file in files}
    texts |= {path: sources.files.get(path, "") for path in gone}
    ours = apt_addresses({p: text for p, text in texts.items() if p.startswith("/etc/apt/")})
    if (apt := sites["apt"]) is not None:
        ours = tuple(uri for uri in ours if uri.startswith(apt.url("/")))
    values = {
        "root": root,
        "apt_addresses": " ".join(ours),
    }
    for service, site in sites.items():
        values[f"{service}_site"] = site.host if site else "the official site"
        pick = choice.picks.get(service)
        values[f"{service}_todo"] = _todo(pick)
        chosen = pick is not None and pick.site is not None and pick.policy != "pinned"
        values[f"{service}_measured"] = "yes" if chosen else ""
    lines = ["set -e", *(f"{name}={quote(value)}" for name, value in values.items())]
    text = "\n".join([*lines, _CLIENTS])
    return text.replace('cd "$t"\n', f'cd "$t"\nprintf %s {quote(requirement)} > wheel\n', 1)


def _todo(pick: Pick | None) -> str:
    """What a person can do where the service's site fails a client."""
    if pick is None or pick.site is None:
        return (
            "wait until it answers and apply again, or put the originals back unchecked (fleet "
            "mirrors restore)"
        )
    if pick.policy == "pinned":
        return f"set mirrors.site or mirrors.pinned.{pick.service} to another, then apply again"
    following = pick.fallbacks[0] if pick.fallbacks else "official"
    return (
        f"apply again, and {following} comes next; {pick.site.name} is left out until it is probed "
        "again (fleet mirrors probe)"
    )


def forgetting(root: str) -> str:
    """A check that always passes: conda forgets what it knows of the channels it had before."""
    return f"conda={quote(f'{root}/conda/bin/conda')}\n{_FORGET}"


def requirement(lock: str) -> str:
    """PACKAGE's entry of a lock: version and hashes. Raises FleetError if it is not there."""
    entry = re.search(rf"^{PACKAGE}==\S+(?: \\\n +--hash=\S+)+\n", lock, re.MULTILINE)
    if entry is None:
        raise FleetError(f"the lock does not name {PACKAGE}, which the check of a mirror downloads")
    return entry[0]


def apt_addresses(files: Mapping[str, str]) -> tuple[str, ...]:
    """The addresses in source files (path → text), as apt's messages have them.

    Empty where one is a list of mirrors: apt names whichever it took from it.
    """
    uris = [uri for path, text in files.items() for e in parse(path, text) for uri in e.uris]
    if any(not uri.startswith(("http://", "https://")) for uri in uris):
        return ()
    return tuple(dict.fromkeys(uri.rstrip("/") for uri in uris))
