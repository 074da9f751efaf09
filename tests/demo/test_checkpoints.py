"""A file that is not the checkpoint it should be is one line, and base + delta is the model."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from modeldemo import config, device, systems
from modeldemo.engine import ModelDemoError, Sampling
from modeldemo.minigpt4 import load
from modeldemo.minigpt4.checkpoints import check_language, read_llama_config
from modeldemo.minigpt4.decoder import Decoder
from modeldemo.pico.train import Plan
from modeldemo.pico.write import zero_padded
from safetensors.torch import save_file
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

PICO = Path(__file__).parents[2] / "files" / "weights" / "pico"

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
    assert "32001 rows is Vicuna v0" in line
    assert "fleet weights merge" in line


def test_vicuna_v1_1_is_refused_as_preflight_refuses_it(made, tmp_path):
    folder = tmp_path / VICUNA
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 32000}))
    rows = torch.zeros(32000, raw["hidden_size"], dtype=torch.float16)
    words = {"model.embed_tokens.weight": rows, "lm_head.weight": rows}
    for file in folder.glob("*.bin"):
        change(file, lambda t: t.update({name: words[name] for name in words.keys() & t.keys()}))
    line = loaded(made)
    assert "32000 rows is LLaMA's or Vicuna v1.1's" in line
    assert "trained with Vicuna v0" in line


def test_a_tokenizer_with_more_pieces_than_the_vocabulary_is_named(made, tmp_path):
    raw = json.loads((tmp_path / VICUNA / "config.json").read_text())
    (tmp_path / VICUNA / "config.json").write_text(json.dumps(raw | {"vocab_size": 300}))
    assert "tokenizer.model has 400 pieces, config.json a vocab_size of 300" in loaded(made)


@pytest.mark.parametrize("pico", [True, False])
def test_a_delta_that_was_not_merged_is_named_before_the_weights_are_read(made, tmp_path, pico):
    delta = PICO / "vicuna-pico-delta" if pico else tmp_path / "vicuna-pico-delta"
    change(tmp_path / VIT, lambda t: t.clear())
    if pico:
        shutil.copyfile(PICO / PROJECTION, tmp_path / PROJECTION)
        sizes = tiny.write_yamls(tmp_path, Plan().sizes)
        line = loaded(sizes, f"model.llama_model={delta}")
    else:
        line = loaded(made, f"model.llama_model={delta}")
    assert f"{delta}: a delta, not a model" in line
    assert "fleet weights merge" in line


@pytest.mark.parametrize("merged", [VICUNA, "llama-pico-base"])
def test_a_whole_model_is_not_taken_for_a_delta(merged):
    config = read_llama_config(PICO / merged)
    check_language(PICO / merged, config, 640)


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


def tensor_bytes(file):
    """Where in a checkpoint its largest tensor's numbers begin, and how many bytes they are."""
    with zipfile.ZipFile(file) as archive:
        stored = [info for info in archive.infolist() if "/data/" in info.filename]
        entry = max(stored, key=lambda info: info.file_size)
    with file.open("rb") as stream:
        stream.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
    return entry.header_offset + 30 + name + extra, entry.file_size


@pytest.mark.parametrize("file", FILES)
def test_damaged_numbers_are_named(made, tmp_path, file):
    start, size = tensor_bytes(tmp_path / file)
    with (tmp_path / file).open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\xff" * min(size, 64))
    line = loaded(made)
    assert f"{tmp_path / file}: " in line
    assert "the file is damaged; fetch it again" in line


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_table_of_contents_is_named(made, tmp_path, file):
    data = (tmp_path / file).read_bytes()
    at = data.index(b"data.pkl") + 300
    (tmp_path / file).write_bytes(data[:at] + b"\x00\xff" * 40 + data[at + 80 :])
    line = loaded(made)
    assert f"{tmp_path / file}: " in line
    assert "fetch the file" in line


def test_safetensors_load_and_a_damaged_one_is_named(made, tmp_path):
    folder, whole = tmp_path / VICUNA, {}
    for file in folder.glob("*.bin"):
        whole |= torch.load(file, weights_only=True)
        file.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    file = folder / "model.safetensors"
    save_file(whole, file)
    assert systems.load(config.load(*made, []), "cpu").model_id == "pico"
    os.truncate(file, file.stat().st_size - 100)
    assert "model.safetensors: cannot be read" in loaded(made)


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
    line = loaded(made)
    assert QFORMER in line
    assert "could run code" in line
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


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("low_resource=True", "8bit weights need a GPU; set precision to auto and low_resource to"),
        ("precision=8bit", "8bit weights need a GPU"),
        ("precision=4bit", "4bit weights need a GPU"),
        ("precision=fp16", "fp16 needs a GPU"),
    ],
)
def test_a_precision_that_a_cpu_cannot_serve_is_refused(made, option, said):
    assert said in loaded(made, f"model.{option}")


def test_a_gpu_without_bitsandbytes_is_told_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelDemoError, match="4bit weights need bitsandbytes; install it"):
        device.choose_precision("4bit", torch.device("cuda"))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_the_language_half_has_the_precision_that_was_asked_for(made, precision, dtype):
    settings = config.load(*made, [f"model.precision={precision}"])
    engine = systems.load(settings, "cpu")
    assert {p.dtype for p in engine._model.llama.parameters()} == {dtype}
    assert {p.dtype for p in engine._model.vision.parameters()} == {torch.float32}
    answer = engine.stream(engine.health, Sampling(temperature=0, max_new_tokens=4))
    assert sum(piece.new_tokens for piece in answer) == 4


def both(name, weight):
    return {f"{name}.weight": weight, f"{name}.bias": weight[:, 0]}


@pytest.mark.parametrize(("precision", "most"), [("8bit", 0.03), ("4bit", 0.25)])
def test_bitsandbytes_layers_are_filled_one_by_one_and_answer(made, tmp_path, precision, most):
    folder = tmp_path / "language"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "vocab_size": 90}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).half().save_pretrained(folder)
    settings = replace(config.load(*made, []).settings, llama=folder)
    change(tmp_path / PROJECTION, lambda t: t.update(both("llama_proj", torch.zeros(64, 24))))
    language = read_llama_config(folder)
    cpu = torch.device("cpu")
    whole = load.assemble(settings, language, cpu, "fp32").llama
    small = load.assemble(settings, language, cpu, precision).llama
    kinds = {type(m).__name__ for m in small.model.layers.modules() if isinstance(m, nn.Linear)}
    assert kinds == {{"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[precision]}
    for name, module in small.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            full = whole.model.layers.get_submodule(name).weight
            assert module.weight.nbytes * (4 if precision == "8bit" else 8) == full.nbytes
    ids = torch.arange(5, 45)
    logits = []
    for llama in (whole, small):
        decoder = Decoder(llama.eval(), 64)
        with torch.inference_mode():
            logits.append(decoder.read(decoder.embed(ids), ids.tolist()))
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < most


def test_weights_that_do_not_fit_the_gpu_say_what_would(made, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(load, "load_llama", full)
    assert "do not fit the GPU's memory in fp32; set model.precision to 8bit" in loaded(made)


MEASURE = """
import sys
import torch
from pathlib import Path
from modeldemo.minigpt4 import checkpoints
from modeldemo.minigpt4.model import MiniGPT4
from modeldemo.minigpt4.sizes import Sizes, VitSizes

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(lines[key].split()[0]) for key in ("RssAnon", "VmRSS")]

def place(name, value):  # as to a device: all is read, and nothing of it stays in host memory
    buffer[: value.numel()].copy_(value.flatten())
    most[:] = map(max, most, resident())
    return torch.empty(value.shape, device="meta")

buffer = torch.ones(1 << 24)
for folder in map(Path, sys.argv[1:]):
    with torch.device("meta"):
        config = checkpoints.read_llama_config(folder)
        model = MiniGPT4(Sizes(VitSizes(depth=1)), config)
    checkpoints.read(folder / "0.bin")
    before, most = resident(), [0, 0]
    checkpoints.load_llama(model, folder, place)
    print(*(after - first for after, first in zip(most, before)))
"""


def test_host_memory_holds_no_more_than_one_shard(tmp_path):
    width, layers = 1024, 6
    shards = [{"model.embed_tokens.weight": torch.ones(64, width).half()}]
    for i in range(layers):
        layer = f"model.layers.{i}"
        sizes = {f"self_attn.{p}_proj": (width, width) for p in "qkvo"}
        sizes |= {f"mlp.{p}_proj": (4 * width, width) for p in ("gate", "up")}
        sizes |= {"mlp.down_proj": (width, 4 * width)}
        sizes |= {f"{name}_layernorm": (width,) for name in ("input", "post_attention")}
        shards.append({f"{layer}.{n}.weight": torch.ones(s).half() for n, s in sizes.items()})
    shards[-1] |= {"model.norm.weight": torch.ones(width), "lm_head.weight": torch.ones(64, width)}
    where = {name: f"{i}.bin" for i, shard in enumerate(shards) for name in shard}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 8}
    sizes |= {"num_hidden_layers": layers, "vocab_size": 64}
    # Files older than torch 1.6 cannot be mapped.
    folders = [tmp_path / "mapped", tmp_path / "old"]
    for folder in folders:
        folder.mkdir()
        for i, shard in enumerate(shards):
            zipped = folder.name == "mapped"
            torch.save(shard, folder / f"{i}.bin", _use_new_zipfile_serialization=zipped)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        (folder / "config.json").write_text(json.dumps(sizes))
    # What is freed goes back to the system at once, so that what is held is measured.
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    path["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)],
        env=path,
        capture_output=True,
        text=True,
        check=True,
    )
    shard = max(file.stat().st_size for file in folders[0].glob("*.bin")) / 2**20
    assert shard > 30
    for line, read in zip(done.stdout.splitlines(), (0, shard), strict=True):
        anonymous, resident = (int(kib) / 1024 for kib in line.split())
        assert anonymous < 4 + read
        assert resident < 8 + shard


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
