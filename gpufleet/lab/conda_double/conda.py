"""The lab's own conda: conda 24's command line, files and messages over py-rattler's solver."""

from __future__ import annotations

import argparse
import asyncio
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rattler import (
    Channel,
    MatchSpec,
    PrefixRecord,
    RepoDataRecord,
    SparseRepoData,
    VirtualPackage,
    install,
    solve,
)
from rattler.exceptions import InstallerError, InvalidMatchSpecError, LinkError, SolverError

VERSION = "24.9.2"
ROOT = Path(sys.prefix)
SUBDIRS = ("linux-64", "noarch")
AGENT = f"conda/{VERSION} requests/2.32.3 CPython/{sys.version.split()[0]} Linux/lab"
LISTS, MAPS = (
    ("channels", "default_channels", "pkgs_dirs", "envs_dirs"),
    (
        "custom_channels",
        "custom_multichannels",
    ),
)


class CondaError(Exception):
    """What conda prints as `NAME: message` before it exits with 1."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


# --- configuration: docs.conda.io, "Using the .condarc conda configuration file" ---------------


def rc_paths() -> list[Path]:
    """Where configuration is looked for, weakest first."""
    home, prefix = Path.home(), os.environ.get("CONDA_PREFIX")
    folders = [Path("/etc/conda"), Path("/var/lib/conda"), ROOT]
    folders += [home / ".config" / "conda", home / ".conda"]
    found = [path for folder in folders for path in (folder / ".condarc", folder / "condarc")]
    found += [home / ".condarc"]
    if prefix:
        found += [Path(prefix) / ".condarc", Path(prefix) / "condarc"]
    if "CONDARC" in os.environ:
        found.append(Path(os.environ["CONDARC"]))
    return list(dict.fromkeys(found))


def sources() -> dict[str, dict[str, Any]]:
    """What each file, then the environment, says."""
    found: dict[str, dict[str, Any]] = {}
    for path in rc_paths():
        if path.is_file():
            try:
                said = yaml.safe_load(path.read_text("utf-8")) or {}
            except yaml.YAMLError as error:
                raise CondaError(
                    "ConfigurationLoadError",
                    f"Unable to load configuration file.\n  path: {path}\n"
                    f"  reason: {' '.join(str(error).split())}",
                ) from None
            found[str(path)] = said
    variables: dict[str, Any] = {}
    for key in (*LISTS, "channel_alias", "ssl_verify"):
        if value := os.environ.get(f"CONDA_{key.upper()}"):
            variables[key] = value.split(",") if key in LISTS else value
    if variables:
        found["envvars"] = variables
    return found


def configuration() -> dict[str, Any]:
    """All sources as one: lists put the strongest source first, maps take its keys."""
    merged: dict[str, Any] = {}
    for said in sources().values():
        for key, value in said.items():
            if key in LISTS:
                given = [value] if isinstance(value, str) else list(value or [])
                merged[key] = list(dict.fromkeys([*given, *merged.get(key, [])]))
            elif key in MAPS:
                merged[key] = {**merged.get(key, {}), **(value or {})}
            else:
                merged[key] = value
    merged.setdefault("channels", ["defaults"])
    merged.setdefault("channel_alias", Channel("x").base_url.rstrip("/").removesuffix("/x"))
    return merged


def urls(channel: str, config: dict[str, Any]) -> list[str]:
    """The addresses that a channel's name stands for."""
    alias = str(config["channel_alias"]).rstrip("/")
    if re.match(r"^[a-z][a-z0-9+.-]*://", channel):
        return [channel.rstrip("/")]
    if channel.startswith(("/", "./", "~/")):
        return [Path(channel).expanduser().absolute().as_uri()]
    many = config.get("custom_multichannels", {})
    many = {"defaults": config.get("default_channels") or [f"{alias}/main"], **many}
    if channel in many:
        return [url for one in many[channel] for url in urls(one, config)]
    first = channel.split("/")[0]
    for name in (channel, first):
        if name in config.get("custom_channels", {}):
            base = str(config["custom_channels"][name]).rstrip("/")
            return urls(base, config) if base.endswith(f"/{channel}") else [f"{base}/{channel}"]
    return [f"{alias}/{channel}"]


def pkgs_dir(config: dict[str, Any]) -> Path:
    """Where packages and indexes are kept."""
    given = config.get("pkgs_dirs") or [str(ROOT / "pkgs")]
    return Path(str(given[0])).expanduser()


# --- fetching ----------------------------------------------------------------------------------


def http_error(url: str, error: Exception) -> CondaError:
    """The words that conda has for a request that failed."""
    if isinstance(error, urllib.error.HTTPError):
        head = f"HTTP {error.code} {str(error.reason).upper()} for url <{url}>"
    else:
        head = f"HTTP 000 CONNECTION FAILED for url <{url}>"
    return CondaError(
        "CondaHTTPError",
        f"{head}\nElapsed: -\n\nAn HTTP error occurred when trying to retrieve this URL.\n"
        "HTTP errors are often intermittent, and a simple retry will get you on your way.\n",
    )


def opened(url: str) -> Any:
    return urllib.request.urlopen(
        urllib.request.Request(url, headers={"User-Agent": AGENT}), timeout=60
    )


def index(channel: str, subdir: str, kept: Path) -> Path:
    """repodata.json of a channel's folder: the kept one while its max-age lasts, else fetched."""
    url = f"{channel}/{subdir}/repodata.json"
    stem = hashlib.md5(url.encode(), usedforsecurity=False).hexdigest()[:8]
    path, info = kept / "cache" / f"{stem}.json", kept / "cache" / f"{stem}.info.json"
    if path.exists() and info.exists() and time.time() < json.loads(info.read_text())["until"]:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with opened(url) as answer:
            text = answer.read()
            control = answer.headers.get("Cache-Control", "")
    except urllib.error.HTTPError as error:
        if error.code not in (403, 404):
            raise http_error(url, error) from None
        if subdir == "noarch":
            said = f"HTTP {error.code} {str(error.reason).upper()}"
            name = "/".join(channel.split("/")[3:]) or channel
            raise CondaError(
                "UnavailableInvalidChannel",
                f"{said} for channel {name} <{channel}>\n\n"
                "The channel is not accessible or is invalid.\n\n"
                "You will need to adjust your conda configuration to proceed.\n"
                "Use `conda config --show channels` to view your configuration's current state,\n"
                "and use `conda config --show-sources` to view config file locations.\n",
            ) from None
        text, control = b'{"packages": {}, "packages.conda": {}}', ""
    except urllib.error.URLError as error:
        if isinstance(error.reason, FileNotFoundError) or "No such file" in str(error.reason):
            missing = f"The channel is not accessible or is invalid: {channel}/{subdir}"
            raise CondaError("UnavailableInvalidChannel", missing) from None
        raise http_error(url, error) from None
    except OSError as error:
        raise http_error(url, error) from None
    try:
        said = json.loads(text)
        said["packages"], said.get("packages.conda")
    except (ValueError, KeyError, TypeError):
        raise CondaError(
            "CondaHTTPError", f"Invalid index file: {url}: no repodata in what it answered"
        ) from None
    path.write_bytes(text)
    age = re.search(r"max-age=(\d+)", control)
    info.write_text(json.dumps({"url": url, "until": time.time() + int(age[1] if age else 0)}))
    return path


def fetch(record: RepoDataRecord, kept: Path) -> Path:
    """The package's archive in the kept folder, its checksum right."""
    path = kept / record.file_name
    wanted = record.sha256.hex() if record.sha256 else ""
    if path.exists() and digest(path) == wanted:
        return path
    part = path.with_name(path.name + ".partial")
    try:
        with opened(record.url) as answer, part.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    except urllib.error.URLError as error:
        raise http_error(record.url, error) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise http_error(record.url, error) from None
    if digest(part) != wanted:
        raise CondaError(
            "ChecksumMismatchError",
            f"Conda detected a mismatch between the expected content and downloaded content\n"
            f"for url '{record.url}'.\n  download saved to: {part}\n"
            f"  expected sha256: {wanted}\n  actual sha256: {digest(part)}\n",
        )
    part.rename(path)
    return path


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- environments ------------------------------------------------------------------------------


def solved(specs: Sequence[str], channels: Sequence[str], kept: Path) -> list[RepoDataRecord]:
    """What the specs come to, from the channels in this order."""
    config = configuration()
    addresses = list(dict.fromkeys(url for name in channels for url in urls(name, config)))
    say("Collecting package metadata (repodata.json): ", end="")
    found = [
        SparseRepoData(Channel(url), subdir, index(url, subdir, kept))
        for url in addresses
        for subdir in SUBDIRS
    ]
    say("done\nSolving environment: ", end="")
    try:
        wanted = [MatchSpec(spec) for spec in specs]
    except InvalidMatchSpecError as error:
        raise CondaError("InvalidMatchSpec", str(error)) from None
    named = {str(name.normalized) for data in found for name in map(_name, data.package_names())}
    missing = [
        spec for spec in specs if _name(re.split(r"[ =<>!~]", spec)[0]).normalized not in named
    ]
    if missing:
        listed = "\n".join(f"  - {spec}" for spec in missing)
        current = "\n".join(f"  - {url}" for url in addresses)
        raise CondaError(
            "PackagesNotFoundError",
            f"The following packages are not available from current channels:\n\n{listed}\n\n"
            f"Current channels:\n\n{current}\n",
        )
    try:
        records = asyncio.run(
            solve(sources=found, specs=wanted, virtual_packages=VirtualPackage.detect())
        )
    except SolverError as error:
        raise CondaError(
            "LibMambaUnsatisfiableError", f"Encountered problems while solving:\n  - {error}\n"
        ) from None
    say("done\n")
    return records


def _name(text: str) -> Any:
    from rattler import PackageName

    return PackageName(text)


def make(prefix: Path, specs: Sequence[str], channels: Sequence[str], dry_run: bool) -> list[Any]:
    """Solve, download, link; returns what was linked."""
    kept = pkgs_dir(configuration())
    records = solved(specs, channels, kept)
    if not dry_run:
        say("\nDownloading and Extracting Packages: ", end="")
        for record in records:
            record.url = fetch(record, kept).as_uri()
        say("done\nPreparing transaction: done\nVerifying transaction: done\n")
        say("Executing transaction: ", end="")
        meta = prefix / "conda-meta"
        meta.mkdir(parents=True, exist_ok=True)
        asyncio.run(
            install(
                records, target_prefix=prefix, cache_dir=kept / "extracted", show_progress=False
            )
        )
        with (meta / "history").open("a") as history:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            history.write(f"==> {stamp} <==\n# cmd: {' '.join(sys.argv)}\n")
            history.write(f"# conda version: {VERSION}\n# update specs: {list(specs)}\n")
        say("done\n")
    return records


def installed(prefix: Path) -> Iterator[PrefixRecord]:
    for path in sorted((prefix / "conda-meta").glob("*.json")):
        yield PrefixRecord.from_path(path)


# --- commands ----------------------------------------------------------------------------------

QUIET = False


def say(text: str, end: str = "\n") -> None:
    if not QUIET:
        print(text, end=end, flush=True)


def where(args: argparse.Namespace) -> Path:
    if args.prefix:
        return Path(args.prefix).absolute()
    if args.name:
        return ROOT if args.name == "base" else ROOT / "envs" / str(args.name)
    raise CondaError("ArgumentError", "one of the arguments -n/--name -p/--prefix is required")


def create(args: argparse.Namespace) -> Any:
    prefix = where(args)
    if (prefix / "conda-meta" / "history").exists() and not args.dry_run:
        if not args.yes:
            raise CondaError("CondaSystemExit", "Exiting: the environment exists; say --yes")
        shutil.rmtree(prefix)
    return transaction(args, prefix, args.specs)


def add_packages(args: argparse.Namespace) -> Any:
    prefix = where(args)
    if not (prefix / "conda-meta" / "history").exists():
        raise CondaError("EnvironmentLocationNotFound", f"Not a conda environment: {prefix}")
    kept = [f"{one.name.normalized} =={one.version}" for one in installed(prefix)]
    named = {re.split(r"[ =<>!~]", spec)[0] for spec in args.specs}
    kept = [spec for spec in kept if spec.split(" ")[0] not in named]
    return transaction(args, prefix, [*args.specs, *kept])


def transaction(args: argparse.Namespace, prefix: Path, specs: Sequence[str]) -> Any:
    channels = [*(args.channel or [])]
    if not args.override_channels:
        channels += configuration()["channels"]
    records = make(prefix, specs, channels, args.dry_run)
    if args.dry_run and not args.json:
        for one in records:
            print(f"  {one.name.normalized:<20} {one.version}-{one.build}")
        say("\nDryRunExit: Dry run. Exiting.\n")
    return {"success": True, "dry_run": args.dry_run, "prefix": str(prefix)}


def environment_file(path: Path) -> tuple[list[str], list[str], list[str], bool]:
    """Channels, specs and pip lines of an environment.yml, and whether `nodefaults` is in it."""
    if not path.is_file():
        raise CondaError("EnvironmentFileNotFound", f"'{path}' file not found")
    said = yaml.safe_load(path.read_text("utf-8")) or {}
    specs, pip = [], []
    for each in said.get("dependencies") or []:
        if isinstance(each, dict):
            pip += each.get("pip", [])
        else:
            specs.append(str(each))
    channels = [str(name) for name in said.get("channels") or []]
    return [c for c in channels if c != "nodefaults"], specs, pip, "nodefaults" in channels


def env_create(args: argparse.Namespace) -> Any:
    prefix = where(args)
    if (prefix / "conda-meta" / "history").exists() and not args.dry_run:
        if not args.yes:
            raise CondaError("CondaValueError", f"prefix already exists: {prefix}")
        shutil.rmtree(prefix)
    return env_apply(args, prefix)


def env_apply(args: argparse.Namespace, prefix: Path) -> Any:
    path = Path(args.file)
    own, specs, pip, nodefaults = environment_file(path)
    channels = own if nodefaults else [*own, *configuration()["channels"]]
    make(prefix, specs, channels, getattr(args, "dry_run", False))
    if pip and not getattr(args, "dry_run", False):
        say("Installing pip dependencies: ", end="")
        listed = path.with_name(f"condaenv.{os.getpid()}.requirements.txt")
        listed.write_text("".join(f"{line}\n" for line in pip))
        try:
            python = prefix / "bin" / "python"
            done = subprocess.run([python, "-m", "pip", "install", "-U", "-r", listed], check=False)
        finally:
            listed.unlink()
        if done.returncode:
            raise CondaError("CondaEnvException", "Pip failed")
        say("done")
    return {"success": True, "prefix": str(prefix)}


def env_update(args: argparse.Namespace) -> Any:
    return env_apply(args, where(args))


def environments() -> list[Path]:
    found = [path.parent.parent for path in ROOT.glob("envs/*/conda-meta/history")]
    return [ROOT, *sorted(found)]


def env_list(args: argparse.Namespace) -> Any:
    if not args.json:
        print("# conda environments:\n#")
        for path in environments():
            print(f"{'base' if path == ROOT else path.name:<22} {path}")
    return {"envs": [str(path) for path in environments()]}


def show_list(args: argparse.Namespace) -> Any:
    prefix = where(args) if args.prefix or args.name else ROOT
    found = [
        {"name": one.name.normalized, "version": str(one.version), "build_string": str(one.build)}
        for one in installed(prefix)
    ]
    if not args.json:
        print(f"# packages in environment at {prefix}:\n#")
        for one in found:
            print(f"{one['name']:<24} {one['version']:<14} {one['build_string']}")
    return found


def info(args: argparse.Namespace) -> Any:
    config = configuration()
    channels = [
        f"{url}/{subdir}"
        for name in config["channels"]
        for url in urls(name, config)
        for subdir in SUBDIRS
    ]
    found = {
        "conda_version": VERSION,
        "python_version": f"{sys.version.split()[0]}.final.0",
        "platform": SUBDIRS[0],
        "root_prefix": str(ROOT),
        "conda_prefix": str(ROOT),
        "default_prefix": os.environ.get("CONDA_PREFIX", str(ROOT)),
        "active_prefix": os.environ.get("CONDA_PREFIX"),
        "channels": channels,
        "config_files": [name for name in sources() if name != "envvars"],
        "rc_path": str(Path.home() / ".condarc"),
        "sys_rc_path": str(ROOT / ".condarc"),
        "pkgs_dirs": [str(pkgs_dir(config))],
        "envs_dirs": [str(ROOT / "envs")],
        "envs": [str(path) for path in environments()],
        "offline": False,
        "user_agent": AGENT,
    }
    if not args.json:
        for key, value in found.items():
            print(f"{key.replace('_', ' '):>22} : {value}")
    return found


def config_command(args: argparse.Namespace) -> Any:
    if args.show_sources:
        found: Any = sources()
    elif args.show is not None:
        merged = configuration()
        found = {key: merged.get(key) for key in args.show} if args.show else merged
    else:
        raise CondaError("ArgumentError", "of config, this conda has --show and --show-sources")
    if not args.json:
        for name, value in found.items():
            if args.show_sources:
                print(f"==> {name} <==\n{yaml.safe_dump(value)}")
            else:
                print(yaml.safe_dump({name: value}), end="")
    return found


def clean(args: argparse.Namespace) -> Any:
    if not (args.index_cache or args.tarballs or args.packages or args.all):
        raise CondaError("ArgumentError", "At least one removal target must be given.")
    kept = pkgs_dir(configuration())
    if args.index_cache or args.all:
        shutil.rmtree(kept / "cache", ignore_errors=True)
    if args.packages or args.all:
        shutil.rmtree(kept / "extracted", ignore_errors=True)
    if args.tarballs or args.all:
        for path in [*kept.glob("*.conda"), *kept.glob("*.partial")]:
            path.unlink()
    return {"success": True}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="conda")
    top.add_argument("-V", "--version", action="version", version=f"conda {VERSION}")
    commands = top.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true")
    common.add_argument("-q", "--quiet", action="store_true")
    common.add_argument("-y", "--yes", action="store_true")
    common.add_argument("-v", "--verbose", action="count")
    target = argparse.ArgumentParser(add_help=False)
    target.add_argument("-p", "--prefix")
    target.add_argument("-n", "--name")
    changing = argparse.ArgumentParser(add_help=False)
    changing.add_argument("-c", "--channel", action="append")
    changing.add_argument("--override-channels", "-O", action="store_true")
    changing.add_argument("-d", "--dry-run", action="store_true")
    changing.add_argument("specs", nargs="*")

    def command(to: Any, name: str, run: Any, *parents: argparse.ArgumentParser) -> Any:
        made = to.add_parser(name, parents=[common, *parents])
        made.set_defaults(run=run)
        return made

    command(commands, "create", create, target, changing)
    command(commands, "install", add_packages, target, changing)
    command(commands, "list", show_list, target)
    command(commands, "info", info)
    said = command(commands, "config", config_command)
    said.add_argument("--show-sources", action="store_true")
    said.add_argument("--show", nargs="*")
    swept = command(commands, "clean", clean)
    for flags in (
        ("-i", "--index-cache"),
        ("-t", "--tarballs"),
        ("-p", "--packages"),
        ("-a", "--all"),
    ):
        swept.add_argument(*flags, action="store_true")
    env = commands.add_parser("env").add_subparsers(dest="env_command", required=True)
    for name, run in (("create", env_create), ("update", env_update)):
        made = command(env, name, run, target)
        made.add_argument("-f", "--file", default="environment.yml")
        made.add_argument("--prune" if name == "update" else "--dry-run", action="store_true")
    command(env, "list", env_list)
    return top


def main() -> None:
    global QUIET
    args = parser().parse_args()
    QUIET = args.json or args.quiet
    try:
        found = args.run(args)
        if args.json:
            print(json.dumps(found, indent=2))
    except CondaError as error:
        end(args.json, error.name, str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        end(args.json, "NoSpaceLeftError", "No space left on devices.")
    except (InstallerError, LinkError) as error:
        if "No space left" in str(error):
            end(args.json, "NoSpaceLeftError", "No space left on devices.")
        end(args.json, "CondaError", str(error))


def end(as_json: bool, name: str, message: str) -> NoReturn:
    """Say what went wrong as conda does, and exit with 1."""
    if as_json:
        print(json.dumps({"error": message, "exception_name": name, "success": False}, indent=2))
    else:
        print("failed", flush=True) if not QUIET else None
        print(f"\n{name}: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    try:
        main()
        code: Any = 0
    except SystemExit as stopped:
        code = stopped.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # the solver's threads may outlive the interpreter, and crash
