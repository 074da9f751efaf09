"""Looks at checkpoint files before anything heavy is imported, for the mistakes people make."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from ..engine import ModelDemoError

_INDEXES = ("pytorch_model.bin.index.json", "model.safetensors.index.json")
_SINGLE = ("pytorch_model.bin", "model.safetensors")


def check_path(path: str, field: str, file: Path) -> Path:
    """The path a YAML file names: absolute, not a placeholder, and there."""
    if not path.strip() or path.strip().startswith("/path/to") or "<" in path:
        raise ModelDemoError(
            f"{file}: {field} is {path!r}, a placeholder; write the absolute path of the weights"
        )
    if not Path(path).is_absolute():
        raise ModelDemoError(
            f"{file}: {field} is {path!r}, a relative path; write the absolute path"
        )
    if not Path(path).exists():
        raise ModelDemoError(f"{file}: {field}: {path} does not exist; bring the weights there")
    return Path(path)


def check_file(file: Path) -> None:
    """Raise ModelDemoError unless the file can be a checkpoint, judged by its two ends."""
    if not file.is_file():
        raise ModelDemoError(f"{file}: not a file; bring the weights there")
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise ModelDemoError(f"{file}: cannot be read ({error.strerror})") from error
    if not head:
        raise ModelDemoError(f"{file}: empty; fetch the file again")
    if head.lstrip().startswith(b"<"):
        raise ModelDemoError(
            f"{file}: a web page, not a checkpoint: the download page was saved instead of the "
            "file; fetch it again with the direct link"
        )
    if head.startswith(b"version https://git-lfs"):
        raise ModelDemoError(
            f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` or fetch it again"
        )
    # A zip file's directory is at its end: a cut download has the beginning only.
    if head.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise ModelDemoError(f"{file}: cut off, the end is missing; fetch the file again")


def shards(directory: Path) -> list[Path]:
    """The files a LLaMA directory's index names, or its single file, all of them there."""
    for name in _INDEXES:
        index = directory / name
        if index.is_file():
            try:
                # Names prove nothing: 13B's shards count from 00000, 7B's from 00001.
                listed = set(json.loads(index.read_text())["weight_map"].values())
                return [directory / shard for shard in sorted(listed)]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelDemoError(f"{index}: not a shard index; fetch it again") from error
    for name in _SINGLE:
        if (directory / name).is_file():
            return [directory / name]
    raise ModelDemoError(
        f"{directory}: no weights ({_INDEXES[0]} or {_SINGLE[0]}); bring the merged Vicuna there"
    )


def check_llama(directory: Path) -> None:
    """Raise ModelDemoError unless a directory holds a configuration, a tokenizer and all shards."""
    if not directory.is_dir():
        raise ModelDemoError(f"{directory}: not a directory; llama_model is the Vicuna's folder")
    for name, what in (("config.json", "configuration"), ("tokenizer.model", "tokenizer")):
        if not (directory / name).is_file():
            raise ModelDemoError(
                f"{directory}: no {name}, the {what}; copy it from the model's repository"
            )
    check_file(directory / "tokenizer.model")
    for shard in shards(directory):
        check_file(shard)
