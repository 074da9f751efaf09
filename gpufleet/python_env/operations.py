"""Operations that make the demo's environment on a host."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from io import StringIO
from shlex import quote

from pyinfra import host
from pyinfra.api import FileUploadCommand, QuoteString, RsyncCommand, StringCommand, operation

from gpufleet.apt import APT, INSTALL
from gpufleet.errors import FleetError
from gpufleet.python_env import wheelhouse
from gpufleet.python_env.conda import CONDARC, Installer, Recipe
from gpufleet.python_env.facts import CudaToolkit, EnvironmentsOnHost
from gpufleet.python_env.plan import UV_LOCK, Lock
from gpufleet.seen import changed, fresh
from gpufleet.shell import failing, script

# $1 folder of the deploy, $2 digest, $3 interpreter, then uv's options for where wheels come from.
# uv unpacks a wheel once, into its cache, and hard-links it into the environment. The marker is
# written last, so an environment that has it is whole.
_MAKE = r"""set -e
umask 022
root=$1 digest=$2 python=$3; shift 3
new=$root/envs/$digest wheels=$root/incoming/$digest
rm -rf "$new"
"$python" -m zipfile -e "$wheels"/uv-*.whl "$wheels/uv"
uv=$(ls "$wheels"/uv/uv-*.data/scripts/uv); chmod 755 "$uv"
export UV_CACHE_DIR="$root/incoming/cache" UV_PYTHON_DOWNLOADS=never
export UV_SYSTEM_CERTS=1 UV_NO_PROGRESS=1 UV_HTTP_RETRIES=5
"$uv" venv --quiet --no-project --python "$python" "$new"
"$uv" pip sync --quiet --python "$new/bin/python" --require-hashes "$@" "$wheels/requirements.lock"
"$uv" pip check --quiet --python "$new/bin/python"
rm -f "$new/.lock"  # uv leaves it writable for everybody
printf '%s\n' "$digest" > "$new/.whole"
rm -rf "$root/incoming/cache" "$wheels"
"""


# Downloads conda's installer, continuing what was cut off, from the first address whose file has
# the checksum. $1 folder of the deploy, $2 sha256, then addresses.
_FETCH = r"""
umask 022
root=$1 sha=$2 file=$1/incoming/conda-$2.sh; shift 2
right() { [ -f "$1" ] && [ "$(sha256sum < "$1" | cut -d' ' -f1)" = "$sha" ]; }
mkdir -p "$root/incoming" || exit
right "$file" && exit 0
why=
for url in "$@"; do
  for pause in 0 2 8; do
    sleep $pause
    said=$(curl -fsSL --connect-timeout 15 --speed-limit 1024 --speed-time 60 -C - \
      -o "$file.part" "$url" 2>&1); code=$?
    right "$file.part" && mv "$file.part" "$file" && exit 0
    [ $code = 22 ] && break  # 4xx: asking again changes nothing
    [ $code = 23 ] && { echo "$said: No space left on device" >&2; exit 1; }
    [ $code = 0 ] && { said="it has another checksum"; rm -f "$file.part"; break; }
  done
  rm -f "$file.part"
  why="$why$url: ${said#curl: }; "
done
echo "no site gave conda's installer: ${why}set mirrors.site to another, or python_env.installer \
to a file on the laptop" >&2
exit 1
"""

# Installs conda, or updates a whole one; a half-made one goes first. The marker is written last.
# $1 folder of the deploy, $2 sha256, $3 text of its .condarc.
_CONDA = r"""
umask 022
conda=$1/conda file=$1/incoming/conda-$2.sh log=$1/incoming/conda-$2.log
if [ "$(sha256sum < "$file" | cut -d' ' -f1)" != "$2" ]; then
  rm -f "$file"
  echo "conda's installer has another sha256 than $2: check python_env.installer and \
python_env.installer_sha256; it was not run" >&2
  exit 1
fi
[ -s "$conda/.whole" ] || rm -rf "$conda"
rm -f "$conda/.whole"
unset CONDARC CONDA_PREFIX CONDA_CHANNELS PYTHONPATH PYTHONHOME
export CONDA_REGISTER_ENVS=false
bash "$file" -b -u -p "$conda" < /dev/null > "$log" 2>&1 || {
  why=$(grep -i 'no space left\|error' "$log" | head -n 1)
  echo "conda's installer failed: ${why:-$(tail -n 1 "$log")}; mend that, then apply again" >&2
  exit 1
}
printf '%s' "$3" > "$conda/.condarc" && "$conda/bin/conda" --version > /dev/null &&
  printf '%s\n' "$2" > "$conda/.whole" && rm -f "$file" "$log"
"""

# What the two scripts that make an environment with conda begin with: the part that conda makes.
# Half-made it has no marker and is made anew; packages that were downloaded are in conda's cache.
# $1 folder of the deploy, $2 digest, $3 name.
_FROM_CONDA = r"""
umask 022
root=$1 digest=$2 name=$3; shift 3
new=$root/envs/$digest files=$root/incoming/$digest
export CONDA_REGISTER_ENVS=false PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset CONDARC CONDA_PREFIX CONDA_CHANNELS PYTHONPATH PYTHONHOME
say() {  # $1 what failed, $2 its output, $3 what to do
  why=$(grep -i 'no space left' "$2" | head -n 1)
  [ -n "$why" ] || why=$(sed -n '/^[A-Za-z]*\(Error\|Channel\|NotFound\|Exception\): /,$p' "$2" |
    tr -s '\n\t ' ' ' | cut -c 1-220)
  [ -n "$why" ] || why=$(grep -i '^error\|^ERROR\|error:' "$2" | head -n 1 | cut -c 1-220)
  echo "$1: ${why:-$(tail -n 1 "$2")}; $3" >&2
  exit 1
}
mkdir -p "$root/envs" || exit
if [ "$(cat "$new/.conda" 2>/dev/null)" != "$digest" ] || [ ! -x "$new/bin/python" ]; then
  rm -rf "$new"
  "$root/conda/bin/conda" env create --quiet --prefix "$new" --file "$files/environment.yml" \
    < /dev/null > "$files/log" 2>&1 || {
    rm -rf "$new"
    say "conda cannot make environment $name" "$files/log" \
      "choose packages that the channels have, or another mirrors.site"
  }
  printf '%s\n' "$digest" > "$new/.conda" || exit
fi
rm -f "$new/.whole"
python=$new/bin/python
"$python" -m zipfile -e "$files"/uv-*.whl "$files/uv" || exit
uv=$(ls "$files"/uv/uv-*.data/scripts/uv); chmod 755 "$uv"
export UV_CACHE_DIR="$root/incoming/cache" UV_PYTHON_DOWNLOADS=never
export UV_SYSTEM_CERTS=1 UV_NO_PROGRESS=1 UV_HTTP_RETRIES=5
whole() {
  "$uv" pip check --quiet --python "$python" > "$files/log" 2>&1 || [ "$1" = unchecked ] ||
    say "environment $name does not fit together" "$files/log" "correct its pip packages"
  printf '%s\n' "$digest" > "$new/.whole" && ln -sfn "$digest" "$root/envs/$name" &&
    rm -rf "$root/incoming/cache" "$files"
}
"""

# The pip part is a lock. Then uv's options for where wheels come from.
_CONDA_LOCKED = (
    _FROM_CONDA
    + r"""
todo="apply again: what came is kept"
case " $* " in *" --offline "*) ;; *) todo="$todo, or set python_env.source to wheelhouse";; esac
"$uv" pip install --quiet --python "$python" --require-hashes "$@" \
  -r "$files/requirements.lock" > "$files/log" 2>&1 ||
  say "uv cannot install the packages of $name" "$files/log" "$todo"
whole checked
"""
)

# The pip part is a list: resolved once, then every package by itself into a folder that stays until
# the environment is whole, so that a flaky line goes on where it was; then installed from there.
# Then pip's options for where torch's builds for CUDA come from.
_CONDA_LISTED = (
    _FROM_CONDA
    + r"""
house=$files/house got=$files/got; mkdir -p "$house" "$got" || exit
get() {  # $1 requirement, then pip's command and options
  line=$1; shift
  [ -e "$got/$line" ] && return
  for pause in 0 2 8 20; do
    sleep $pause
    "$python" -m pip --retries 3 --timeout 30 --cache-dir "$root/incoming/cache/pip" "$@" "$line" \
      < /dev/null > "$files/log" 2>&1 && { : > "$got/$line"; return; }
    grep -qi 'no space left\|No matching distribution' "$files/log" && break
  done
  say "pip cannot get $line for environment $name" "$files/log" "apply again: what came is kept"
}
while read -r line; do
  get "$line" download --no-deps --only-binary :all: "$@" --dest "$house"
done < "$files/torch.txt"
cat "$files/torch.txt" "$files/requirements.txt" > "$files/wanted.txt"
[ -s "$files/resolved.txt" ] || {
  "$uv" pip compile --quiet --no-header --no-annotate --python "$python" --find-links "$house" \
    -o "$files/resolving.txt" "$files/wanted.txt" > "$files/log" 2>&1 || {
    grep -qi 'failed to fetch\|error sending request\|timed out\|no space left' "$files/log" &&
      say "the index does not answer for environment $name" "$files/log" "apply again"
    say "no versions satisfy environment $name" "$files/log" "correct its pip packages"
  }
  mv "$files/resolving.txt" "$files/resolved.txt" || exit
}
grep -v '+\|^[[:space:]]*$' "$files/resolved.txt" > "$files/plain.txt"
cat "$files/alone.txt" >> "$files/plain.txt"
while read -r line; do
  get "$line" wheel --quiet --no-deps --find-links "$house" --wheel-dir "$house"
done < "$files/plain.txt"
cat "$files/torch.txt" "$files/plain.txt" > "$files/all.txt"
"$uv" pip install --quiet --python "$python" --offline --no-index --find-links "$house" --no-deps \
  -r "$files/all.txt" > "$files/log" 2>&1 ||
  say "uv cannot install the packages of $name" "$files/log" "apply again"
# A package that was installed without its dependencies pins others.
if [ -s "$files/alone.txt" ]; then whole unchecked; else whole checked; fi
"""
)

# $1 the packages' address without the distribution, $2 CUDA such as 11.8.
_TOOLKIT = (
    r"""
. /etc/os-release
from="$1/$ID$(echo "$VERSION_ID" | tr -d .)/x86_64" package=cuda-toolkit-$(echo "$2" | tr . -)
dpkg-query -W -f '${db:Status-Status}' cuda-keyring 2>/dev/null | grep -qx installed || {
  new=$(mktemp --suffix=.deb) || exit
  curl -fsSL --retry 3 -o "$new" "$from/cuda-keyring_1.1-1_all.deb" || {
    rm -f "$new"
    echo "no keyring of NVIDIA's repository at $from: unset python_env.cuda_toolkit, or use a \
system that NVIDIA has packages for" >&2; exit 1; }
  dpkg -i "$new"; code=$?; rm -f "$new"; [ $code = 0 ] || exit $code
}
"""
    + f"{APT} update || exit\n"
    + r"""
[ -n "$(apt-cache policy "$package" | sed -n 's/^ *Candidate: //p' | grep -v none)" ] || {
  echo "NVIDIA has no $package for $ID $VERSION_ID: choose another python_env.cuda_toolkit" >&2
  exit 1; }
"""
    + f'{INSTALL} "$package" && ldconfig\n'
)


@operation()
def environment(
    *, root: str, lock: Lock, from_index: bool, torch_index: str
) -> Generator[RsyncCommand | FileUploadCommand | StringCommand]:
    """Make the environment of a lock at ROOT/envs/DIGEST, unless it is there and whole.

    The operator's pip downloads the wheels, once for all hosts, and rsync brings them. With
    `from_index` it brings uv's own alone, and the host downloads the rest for itself.
    """
    if lock.digest in fresh(EnvironmentsOnHost, root=root).whole:
        host.noop(f"environment {lock.digest} is whole")
        return
    changed()
    incoming = f"{root}/incoming/{lock.digest}"
    if not (yield from _bring(incoming, [UV_LOCK] if from_index else [UV_LOCK, lock], torch_index)):
        return
    options = _where(incoming, lock, torch_index if from_index else None)
    yield FileUploadCommand(StringIO(lock.text), f"{incoming}/requirements.lock")
    yield script(_MAKE, root, lock.digest, f"/usr/bin/{lock.python}", *options)


def _bring(
    incoming: str, locks: Sequence[Lock], torch_index: str
) -> Generator[RsyncCommand | StringCommand, None, bool]:
    """Bring the wheels of the locks to a folder of the host; False if they cannot be had here."""
    # First of all, so that finding out what would change does not start a download.
    yield StringCommand("mkdir -p", QuoteString(incoming))
    try:
        folders = [wheelhouse.build(lock, torch_index) for lock in locks]
    except FleetError as error:
        yield failing(str(error))
        return False
    # Wheels are compressed already; what a cut-off transfer brought is kept and continued.
    sources = " ".join(quote(f"{folder}/") for folder in folders)
    flags = ["-rt", "--partial", "--include='*.whl'", "--exclude='*'", "--chmod=F644,D755"]
    yield RsyncCommand(sources, quote(f"{incoming}/"), flags)
    return True


def _where(incoming: str, lock: Lock, torch_index: str | None) -> list[str]:
    """uv's options for where a lock's wheels are: brought, or with an index of torch's builds to be
    had beside the default one where the lock names such builds."""
    if torch_index is None:
        return ["--offline", "--no-index", "--find-links", incoming]
    if not lock.split()[1]:
        # uv would take 2.13.0+cpu for a better 2.13.0, and then miss its hash in the lock.
        return []
    # Safe beside the default index: every file must have the hash that the lock names.
    return ["--index", torch_index, "--index-strategy", "unsafe-best-match"]


@operation()
def conda(*, root: str, installer: Installer) -> Generator[RsyncCommand | StringCommand]:
    """Install conda at ROOT/conda, update it to another installer, or repair what is half made.

    Batch mode: nothing is asked, and nothing outside of ROOT is written.
    """
    if fresh(EnvironmentsOnHost, root=root).conda == installer.sha256:
        host.noop(f"{installer.kind} is whole")
        return
    changed()
    incoming = f"{root}/incoming"
    yield StringCommand("mkdir -p", QuoteString(incoming))
    if installer.path is not None:
        flags = ["-t", "--partial", "--chmod=F644"]
        target = f"{incoming}/conda-{installer.sha256}.sh"
        yield RsyncCommand(quote(str(installer.path)), quote(target), flags)
    else:
        yield script(_FETCH, root, installer.sha256, *installer.urls)
    yield script(_CONDA, root, installer.sha256, CONDARC)


@operation()
def conda_environment(
    *, root: str, recipe: Recipe, from_index: bool, torch_index: str, torch: Sequence[str] = ()
) -> Generator[RsyncCommand | FileUploadCommand | StringCommand]:
    """Make an environment with conda at ROOT/envs/DIGEST, unless it is there and whole.

    The pip part of a lock comes as `environment` says; that of a list is downloaded by the host,
    torch's builds for CUDA by pip's options `torch`.
    """
    digest = recipe.digest
    if digest in fresh(EnvironmentsOnHost, root=root).whole:
        host.noop(f"environment {recipe.name} {digest} is whole")
        return
    changed()
    incoming = f"{root}/incoming/{digest}"
    locks = [UV_LOCK] if from_index or recipe.lock is None else [UV_LOCK, recipe.lock]
    if not (yield from _bring(incoming, locks, torch_index)):
        return
    yield FileUploadCommand(StringIO(recipe.environment_yml), f"{incoming}/environment.yml")
    if recipe.lock is not None:
        options = _where(incoming, recipe.lock, torch_index if from_index else None)
        yield FileUploadCommand(StringIO(recipe.lock.text), f"{incoming}/requirements.lock")
        yield script(_CONDA_LOCKED, root, digest, recipe.name, *options)
        return
    alone = "".join(f"{line}\n" for line in recipe.alone)
    lists = {"requirements": recipe.requirements, "torch": recipe.torch, "alone": alone}
    for name, text in lists.items():
        yield FileUploadCommand(StringIO(text), f"{incoming}/{name}.txt")
    yield script(_CONDA_LISTED, root, digest, recipe.name, *torch)


@operation()
def cuda_toolkit(*, version: str, address: str) -> Generator[StringCommand]:
    """Install a CUDA toolkit without a driver from NVIDIA's repository, and have the dynamic linker
    know its libraries; `address` is that of the distributions' folders."""
    state = host.get_fact(CudaToolkit, version=version)
    if state == "ready":
        host.noop(f"CUDA toolkit {version} is installed")
    elif state == "unlinked":
        yield StringCommand("ldconfig")
    else:
        yield script(_TOOLKIT, address, version)


@operation()
def prune(*, root: str, keep: Sequence[str]) -> Generator[StringCommand]:
    """Remove environments that nothing asks for any more, and names of such; `keep` are in use."""
    others = sorted(fresh(EnvironmentsOnHost, root=root).all - set(keep))
    if not others:
        host.noop("no other environments")
        return
    changed()
    yield StringCommand("rm -rf", *(QuoteString(f"{root}/envs/{digest}") for digest in others))
    yield StringCommand("find", QuoteString(f"{root}/envs"), "-maxdepth 1 -xtype l -delete")
