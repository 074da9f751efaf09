"""Reads where the tensors of a LLaMA folder lie on the disk, without torch and without their data.

`.bin` is torch's zip format (torch 1.6 and newer): a pickle that names tensors and storages, and a
stored, uncompressed member for each storage. The pickle is read with an unpickler that knows
tensors and plain containers alone, so a checkpoint can run no code. `.safetensors` is a JSON header
and the bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gpufleet.errors import UsageError
from gpufleet.weights.headers import ODD_ZIP, TYPES
from gpufleet.weights.merge.plan import BYTES, Folder, Stored

#: By the name that its folder has when it is not in shards: index, and what the shards end in.
_KINDS = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}

#: How a torch checkpoint older than 1.6 begins: a pickle of torch's magic number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_LARGEST_HEADER = 100 << 20
AGAIN = "fetch it again"


def read(folder: Path) -> Folder:
    """What a LLaMA folder holds: its tensors by name, and its small files.

    Raises UsageError, one line, for what is missing, truncated, or no checkpoint at all.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: give the folder with config.json and the shards")
    config = json_object(folder / "config.json")
    where = _where(folder)
    tensors: dict[str, Stored] = {}
    for file in dict.fromkeys(where.values()) if isinstance(where, dict) else where:
        for name, stored in tensors_of(folder / file).items():
            if name in tensors:
                raise UsageError(
                    f"{folder}: {name} is in both {tensors[name].file.name} and {file}: "
                    "remove the shard that does not belong to this model"
                )
            if isinstance(where, dict) and where.get(name, file) != file:
                raise UsageError(
                    f"{folder}: {name} is in {file}, but the index says {where[name]}: "
                    "fetch index and shards from one place"
                )
            tensors[name] = stored
    if isinstance(where, dict) and (lost := sorted(set(where) - set(tensors))):
        raise UsageError(
            f"{folder / where[lost[0]]} holds no {lost[0]}, which the index names: {AGAIN}"
        )
    small = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in (".json", ".model") and "index" not in path.name
    }
    return Folder(folder, tensors, config, small)


def _where(folder: Path) -> dict[str, str] | list[str]:
    """File by tensor, as the index says; without an index, the one file there is."""
    for single, index in _KINDS.items():
        if (folder / index).is_file():
            where = json_object(folder / index).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise UsageError(f"{folder / index} has no weight_map: {AGAIN}")
            if bad := [file for file in where.values() if Path(str(file)).name != file]:
                raise UsageError(f"{folder / index} names {bad[0]}, no file beside it: {AGAIN}")
            return where
        if (folder / single).is_file():
            return [single]
    for single, index in _KINDS.items():
        stem, suffix = Path(single).stem, Path(single).suffix
        if any(folder.glob(f"{stem}-*{suffix}")):
            raise UsageError(f"{folder} has shards but no {index}: fetch the index too")
    raise UsageError(f"{folder} holds no model: neither .bin nor .safetensors; fetch the shards")


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UsageError if it holds none, or one key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{path} names {twice} twice: {AGAIN}")
        return found

    try:
        text = path.read_text("utf-8")
        if (what := no_checkpoint(text[:512].encode())) is not None:
            raise UsageError(f"{path} {what}")
        found = json.loads(text, object_pairs_hook=once)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: fetch it") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: check its permissions") from None
    except ValueError:
        raise UsageError(f"{path} is not JSON: {AGAIN}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object: {AGAIN}")
    return found


def no_checkpoint(head: bytes) -> str | None:
    """What a file is instead of weights, by its first bytes; None if nothing that is known."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file: run `git lfs pull`, or fetch it again"
    if head.lstrip()[:1] == b"<":
        return "is a web page saved under this name: fetch it again, logged in where need be"
    if head.startswith(_LEGACY):
        return "has the format of torch before 1.6: load it in torch and save it again"
    return None


def tensors_of(path: Path) -> dict[str, Stored]:
    """Where each tensor of one shard lies. Raises UsageError, one line, if it is not whole."""
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
            if (what := no_checkpoint(head)) is not None:
                raise UsageError(f"{path} {what}")
            size = stream.seek(0, io.SEEK_END)
            if path.suffix == ".safetensors":
                return _safetensors(path, stream, size)
            return _zip(path, stream, size)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: fetch it") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: check its permissions") from None


def sample(stored: Stored, count: int) -> list[float]:
    """The first numbers of a tensor of a dtype that can be merged."""
    count = min(count, stored.elements)
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset)
        data = stream.read(count * BYTES[stored.dtype])
    if stored.dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    form = "e" if stored.dtype == "F16" else "f"
    return list(struct.unpack(f"<{count}{form}", data))


def _truncated(path: Path, size: int) -> UsageError:
    return UsageError(f"{path} is truncated or damaged ({size} bytes): {AGAIN}")


def _safetensors(path: Path, stream: BinaryIO, size: int) -> dict[str, Stored]:
    stream.seek(0)
    (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
    if length > min(size - 8, _LARGEST_HEADER):
        raise _truncated(path, size)
    found: dict[str, Stored] = {}
    start, last = 8 + length, 0
    try:
        for name, row in json.loads(stream.read(length)).items():
            if name == "__metadata__":
                continue
            first, end = row["data_offsets"]
            stored = Stored(path, start + first, row["dtype"], tuple(row["shape"]))
            if end - first != stored.bytes:
                raise ValueError
            found[name], last = stored, max(last, end)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _truncated(path, size) from None
    if start + last != size:
        raise _truncated(path, size)
    return found


def _zip(path: Path, stream: BinaryIO, size: int) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(stream) as archive:
            members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UsageError(f"{path} is a zip file, but not torch's: {AGAIN}")
            prefix = pickles[0].removesuffix("data.pkl")
            order = members.get(f"{prefix}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise UsageError(f"{path} is of a big-endian machine: save it again on another")
            listed = _Unpickler(io.BytesIO(archive.read(pickles[0])), path).load()
    except (zipfile.BadZipFile, zipfile.LargeZipFile, *ODD_ZIP):
        raise _truncated(path, size) from None
    except (pickle.UnpicklingError, AttributeError, ValueError, TypeError, IndexError):
        raise UsageError(f"{path} holds no tensors by name: {AGAIN}") from None
    if not isinstance(listed, Mapping) or not all(isinstance(v, _Tensor) for v in listed.values()):
        raise UsageError(f"{path} holds more than tensors by name: is it a shard of LLaMA?")
    found: dict[str, Stored] = {}
    starts: dict[str, int] = {}
    for name, tensor in listed.items():
        member = members.get(f"{prefix}data/{tensor.storage}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise _truncated(path, size)
        if member.filename not in starts:
            starts[member.filename] = _data(stream, member.header_offset)
        start = starts[member.filename] + tensor.offset * BYTES[tensor.dtype]
        stored = Stored(path, start, tensor.dtype, tensor.shape)
        end = starts[member.filename] + member.file_size
        if start + stored.bytes > min(end, size):
            raise _truncated(path, size)
        if not tensor.contiguous:
            raise UsageError(f"{path}: {name} is not contiguous: load it and save it again")
        found[name] = stored
    return found


def _data(stream: BinaryIO, header: int) -> int:
    """Where the data of a zip member begins: behind its local header (APPNOTE.TXT, 4.3.7)."""
    stream.seek(header + 26)
    name, extra = struct.unpack("<HH", stream.read(4).ljust(4, b"\0"))
    return header + 30 + int(name) + int(extra)


@dataclass(frozen=True)
class _Tensor:
    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        pairs = zip(self.shape, self.stride, strides, strict=True)
        return all(size == 1 or mine == right for size, mine, right in pairs)


def _rebuild(storage: tuple[str, str], offset: int, size: Any, stride: Any, *_: object) -> _Tensor:
    return _Tensor(storage[0], storage[1], offset, tuple(size), tuple(stride))


def _parameter(data: _Tensor, *_: object) -> _Tensor:
    return data


class _Unpickler(pickle.Unpickler):
    """Knows how torch writes tensors, and nothing else."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        super().__init__(stream, encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if module == "torch" and name in TYPES:
            return TYPES[name]
        if (module, name) not in known:
            raise UsageError(
                f"{self.path} holds {module}.{name}, no tensor: it is refused, since a pickle can "
                "run any code"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, key, *_ = pid
        return str(key), str(dtype)
