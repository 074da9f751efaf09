"""Decides whether a base and a delta belong together, what comes of them, and in which files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpufleet.errors import UsageError

Version = Literal["v0", "v1.1"]
Form = Literal["safetensors", "bin"]

#: Bytes of an element, by the names of safetensors.
BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
#: What is merged: both are turned into float16 first, as FastChat loads them.
FLOATS = ("F16", "BF16", "F32")

#: Tensors with a row a token; the only ones that differ between a base and a v0 delta.
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
_EMBEDDING = BY_TOKEN[0]

#: The vocabulary of LLaMA, and of Vicuna v0, whose training added [PAD].
_LLAMA, _VICUNA_V0 = 32000, 32001

#: A different number where other output would come of the same input.
_ENGINE = 1


@dataclass(frozen=True)
class Stored:
    """A tensor on the disk: `bytes` of it from `offset` on, row by row, little-endian."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Raises ValueError for a dtype that is not known."""
        if self.dtype not in BYTES:
            raise ValueError(f"dtype {self.dtype}")
        return self.elements * BYTES[self.dtype]


@dataclass(frozen=True)
class Folder:
    """A LLaMA model on the disk: tensors by name, config.json, and its small files by name."""

    path: Path
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]
    small: Mapping[str, Path]


@dataclass(frozen=True)
class Sum:
    """One tensor of the output: base, with rows of zero added where it has fewer, plus delta."""

    name: str
    base: Stored
    delta: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.delta.shape

    @property
    def bytes(self) -> int:
        """Bytes of the sum, which is float16."""
        return 2 * self.delta.elements


@dataclass(frozen=True)
class Shard:
    """One file of the output and its tensors, in their order in the file."""

    file: str
    sums: tuple[Sum, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its tensors, without the file's header."""
        return sum(one.bytes for one in self.sums)


@dataclass(frozen=True)
class Merge:
    """What is to be done."""

    version: Version
    form: Form
    rows: int
    """Of the output's vocabulary."""
    shards: tuple[Shard, ...]
    dropped: tuple[str, ...]
    """inv_freq, which no model reads: it is computed from the sizes."""

    @property
    def bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(shard.bytes for shard in self.shards)


def plan(
    base: Folder, delta: Folder, *, version: Version | None, form: Form, shard_bytes: int
) -> Merge:
    """What merging the two makes; `version` is what they must be, None if either will do.

    `shard_bytes` bounds the tensors of one output file; a larger tensor has a file of its own.

    Raises UsageError, one line, if they do not belong together.
    """
    kept = [_without_inv_freq(side.tensors) for side in (base, delta)]
    _one_architecture(base, delta, *kept)
    _one_set_of_names(base, delta, *kept)
    found = _version(base, delta, *kept)
    if version is not None and found != version:
        raise UsageError(
            f"{delta.path} is a Vicuna {found} delta ({_fastchat(found)}), not {version}: fetch "
            f"the {version} delta ({_fastchat(version)}) or ask for {found}"
        )
    for name, stored in kept[1].items():
        start = needed = kept[0][name].shape
        if found == "v0" and name in BY_TOKEN:
            needed = (start[0] + 1, *start[1:])
        if needed != stored.shape:
            raise UsageError(
                f"{name}: the base has {_size(start)}, the delta {_size(stored.shape)}: "
                f"fetch base and delta of one model; {base.path} and {delta.path} are not"
            )
        for side, one in ((base, kept[0][name]), (delta, stored)):
            if one.dtype not in FLOATS:
                raise UsageError(
                    f"{side.path}: {name} is {one.dtype}, not one of {', '.join(FLOATS)}: a "
                    "quantised model cannot be merged; fetch the original"
                )
    # In the order in which the base lies on the disk.
    order = sorted(kept[0], key=lambda name: (kept[0][name].file.name, kept[0][name].offset))
    sums = [Sum(name, kept[0][name], kept[1][name]) for name in order]
    dropped = sorted({*base.tensors, *delta.tensors} - set(order))
    rows = kept[1][_EMBEDDING].shape[0]
    return Merge(found, form, rows, _shards(sums, form, shard_bytes), tuple(dropped))


def _without_inv_freq(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    return {name: one for name, one in tensors.items() if not name.endswith(".inv_freq")}


def _one_architecture(
    base: Folder, delta: Folder, ours: Mapping[str, Stored], theirs: Mapping[str, Stored]
) -> None:
    for side, tensors in ((base, ours), (delta, theirs)):
        embedding = tensors.get(_EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise UsageError(f"{side.path} holds no {_EMBEDDING}: it is no LLaMA model")
    sizes = [(_layers(tensors), tensors[_EMBEDDING].shape[1]) for tensors in (ours, theirs)]
    if sizes[0] != sizes[1]:
        (one, two) = (f"{_model(*size)}" for size in sizes)
        raise UsageError(
            f"{base.path} is {one}, {delta.path} is {two}: fetch base and delta of one size"
        )


def _layers(tensors: Mapping[str, Stored]) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})


def _model(layers: int, width: int) -> str:
    known = {(32, 4096): "7B", (40, 5120): "13B", (60, 6656): "30B", (80, 8192): "65B"}
    sizes = f"{layers} layers of width {width}"
    return f"{known[layers, width]} ({sizes})" if (layers, width) in known else sizes


def _one_set_of_names(
    base: Folder, delta: Folder, ours: Mapping[str, Stored], theirs: Mapping[str, Stored]
) -> None:
    for side, lacking, other in ((base, ours, theirs), (delta, theirs, ours)):
        if lost := sorted(set(other) - set(lacking)):
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise UsageError(
                f"{side.path} lacks {lost[0]}{more}, which the other has: fetch what is missing"
            )


def _fastchat(version: Version) -> str:
    if version == "v0":
        return "FastChat up to 0.1.10, 32001 rows with [PAD]"
    return "FastChat 0.2 and newer, 32000 rows"


def _version(
    base: Folder, delta: Folder, ours: Mapping[str, Stored], theirs: Mapping[str, Stored]
) -> Version:
    start, end = ours[_EMBEDDING].shape[0], theirs[_EMBEDDING].shape[0]
    swapped = "; or swap the two, if it is the delta" if start == end + 1 else ""
    if start == _VICUNA_V0:
        raise UsageError(
            f"{base.path} has {start} rows, LLaMA has {_LLAMA}: it is Vicuna v0, merged already, "
            f"or [PAD] was added to it; give LLaMA as it was published{swapped}"
        )
    if end == start:
        return "v1.1"
    if end == start + 1:
        return "v0"
    raise UsageError(
        f"{base.path} has {start} rows, {delta.path} has {end}: a v1.1 delta "
        f"({_fastchat('v1.1')}) has as many as its base, a v0 delta ({_fastchat('v0')}) one more"
        f"{swapped}"
    )


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "one number"


def _shards(sums: Sequence[Sum], form: Form, shard_bytes: int) -> tuple[Shard, ...]:
    parts: list[list[Sum]] = [[]]
    size = 0
    for one in sums:
        if parts[-1] and size + one.bytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += one.bytes
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    if len(parts) == 1:
        return (Shard(f"{stem}.{suffix}", tuple(parts[0])),)
    return tuple(
        Shard(f"{stem}-{number:05}-of-{len(parts):05}.{suffix}", tuple(part))
        for number, part in enumerate(parts, 1)
    )


def index(merge: Merge) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the index; None where one file holds everything."""
    if len(merge.shards) == 1:
        return None
    name = "model.safetensors" if merge.form == "safetensors" else "pytorch_model.bin"
    where = {one.name: shard.file for shard in merge.shards for one in shard.sums}
    return f"{name}.index.json", {
        "metadata": {"total_size": merge.bytes},
        "weight_map": dict(sorted(where.items())),
    }


def header(shard: Shard) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, and where in the file each tensor then begins."""
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for one in shard.sums:
        offsets[one.name] = end
        span = [end, end + one.bytes]
        rows[one.name] = {"dtype": "F16", "shape": list(one.shape), "data_offsets": span}
        end += one.bytes
    text = json.dumps(rows, separators=(",", ":")).encode()
    # Data begins on a page: the format allows spaces at the header's end.
    text += b" " * (-(8 + len(text)) % 4096)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: start + offset for name, offset in offsets.items()
    }


def identity(merge: Merge, files: Sequence[tuple[str, int, int]], shard_bytes: int) -> str:
    """32 hex digits that name a merge by what goes into it.

    `files` are the inputs: role and name, bytes, time of the last change in nanoseconds.
    """
    told = [_ENGINE, merge.version, merge.form, shard_bytes, *sorted(files)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def alike(base: Sequence[float], delta: Sequence[float]) -> str | None:
    """Why a piece of a delta's tensor is no delta's, next to the same piece of the base.

    A delta is what training changed: small, and in no direction that the base has. A model that
    is merged already has the base's direction and length.
    """
    lengths = [math.sqrt(math.fsum(x * x for x in side)) for side in (base, delta)]
    if not all(math.isfinite(length) and length > 0 for length in lengths):
        return None
    if base == delta:
        return "is the base again"
    cosine = math.fsum(a * b for a, b in zip(base, delta, strict=True)) / math.prod(lengths)
    if cosine > 0.9 and 0.5 < lengths[1] / lengths[0] < 2:
        return "is no delta, but a model that is merged already"
    return None
