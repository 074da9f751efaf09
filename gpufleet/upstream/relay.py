"""Takes one commit of upstream's code from a copy on the operator's machine, for hosts without a
way out: a repository, a bundle or a tarball becomes one pack of objects named by content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs

from gpufleet.errors import FleetError

#: Author and date of the commit that stands for a tarball: the same files make the same commit.
_MADE = {
    "GIT_AUTHOR_NAME": "gpufleet",
    "GIT_AUTHOR_EMAIL": "gpufleet@localhost",
    "GIT_AUTHOR_DATE": "1700000000 +0000",
    "GIT_COMMITTER_NAME": "gpufleet",
    "GIT_COMMITTER_EMAIL": "gpufleet@localhost",
    "GIT_COMMITTER_DATE": "1700000000 +0000",
}

_this_process = threading.Lock()


@dataclass(frozen=True)
class Relayed:
    """A commit as it goes to hosts."""

    head: str
    """What git checks out there: the commit itself, or the one that stands for a tarball."""
    pack: bytes


def relayed(source: str, commit: str, sha256: str | None) -> Relayed:
    """The commit's pack, from what `upstream.source` names; made once a run.

    Raises FleetError, one line, where the copy does not have the commit, or is not what was seen
    of it before.
    """
    with _this_process:
        return _relayed(source, commit, sha256)


@cache
def _relayed(source: str, commit: str, sha256: str | None) -> Relayed:
    path = Path(source).expanduser()
    if path.is_dir():
        return _packed(path, commit, commit, path)
    if not path.is_file():
        raise FleetError(f"setting upstream.source: no {path} on this machine")
    with _scratch() as folder:
        if tarfile.is_tarfile(path):
            head = _from_tarball(path, commit, sha256, folder)
        elif not path.read_bytes().startswith(b"# v"):
            raise FleetError(
                f"setting upstream.source: {path} is no git repository, bundle or tarball: "
                "download it again"
            )
        else:
            _git(path, folder, "fetch", "--quiet", str(path.resolve()), "+refs/*:refs/bundle/*")
            head = commit
        return _packed(folder, head, commit, path)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpufleet-") as name:
        folder = Path(name)
        _git(folder, folder, "init", "--quiet")
        yield folder


def _git(about: Path, folder: Path, *words: str, given: bytes = b"") -> bytes:
    """Run git in a folder. Raises FleetError, with git's own last line about `about`."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.autocrlf=false", *words],
            input=given,
            capture_output=True,
            check=False,
            env={**os.environ, **_MADE, "GIT_TERMINAL_PROMPT": "0"},
        )
    except FileNotFoundError:
        raise FleetError("setting upstream.source: this machine has no git: install git") from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it failed"]
        why = next((line for line in lines if line.startswith("fatal: ")), lines[-1])
        raise FleetError(f"setting upstream.source: {about}: {why.removeprefix('fatal: ')}")
    return done.stdout


def _packed(folder: Path, head: str, commit: str, about: Path) -> Relayed:
    """The commit without its history, every object that it is made of."""
    try:
        _git(about, folder, "cat-file", "-e", f"{head}^{{commit}}")
        objects = _git(about, folder, "rev-list", "--objects", "--no-walk", f"{head}^{{tree}}")
    except FleetError as error:
        if "not a git repository" in str(error) or "no git" in str(error):
            raise
        raise FleetError(
            f"setting upstream.source: {about} does not have commit {commit}: fetch it there, or "
            "set upstream.commit to one that it has"
        ) from None
    names = f"{head}\n".encode() + objects
    return Relayed(head, _git(about, folder, "pack-objects", "--quiet", "--stdout", given=names))


def _from_tarball(path: Path, commit: str, sha256: str | None, folder: Path) -> str:
    """Make a commit of a tarball's files. Raises FleetError where it is of another commit."""
    _expect(path, commit, hashlib.sha256(path.read_bytes()).hexdigest(), sha256)
    tree = folder / "tree"
    tree.mkdir()
    try:
        with tarfile.open(path) as tar:
            said = tar.pax_headers.get("comment", "")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise FleetError(f"setting upstream.source: {path}: {error}: download it again") from None
    if re.fullmatch(r"[0-9a-f]{40}", said) and said != commit:
        raise FleetError(
            f"setting upstream.source: {path} is of commit {said}, not {commit}: download that "
            "one's, or set upstream.commit"
        )
    # tar itself, which writes nothing outside the folder: tarfile's filter came with 3.11.4.
    done = subprocess.run(
        ["tar", "-x", "-f", str(path.resolve()), "-C", str(tree)], capture_output=True, check=False
    )
    if done.returncode != 0:
        why = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it failed"]
        raise FleetError(
            f"setting upstream.source: {path} cannot be unpacked ({why[0]}): download it again"
        )
    inside = list(tree.iterdir())
    if len(inside) == 1 and inside[0].is_dir():
        (tree,) = inside
    if not (tree / "demo.py").is_file():
        raise FleetError(f"setting upstream.source: {path} has no demo.py: it is something else")
    work = f"--work-tree={tree}"
    _git(path, folder, f"--git-dir={folder / '.git'}", work, "add", "--all", "--force", ".")
    made = _git(path, folder, "write-tree").decode().strip()
    head = _git(path, folder, "commit-tree", "-m", f"files of {commit}", made)
    return head.decode().strip()


def _expect(path: Path, commit: str, digest: str, sha256: str | None) -> None:
    """See that a tarball is the one that the setting, or the first sight, says; note a first one.

    Raises FleetError where it is another.
    """
    note = platformdirs.user_data_path("gpufleet") / "upstream" / f"{commit}.json"
    if sha256 is not None:
        if digest != sha256:
            raise FleetError(
                f"setting upstream.sha256: {path} has sha256 {digest}: download it again, or "
                "correct the setting"
            )
        return
    try:
        seen = str(json.loads(note.read_text("utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        note.parent.mkdir(parents=True, exist_ok=True)
        aside = note.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps({"sha256": digest, "file": path.name}), "utf-8")
        aside.replace(note)
        return
    if seen != digest:
        raise FleetError(
            f"setting upstream.source: {path} has sha256 {digest}, the first one seen of commit "
            f"{commit} had {seen}: download it again; if it is right, set upstream.sha256"
        )
