"""Inspection: what people trip over with weights, made from real files, gets its name."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gpufleet import ROOT, catalog
from gpufleet.errors import UsageError
from gpufleet.weights import inspect
from gpufleet.weights.headers import LEGACY, Damaged, tensors
from gpufleet.weights.inspect import Flaw, flaw
from gpufleet.weights.merge import checkpoint

PICO = ROOT / "files" / "weights" / "pico"
SHARD = PICO / "vicuna-pico" / "pytorch_model-00003-of-00003.bin"
REAL = sorted(path for path in PICO.rglob("*") if path.is_file())


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A real torch file that a test may spoil."""
    return Path(shutil.copy(SHARD, tmp_path / "pytorch_model.bin"))


def said(path: Path, size: int | None = None) -> tuple[str, str, str]:
    found = flaw(path, size)
    assert found is not None
    for text in (found.what, found.do):
        assert "\n" not in text
    return found.kind, found.what, found.do


def safetensors(path: Path, **entries: tuple[str, list[int], bytes]) -> Path:
    """A file as the format's specification describes it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in entries.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


class TestHeaders:
    @pytest.mark.parametrize(
        ("file", "name", "dtype", "shape"),
        [
            ("eva_vit_pico.pth", "cls_token", "F16", (1, 1, 128)),
            ("blip2_pico_qformer.pth", "model.query_tokens", "F32", (1, 16, 96)),
            ("pretrained_minigpt4_pico.pth", "model.llama_proj.weight", "F32", (128, 96)),
            ("vicuna-pico/pytorch_model-00003-of-00003.bin", "lm_head.weight", "F16", (641, 128)),
        ],
    )
    def test_torch_files_tell_names_types_and_shapes(
        self, file: str, name: str, dtype: str, shape: tuple[int, ...]
    ):
        found = tensors(PICO / file)
        assert (found[name].dtype, found[name].shape) == (dtype, shape)

    def test_they_name_what_the_index_of_the_folder_names(self):
        index = json.loads((PICO / "vicuna-pico" / "pytorch_model.bin.index.json").read_text())
        mine = {name for name, file in index["weight_map"].items() if file == SHARD.name}
        assert set(tensors(SHARD)) == mine

    def test_a_tensors_numbers_are_where_the_header_says(self):
        found = tensors(PICO / "pretrained_minigpt4_pico.pth")["model.llama_proj.bias"]
        with zipfile.ZipFile(PICO / "pretrained_minigpt4_pico.pth") as archive:
            raw = archive.read("pretrained_minigpt4_pico/data/1")
        values = found.values(PICO / "pretrained_minigpt4_pico.pth")
        assert values == list(struct.unpack("<128f", raw))

    def test_safetensors_files_tell_the_same(self, tmp_path: Path):
        raw = struct.pack("<3e", 1.0, -2.0, 0.5)
        path = safetensors(
            tmp_path / "m.safetensors", a=("F32", [2], b"\0" * 8), b=("F16", [3], raw)
        )
        found = tensors(path)
        assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
            "a": ("F32", (2,)),
            "b": ("F16", (3,)),
        }
        assert found["b"].values(path) == [1.0, -2.0, 0.5]

    def test_bfloat16_is_read(self, tmp_path: Path):
        raw = struct.pack("<2H", 0x3F80, 0xC000)
        path = safetensors(tmp_path / "m.safetensors", a=("BF16", [2], raw))
        assert tensors(path)["a"].values(path) == [1.0, -2.0]

    def test_a_file_of_the_format_before_zip_is_read_too(self, tmp_path: Path):
        path = legacy(tmp_path / "old.bin")
        assert {name: one.shape for name, one in tensors(path).items()} == {"w": (2, 3)}
        assert flaw(path) is None

    def test_nothing_that_a_pickle_names_is_called(self, tmp_path: Path):
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "called",)

        path = tmp_path / "evil.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", pickle.dumps({"w": Evil()}))
        assert tensors(path) == {}
        assert not (tmp_path / "called").exists()

    @pytest.mark.parametrize("index", [b"", b"\x80\x02}", b"no pickle at all", b"\x80\x02K\x01b."])
    def test_a_pickle_that_makes_no_sense_is_damage_and_no_crash(
        self, tmp_path: Path, index: bytes
    ):
        path = tmp_path / "odd.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("odd/data.pkl", index)
        with pytest.raises(Damaged):
            tensors(path)


def legacy(path: Path) -> Path:
    """One fp32 tensor `w` of 2 x 3 as torch.save wrote it before version 1.6."""

    # Written by hand: pickle would look the classes up, and torch is not here.
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06NtQK\x00(K\x02K\x03t(K\x03K\x01t\x89N}tR"
    )
    index = b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."
    head = LEGACY + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    data = pickle.dumps(["0"], 2) + struct.pack("<q6f", 6, *range(6))
    path.write_bytes(head + index + data)
    return path


class TestOneFile:
    @pytest.mark.parametrize(
        "path", sorted(p for p in PICO.rglob("*") if p.is_file()), ids=lambda p: p.name
    )
    def test_every_real_file_is_well(self, path: Path):
        assert flaw(path) is None
        assert flaw(path, path.stat().st_size) is None

    def test_missing(self, tmp_path: Path):
        assert said(tmp_path / "none.bin")[:2] == ("missing", "is missing")

    def test_truncated_with_the_size_known(self, shard: Path):
        with shard.open("r+b") as stream:
            stream.truncate(1000)
        assert said(shard, 431300)[:2] == ("truncated", "is truncated: 1000 of 431300 bytes")

    @pytest.mark.parametrize("left", [100, 5000, 431299])
    def test_truncated_with_the_size_unknown(self, shard: Path, left: int):
        with shard.open("r+b") as stream:
            stream.truncate(left)
        kind, what, _ = said(shard)
        assert (kind, what) == (
            "truncated",
            "is truncated: the end of its zip archive is missing",
        )

    def test_any_wrong_byte_of_a_zip_s_directory_is_no_error_of_ours(self, shard: Path):
        whole = shard.read_bytes()
        with zipfile.ZipFile(shard) as archive:
            start = archive.start_dir
        kinds = set()
        for at in range(start, start + 160):
            shard.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
            found = flaw(shard)
            kinds.add(found and found.kind)
            with suppress(UsageError):
                checkpoint.tensors_of(shard)
        assert kinds >= {"truncated", "not-a-checkpoint"}

    def test_truncated_safetensors(self, tmp_path: Path):
        path = safetensors(tmp_path / "m.safetensors", a=("F32", [20], b"\1" * 80))
        whole = path.stat().st_size
        with path.open("r+b") as stream:
            stream.truncate(whole - 30)
        assert said(path)[:2] == ("truncated", f"is truncated: {whole - 30} of {whole} bytes")
        with path.open("r+b") as stream:
            stream.truncate(20)
        assert said(path)[0] == "truncated"

    @pytest.mark.parametrize("missing", [1, 20, 40, 60, 100])
    def test_truncated_of_the_format_before_zip(self, tmp_path: Path, missing: int):
        path = legacy(tmp_path / "old.bin")
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size - missing)
        assert said(path)[0] == "truncated"

    def test_empty(self, tmp_path: Path):
        (tmp_path / "x.pth").touch()
        assert said(tmp_path / "x.pth", 10)[:2] == ("truncated", "is empty")

    def test_a_download_that_reserved_its_space_and_stopped(self, shard: Path):
        size = shard.stat().st_size
        with shard.open("r+b") as stream:
            stream.truncate(200_000)
            stream.truncate(size)
        kind, what, _ = said(shard, size)
        assert kind == "unfinished"
        assert "did not finish" in what

    @pytest.mark.parametrize(
        "name", ["x.bin", "tokenizer.model", "x.safetensors", "x.json", "x.png"]
    )
    def test_a_git_lfs_pointer(self, tmp_path: Path, name: str):
        text = (
            "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 499723\n"
        )
        (tmp_path / name).write_text(text)
        kind, what, do = said(tmp_path / name, 499723)
        assert (kind, do) == ("lfs-pointer", "git lfs pull")
        assert what == "is a Git LFS pointer to 499723 bytes, not the file"

    @pytest.mark.parametrize(
        ("page", "do"),
        [
            ("<!DOCTYPE html><title>Google Drive - Virus scan warning</title>", "Google Drive"),
            ("<html><head><title>Google Drive - Quota exceeded</title>", "try again in a day"),
            ("\n  <HTML><body>Please sign in to continue</body>", "log in"),
            ("<!doctype html>\n<title>Portal</title><input type=password>", "log in"),
            ("<html><title>404 Not &amp; Found</title>", ""),
            ("<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", ""),
        ],
    )
    def test_a_web_page_saved_as_a_checkpoint(self, tmp_path: Path, page: str, do: str):
        (tmp_path / "x.pth").write_text(page)
        kind, what, todo = said(tmp_path / "x.pth", 37907201)
        assert kind == "web-page"
        assert what.startswith("is a web page saved under this name")
        assert do in todo
        assert bool(do) == bool(todo)

    def test_the_pages_title_is_shown(self, tmp_path: Path):
        (tmp_path / "x.pth").write_text("<html><title>404\n Not &amp; Found</title>")
        assert "'404 Not & Found'" in said(tmp_path / "x.pth")[1]

    @pytest.mark.parametrize("name", ["x.bin", "x.safetensors", "config.json"])
    def test_a_servers_error_saved_as_the_file(self, tmp_path: Path, name: str):
        (tmp_path / name).write_text('{"error": "Repository not found"}')
        kind, what, _ = said(tmp_path / name)
        assert kind == "error-body"
        assert what == "is a server's answer, not the file: Repository not found"

    @pytest.mark.parametrize("name", ["x.bin", "tokenizer.model"])
    def test_a_text_saved_as_the_file(self, tmp_path: Path, name: str):
        (tmp_path / name).write_text("Entry not found\n")
        kind, what, _ = said(tmp_path / name)
        assert (kind, what) == (
            "error-body",
            "is a text of 16 bytes, not the file: 'Entry not found'",
        )

    def test_json_that_is_cut_off(self, tmp_path: Path):
        text = (PICO / "vicuna-pico" / "config.json").read_text()
        (tmp_path / "config.json").write_text(text[:-20])
        assert said(tmp_path / "config.json")[0] == "not-json"

    def test_json_that_speaks_of_errors_among_other_things_is_no_error(self, tmp_path: Path):
        (tmp_path / "x.json").write_text('{"error": 0.1, "accuracy": 0.9}')
        assert flaw(tmp_path / "x.json") is None

    def test_a_folder_that_google_drive_zipped(self, tmp_path: Path):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            archive.writestr("weights/x.pth", b"x" * 100)
        kind, _, do = said(tmp_path / "x.pth")
        assert (kind, do) == ("archive", "unpack it there")

    def test_bytes_that_are_no_checkpoint(self, tmp_path: Path):
        (tmp_path / "x.bin").write_bytes(bytes(range(256)) * 100)
        assert said(tmp_path / "x.bin")[0] == "not-a-checkpoint"
        (tmp_path / "x.safetensors").write_bytes(bytes(range(256)) * 100)
        assert said(tmp_path / "x.safetensors")[0] == "not-a-checkpoint"

    def test_a_tokenizer_that_is_cut_off(self, tmp_path: Path):
        whole = (PICO / "vicuna-pico" / "tokenizer.model").read_bytes()
        (tmp_path / "tokenizer.model").write_bytes(whole[:5003])
        assert said(tmp_path / "tokenizer.model")[0] in ("truncated", "not-a-tokenizer")

    def test_another_size_than_expected(self, shard: Path):
        with shard.open("ab") as stream:
            stream.write(b"\1" * 70_000)
        found = flaw(shard, 431300)
        assert found is not None
        assert found.kind in ("truncated", "wrong-size")
        page = Path(shutil.copy(PICO / "health.png", shard.with_name("health.png")))
        assert said(page, 5)[:2] == ("wrong-size", "has 83114 bytes, expected 5")


def test_the_pieces_of_a_tokenizer_are_counted():
    config = json.loads((PICO / "llama-pico-base" / "config.json").read_text())
    assert inspect.pieces(PICO / "vicuna-pico" / "tokenizer.model") == config["vocab_size"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of pico's language model that a test may spoil."""
    shutil.copytree(PICO / "vicuna-pico", tmp_path / "vicuna-pico")
    return tmp_path / "vicuna-pico"


def flaws(folder: Path, name: str = "vicuna-pico", **change: Any) -> dict[str, Flaw]:
    weights = catalog.weight_set(name).model_copy(update=change)
    paths = sorted(path.name for path in folder.iterdir())
    return {one.path: one.flaw for one in inspect.together(folder, weights, paths)}


class TestFilesBesideEachOther:
    @pytest.mark.parametrize("name", ["vicuna-pico", "vicuna-pico-delta", "llama-pico-base"])
    def test_the_real_ones_are_well(self, name: str):
        assert flaws(PICO / name, name) == {}

    def test_7b_in_the_place_of_13b(self, folder: Path):
        found = flaws(folder, hidden_size=5120)
        assert found["config.json"].kind == "wrong-pair"
        assert found["config.json"].what == (
            "is of the wrong size (hidden size 128): hidden size 5120, 13B is needed"
        )
        (shard,) = [path for path in found if path.endswith(".bin")]
        assert "model.embed_tokens.weight" in tensors(folder / shard)

    @pytest.mark.parametrize(
        ("rows", "wanted", "hint"),
        [
            (641, 640, ""),
            (32001, 32000, "this is Vicuna v0 (FastChat <= 0.1.10), not v1.1"),
            (32000, 32001, "this is Vicuna v1.1 (FastChat >= 0.2) or LLaMA, not v0"),
        ],
    )
    def test_v0_in_the_place_of_v1_1(self, tmp_path: Path, rows: int, wanted: int, hint: str):
        raw = b"\0" * (rows * 2)
        entries = {"model.embed_tokens.weight": ("F16", [rows, 1], raw)}
        safetensors(tmp_path / "model.safetensors", **entries)
        found = flaws(tmp_path, vocabulary=wanted, hidden_size=1)["model.safetensors"]
        assert found.kind == "wrong-version"
        assert found.what.startswith(f"has {rows} rows of vocabulary, {wanted} are needed")
        assert hint in found.what

    def test_a_delta_that_was_not_merged(self):
        base = catalog.weight_set("vicuna-pico")
        paths = [path.name for path in (PICO / "vicuna-pico-delta").iterdir()]
        (found,) = inspect.together(PICO / "vicuna-pico-delta", base, paths)
        assert found.flaw.kind == "delta-not-merged"

    def test_a_model_in_the_place_of_a_delta(self, folder: Path):
        (found,) = flaws(folder, "vicuna-pico-delta").values()
        assert found.kind == "not-a-delta"

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"tokenizer_class": "LLaMATokenizer"}, "LLaMATokenizer, which does not exist"),
            ({"bos_token": ""}, "empty special tokens"),
            ({"add_bos_token": None}, "lacks add_bos_token"),
        ],
    )
    def test_decapodas_tokenizer_in_a_model_to_be_served(
        self, folder: Path, change: dict[str, Any], what: str
    ):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        found = flaws(folder)["tokenizer_config.json"]
        assert found.kind == "old-tokenizer"
        assert what in found.what
        assert found.do.startswith("set ")

    def test_decapodas_tokenizer_in_the_base_is_as_it_came(self):
        assert "LLaMATokenizer" in (PICO / "llama-pico-base/tokenizer_config.json").read_text()
        assert flaws(PICO / "llama-pico-base", "llama-pico-base") == {}

    def test_a_config_that_says_another_vocabulary_than_the_tensors_have(self, folder: Path):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 640}))
        assert flaws(folder)["config.json"].what == (
            "says vocab_size 640, the tensors have 641 rows"
        )

    def test_a_tokenizer_with_more_pieces_than_the_model_has_rows(self, tmp_path: Path):
        entries = {"model.embed_tokens.weight": ("F16", [100, 1], b"\0" * 200)}
        safetensors(tmp_path / "model.safetensors", **entries)
        shutil.copy(PICO / "vicuna-pico" / "tokenizer.model", tmp_path)
        found = flaws(tmp_path, vocabulary=100, hidden_size=1)["tokenizer.model"]
        assert "has 640 pieces, the model's vocabulary 100" in found.what

    def test_shards_of_two_sets_mixed(self, folder: Path):
        one, other = sorted(folder.glob("*.bin"))[:2]
        shutil.copy(other, one)
        assert flaws(folder)[one.name].kind == "mixed-shards"

    def test_the_format_before_zip_in_what_is_to_be_merged(self, tmp_path: Path):
        legacy(tmp_path / "pytorch_model.bin")
        assert flaws(tmp_path, "vicuna-pico-delta")["pytorch_model.bin"].kind == "old-format"
        assert flaws(tmp_path, "vicuna-pico") == {}

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("pico-q-former", "eva_vit_pico.pth"),
            ("pico-vision", "blip2_pico_qformer.pth"),
            ("minigpt4-pico", "eva_vit_pico.pth"),
        ],
    )
    def test_one_part_in_the_place_of_another(self, name: str, file: str):
        (found,) = inspect.together(PICO, catalog.weight_set(name), [file])
        assert found.flaw.kind == "wrong-part"

    def test_a_projection_of_the_other_size(self):
        thirteen = catalog.weight_set("minigpt4-pico").model_copy(update={"hidden_size": 5120})
        files = [file.path for file in thirteen.files]
        (found,) = inspect.together(PICO, thirteen, files)
        assert found.flaw.kind == "wrong-pair"
        assert "hidden size 5120, 13B is needed" in found.flaw.what


def test_a_projection_and_a_language_model_that_do_not_fit_are_told_of_in_one_line(folder: Path):
    shutil.copy(PICO / "pretrained_minigpt4_pico.pth", folder.parent)
    parts = {name: catalog.weight_set(name) for name in ("vicuna-pico", "minigpt4-pico")}
    assert inspect.pair(folder.parent, parts) == []
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 4096}))
    assert inspect.pair(folder.parent, parts) == [
        "vicuna-pico (hidden size 4096, 7B) does not fit minigpt4-pico (hidden size 128): "
        "take the projection and the language model of one size"
    ]


def test_a_projection_with_a_language_model_that_it_was_not_trained_with_is_told_of(tmp_path: Path):
    """Both have the same sizes: v0 and v1.1 of Vicuna."""
    parts = {name: catalog.weight_set(name) for name in ("vicuna-7b-v1.1", "minigpt4-7b")}
    (line,) = inspect.pair(tmp_path, parts)
    assert line.startswith("minigpt4-7b was trained with vicuna-7b-v0, not with vicuna-7b-v1.1: ")
