"""Which tensors a checkpoint holds, read from its header alone: no torch, none of its code run."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

#: The first bytes of what torch wrote before it used zip: a pickled number.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
ZIP = b"PK\x03\x04"

#: What zipfile and its readers raise, beside BadZipFile, for an archive with wrong bytes in it.
ODD_ZIP = (RuntimeError, UnicodeDecodeError, EOFError, struct.error, zlib.error)

#: More than any header of a real checkpoint, in bytes.
_LARGEST = 64 << 20

#: torch's storage classes by their names in a pickle; others have sizes that nothing here needs.
TYPES = {
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


class Damaged(Exception):
    """The file is not whole, or no checkpoint. The message goes on after the file's name."""


@dataclass(frozen=True)
class Tensor:
    """A tensor's type, as safetensors names it, its shape, and where its first byte is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    """In the file; None where the header does not say."""

    @property
    def count(self) -> int:
        """Numbers in it."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    def values(self, path: Path, most: int = 1 << 16) -> list[float] | None:
        """Its first numbers, as far as they are fp16, bf16 or fp32 and the file has them."""
        if self.offset is None or self.dtype not in ("F16", "BF16", "F32"):
            return None
        count, width = min(self.count, most), _SIZES[self.dtype]
        with path.open("rb") as stream:
            stream.seek(self.offset)
            raw = stream.read(count * width)
        count = len(raw) // width
        if self.dtype == "BF16":
            halves = struct.unpack(f"<{count}H", raw[: count * 2])
            raw = b"".join(struct.pack("<I", half << 16) for half in halves)
        code = "e" if self.dtype == "F16" else "f"
        return list(struct.unpack(f"<{count}{code}", raw[: count * (2 if code == "e" else 4)]))


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin, .pth, .pt or .safetensors file, by name.

    Those of dictionaries inside have dotted names, such as model.llama_proj.weight.
    Raises Damaged for a file that is cut off or no checkpoint, OSError if it cannot be read.
    """
    if path.suffix == ".safetensors":
        return _safetensors(path)
    with path.open("rb") as stream:
        zipped = stream.read(len(ZIP)) == ZIP
    if zipped:
        return _zip(path)
    if old(path):
        return _legacy(path)
    raise Damaged("is no checkpoint")


def old(path: Path) -> bool:
    """Whether a file has the format that torch wrote before 1.6. Raises OSError."""
    with path.open("rb") as stream:
        return stream.read(len(LEGACY)) == LEGACY


def _safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= _LARGEST:
            raise Damaged("is no safetensors file")
        text = stream.read(length)
    if len(text) < length:
        raise Damaged(f"is truncated: its header alone has {length + 8} bytes, it has {size}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        found = {
            str(name): Tensor(
                str(entry["dtype"]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise Damaged("is no safetensors file") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise Damaged(f"is truncated: {size} of {whole} bytes")
    return found


def _zip(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            indexes = [one for one in archive.infolist() if one.filename.endswith("/data.pkl")]
            if not indexes:
                raise Damaged("is a zip archive of other files, no checkpoint")
            if indexes[0].file_size > _LARGEST:
                raise Damaged("has an index too large to be a checkpoint's")
            root = indexes[0].filename.removesuffix("data.pkl")
            places = {
                one.filename.removeprefix(f"{root}data/"): one
                for one in archive.infolist()
                if one.filename.startswith(f"{root}data/")
            }
            index = archive.read(indexes[0])
        with path.open("rb") as stream:
            starts = {key: _start(stream, place) for key, place in places.items()}
    except zipfile.BadZipFile:
        raise Damaged("is truncated: the end of its zip archive is missing") from None
    except ODD_ZIP:
        raise Damaged("is damaged: its zip archive makes no sense") from None
    return _flat(_Reader(io.BytesIO(index), starts).whole())


def _start(stream: IO[bytes], place: zipfile.ZipInfo) -> int | None:
    """Where a stored file's bytes begin: its local header may be longer than the directory says."""
    if place.compress_type != zipfile.ZIP_STORED:
        return None
    stream.seek(place.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))
    return place.header_offset + 30 + int(name) + int(extra)


def _legacy(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        for _ in range(3):  # the number, the protocol, the machine
            _Reader(stream, {}).whole()
        reader = _Reader(stream, {})
        found = _flat(reader.whole())
        _Reader(stream, {}).whole()  # the names of the storages that follow
        needed = stream.tell() + sum(8 + length for length in reader.storages.values())
    if size < needed:
        raise Damaged(f"is truncated: {size} of {needed} bytes")
    return found


@dataclass(frozen=True)
class _Storage:
    dtype: str
    start: int | None


class _Anything:
    """Stands for whatever else a pickle names; nothing of it is ever imported or called."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> _Anything:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """As a list."""

    def extend(self, values: object) -> None:
        """As a list."""

    def add(self, value: object) -> None:
        """As a set."""


class _Reader(pickle.Unpickler):
    """Reads a checkpoint's pickle with nothing but dictionaries and descriptions of tensors."""

    def __init__(self, stream: IO[bytes], starts: Mapping[str, int | None]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._starts = starts
        self.storages: dict[str, int] = {}

    def whole(self) -> Any:
        """What the pickle holds. Raises Damaged."""
        try:
            return self.load()
        except EOFError:
            raise Damaged("is truncated: it ends inside its index") from None
        except Exception as error:  # whatever bytes that are no pickle lead to
            if isinstance(error, pickle.UnpicklingError) and "truncated" in str(error):
                raise Damaged("is truncated: it ends inside its index") from None
            raise Damaged("has an index that cannot be read") from None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuilt
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *rest: data
        if module.startswith("torch") and name.endswith("Storage"):
            return type(name, (_Anything,), {})
        return _Anything

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid[:5]
        dtype = TYPES.get(kind.__name__, "?")
        self.storages[str(key)] = int(count) * _SIZES.get(dtype, 1)
        return _Storage(dtype, self._starts.get(str(key)))


def _rebuilt(storage: _Storage, offset: int, size: tuple[int, ...], *rest: object) -> Tensor:
    start = None
    if storage.start is not None and storage.dtype in _SIZES:
        start = storage.start + offset * _SIZES[storage.dtype]
    return Tensor(storage.dtype, tuple(int(one) for one in size), start)


def _flat(value: object, prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = f"{prefix}{key}"
            if isinstance(inner, Tensor):
                found[name] = inner
            elif isinstance(inner, Mapping):
                found |= _flat(inner, f"{name}.")
    return found
