"""Says what is wrong with weight files by what is in them: what people trip over, by name."""

from __future__ import annotations

import fnmatch
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpufleet.catalog import WeightSet
from gpufleet.weights.headers import ZIP, Damaged, Tensor, old, tensors

Kind = Literal[
    "missing",
    "truncated",
    "unfinished",
    "lfs-pointer",
    "web-page",
    "error-body",
    "archive",
    "not-a-checkpoint",
    "not-json",
    "not-a-tokenizer",
    "wrong-size",
    "wrong-sha256",
    "other-file",
    "unreadable",
    "wrong-pair",
    "wrong-version",
    "delta-not-merged",
    "not-a-delta",
    "wrong-part",
    "mixed-shards",
    "old-tokenizer",
    "old-format",
]

LFS = b"version https://git-lfs.github.com/spec/"
CHECKPOINTS = {".bin", ".pth", ".pt", ".safetensors"}

#: What people call the language models whose hidden size this is.
MODELS = {4096: "7B", 5120: "13B"}

#: The final norm's weights are about 1 in a model and about 0 in what is to be added to one.
#: Seen: 1.15 and 0.006 in pico; LLaMA's begin at 1 as well.
_DELTA_BELOW, _MODEL_ABOVE = 0.05, 0.2

#: A tensor without which a file does not play its part.
_PARTS = {
    "q-former": ("query_tokens", "is no Q-Former of BLIP-2: it has no query_tokens"),
    "vision-tower": ("patch_embed.proj.weight", "is no EVA vision tower: it has no patch_embed"),
    "projection": ("llama_proj.weight", "is no projection of MiniGPT-4: it has no llama_proj"),
}


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a file. `what` goes on after its name: ``is missing``."""

    kind: Kind
    what: str
    do: str = ""
    """What to do if it is not just to get the file again."""


def flaw(path: Path, size: int | None = None) -> Flaw | None:
    """What is wrong with a file as it is, read from its first bytes and its header alone.

    `size` are the bytes that it must have, where that is known.
    """
    try:
        here = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(4096)
            stream.seek(max(here - 4096, 0))
            tail = stream.read(4096)
        found = _content(path, head, here)
        if found is not None and found.kind != "truncated":
            return found
        if size is not None and 0 < here < size:
            return Flaw("truncated", f"is truncated: {here} of {size} bytes")
        if found is None and path.suffix in CHECKPOINTS:
            tensors(path)
        if found is None and size is not None and here != size:
            return Flaw("wrong-size", f"has {here} bytes, expected {size}")
        return found
    except Damaged as damaged:
        if here > 8192 and not tail.strip(b"\0"):
            return Flaw("unfinished", "ends in zeros: its download did not finish")
        return _damaged(str(damaged))
    except FileNotFoundError:
        return Flaw("missing", "is missing")
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        return Flaw("unreadable", what, "check its permissions and the disk")


def _damaged(what: str) -> Flaw:
    if what.startswith("is truncated"):
        return Flaw("truncated", what)
    if "zip archive of other files" in what:
        return Flaw("archive", what, "unpack it there")
    return Flaw("not-a-checkpoint", what)


def _content(path: Path, head: bytes, size: int) -> Flaw | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if size == 0:
        return Flaw("truncated", "is empty")
    if head.startswith(LFS):
        real = re.search(rb"^size (\d+)$", head, re.MULTILINE)
        of = f" to {int(real[1])} bytes" if real else ""
        return Flaw("lfs-pointer", f"is a Git LFS pointer{of}, not the file", "git lfs pull")
    if text[:1] == b"<" and re.match(rb"<(!doctype html|html|head|\?xml|!--)", text[:64].lower()):
        return _page(head)
    if path.suffix == ".json":
        return _json(path, size)
    if path.suffix in CHECKPOINTS and text[:1] in b"{[" and size <= 1 << 20:
        return _error_body(path.read_bytes())
    if path.suffix in CHECKPOINTS | {".model"} and size < 4096 and _is_text(head):
        said = " ".join(head.decode("utf-8", "replace").split())[:60]
        return Flaw("error-body", f"is a text of {size} bytes, not the file: {said!r}")
    if path.suffix == ".model":
        return _tokenizer(path)
    if path.suffix in CHECKPOINTS and head[:2] == b"\x1f\x8b":
        return Flaw("archive", "is a gzip archive, no checkpoint", "unpack it there")
    if path.suffix not in CHECKPOINTS | {".zip"} and head.startswith(ZIP):
        return Flaw("archive", "is a zip archive", "unpack it there")
    return None


def _page(head: bytes) -> Flaw:
    found = re.search(rb"<title[^>]*>(.*?)</title>", head, re.IGNORECASE | re.DOTALL)
    title = " ".join(html.unescape(found[1].decode("utf-8", "replace")).split()) if found else ""
    what = "is a web page saved under this name" + (f" ({title[:60]!r})" if title else "")
    lower = head.lower()
    if b"virus scan warning" in lower or b"download_warning" in lower:
        return Flaw("web-page", what, "confirm Google Drive's question in a browser")
    if b"quota exceeded" in lower or b"too many users" in lower:
        return Flaw("web-page", what, "Google Drive's quota is used up: try again in a day")
    if re.search(rb"sign in|log ?in|password|authenticat", lower):
        return Flaw("web-page", what, "log in to that site or network first")
    return Flaw("web-page", what)


def _is_text(head: bytes) -> bool:
    try:
        return head.decode("utf-8").isprintable() or all(
            line.isprintable() for line in head.decode("utf-8").splitlines()
        )
    except UnicodeDecodeError:
        return False


def _error_body(raw: bytes) -> Flaw | None:
    try:
        said = json.loads(raw)
    except ValueError:
        return None
    return Flaw("error-body", f"is a server's answer, not the file: {_said(said)}")


def _said(said: Any) -> str:
    for key in ("error", "message", "Message", "detail", "msg"):
        if isinstance(said, Mapping) and isinstance(said.get(key), str):
            return " ".join(said[key].split())[:80]
    return " ".join(json.dumps(said).split())[:80]


def _json(path: Path, size: int) -> Flaw | None:
    if size > 64 << 20:
        return Flaw("not-json", f"is no JSON of a model: it has {size} bytes")
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return Flaw("not-json", "is no JSON: it is cut off or not the file")
    keys = {key.lower() for key in said} if isinstance(said, Mapping) else set()
    if keys & {"error", "errors"} and keys <= {"error", "errors", "message", "code", "status"}:
        return Flaw("error-body", f"is a server's answer, not the file: {_said(said)}")
    return None


def _tokenizer(path: Path) -> Flaw | None:
    try:
        found = pieces(path)
    except Damaged as damaged:
        kind: Kind = "truncated" if str(damaged).startswith("is truncated") else "not-a-tokenizer"
        return Flaw(kind, str(damaged))
    if not found:
        return Flaw("not-a-tokenizer", "is no sentencepiece model: it has no pieces")
    return None


def pieces(path: Path) -> int:
    """Pieces of a sentencepiece model. Raises Damaged, or OSError."""
    raw = path.read_bytes()
    at = count = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise Damaged("is no sentencepiece model")

    try:
        while at < len(raw):
            key = number()
            field, wire = key >> 3, key & 7
            if wire not in (0, 1, 2, 5) or field == 0:
                raise Damaged("is no sentencepiece model")
            if wire == 0:
                number()
            else:
                length = number() if wire == 2 else 8 if wire == 1 else 4
                at += length
                count += field == 1 and wire == 2
    except IndexError:
        at = len(raw) + 1
    if at > len(raw):
        raise Damaged("is truncated: its last piece is cut off")
    return int(count)


#: The demo can read it; the merge cannot, and only what is to be merged is called wrong for it.
_OLD = Flaw(
    "old-format",
    "has torch's format of before 1.6, which a merge cannot map into memory",
    "load it and save it again with today's torch",
)


@dataclass(frozen=True)
class Found:
    """A flaw and the file that has it; `path` is below the set's folder."""

    path: str
    flaw: Flaw


def shards(folder: Path, weights: WeightSet) -> dict[str, str]:
    """What the set's own index files say: tensor -> file. Of broken files, nothing."""
    names: dict[str, str] = {}
    for index in sorted(folder.glob("*.index.json")):
        try:
            said = json.loads(index.read_bytes())["weight_map"]
            listed = {str(tensor): str(file) for tensor, file in said.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        patterns = [*weights.include, *(file.path for file in weights.files)]
        if any(fnmatch.fnmatch(file, one) for file in set(listed.values()) for one in patterns):
            names |= listed
    return names


def together(folder: Path, weights: WeightSet, paths: Sequence[str]) -> list[Found]:
    """What is wrong with a set's files beside each other, though each is whole by itself.

    Sizes, vocabulary and index are compared with one another and with what the catalogue says of
    the set. Files that are not whole are passed over.
    """
    if weights.kind == "pictures":
        return []
    read: dict[str, dict[str, Tensor]] = {}
    for path in paths:
        if Path(path).suffix in CHECKPOINTS:
            try:
                read[path] = tensors(folder / path)
            except (Damaged, OSError):
                continue
    found: list[Found] = []
    where = {tensor: path for path, names in read.items() for tensor in names}
    for tensor, path in shards(folder, weights).items():
        if path in read and tensor not in read[path]:
            what = f"lacks {tensor}, which the index says is in it: shards of two sets were mixed"
            found.append(Found(path, Flaw("mixed-shards", what)))
            break
    if weights.kind in ("llama", "delta") and weights.made is None:
        found += [Found(path, _OLD) for path in read if old(folder / path)]
    if weights.kind in ("llama", "delta"):
        found += _language(folder, weights, read, where)
    elif weights.kind in _PARTS:
        found += _part(weights, read)
    return found


def _ending(names: Mapping[str, Tensor], end: str) -> Tensor | None:
    return next((t for n, t in names.items() if n == end or n.endswith(f".{end}")), None)


def _part(weights: WeightSet, read: Mapping[str, Mapping[str, Tensor]]) -> list[Found]:
    key, lacks = _PARTS[weights.kind]
    for path, names in read.items():
        tensor = _ending(names, key)
        if tensor is None:
            return [Found(path, Flaw("wrong-part", lacks))]
        if weights.kind == "projection" and weights.hidden_size not in (None, tensor.shape[0]):
            return [Found(path, _wrong_size(tensor.shape[0], weights))]
    return []


def _sized(hidden: int) -> str:
    return f"hidden size {hidden}" + (f", {MODELS[hidden]}" if hidden in MODELS else "")


def _wrong_size(hidden: int, weights: WeightSet) -> Flaw:
    wanted = _sized(weights.hidden_size or 0)
    return Flaw("wrong-pair", f"is of the wrong size ({_sized(hidden)}): {wanted} is needed")


def _language(
    folder: Path,
    weights: WeightSet,
    read: Mapping[str, Mapping[str, Tensor]],
    where: Mapping[str, str],
) -> list[Found]:
    found: list[Found] = []
    config = _settings(folder / "config.json")
    hidden = config.get("hidden_size")
    if weights.hidden_size and isinstance(hidden, int) and hidden != weights.hidden_size:
        found.append(Found("config.json", _wrong_size(hidden, weights)))
    path = where.get("model.embed_tokens.weight")
    if path is not None:
        rows, width = (*read[path]["model.embed_tokens.weight"].shape, 0, 0)[:2]
        if weights.hidden_size and width != weights.hidden_size:
            found.append(Found(path, _wrong_size(width, weights)))
        elif weights.vocabulary and rows != weights.vocabulary:
            found.append(Found(path, _wrong_version(rows, weights)))
        if config.get("vocab_size") not in (None, rows):
            what = f"says vocab_size {config['vocab_size']}, the tensors have {rows} rows"
            how = f"set vocab_size to {rows}" if weights.made else ""
            found.append(Found("config.json", Flaw("wrong-version", what, how)))
        found += _pieces(folder, rows)
    path = where.get("model.norm.weight")
    if path is not None:
        values = read[path]["model.norm.weight"].values(folder / path)
        mean = sum(map(abs, values)) / len(values) if values else None
        if mean is not None and weights.kind == "llama" and mean < _DELTA_BELOW:
            what = "is the delta, not the model: it has to be added to LLaMA's weights first"
            found.append(Found(path, Flaw("delta-not-merged", what)))
        if mean is not None and weights.kind == "delta" and mean > _MODEL_ABOVE:
            what = "is of a whole model, not of a delta: do not merge it again"
            found.append(Found(path, Flaw("not-a-delta", what)))
    return found + (_old_tokenizer(folder) if weights.made else [])


def _wrong_version(rows: int, weights: WeightSet) -> Flaw:
    wanted = weights.vocabulary or 0
    what = f"has {rows} rows of vocabulary, {wanted} are needed"
    if (rows, wanted) == (32001, 32000):
        what += ": this is Vicuna v0 (FastChat <= 0.1.10), not v1.1 or LLaMA"
    if (rows, wanted) == (32000, 32001):
        what += ": this is Vicuna v1.1 (FastChat >= 0.2) or LLaMA, not v0"
    return Flaw("wrong-version", what)


def _pieces(folder: Path, rows: int) -> list[Found]:
    try:
        found = pieces(folder / "tokenizer.model")
    except (OSError, Damaged):
        return []
    if found <= rows:
        return []
    what = f"has {found} pieces, the model's vocabulary {rows}: it is another model's"
    return [Found("tokenizer.model", Flaw("wrong-version", what))]


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, Mapping) else {}


def _old_tokenizer(folder: Path) -> list[Found]:
    """What decapoda's tokenizer_config.json has, and today's transformers stumble over."""
    said = _settings(folder / "tokenizer_config.json")
    if not said:
        return []
    if said.get("tokenizer_class") == "LLaMATokenizer":
        flaw = ("names the class LLaMATokenizer, which does not exist", "set LlamaTokenizer")
    elif any(said.get(key) == "" for key in ("bos_token", "eos_token", "unk_token")):
        flaw = ("has empty special tokens", "set <s>, </s> and <unk>")
    elif said.get("add_bos_token") is not True:
        flaw = ("lacks add_bos_token: prompts would begin wrong", "set add_bos_token to true")
    else:
        return []
    return [Found("tokenizer_config.json", Flaw("old-tokenizer", *flaw))]


def pair(store: Path, parts: Mapping[str, WeightSet]) -> list[str]:
    """What is wrong between the sets of one model, by the catalogue and the files; a line each.

    The projection's rows must be the language model's hidden size, as in upstream's
    ``size mismatch for llama_proj.weight``.
    """
    hidden: dict[str, int] = {}
    rows: dict[str, int] = {}
    for name, weights in parts.items():
        folder = store / weights.folder if weights.folder else store
        if weights.kind == "llama":
            size = _settings(folder / "config.json").get("hidden_size")
            if isinstance(size, int):
                hidden[name] = size
        if weights.kind == "projection":
            for file in weights.files:
                try:
                    tensor = _ending(tensors(folder / file.path), "llama_proj.weight")
                except (Damaged, OSError):
                    continue
                if tensor is not None:
                    rows[name] = tensor.shape[0]
    apart = [
        f"{name} was trained with {' or '.join(weights.pairs)}, not with {other}: with it the "
        "answers would be garbage: take the one that it was trained with"
        for name, weights in parts.items()
        for other, language in parts.items()
        if weights.kind == "projection" and weights.pairs and language.kind == "llama"
        if other not in weights.pairs
    ]
    return apart + [
        f"{one} ({_sized(size)}) does not fit {other} ({_sized(rows[other])}): "
        "take the projection and the language model of one size"
        for other in rows
        for one, size in hidden.items()
        if size != rows[other]
    ]
