"""OpenAI's own CLIP file gives the numbers that Hugging Face's folder gives, and runs no code."""

import gzip
import json
import pickle
import shutil
import zipfile

import pytest
import tiny_systems
import torch
from modeldemo import config, systems
from modeldemo.clip import openai
from modeldemo.clip.settings import WORDS
from modeldemo.engine import Conversation, ModelDemoError, Sampling, Turn
from PIL import Image
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

LABELS = "a photo of a cat\nA  red Square, it's 7!\nhéllo 世界"


class Part(nn.Module):
    """A module of the archive; what it computes is not asked."""

    sides: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.sides = [1, 2]  # TorchScript marks a list with its type

    def forward(self, x: Tensor) -> Tensor:
        return x


#: CLIPModel's names as OpenAI's code has them, from the end of a name to its beginning.
RENAMED = (
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
)


def original_names(tensors):
    """CLIPModel's tensors as OpenAI's code names, joins and turns them."""
    found = {}
    for name, value in tensors.items():
        if name.endswith("_projection.weight"):
            name = {"visual": "visual.proj", "text": "text_projection"}[name.partition("_")[0]]
            value = value.T.contiguous()
        elif ".q_proj." in name:
            value = torch.cat([tensors[name.replace("q_proj", f"{c}_proj")] for c in "qkv"])
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        found[name] = value
    return found


def write_archive(tensors, file):
    root = Part()
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, Part())
            module = module._modules[step]
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    root.register_buffer("input_resolution", torch.tensor(32))
    torch.jit.script(root).save(str(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_systems.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """OpenAI's two files, of the same model."""
    folder = tmp_path_factory.mktemp("openai")
    write_archive(original_names(made.model.state_dict()), folder / "ViT-B-32.pt")
    with gzip.open(folder / WORDS, "wt", encoding="utf-8") as stream:
        stream.write((made.folder / "merges.txt").read_text())
        stream.write("more merges\nthan are used\n")
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def load(folder, tmp_path):
    file = tmp_path / "demo.yaml"
    file.write_text(json.dumps({"model": {"arch": "clip", "path": str(folder)}}))
    return systems.load(config.load(None, file, []), "cpu", "tiny")


def answer(engine):
    picture = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    conversation = Conversation((Turn("user", LABELS, (picture,)),))
    return "".join(piece.text for piece in engine.stream(conversation, Sampling()))


def test_it_gives_the_same_numbers(made, folder, tmp_path):
    assert answer(load(folder, tmp_path)) == answer(load(made.folder, tmp_path))


def test_its_sizes_are_those_of_the_published_configuration():
    """ViT-B/32's shapes, without its weights."""
    blocks = {f"transformer.resblocks.{i}.ln_1.weight": (512,) for i in range(12)}
    blocks |= {f"visual.transformer.resblocks.{i}.ln_1.weight": (768,) for i in range(12)}
    shapes = blocks | {
        "visual.conv1.weight": (768, 3, 32, 32),
        "visual.positional_embedding": (50, 768),
        "token_embedding.weight": (49408, 512),
        "positional_embedding": (77, 512),
        "text_projection": (512, 512),
    }
    found = openai.configuration({k: torch.empty(v, device="meta") for k, v in shapes.items()})
    published = type(found)()  # transformers' defaults are ViT-B/32
    for side in ("text_config", "vision_config"):
        assert getattr(found, side).to_dict() == getattr(published, side).to_dict()
    assert found.projection_dim == published.projection_dim


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return __import__("os").system, (f"touch {self.trace}",)


def test_an_archive_that_wants_code_is_refused_and_runs_none(copy, tmp_path):
    with zipfile.ZipFile(copy / "ViT-B-32.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(ModelDemoError, match="could run code"):
        load(copy, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WORDS).unlink(), f"without {WORDS}"),
        (lambda f: (f / WORDS).write_bytes(b"words"), "not CLIP's words"),
        (lambda f: (f / "ViT-B-32.pt").write_text("<html>"), "a web page"),
        (lambda f: torch.save({"a": 1}, f / "ViT-B-32.pt"), "not a CLIP"),
        (lambda f: torch.jit.script(Part()).save(str(f / "ViT-B-32.pt")), "not a CLIP"),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_it(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(ModelDemoError, match=message) as caught:
        load(copy, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_off_is_said_to_be(copy, tmp_path):
    file = copy / "ViT-B-32.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelDemoError, match="cut off"):
        load(copy, tmp_path)


def test_too_few_words_are_refused_with_the_figures(copy, tmp_path):
    with gzip.open(copy / WORDS, "wt") as stream:
        stream.write("#version\na b\n")
    with pytest.raises(ModelDemoError, match=r"makes 515 words, the weights have"):
        load(copy, tmp_path)
