"""On a GPU every operand is where it has to be, and no token of an answer waits for the host.

Nothing is computed here: models of the published sizes, all but their number of layers, go through
the application's own code as fake tensors on `cuda:0`.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import tiny_systems
import torch
from fake_gpu import GPU, Waits, fake_gpu, with_numbers
from modeldemo import hub_folder
from modeldemo.clip.engine import ClipEngine
from modeldemo.device import ran_out
from modeldemo.engine import Conversation, DeviceLost, ModelDemoError, Sampling, Turn
from modeldemo.metrics import GpuMemory
from modeldemo.minigpt4 import engine as minigpt4
from modeldemo.minigpt4 import load
from modeldemo.minigpt4.checkpoints import read_llama_config
from modeldemo.minigpt4.engine import MiniGPT4Engine
from modeldemo.minigpt4.sizes import QFormerSizes, Sizes, VitSizes
from modeldemo.minigpt4.tokenizer import Tokenizer
from modeldemo.starchat import engine as starchat_engine
from modeldemo.starchat.engine import StarChatEngine
from PIL import Image
from test_parity import blip2_flant5xxl, eva_vit_g, full_size, save
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

PICO = Path(__file__).parents[2] / "files" / "weights" / "pico" / "vicuna-pico"
RED, BLUE = (Image.new("RGB", (64, 48), color) for color in ("red", "blue"))
ONE = Conversation((Turn("user", "What is this?", (RED,)),))
TWO = Conversation((*ONE.turns, Turn("assistant", "Red."), Turn("user", "And this?", (BLUE,))))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published files of 7B and 13B; what is read of them has two layers of each kind."""
    folder = tmp_path_factory.mktemp("full")
    save(eva_vit_g(), folder / "eva_vit_g.pth")
    save(blip2_flant5xxl(), folder / "blip2_pretrained_flant5xxl.pth", torch.float32)
    found = {}
    for size in ("7b", "13b"):
        settings = full_size(folder, size, 32001)
        config = settings.llama / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
        sizes = Sizes(VitSizes(depth=2), QFormerSizes(layers=2))
        found[size] = replace(settings, sizes=sizes)
    return found


@pytest.fixture(scope="module")
def starchat(tmp_path_factory):
    return tiny_systems.starchat(tmp_path_factory.mktemp("starchat")).folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_systems.clip(tmp_path_factory.mktemp("clip")).folder


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(minigpt4, "resize", with_numbers(minigpt4.resize))
    read = starchat_engine.tensors
    monkeypatch.setattr(starchat_engine, "tensors", with_numbers(lambda folder: [*read(folder)]))
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


def loaded(settings, precision):
    model = load.assemble(settings, read_llama_config(settings.llama), GPU, precision)
    return MiniGPT4Engine("full", model, Tokenizer(PICO / "tokenizer.model"))


def answer(gpu, engine, conversation, **sampling):
    """How many tokens were made; no token but the first may wait for the GPU."""
    gpu.host = itertools.cycle((700, 1))  # a token, and that the logits were numbers
    made = 0
    try:
        for piece in engine.stream(conversation, Sampling(max_new_tokens=4, **sampling)):
            made += piece.new_tokens
            gpu.strict = made > 0
    finally:
        gpu.strict = False
    return made


@pytest.mark.parametrize(
    ("size", "precision"), [("7b", "fp16"), ("13b", "bf16"), ("7b", "fp32"), ("13b", "fp16")]
)
def test_no_token_waits_for_the_gpu_and_nothing_is_on_another_device(
    published, gpu, size, precision
):
    engine = loaded(published[size], precision)
    assert {tensor.device for tensor in engine._model.state_dict().values()} == {GPU}
    assert answer(gpu, engine, ONE, temperature=0) == 4
    assert answer(gpu, engine, ONE, temperature=1.0) == 4
    assert answer(gpu, engine, ONE, temperature=1.0, top_k=0, repetition_penalty=1.2) == 4
    assert answer(gpu, engine, TWO, temperature=1.0, seed=3) == 4
    assert len(engine._pictures) == 2
    assert engine._decoder._cache.dtype == DTYPES[precision]


def test_a_cuda_graph_can_be_recorded_of_every_step(published, gpu):
    decoder = loaded(published["7b"], "fp16")._decoder
    gpu.strict = True
    with torch.inference_mode():
        for seen in decoder._sizes():
            logits = decoder._recorded(seen)
            assert (logits.device, logits.dtype, logits.shape) == (GPU, torch.float32, (32001,))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_picture_is_encoded_in_upstreams_precisions(published, gpu, precision):
    """Matrix products in fp16; norms, and what the layers add to, in fp32."""
    model = loaded(published["7b"], precision)._model
    seen = {}
    vision, qformer = model.vision.encoder.layers[1], model.qformer.encoder.layer[1]
    for name, module in {
        "block": vision,
        "qkv": vision.self_attn.qkv,
        "norm": vision.layer_norm1,
        "ln_vision": model.vision.post_layernorm,
        "query": qformer.attention.attention.query,
        "query norm": qformer.attention.output.LayerNorm,
        "projection": model.llama_proj,
    }.items():
        module.register_forward_hook(
            lambda _, __, found, name=name: seen.update(
                {name: (found[0] if isinstance(found, tuple) else found).dtype}
            )
        )
    model.encode_image(torch.zeros(1, 3, 224, 224, device=GPU))
    half = {"qkv", "query", "projection"}
    assert seen == {name: torch.float16 if name in half else torch.float32 for name in seen}
    assert len(seen) == 7


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_starchat_answers_on_one_device(starchat, gpu, precision):
    gpu.host = itertools.repeat(40)
    engine = StarChatEngine.load(hub_folder.Settings(starchat, precision), "cuda", "starchat")
    assert {parameter.device for parameter in engine._model.parameters()} == {GPU}
    expected = DTYPES["fp16" if precision == "auto" else precision]
    assert engine._model.transformer.wte.weight.dtype == expected
    turns = (Turn("user", "Add two numbers."),)
    for more in ((), (Turn("assistant", "def add"), Turn("user", "And three?"))):
        turns += more
        for sampling in (engine.defaults, Sampling(temperature=0)):
            pieces = engine.stream(Conversation(turns), replace(sampling, max_new_tokens=4))
            assert sum(piece.new_tokens for piece in pieces) == 4


@pytest.mark.parametrize("precision", ["auto", "fp16", "bf16"])
def test_clip_compares_on_one_device(clip, gpu, precision):
    gpu.host = itertools.repeat(0.5)
    engine = ClipEngine.load(hub_folder.Settings(clip, precision), "cuda", "clip")
    kept = {tensor.device for tensor in (*engine._model.parameters(), *engine._model.buffers())}
    assert kept == {GPU}
    labels = Conversation((Turn("user", "a red square\na blue circle", (RED,)),))
    assert "a red square" in "".join(piece.text for piece in engine.stream(labels, Sampling()))


def test_what_cudas_libraries_call_a_lack_of_memory_is_one():
    said = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    )
    assert all(ran_out(error) for error in said)
    assert not ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not ran_out(ValueError("CUDA error: out of memory"))


def test_a_failed_gpu_is_told_from_a_failed_question(starchat, gpu, monkeypatch):
    engine = StarChatEngine.load(hub_folder.Settings(starchat), "cuda", "starchat")
    asked = Conversation((Turn("user", "Add two numbers."),))
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nx")

    def fail(*_):
        raise lost

    engine._model.transformer.wte.register_forward_pre_hook(fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    with pytest.raises(ModelDemoError, match=r"^generation failed: CUDA error: an illegal"):
        list(engine.stream(asked, engine.defaults))
    # An error that stays: whatever is asked of the GPU from now on ends with it.
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(DeviceLost, match=r"illegal memory access was encountered.*Xid") as caught:
        list(engine.stream(asked, engine.defaults))
    assert "\n" not in str(caught.value)


def test_metrics_are_told_while_torch_is_being_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert [family.samples for family in GpuMemory().collect()] == [[]]


def test_what_a_gpu_refuses_is_refused_here(gpu):
    here, there = torch.ones(3), torch.ones(3, device=GPU)
    with pytest.raises(FakeTensorDeviceMismatchError):
        here + there
    gpu.strict = True
    for waits in (
        lambda: bool(there.all()),
        lambda: there.argmax().item(),
        lambda: there[there.argmax()],
        lambda: there[there > 0],
        lambda: there.cpu(),
        lambda: torch.tensor([1], device=GPU),
    ):
        with pytest.raises(Waits):
            waits()
