"""CLIP says how well each label fits a picture, as the published description computes it."""

import json
import shutil

import pytest
import tiny_systems
import torch
from modeldemo import config, systems
from modeldemo.clip import labels
from modeldemo.clip.engine import middle
from modeldemo.engine import BadRequest, Conversation, ModelDemoError, OutOfMemory, Sampling, Turn
from modeldemo.pretrained import read_config
from PIL import Image
from tokenizers import Tokenizer
from torch.nn.functional import conv2d, layer_norm, linear
from transformers import CLIPConfig, CLIPModel

CATS = ["a photo of a cat", "a photo of a dog", "a red square", "the number 7, twice"]


def load(folder, tmp_path, **keys):
    """Through the YAML file, as the service loads it."""
    file = tmp_path / "demo.yaml"
    values = {"arch": "clip", "path": str(folder)} | keys
    file.write_text(json.dumps({"model": values}))
    return systems.load(config.load(None, file, []), "cpu", "tiny")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices: threads would wait for each other, the longer the busier the machine is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_systems.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def engine(made, tmp_path_factory):
    return load(made.folder, tmp_path_factory.mktemp("yaml"))


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def picture():
    return Image.effect_noise((90, 60), 60).convert("RGB")


def ask(engine, picture, text):
    conversation = Conversation((Turn("user", text, (picture,)),))
    return "".join(piece.text for piece in engine.stream(conversation, Sampling()))


def original(folder, picture, names):
    """CLIP's forward straight from the files: cosines [labels] and the scale of the logits.

    From the published description: pre-norm transformers with x·sigmoid(1.702x), a class token
    before the patches, causal attention for text, whose vector is that of its last token.
    """
    w = torch.load(folder / "pytorch_model.bin", weights_only=True)
    raw = json.loads((folder / "config.json").read_text())

    def norm(name, x):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def dense(name, x):
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def transformer(side, x, mask):
        how = raw[f"{side}_config"]
        for i in range(how["num_hidden_layers"]):
            layer = f"{side}_model.encoder.layers.{i}"
            y = norm(f"{layer}.layer_norm1", x)
            q, k, v = (
                dense(f"{layer}.self_attn.{part}_proj", y)
                .reshape(len(x), how["num_attention_heads"], -1)
                .transpose(0, 1)
                for part in "qkv"
            )
            scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask
            read = (scores.softmax(-1) @ v).transpose(0, 1).reshape(x.shape)
            x = x + dense(f"{layer}.self_attn.out_proj", read)
            y = dense(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x))
            x = x + dense(f"{layer}.mlp.fc2", y * torch.sigmoid(1.702 * y))
        return x

    # Bicubic until the shorter side is 32, then the middle, then CLIP's mean and deviation.
    scale = 32 / min(picture.size)
    width, height = (int(side * scale) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 32) // 2, (height - 32) // 2
    small = small.crop((left, top, left + 32, top + 32))
    pixels = (
        torch.tensor(list(small.get_flattened_data())).reshape(32, 32, 3).permute(2, 0, 1) / 255
    )
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).reshape(3, 1, 1)
    deviation = torch.tensor((0.26862954, 0.26130258, 0.27577711)).reshape(3, 1, 1)
    pixels = (pixels - mean) / deviation

    eyes = "vision_model.embeddings"
    patches = conv2d(pixels[None], w[f"{eyes}.patch_embedding.weight"], stride=8)
    x = torch.cat((w[f"{eyes}.class_embedding"][None], patches[0].flatten(1).T))
    x = norm("vision_model.pre_layrnorm", x + w[f"{eyes}.position_embedding.weight"])
    x = transformer("vision", x, 0)
    seen = linear(norm("vision_model.post_layernorm", x[0]), w["visual_projection.weight"])

    cosines = []
    for name in names:
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(name).ids
        words = "text_model.embeddings"
        x = w[f"{words}.token_embedding.weight"][ids]
        x = x + w[f"{words}.position_embedding.weight"][: len(ids)]
        x = transformer("text", x, torch.full((len(ids), len(ids)), -torch.inf).triu(1))
        read = linear(norm("text_model.final_layer_norm", x[-1]), w["text_projection.weight"])
        cosines.append((seen @ read) / (seen.norm() * read.norm()))
    return torch.stack(cosines), w["logit_scale"].exp()


def exact(engine, picture, names):
    """The engine's numbers before they are written."""
    with torch.inference_mode():
        seen = engine._picture(picture)
        read = engine._texts([engine._ids(name) for name in names])
    return (read @ seen.T)[:, 0]


@pytest.mark.parametrize("size", [(90, 60), (60, 91), (32, 32), (7, 9)])
def test_the_numbers_are_those_of_the_published_description(made, engine, size):
    picture = Image.effect_noise(size, 60).convert("RGB")
    expected, scale = original(made.folder, picture, CATS)
    assert (exact(engine, picture, CATS) - expected).abs().max() <= 1e-4
    # and they are no coincidence of small or equal numbers
    assert expected.abs().max() > 0.05
    assert expected.std() > 0.01
    written = {s.label: s for s in labels.parse(ask(engine, picture, "\n".join(CATS)))}
    shares = (expected * scale).softmax(0)
    for name, cosine, share in zip(CATS, expected.tolist(), shares.tolist(), strict=True):
        assert written[name].cosine == pytest.approx(cosine, abs=1.5e-4)
        assert written[name].share == pytest.approx(share, abs=1.5e-4)


def test_labels_come_best_first_and_their_shares_make_a_whole(engine, picture):
    found = labels.parse(ask(engine, picture, "\n".join(CATS)))
    assert len(found) == len(CATS)
    assert [s.cosine for s in found] == sorted((s.cosine for s in found), reverse=True)
    assert sum(s.share for s in found) == pytest.approx(1, abs=3e-4)


def test_one_label_gets_a_similarity_and_no_certainty(made, engine):
    """The example that people start from: noise, one text, a softmax that can only be 1."""
    noise = Image.effect_noise((224, 224), 100).convert("RGB")
    answer = ask(engine, noise, "a photo of a cat")
    assert "%" not in answer
    (found,) = labels.parse(answer)
    expected, _ = original(made.folder, noise, ["a photo of a cat"])
    assert found.share is None
    assert found.cosine == pytest.approx(expected.item(), abs=1.5e-4)
    assert answer.endswith(labels.ALONE)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a cat\na dog\n", ["a cat", "a dog"]),
        ("  a cat \r\n\n a dog", ["a cat", "a dog"]),
        ("a cat, a dog,a bird", ["a cat", "a dog", "a bird"]),
        ("猫，狗、鸟", ["猫", "狗", "鸟"]),
        ("one, two\nthree", ["one, two", "three"]),
        ("a cat\na dog\na cat", ["a cat", "a dog"]),
        ("a cat,", ["a cat"]),
    ],
)
def test_labels_are_lines_or_the_parts_of_one_line(text, read):
    assert labels.read(text) == read


@pytest.mark.parametrize("text", ["", " \n ", ",,"])
def test_a_question_without_a_label_is_refused(engine, picture, text):
    with pytest.raises(BadRequest, match="no label"):
        ask(engine, picture, text)


def test_too_many_labels_are_refused_with_the_limit(engine, picture):
    with pytest.raises(BadRequest, match=r"1001 labels, the limit is 1000"):
        ask(engine, picture, "\n".join(map(str, range(1001))))


def test_many_labels_are_compared_in_batches_that_change_nothing(engine, picture):
    names = [f"the number {n}" + " and more" * (n % 5) for n in range(150)]
    found = {s.label: s.cosine for s in labels.parse(ask(engine, picture, "\n".join(names)))}
    for name in names[::29]:
        assert found[name] == pytest.approx(exact(engine, picture, [name]).item(), abs=1e-4)


def test_a_label_over_the_context_is_refused_with_the_figures(engine, picture):
    fits, over = "7 " * 75, "7 " * 76
    assert len(labels.parse(ask(engine, picture, f"{fits}\na cat"))) == 2
    with pytest.raises(BadRequest, match=r"has 76 tokens, and this model reads 75"):
        ask(engine, picture, f"{over}\na cat")


def test_a_label_cannot_end_itself(engine):
    ids = engine._ids("a <|endoftext|> b <|startoftext|>")
    assert ids.count(engine._end) == 1
    assert ids[-1] == engine._end
    assert ids.count(ids[0]) == 1


def test_vocab_and_merges_do_as_well_as_tokenizer_json(engine, copy, tmp_path, picture):
    (copy / "tokenizer.json").unlink()
    text = "A  Photo of a CAT, it's 2 o'clock!\nhéllo 世界 🙂"
    assert ask(load(copy, tmp_path), picture, text) == ask(engine, picture, text)


def test_a_question_without_a_picture_is_refused(engine):
    with pytest.raises(BadRequest, match="attach one"):
        engine.stream(Conversation((Turn("user", "a cat"),)), Sampling())


def test_the_last_picture_and_the_last_labels_count(engine, picture):
    other = Image.new("RGB", (40, 40), "blue")
    turns = (
        Turn("user", "a bird\na fish", (other,)),
        Turn("assistant", "…"),
        Turn("user", "a cat\na dog", (picture,)),
        Turn("assistant", "…"),
        Turn("user", "a cow\na hen"),
    )
    found = "".join(p.text for p in engine.stream(Conversation(turns), Sampling()))
    assert found == ask(engine, picture, "a cow\na hen")
    assert found != ask(engine, other, "a cow\na hen")


def test_a_strip_is_cut_before_it_is_enlarged():
    strip = Image.new("RGB", (4096, 1), "red")
    strip.putpixel((2048, 0), (0, 0, 255))
    cut = middle(strip)
    assert cut.size == (10, 1)
    assert (0, 0, 255) in cut.get_flattened_data()
    assert middle(Image.new("RGB", (3, 900))).size == (3, 30)
    assert middle(Image.new("RGB", (500, 50))).size == (500, 50)


def test_leaving_between_two_batches_stops_it(engine, picture):
    names = "\n".join(f"label {n}" for n in range(200))
    batches = []
    hook = engine._model.text_model.register_forward_hook(lambda *_: batches.append(1))
    try:
        pieces = engine.stream(Conversation((Turn("user", names, (picture,)),)), Sampling())
        for _ in range(3):
            next(pieces)
        pieces.close()
    finally:
        hook.remove()
    assert len(batches) == 1


def test_without_memory_the_request_fails_and_the_next_is_answered(engine, picture):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = engine._model.vision_model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(OutOfMemory, match="GPU out of memory"):
            ask(engine, picture, "a cat\na dog")
    finally:
        hook.remove()
    assert labels.parse(ask(engine, picture, "a cat\na dog"))


def test_the_health_question_is_answered(engine):
    assert len(labels.parse("".join(p.text for p in engine.stream(engine.health, Sampling())))) == 2


@pytest.mark.parametrize(
    "score",
    [
        labels.Score("a cat (cosine 0.1000)", 0.25, 0.5),
        labels.Score("50.00% wool", -0.1234, 0.5),
        labels.Score("猫", 0.3, 0.5),
    ],
)
def test_what_was_written_is_read_back(score):
    other = labels.Score("other", -1.0, 0.5)
    assert labels.parse(labels.write([other, score])) == [score, other]


def test_a_label_without_others_is_read_back_even_if_it_begins_with_a_percentage():
    alone = labels.Score("50.00% wool", 0.1234, None)
    assert labels.parse(labels.write([alone])) == [alone]


def test_as_json_the_numbers_have_all_their_digits(made, engine, picture):
    def scored(*names):
        turn = Turn("user", "\n".join(names), (picture,))
        pieces = engine.stream(Conversation((turn,)), Sampling(json=True))
        return json.loads("".join(piece.text for piece in pieces))["labels"]

    found = scored(*CATS)
    expected, scale = original(made.folder, picture, CATS)
    order = sorted(range(len(CATS)), key=lambda i: -expected[i])
    assert [one["label"] for one in found] == [CATS[i] for i in order]
    shares = (expected * scale).softmax(0)
    for one, i in zip(found, order, strict=True):
        assert one["cosine"] == pytest.approx(expected[i].item(), abs=1e-6)
        assert one["probability"] == pytest.approx(shares[i].item(), abs=1e-5)
    assert sum(one["probability"] for one in found) == pytest.approx(1, abs=1e-6)
    (alone,) = scored("50.00% wool")
    assert (alone["label"], alone["probability"]) == ("50.00% wool", None)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop(folder, name):
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors[name]
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "pytorch_model.bin").unlink(), "no weights"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), "preprocessor_config.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read"),
        (
            lambda f: [(f / name).unlink() for name in ("tokenizer.json", "merges.txt")],
            "vocab.json without merges.txt",
        ),
        (
            lambda f: [(f / name).unlink() for name in ("tokenizer.json", "vocab.json")],
            "no tokenizer.json or vocab.json",
        ),
        (lambda f: drop(f, "logit_scale"), "logit_scale is in none of its files"),
        (lambda f: edit(f / "config.json", projection_dim=8), "projection.weight is .*says 8×"),
        (lambda f: edit(f / "config.json", model_type="gpt2"), "model_type is 'gpt2'"),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_it(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(ModelDemoError, match=message) as caught:
        load(copy, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_quantised_weights_are_refused(made, tmp_path):
    with pytest.raises(ModelDemoError, match=r"model.precision is 8bit; CLIP"):
        load(made.folder, tmp_path, precision="8bit")


def test_the_published_configuration_is_read(tmp_path):
    """With what configurations of its time held, of which 5.23 knows much no more."""
    of_its_time = {
        "_name_or_path": "",
        "add_cross_attention": False,
        "architectures": None,
        "bad_words_ids": None,
        "cross_attention_hidden_size": None,
        "do_sample": False,
        "early_stopping": False,
        "hidden_act": "quick_gelu",
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False,
        "max_length": 20,
        "num_beams": 1,
        "output_scores": False,
        "prefix": None,
        "problem_type": None,
        "projection_dim": 512,
        "pruned_heads": {},
        "task_specific_params": None,
        "temperature": 1.0,
        "tie_encoder_decoder": False,
        "tokenizer_class": None,
        "top_k": 50,
        "torch_dtype": None,
        "torchscript": False,
        "transformers_version": "4.16.0.dev0",
        "use_bfloat16": False,
    }
    text = {"model_type": "clip_text_model", "bos_token_id": 0, "eos_token_id": 2}
    text |= {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    vision = {"model_type": "clip_vision_model", "bos_token_id": None, "pad_token_id": None}
    vision |= {"hidden_size": 768, "intermediate_size": 3072, "patch_size": 32, "image_size": 224}
    published = {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": of_its_time | text,
        "text_config_dict": None,
        "transformers_version": None,
        "vision_config": of_its_time | vision,
        "vision_config_dict": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    with torch.device("meta"):
        model = CLIPModel(read_config(tmp_path, CLIPConfig))
    # What OpenAI's notebook counts for ViT-B/32.
    assert sum(parameter.numel() for parameter in model.parameters()) == 151_277_313
    assert model.text_model.eos_token_id == 2  # the label's vector is that of its highest id
