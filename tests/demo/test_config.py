"""A wrong configuration is one line that names the file and the key, before anything loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from modeldemo import config
from modeldemo.engine import ModelDemoError
from modeldemo.minigpt4.sizes import QFormerSizes, VitSizes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def refused(*arguments):
    """The one line with which config.load refuses."""
    with pytest.raises(ModelDemoError) as caught:
        config.load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_files_are_read(made):
    settings = config.load(*made.yamls, []).settings
    assert settings.sizes == tiny.SIZES
    assert settings.llama == made.folder / "vicuna-pico"
    assert settings.projection == made.folder / "pretrained_minigpt4_pico.pth"
    assert settings.half_vit
    assert settings.precision == "auto"


def test_absent_sizes_are_those_of_the_real_model(made, tmp_path):
    model = yaml.safe_load(made.yamls[0].read_text())
    for key in ("vit", "qformer", "image_size", "num_query_token"):
        del model["model"][key]
    file = tmp_path / "minigpt4.yaml"
    file.write_text(yaml.safe_dump(model))
    sizes = config.load(file, made.yamls[1], []).settings.sizes
    assert sizes.vit == VitSizes(1408, 39, 16, 6144, 14)
    assert sizes.qformer == QFormerSizes(768, 12, 12, 3072, 2)
    assert (sizes.image_size, sizes.query_tokens) == (224, 32)


def test_the_second_file_overrides_the_first_and_options_override_both(made, tmp_path):
    second = tmp_path / "eval.yaml"
    second.write_text(
        yaml.safe_dump(
            {"model": {"ckpt": str(made.folder / "eva_vit_pico.pth"), "num_query_token": 7}}
        )
    )
    load = config.load
    assert load(made.yamls[0], second, []).settings.sizes.query_tokens == 7
    options = ["model.num_query_token=9", "model.low_resource=True", "model.vit.depth=5"]
    settings = load(made.yamls[0], second, options).settings
    assert settings.sizes.query_tokens == 9
    assert settings.precision == "8bit"
    assert settings.sizes.vit == VitSizes(32, 5, 4, 48, 8)


@pytest.mark.parametrize("key", ["llama_model", "vit_model_path", "q_former_model", "ckpt"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("/path/to/vicuna/weights/", "placeholder"),
        ("", "placeholder"),
        ("weights/vicuna", "relative"),
        ("/no/such/place", "does not exist"),
        (7, "must be text"),
        (None, "missing"),
    ],
)
def test_a_bad_path_names_the_key_and_the_reason(made, key, value, words):
    line = refused(*made.yamls, [f"model.{key}={yaml.safe_dump(value).splitlines()[0]}"])
    assert f"model.{key}" in line
    assert words in line


def test_the_file_that_set_the_key_is_named(made, tmp_path):
    for changed, name in ((0, "first.yaml"), (1, "second.yaml")):
        files = list(made.yamls)
        content = yaml.safe_load(files[changed].read_text())
        content["model"]["image_size"] = "big"
        files[changed] = tmp_path / name
        files[changed].write_text(yaml.safe_dump(content))
        line = refused(*files, [])
        assert str(files[changed]) in line
        assert "model.image_size is 'big'" in line


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("model.image_size=0", "at least 1"),
        ("model.image_size=True", "whole number"),
        ("model.image_size=33", "multiple"),
        ("model.vit.heads=5", "divide"),
        ("model.vit=5", "mapping"),
        ("model=5", "mapping"),
        ("model.vit_precision=fp8", "fp16 or fp32"),
        ("model.low_resource=maybe", "True or False"),
        ("model.arch=star_chat", "star_chat"),
        ("model.end_sym=END", "###"),
        ("image_size", "model.key=value"),
        ("=5", "model.key=value"),
        ("model.vit=[", "YAML"),
    ],
)
def test_a_bad_value_is_refused(made, option, words):
    assert words in refused(*made.yamls, [option])


@pytest.mark.parametrize("content", ["model: [", "", "- a", "\t", "\x00"])
def test_a_file_that_is_not_a_configuration_is_named(made, tmp_path, content):
    file = tmp_path / "minigpt4.yaml"
    file.write_text(content)
    assert str(file) in refused(file, made.yamls[1], [])


def test_a_missing_file_is_named(made, tmp_path):
    assert "no.yaml" in refused(tmp_path / "no.yaml", made.yamls[1], [])


def test_a_yaml_cannot_run_code(made, tmp_path):
    file = tmp_path / "minigpt4.yaml"
    file.write_text("model: !!python/object/apply:os.system ['touch pwned']")
    assert str(file) in refused(file, made.yamls[1], [])


def test_checking_a_configuration_imports_nothing_heavy(made):
    code = (
        "import sys; from pathlib import Path; from modeldemo import config;"
        "config.load(*map(Path, sys.argv[1:]), []);"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    where = Path(config.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, made.yamls)],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.strip() == "[]", ran.stderr
