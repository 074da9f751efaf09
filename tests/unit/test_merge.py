"""What of a merge is decided before torch is there: what belongs together, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gpufleet import ROOT, cli
from gpufleet.errors import FleetError, UsageError
from gpufleet.weights.merge import checkpoint, child, engine, environment, fixes
from gpufleet.weights.merge.plan import Folder, Stored, alike, plan

PICO = ROOT / "files" / "weights" / "pico"
BASE, DELTA, VICUNA = (PICO / n for n in ("llama-pico-base", "vicuna-pico-delta", "vicuna-pico"))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


def shapes(rows: int, width: int = 16, layers: int = 2) -> Shapes:
    """Some tensors of a LLaMA."""
    found: Shapes = {EMBEDDING: (rows, width)}
    for i in range(layers):
        found[f"model.layers.{i}.self_attn.q_proj.weight"] = (width, width)
        found[f"model.layers.{i}.input_layernorm.weight"] = (width,)
        found[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = (width // 8,)
    return {**found, HEAD: (rows, width)}


def folder(name: str, has: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Folder:
    path = Path(name)
    file = path / "model.safetensors"
    return Folder(path, {n: Stored(file, 0, dtype, s) for n, s in has.items()}, {}, {})


def planned(base: Folder, delta: Folder, **how: Any) -> Any:
    return plan(
        base, delta, **{"version": None, "form": "safetensors", "shard_bytes": 1 << 30, **how}
    )


class TestAPlan:
    @pytest.mark.parametrize(("rows", "version"), [(32000, "v1.1"), (32001, "v0")])
    def test_tells_the_version_by_the_rows(self, rows: int, version: str):
        merge = planned(folder("b", shapes(32000)), folder("d", shapes(rows)))
        assert (merge.version, merge.rows) == (version, rows)

    def test_leaves_inv_freq_out_whoever_has_it(self):
        without = {n: s for n, s in shapes(32000).items() if not n.endswith("inv_freq")}
        merge = planned(folder("b", shapes(32000)), folder("d", without))
        assert len(merge.dropped) == 2
        assert [one.name for one in merge.shards[0].sums if "inv_freq" in one.name] == []

    def test_bounds_every_file_unless_one_tensor_is_larger(self):
        merge = planned(folder("b", shapes(64)), folder("d", shapes(64)), shard_bytes=1000)
        assert [shard.file for shard in merge.shards][:2] == [
            "model-00001-of-00004.safetensors",
            "model-00002-of-00004.safetensors",
        ]
        assert sorted(shard.bytes for shard in merge.shards) == [544, 544, 2048, 2048]

    def test_takes_a_single_number_for_a_tensor(self):
        has = {**shapes(64), "scale": ()}
        merge = planned(folder("b", has), folder("d", has))
        assert {one.name: one.shape for one in merge.shards[0].sums}["scale"] == ()

    def test_says_when_base_and_delta_may_be_swapped(self):
        for rows in (64, 32000):
            with pytest.raises(UsageError, match=r"; or swap the two, if it is the delta$"):
                planned(folder("d", shapes(rows + 1)), folder("b", shapes(rows)))

    def test_explains_32000_against_32001(self):
        base, delta = folder("llama", shapes(32000)), folder("delta", shapes(32001))
        with pytest.raises(UsageError) as caught:
            planned(base, delta, version="v1.1")
        assert str(caught.value) == (
            "delta is a Vicuna v0 delta (FastChat up to 0.1.10, 32001 rows with [PAD]), not v1.1: "
            "fetch the v1.1 delta (FastChat 0.2 and newer, 32000 rows) or ask for v0"
        )
        with pytest.raises(UsageError, match=r"is a Vicuna v1\.1 delta .* not v0: fetch the v0"):
            planned(base, folder("delta", shapes(32000)), version="v0")

    @pytest.mark.parametrize("rows", [32000, 32001])
    def test_refuses_a_base_with_pad(self, rows: int):
        with pytest.raises(UsageError, match=r"llama has 32001 rows.*merged already, or \[PAD\]"):
            planned(folder("llama", shapes(32001)), folder("delta", shapes(rows)))

    def test_refuses_7b_with_13b(self):
        seven, thirteen = shapes(32000, 4096, 32), shapes(32001, 5120, 40)
        with pytest.raises(UsageError) as caught:
            planned(folder("llama", seven), folder("delta", thirteen))
        assert str(caught.value) == (
            "llama is 7B (32 layers of width 4096), delta is 13B (40 layers of width 5120): "
            "fetch base and delta of one size"
        )

    def test_refuses_other_vocabularies(self):
        with pytest.raises(UsageError, match="llama has 32000 rows, delta has 32007"):
            planned(folder("llama", shapes(32000)), folder("delta", shapes(32007)))

    @pytest.mark.parametrize("lacking", [0, 1])
    def test_refuses_a_side_that_lacks_a_tensor(self, lacking: int):
        sides = [shapes(32000), shapes(32000)]
        del sides[lacking][HEAD]
        name = ("llama", "delta")[lacking]
        with pytest.raises(UsageError, match=f"^{name} lacks {HEAD}, which the other has"):
            planned(folder("llama", sides[0]), folder("delta", sides[1]))

    def test_refuses_another_shape(self):
        odd = {**shapes(32000), "model.layers.0.input_layernorm.weight": (17,)}
        with pytest.raises(UsageError, match="the base has 16, the delta 17"):
            planned(folder("llama", shapes(32000)), folder("delta", odd))

    def test_refuses_a_head_of_another_length_than_the_embedding(self):
        odd = {**shapes(32001), HEAD: (32000, 16)}
        with pytest.raises(UsageError, match=f"{HEAD}: the base has 32000×16, the delta 32000×16"):
            planned(folder("llama", shapes(32000)), folder("delta", odd))

    def test_refuses_a_quantised_model(self):
        with pytest.raises(UsageError, match=f"llama: {EMBEDDING} is I8, not one of F16"):
            planned(folder("llama", shapes(32000), "I8"), folder("delta", shapes(32000)))

    def test_refuses_what_is_no_llama(self):
        with pytest.raises(UsageError, match=f"delta holds no {EMBEDDING}: it is no LLaMA"):
            planned(folder("llama", shapes(32000)), folder("delta", {"weight": (3,)}))


class TestWhetherADeltaIsOne:
    BASE = (1.0, -2.0, 0.5, 3.0)

    def test_small_changes_are(self):
        assert alike(self.BASE, (0.01, -0.02, 0.001, 0.0)) is None
        assert alike(self.BASE, tuple(x / 100 for x in self.BASE)) is None

    def test_zeros_are(self):
        assert alike(self.BASE, (0.0,) * 4) is None

    def test_independent_numbers_are(self):
        assert alike(self.BASE, (2.0, 1.5, -1.0, -0.5)) is None

    def test_the_base_is_not(self):
        assert alike(self.BASE, self.BASE) == "is the base again"

    def test_the_sum_is_not(self):
        merged = alike(self.BASE, (1.01, -2.02, 0.501, 3.0))
        assert merged == "is no delta, but a model that is merged already"


class TestTheSmallFiles:
    def test_get_ids_class_and_vocabulary_right(self):
        base = json.loads((BASE / "config.json").read_text())
        assert fixes.config(base, 641) == json.loads((VICUNA / "config.json").read_text())

    def test_keep_the_newer_name_of_the_dtype_alone(self):
        assert "torch_dtype" not in fixes.config({"dtype": "float32"}, 5)
        assert fixes.config({"dtype": "float32"}, 5)["dtype"] == "float16"

    def test_are_made_where_the_base_has_none(self):
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        assert fixes.generation_config(None) == {"_from_model_config": True, **ids}

    def test_of_the_tokenizer_get_a_class_that_exists_and_a_first_token(self):
        told = {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "model_max_length": 2048}
        assert fixes.tokenizer_config(told) == {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": 2048,
        }

    def test_keep_what_a_token_has_beside_its_text(self):
        given = {"bos_token": {"content": "", "lstrip": True}, "pad_token": "[PAD]"}
        found = fixes.special_tokens_map(given)
        assert found["bos_token"] == {"content": "<s>", "lstrip": True}
        assert found["pad_token"] == "[PAD]"


def safetensors(path: Path, has: Mapping[str, tuple[int, ...]]) -> None:
    """A file of zeros, as the format is described."""
    rows, end = {}, 0
    for name, shape in has.items():
        size = 2 * Stored(path, 0, "F16", shape).elements
        span = [end, end + size]
        rows[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": span}
        end += size
    head = json.dumps(rows).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(end))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Copies of pico's base and delta."""
    for side in (BASE, DELTA):
        shutil.copytree(side, tmp_path / side.name)
    return tmp_path / BASE.name, tmp_path / DELTA.name


def refused(base: Path, delta: Path, **how: Any) -> str:
    """What a merge says that cannot be done; nothing is written."""
    output = base.parent / "out"
    before = sorted(path.name for path in base.parent.iterdir())
    with pytest.raises(UsageError) as caught:
        engine.prepare(engine.Job(base, delta, output, **how))
    assert sorted(path.name for path in base.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


SHARD = "pytorch_model-00002-of-00002.bin"


class TestRefusals:
    def test_pico_itself_is_not_refused(self, pair: tuple[Path, Path]):
        ready = engine.prepare(engine.Job(*pair, pair[0].parent / "out"))
        assert (ready.merge.version, ready.merge.rows, ready.there) == ("v0", 641, False)

    def test_the_same_folder_twice(self, pair: tuple[Path, Path]):
        other = pair[0].parent / "link"
        other.symlink_to(pair[0])
        assert "base and delta are the same folder" in refused(pair[0], other)

    def test_a_copy_of_the_base(self, pair: tuple[Path, Path]):
        other = pair[0].parent / "copy"
        shutil.copytree(pair[0], other)
        shutil.copy(DELTA / "tokenizer_config.json", other)
        assert f"{other} is the base again" in refused(pair[0], other)

    def test_a_model_that_is_merged_already(self, pair: tuple[Path, Path]):
        other = pair[0].parent / "merged"
        shutil.copytree(VICUNA, other)
        assert f"{other} is no delta, but a model that is merged" in refused(pair[0], other)

    def test_a_truncated_shard(self, pair: tuple[Path, Path]):
        shard = pair[1] / SHARD
        shard.write_bytes(shard.read_bytes()[:-1000])
        assert refused(*pair) == (
            f"{shard} is truncated or damaged ({shard.stat().st_size} bytes): fetch it again"
        )

    @pytest.mark.parametrize("cut", [4, 90, 2000])
    def test_a_truncated_safetensors_file(self, tmp_path: Path, cut: int):
        path = tmp_path / "model.safetensors"
        safetensors(path, shapes(40))
        assert len(checkpoint.tensors_of(path)) == 8
        path.write_bytes(path.read_bytes()[:-cut] if cut < 2000 else path.read_bytes()[:cut])
        with pytest.raises(UsageError, match="is truncated or damaged"):
            checkpoint.tensors_of(path)

    def test_an_lfs_pointer(self, pair: tuple[Path, Path]):
        for name in (SHARD, "tokenizer.model"):
            path = pair[1] / name
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
            assert f"{path} is a Git LFS pointer, not the file: run `git lfs pull`" in refused(
                *pair
            )
            shutil.copy(DELTA / name, path)

    @pytest.mark.parametrize("name", [SHARD, "config.json", "pytorch_model.bin.index.json"])
    def test_a_web_page(self, pair: tuple[Path, Path], name: str):
        (pair[0] / name).write_text("\n<!DOCTYPE html><title>Sign in</title>")
        assert f"{pair[0] / name} is a web page saved under this name" in refused(*pair)

    @pytest.mark.parametrize("name", [SHARD, "config.json"])
    def test_a_missing_file(self, pair: tuple[Path, Path], name: str):
        (pair[0] / name).unlink()
        assert refused(*pair) == f"{pair[0] / name} is missing: fetch it"

    def test_a_delta_without_a_tokenizer(self, pair: tuple[Path, Path]):
        (pair[1] / "tokenizer.model").unlink()
        assert "tokenizer.model is missing: fetch it" in refused(*pair)

    def test_shards_without_an_index(self, pair: tuple[Path, Path]):
        (pair[0] / "pytorch_model.bin.index.json").unlink()
        assert "has shards but no pytorch_model.bin.index.json: fetch" in refused(*pair)

    def test_a_folder_that_is_not_there_or_empty(self, pair: tuple[Path, Path], tmp_path: Path):
        assert f"no folder {tmp_path / 'x'}" in refused(tmp_path / "x", pair[1])
        (tmp_path / "e").mkdir()
        (tmp_path / "e" / "config.json").write_text("{}")
        assert "holds no model: neither .bin nor .safetensors" in refused(tmp_path / "e", pair[1])

    def test_a_tensor_in_two_shards(self, pair: tuple[Path, Path]):
        shutil.copy(pair[0] / "pytorch_model-00001-of-00002.bin", pair[0] / SHARD)
        assert "is in both pytorch_model-00001-of-00002.bin and " + SHARD in refused(*pair)

    def test_a_tensor_that_the_index_names_twice(self, pair: tuple[Path, Path]):
        index = pair[0] / "pytorch_model.bin.index.json"
        index.write_text(f'{{"weight_map": {{"{HEAD}": "{SHARD}", "{HEAD}": "{SHARD}"}}}}')
        assert refused(*pair) == f"{index} names {HEAD} twice: fetch it again"

    def test_a_tensor_that_is_in_no_shard(self, pair: tuple[Path, Path]):
        index = pair[0] / "pytorch_model.bin.index.json"
        told = json.loads(index.read_text())
        told["weight_map"]["model.more"] = SHARD
        index.write_text(json.dumps(told))
        assert f"{pair[0] / SHARD} holds no model.more, which the index names" in refused(*pair)

    def test_an_index_that_leads_out_of_the_folder(self, pair: tuple[Path, Path]):
        index = pair[0] / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": {HEAD: "../other.bin"}}))
        assert "names ../other.bin, no file beside it" in refused(*pair)

    def test_another_version_than_the_one_asked_for(self, pair: tuple[Path, Path]):
        assert "is a Vicuna v0 delta" in refused(*pair, version="v1.1")

    def test_an_output_that_is_there(self, pair: tuple[Path, Path]):
        output = pair[0].parent / "out"
        output.mkdir()
        (output / "mine").touch()
        assert f"{output} is there already, and not of this merge" in refused(*pair)

    def test_an_output_that_is_a_whole_disk(self, pair: tuple[Path, Path]):
        with pytest.raises(UsageError, match=r"^/ is a whole disk: give a folder on it, /merged"):
            engine.prepare(engine.Job(*pair, Path("/")))

    def test_an_output_that_leads_nowhere(self, pair: tuple[Path, Path], tmp_path: Path):
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(UsageError, match="loop is a link that leads nowhere"):
            engine.prepare(engine.Job(*pair, tmp_path / "loop"))

    def test_a_pickle_that_would_run_code(self, pair: tuple[Path, Path], tmp_path: Path):
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "touched",))

        with zipfile.ZipFile(pair[0] / SHARD, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"x": Evil()}, 2))
        assert "it is refused, since a pickle can run any code" in refused(*pair)
        assert not (tmp_path / "touched").exists()

    def test_a_zip_that_is_not_torchs(self, pair: tuple[Path, Path]):
        with zipfile.ZipFile(pair[0] / SHARD, "w") as archive:
            archive.writestr("x", "y")
        assert "is a zip file, but not torch's" in refused(*pair)

    def test_the_format_of_old_torch(self, pair: tuple[Path, Path]):
        (pair[0] / SHARD).write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(500))
        assert "has the format of torch before 1.6" in refused(*pair)

    def test_a_checkpoint_of_more_than_tensors(self, pair: tuple[Path, Path]):
        shutil.copy(PICO / "pretrained_minigpt4_pico.pth", pair[0] / SHARD)
        assert "holds more than tensors by name: is it a shard of LLaMA?" in refused(*pair)


class TestTheCommand:
    def run(self, *words: str) -> tuple[int, str]:
        cli._register()
        found = CliRunner().invoke(cli.app, ["weights", "merge", *words])
        if isinstance(found.exception, FleetError):
            return found.exception.exit_code, str(found.exception)
        return found.exit_code, found.output

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ((), "give a NAME of the catalogue, or --base, --delta and --output"),
            (("--base", "x", "--delta", "y"), "give a NAME of the catalogue, or --base"),
            (("vicuna-pico", "--base", "x"), "give either a NAME of the catalogue or --base"),
            (("--base", "x", "--delta", "y", "--output", "z", "--store", "s"), "--store goes with"),
            (("eva-vit-g",), "eva-vit-g: nothing of it is merged; ./fleet weights fetch"),
        ],
    )
    def test_says_what_to_give(self, words: tuple[str, ...], said: str):
        code, line = self.run(*words)
        assert code == 2
        assert line.startswith(said)

    def test_says_which_part_of_a_set_is_missing(self, tmp_path: Path):
        code, line = self.run("vicuna-7b-v0", "--store", str(tmp_path))
        assert code == 2
        assert line.endswith(f"is missing: ./fleet weights fetch llama-7b-hf --store {tmp_path}")

    def test_refuses_before_torch_is_needed(self, tmp_path: Path):
        (tmp_path / "vicuna-pico").mkdir()
        (tmp_path / "vicuna-pico" / "mine").touch()
        code, line = self.run("vicuna-pico", "--store", str(tmp_path))
        assert code == 2
        assert "vicuna-pico is there already, and not of this merge" in line


class TestTheProcess:
    def test_that_is_killed_is_told_from_one_that_fails(self, tmp_path: Path):
        script = tmp_path / "python"
        job = engine.Job(BASE, DELTA, tmp_path / "out")
        for line, said in (
            ("kill -9 $$", r"\(killed, perhaps for want of memory\): merge again: it goes on"),
            ("echo ImportError: no torch >&2; exit 1", r"\(ImportError: no torch\)"),
        ):
            script.write_text(f"#!/bin/sh\n{line}\n")
            script.chmod(0o755)
            with pytest.raises(FleetError, match=said):
                child.merge(job, environment.Python(str(script), ()), lambda progress: None)

    def test_hands_errors_on_with_their_exit_codes(self, tmp_path: Path):
        job = engine.Job(BASE, BASE, tmp_path / "out")
        python = environment.Python(sys.executable, ())
        with pytest.raises(UsageError, match="base and delta are the same folder"):
            child.merge(job, python, lambda progress: None)
