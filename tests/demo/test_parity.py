"""Prompt and picture give the logits that the published computation gives, and real sizes load.

The expected side is written here from the publications (EVA's and BEiT's pre-norm blocks with
biases on queries and values alone, BLIP-2's Q-Former as a BERT with cross-attention in every second
layer, MiniGPT-4's prompt), over the original files' own names; of the application it uses nothing.
"""

import json

import pytest
import sentencepiece
import tiny
import torch
from modeldemo import config, systems
from modeldemo.engine import Conversation, ModelDemoError, Sampling, Turn
from modeldemo.minigpt4 import load
from modeldemo.minigpt4.checkpoints import read_llama_config
from modeldemo.minigpt4.settings import Settings
from modeldemo.minigpt4.sizes import Sizes
from modeldemo.pico import pictures
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput


class Block(nn.Module):
    """EVA's transformer block, its parameters named as in eva_vit_g.pth."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn.q_bias = nn.Parameter(torch.zeros(width))
        self.attn.v_bias = nn.Parameter(torch.zeros(width))
        self.attn.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = self.attn.qkv(y).chunk(3, dim=-1)
        q, v = q + self.attn.q_bias, v + self.attn.v_bias
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, side, patch, width, depth, heads, mlp):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(Block(width, heads, mlp) for _ in range(depth)))

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat((self.cls_token, x), 1) + self.pos_embed)


class QFormerLayer(nn.Module):
    """A BERT layer whose queries also look at the picture, and have a feed-forward of their own."""

    def __init__(self, sizes, crosses):
        super().__init__()
        self.attention = BertAttention(sizes)
        if crosses:
            self.crossattention = BertAttention(sizes, is_cross_attention=True)
            inner = self.crossattention.self
            inner.key = nn.Linear(sizes.encoder_width, sizes.hidden_size)
            inner.value = nn.Linear(sizes.encoder_width, sizes.hidden_size)
        self.intermediate_query, self.output_query = BertIntermediate(sizes), BertOutput(sizes)

    def forward(self, x, picture):
        x = self.attention(x)[0]
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, encoder_hidden_states=picture)[0]
        return self.output_query(self.intermediate_query(x), x)


class QFormer(nn.Module):
    """ln_vision, query tokens and the Q-Former, named as in the BLIP-2 file."""

    def __init__(self, vision, width, layers, heads, mlp, every, queries):
        super().__init__()
        sizes = BertConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=mlp,
            layer_norm_eps=1e-12,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            attn_implementation="eager",
        )
        sizes.encoder_width = vision
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, width))
        self.ln_vision = nn.LayerNorm(vision, eps=1e-5)
        bert = nn.Module()
        bert.embeddings, bert.encoder = nn.Module(), nn.Module()
        bert.embeddings.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        bert.encoder.layer = nn.ModuleList(
            QFormerLayer(sizes, i % every == 0) for i in range(layers)
        )
        self.Qformer = nn.Module()
        self.Qformer.bert = bert

    def forward(self, patches):
        picture = self.ln_vision(patches)
        x = self.Qformer.bert.embeddings.LayerNorm(self.query_tokens)
        for layer in self.Qformer.bert.encoder.layer:
            x = layer(x, picture)
        return x


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(made):
    return systems.load(config.load(*made.yamls, []), "cpu", "tiny")


@pytest.fixture(scope="module")
def drawings():
    return [pictures.draw(e.scene) for e in pictures.held_out_examples(5, 2)]


def read(file):
    return {k: v.float() for k, v in torch.load(file, weights_only=True).items()}


def published(made, prompt, drawings, answer):
    """[T, vocabulary]: the logits at every token of an answer, all from the files."""
    sizes, folder = made.model.sizes, made.folder
    v, q = sizes.vit, sizes.qformer
    vit = Vit(sizes.image_size, v.patch_size, v.width, v.depth, v.heads, v.mlp_width)
    vit.load_state_dict(read(folder / "eva_vit_pico.pth"))
    file = torch.load(folder / "blip2_pico_qformer.pth", weights_only=True)["model"]
    every, mlp = q.cross_attention_frequency, q.intermediate_size
    former = QFormer(v.width, q.hidden_size, q.layers, q.heads, mlp, every, sizes.query_tokens)
    former.load_state_dict(file)
    projection = torch.load(folder / "pretrained_minigpt4_pico.pth", weights_only=True)["model"]
    llama = LlamaForCausalLM.from_pretrained(folder / "vicuna-pico", dtype=torch.float32).eval()
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "vicuna-pico" / "tokenizer.model")
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    words = llama.get_input_embeddings()
    context = [words(torch.tensor([[1]]))]
    texts = prompt.split("<ImageHere>")
    for i, text in enumerate(texts):
        context.append(words(torch.tensor([pieces.encode(text)])))
        if i == len(texts) - 1:
            break
        side = (sizes.image_size, sizes.image_size)
        rgb = drawings[i].convert("RGB").resize(side, 3)  # 3: bicubic
        pixels = torch.tensor(list(rgb.tobytes())).view(*side, 3).permute(2, 0, 1) / 255
        seen = former(vit(((pixels - mean) / deviation)[None]))
        weight, bias = projection["llama_proj.weight"], projection["llama_proj.bias"]
        context.append(nn.functional.linear(seen, weight, bias))
    start = sum(part.shape[1] for part in context)
    context.append(words(torch.tensor([answer])))
    logits = llama(inputs_embeds=torch.cat(context, dim=1)).logits[0]
    return logits[start - 1 : -1]


HEAD = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions.###Human: <Img><ImageHere></Img> "
)


def test_the_logits_of_prompt_and_picture_are_the_published_ones(made, engine, drawings):
    one = Conversation((Turn("user", "What is this?", (drawings[0],)),))
    two = Conversation(
        (
            *one.turns,
            Turn("assistant", "A red circle."),
            Turn("user", "And here?", (drawings[1],)),
        )
    )
    first = f"{HEAD}What is this?###Assistant:"
    second = f"{first} A red circle.###Human: <Img><ImageHere></Img> And here?###Assistant:"
    for conversation, prompt in ((one, first), (two, second)):
        logits, answer = [], []
        read, step = engine._decoder.read, engine._decoder.step
        note = engine._decoder.note
        engine._decoder.read = lambda *a, read=read, logits=logits: kept(logits, read(*a))
        engine._decoder.step = lambda *a, step=step, logits=logits: kept(logits, step(*a))
        engine._decoder.note = lambda token, note=note, answer=answer: (
            answer.append(token),
            note(token),
        )
        try:
            sampling = Sampling(temperature=0, max_new_tokens=12)
            pieces = list(engine.stream(conversation, sampling))
        finally:
            engine._decoder.read, engine._decoder.step = read, step
            engine._decoder.note = note
        assert len(logits) == sum(piece.new_tokens for piece in pieces) == len(answer) + 1
        with torch.inference_mode():
            last = int(logits[-1].argmax())
            expected = published(made, prompt, drawings, [*answer, last])
        worst = (torch.stack(logits) - expected).abs().max()
        assert worst <= 1e-4, worst
        assert expected.abs().max() > 0.5


def kept(list_, value):
    list_.append(value.clone())
    return value


# The real files' tensors, as published: names, shapes and what MiniGPT-4 does not use of them.


def both(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def eva_vit_g():
    shapes = {"cls_token": (1, 1, 1408), "pos_embed": (1, 257, 1408)}
    shapes |= both("patch_embed.proj", 1408, 3, 14, 14)
    for i in range(40):
        block = f"blocks.{i}"
        shapes |= both(f"{block}.norm1", 1408) | both(f"{block}.norm2", 1408)
        shapes |= {f"{block}.attn.q_bias": (1408,), f"{block}.attn.v_bias": (1408,)}
        shapes |= {f"{block}.attn.qkv.weight": (4224, 1408)}
        shapes |= both(f"{block}.attn.proj", 1408, 1408)
        shapes |= both(f"{block}.mlp.fc1", 6144, 1408) | both(f"{block}.mlp.fc2", 1408, 6144)
    return shapes | both("norm", 1408) | both("head", 1000, 1408)


def blip2_flant5xxl():
    shapes = {"query_tokens": (1, 32, 768)} | both("ln_vision", 1408)
    shapes |= {"Qformer.bert.embeddings.position_ids": (1, 512)}
    shapes |= both("Qformer.bert.embeddings.LayerNorm", 768)
    for i in range(12):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for name, seen in (("attention", 768), ("crossattention", 1408)):
            if i % 2 and name == "crossattention":
                continue
            shapes |= both(f"{layer}.{name}.self.query", 768, 768)
            shapes |= both(f"{layer}.{name}.self.key", 768, seen)
            shapes |= both(f"{layer}.{name}.self.value", 768, seen)
            shapes |= both(f"{layer}.{name}.output.dense", 768, 768)
            shapes |= both(f"{layer}.{name}.output.LayerNorm", 768)
        shapes |= both(f"{layer}.intermediate_query.dense", 3072, 768)
        shapes |= both(f"{layer}.output_query.dense", 768, 3072)
        shapes |= both(f"{layer}.output_query.LayerNorm", 768)
    return shapes | both("t5_proj", 4096, 768)


def vicuna(width, mlp, layers, rows):
    yield {"model.embed_tokens.weight": (rows, width)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes = {f"{layer}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (mlp, width) for p in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{layer}.{norm}_layernorm.weight": (width,) for norm in NORMS}
        yield shapes | {f"{layer}.self_attn.rotary_emb.inv_freq": (64,)}
    yield {"model.norm.weight": (width,), "lm_head.weight": (rows, width)}


NORMS = ("input", "post_attention")
SIZES = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}


def save(shapes, file, dtype=torch.float16):
    """A file of these tensors, each one number repeated, so that it is small."""
    tensors = {name: torch.ones((), dtype=dtype).expand(shape) for name, shape in shapes.items()}
    torch.save({"model": tensors} if dtype == torch.float32 else tensors, file)


@pytest.fixture(scope="module")
def picture_half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    save(eva_vit_g(), folder / "eva_vit_g.pth")
    save(blip2_flant5xxl(), folder / "blip2_pretrained_flant5xxl.pth", torch.float32)
    return folder


def full_size(folder, size, rows):
    """The files of a whole published model; its shards one a layer, named as decapoda's 13B."""
    width, mlp, layers = SIZES[size]
    llama = folder / f"vicuna-{size}-{rows}"
    llama.mkdir()
    where = {}
    for i, shapes in enumerate(vicuna(width, mlp, layers, rows)):
        file = f"pytorch_model-{i:05}-of-{layers + 2:05}.bin"
        save(shapes, llama / file)
        where |= dict.fromkeys(shapes, file)
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    heads = width // 128
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads}
    sizes |= {"num_hidden_layers": layers, "vocab_size": rows, "rms_norm_eps": 1e-6}
    (llama / "config.json").write_text(json.dumps(sizes))
    projection = folder / f"minigpt4-{size}.pth"
    save(both("llama_proj", width, 768), projection, torch.float32)
    vit, qformer = folder / "eva_vit_g.pth", folder / "blip2_pretrained_flant5xxl.pth"
    return Settings(Sizes(), llama=llama, vit=vit, qformer=qformer, projection=projection)


@pytest.mark.parametrize("rows", [32001, 32000], ids=["v0", "v1.1"])
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_published_files_of_full_size_fill_the_model_to_the_last_tensor(
    picture_half, size, rows
):
    settings = full_size(picture_half, size, rows)
    model = load.assemble(settings, read_llama_config(settings.llama), torch.device("meta"), "fp16")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    weights = {name: tensor for name, tensor in model.state_dict().items() if "llama." in name}
    # fp16 bytes of weights, as the published shards add up to
    expected = {("7b", 32000): 13_476_831_232, ("7b", 32001): 13_476_847_616}
    expected |= {("13b", 32001): 26_031_749_120, ("13b", 32000): 26_031_728_640}
    assert sum(tensor.numel() * 2 for tensor in weights.values()) == expected[size, rows]
    vision = [p for n, p in model.vision.named_parameters() if "post_layernorm" not in n]
    # the key's third of each qkv bias is not in the file: it is zero, and changes nothing
    assert sum(p.numel() for p in vision) - 39 * 1408 == 985_894_528
    assert model.vision.post_layernorm.eps == 1e-5
    assert model.vision.encoder.layers[0].layer_norm1.eps == 1e-6
    assert len(model.vision.encoder.layers) == 39


def test_one_tensor_of_another_shape_in_a_full_size_file_is_named(picture_half):
    shapes = blip2_flant5xxl() | {"query_tokens": (1, 64, 768)}
    save(shapes, picture_half / "other.pth", torch.float32)
    settings = full_size(picture_half, "7b", 32002)
    settings = Settings(
        Sizes(), settings.llama, settings.vit, picture_half / "other.pth", settings.projection
    )
    with pytest.raises(ModelDemoError, match=r"query_tokens is 1×64×768, .* says 1×32×768"):
        load.assemble(settings, read_llama_config(settings.llama), torch.device("meta"), "fp16")
