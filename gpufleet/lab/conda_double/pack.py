"""Packs the channel and the installer of the lab's conda, run by the very python that it packs.

usage: python pack.py PREFIX WHEELS SOURCES OUT

PREFIX is a relocatable python, WHEELS holds pip's and those that the double's conda needs, SOURCES
is this folder, OUT becomes what a mirror site has below /anaconda.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from conda_package_streaming.create import conda_builder
from rattler.index import index_fs

#: What conda replaces by an environment's own folder: as long as conda-build makes it (255).
PLACEHOLDER = ("/opt/conda_double_placeholder" + "_placehold" * 25)[:255]
#: A conda of this version is what the double speaks like.
VERSION = "24.9.2"
INSTALLER = "Miniconda3-latest-Linux-x86_64.sh"
#: What the double's own conda imports.
OWN_WHEELS = ("py_rattler", "pyyaml")
TIME = 1700000000


def main(prefix: Path, wheels: Path, sources: Path, out: Path) -> None:
    """Make OUT: pkgs/main, cloud/conda-forge and miniconda/, each as mirror sites lay them out."""
    version = ".".join(map(str, sys.version_info[:3]))
    forge = out / "cloud" / "conda-forge"
    for subdir in ("linux-64", "noarch"):
        (forge / subdir).mkdir(parents=True)
    package(forge / "linux-64", python_package(version), tree(prefix))
    package(forge / "noarch", *pip_package(only(wheels, "pip-")))
    asyncio.run(index_fs(forge, write_shards=False))
    shutil.copytree(forge, out / "pkgs" / "main")
    write_installer(prefix, wheels, sources, out / "miniconda")


def only(wheels: Path, start: str) -> Path:
    (found,) = (path for path in wheels.glob("*.whl") if path.name.lower().startswith(start))
    return found


Entry = tuple[str, bytes, int] | tuple[str, str, None]
"""A file's path, bytes and mode, or a link's path and target."""


def tree(prefix: Path) -> list[Entry]:
    """The files of a prefix; a script that names its interpreter gets the placeholder."""
    found: list[Entry] = []
    for path in sorted(prefix.rglob("*")):
        name = path.relative_to(prefix).as_posix()
        if path.is_symlink():
            found.append((name, str(path.readlink()), None))
        elif path.is_file():
            content = path.read_bytes()
            if content.startswith(b"#!/usr/bin/python3.11"):
                content = content.replace(b"/usr/bin", f"{PLACEHOLDER}/bin".encode(), 1)
            found.append((name, content, path.stat().st_mode & 0o777))
    return found


def python_package(version: str) -> dict[str, Any]:
    build = "0_debian_cpython"
    named = {"name": "python", "version": version, "build": build, "build_number": 0}
    return {**named, "depends": [], "subdir": "linux-64", "arch": "x86_64", "platform": "linux"}


def pip_package(wheel: Path) -> tuple[dict[str, Any], list[Entry]]:
    """pip as conda-forge has it: for any platform, its commands made when it is linked."""
    entries: list[Entry] = []
    with zipfile.ZipFile(wheel) as opened:
        for name in sorted(opened.namelist()):
            if not name.endswith("/"):
                entries.append((f"site-packages/{name}", opened.read(name), 0o644))
    version = wheel.name.split("-")[1]
    named = {"name": "pip", "version": version, "build": "pyh_0", "build_number": 0}
    index = {**named, "depends": ["python >=3.10"], "subdir": "noarch", "noarch": "python"}
    return {**index, "arch": None, "platform": None}, entries


def package(folder: Path, index: dict[str, Any], entries: list[Entry]) -> None:
    """Write one .conda archive: a zip of two zstd tarballs, with info/index.json, paths.json …"""
    paths = [described(*entry) for entry in entries]
    stem = f"{index['name']}-{index['version']}-{index['build']}"
    info: dict[str, Any] = {
        "index.json": {**index, "license": "see the package", "timestamp": TIME * 1000},
        "paths.json": {"paths": paths, "paths_version": 1},
        "about.json": {"summary": "made for a throwaway lab from Debian's or PyPI's package"},
    }
    if index.get("noarch") == "python":
        points = [f"{name} = pip._internal.cli.main:main" for name in ("pip", "pip3")]
        noarch = {"type": "python", "entry_points": points}
        info["link.json"] = {"noarch": noarch, "package_metadata_version": 1}
    with conda_builder(stem, folder) as archive:
        for name, content, mode in entries:
            add(archive, name, content, mode)
        for name, value in info.items():
            add(archive, f"info/{name}", json.dumps(value, indent=1).encode(), 0o644)
        files = "".join(f"{path['_path']}\n" for path in paths)
        add(archive, "info/files", files.encode(), 0o644)


def described(name: str, content: bytes | str, mode: int | None) -> dict[str, Any]:
    if isinstance(content, str):
        empty = hashlib.sha256(b"").hexdigest()
        return {"_path": name, "path_type": "softlink", "sha256": empty, "size_in_bytes": 0}
    found: dict[str, Any] = {"_path": name, "path_type": "hardlink"}
    found |= {"sha256": hashlib.sha256(content).hexdigest(), "size_in_bytes": len(content)}
    if PLACEHOLDER.encode() in content:
        found |= {"prefix_placeholder": PLACEHOLDER, "file_mode": "text"}
    return found


def add(archive: tarfile.TarFile, name: str, content: bytes | str, mode: int | None) -> None:
    member = tarfile.TarInfo(name)
    member.mtime = TIME
    if isinstance(content, str):
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, content, 0o777
        archive.addfile(member)
        return
    member.size, member.mode = len(content), mode or 0o644
    archive.addfile(member, io.BytesIO(content))


def write_installer(prefix: Path, wheels: Path, sources: Path, folder: Path) -> None:
    """The header with its sizes filled in, then a tar.gz of python and conda; and a checksum."""
    payload = io.BytesIO()
    site = "lib/python3.11/site-packages"
    with tarfile.open(fileobj=payload, mode="w:gz", compresslevel=6) as archive:
        for name, content, mode in tree(prefix):
            add(archive, name, content, mode)
        for start in OWN_WHEELS:
            with zipfile.ZipFile(only(wheels, start)) as opened:
                for name in (each for each in opened.namelist() if not each.endswith("/")):
                    add(archive, f"{site}/{name}", opened.read(name), 0o644)
        add(archive, "lib/conda_double/conda.py", (sources / "conda.py").read_bytes(), 0o644)
    header = (sources / "installer.sh").read_text("utf-8").replace("@END@\n", "")
    header = header.replace("@VERSION@", VERSION)
    length = len(header.encode())
    numbers = {"@@@FROM@@@": length + 1, "@@@SIZE@@@": length + len(payload.getvalue())}
    for mark, number in numbers.items():  # as long as the mark, so that nothing moves
        header = header.replace(mark, f"{number:0{len(mark)}d}")
    whole = header.encode() + payload.getvalue()
    folder.mkdir(parents=True)
    (folder / INSTALLER).write_bytes(whole)
    (folder / INSTALLER).chmod(0o755)
    checksum = hashlib.sha256(whole).hexdigest()
    (folder / f"{INSTALLER}.sha256").write_text(f"{checksum}  {INSTALLER}\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
