"""A file that is not the checkpoint it should be is one line, and base + delta is the model."""

import json
import os
import pickle
import shutil

import pytest
import tiny
import torch
from modeldemo import config, systems
from modeldemo.engine import ModelDemoError
from modeldemo.pico.write import zero_padded

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2030000000\n"
HTML = b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title>"
VIT, QFORMER = "eva_vit_pico.pth", "blip2_pico_qformer.pth"
PROJECTION, VICUNA = "pretrained_minigpt4_pico.pth", "vicuna-pico"
SHARD = f"{VICUNA}/pytorch_model-00002-of-00003.bin"
FILES = [VIT, QFORMER, PROJECTION, SHARD]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def made(original, tmp_path):
    shutil.copytree(original.folder, tmp_path, dirs_exist_ok=True)
    return tiny.write_yamls(tmp_path)


def checked(made):
    """The line with which the light check refuses."""
    with pytest.raises(ModelDemoError) as caught:
        config.load(*made, [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(made, *options):
    """The line with which loading refuses, after the light check had nothing to say."""
    settings = config.load(*made, options)
    with pytest.raises(ModelDemoError) as caught:
        systems.load(settings, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", [*FILES, f"{VICUNA}/tokenizer.model"])
@pytest.mark.parametrize(
    ("content", "words"), [(HTML, "web page"), (LFS, "Git LFS pointer"), (b"", "empty")]
)
def test_what_a_failed_download_leaves_is_named(made, tmp_path, file, content, words):
    (tmp_path / file).write_bytes(content)
    line = checked(made)
    assert words in line
    assert file in line


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("left", [0.1, 0.5, 0.99])
def test_a_cut_off_file_is_named(made, tmp_path, file, left):
    size = (tmp_path / file).stat().st_size
    os.truncate(tmp_path / file, int(size * left))
    line = checked(made)
    assert "cut off" in line
    assert file in line


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "config.json", "pytorch_model-00001-of-00003.bin"]
)
def test_a_missing_part_of_the_llama_directory_is_named(made, tmp_path, name):
    (tmp_path / VICUNA / name).unlink()
    assert name in checked(made)


def test_a_llama_directory_without_weights_is_named(made, tmp_path):
    (tmp_path / VICUNA / "pytorch_model.bin.index.json").unlink()
    assert "no weights" in checked(made)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(made, tmp_path, content):
    (tmp_path / VICUNA / "pytorch_model.bin.index.json").write_text(content)
    assert "pytorch_model.bin.index.json" in checked(made)


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden_size": "wide"}', '{"vocab_size": -1}'])
def test_a_broken_llama_configuration_is_named(made, tmp_path, content):
    (tmp_path / VICUNA / "config.json").write_text(content)
    assert "config.json" in loaded(made)


def test_a_file_of_the_wrong_kind_is_named(made, tmp_path):
    (tmp_path / VICUNA / "tokenizer.model").write_bytes(b"\x80 nothing of the kind" * 9)
    assert "tokenizer.model" in loaded(made)


def change(file, edit):
    content = torch.load(file, weights_only=True)
    edit(content.get("model", content))
    torch.save(content, file)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (VIT, "blocks.1.attn.q_bias"),
        (VIT, "pos_embed"),
        (QFORMER, "query_tokens"),
        (QFORMER, "ln_vision.weight"),
        (QFORMER, "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"),
        (PROJECTION, "llama_proj.bias"),
    ],
)
def test_a_missing_or_misshaped_tensor_is_named_with_its_file(made, tmp_path, file, key):
    change(tmp_path / file, lambda t: t.update({key: torch.zeros(3, 1)}))
    line = loaded(made)
    assert file in line
    assert key in line
    assert "3×1" in line
    change(tmp_path / file, lambda t: t.pop(key))
    line = loaded(made)
    assert f"{file}: {key} is missing" in line


def test_a_tensor_missing_from_every_shard_is_named(made, tmp_path):
    for file in (tmp_path / VICUNA).glob("*.bin"):
        change(file, lambda t: t.pop("model.norm.weight", None))
    assert "model.norm.weight" in loaded(made)


def test_a_vocabulary_of_one_row_too_few_is_named(made, tmp_path):
    raw = json.loads((tmp_path / VICUNA / "config.json").read_text())
    raw["vocab_size"] -= 1
    (tmp_path / VICUNA / "config.json").write_text(json.dumps(raw))
    line = loaded(made)
    assert "401×32" in line
    assert "400×32" in line


def test_a_projection_for_another_llama_says_which_pair_is_wrong(made, tmp_path):
    weight = torch.zeros(5120, 24)
    change(tmp_path / PROJECTION, lambda t: t.update({"llama_proj.weight": weight}))
    line = loaded(made)
    assert "7B/13B pair" in line
    assert "5120×24" in line
    assert "32×24" in line


def test_the_pair_is_checked_before_the_weights_are_read(made, tmp_path):
    weight = torch.zeros(5120, 24)
    change(tmp_path / PROJECTION, lambda t: t.update({"llama_proj.weight": weight}))
    change(tmp_path / VIT, lambda t: t.clear())
    assert "pair" in loaded(made)


def test_a_checkpoint_without_the_key_model_is_named(made, tmp_path):
    torch.save({"llama_proj.weight": torch.zeros(32, 24)}, tmp_path / PROJECTION)
    assert f"{PROJECTION}: has no key 'model'" in loaded(made)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_no_code(made, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    if zipped:
        torch.save({"model": Evil()}, tmp_path / QFORMER)
    else:
        (tmp_path / QFORMER).write_bytes(pickle.dumps({"model": Evil()}))
    assert QFORMER in loaded(made)
    assert not (tmp_path / "pwned").exists()


def test_files_of_the_format_before_zip_load(made, tmp_path):
    for file in (VIT, QFORMER, PROJECTION):
        content = torch.load(tmp_path / file, weights_only=True)
        torch.save(content, tmp_path / file, _use_new_zipfile_serialization=False)
    assert systems.load(config.load(*made, []), "cpu").model_id == "pico"


def test_one_single_shard_without_an_index_loads(made, tmp_path):
    folder, whole = tmp_path / VICUNA, {}
    for file in folder.glob("*.bin"):
        whole |= torch.load(file, weights_only=True)
        file.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    torch.save(whole, folder / "pytorch_model.bin")
    assert systems.load(config.load(*made, []), "cpu").model_id == "pico"


def test_shards_are_found_by_the_index_and_not_by_their_names(made, tmp_path):
    index = tmp_path / VICUNA / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    for name in set(content["weight_map"].values()):
        (tmp_path / VICUNA / name).rename(tmp_path / VICUNA / f"part-{name}")
    content["weight_map"] = {k: f"part-{v}" for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    assert systems.load(config.load(*made, []), "cpu").model_id == "pico"


def test_rotary_tables_of_old_conversions_are_ignored(made, tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change(tmp_path / SHARD, lambda t: t.update(extra))
    assert systems.load(config.load(*made, []), "cpu").model_id == "pico"


def test_the_loaded_model_no_longer_depends_on_the_files(made, tmp_path):
    engine = systems.load(config.load(*made, []), "cpu")
    before = {k: v.clone() for k, v in engine._model.state_dict().items()}
    for file in FILES:
        data = bytearray((tmp_path / file).read_bytes())
        with (tmp_path / file).open("r+b") as stream:
            stream.write(b"\xff" * len(data))
    assert all(torch.equal(v, before[k]) for k, v in engine._model.state_dict().items())


def test_eight_bit_without_a_gpu_is_refused(made):
    assert "low_resource" in loaded(made, "model.low_resource=True")


def test_a_gpu_that_is_not_there_is_refused(made):
    if torch.cuda.is_available():
        assert systems.load(config.load(*made, []), "cuda").model_id == "pico"
        return
    with pytest.raises(ModelDemoError, match="no GPU"):
        systems.load(config.load(*made, []), "cuda")


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def test_base_and_delta_add_up_to_the_model_bit_for_bit(original):
    base = tensors(original.folder / "llama-pico-base")
    delta = tensors(original.folder / "vicuna-pico-delta")
    merged = tensors(original.folder / VICUNA)
    assert base.keys() == delta.keys() == merged.keys()
    for name, value in merged.items():
        assert value.dtype == torch.float16
        total = zero_padded(base[name], len(delta[name])) + delta[name]
        assert torch.equal(total, value), name
        longer = len(delta[name]) - len(base[name])
        assert longer == (name in ("model.embed_tokens.weight", "lm_head.weight")), name
