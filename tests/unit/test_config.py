"""The model's two YAML files: what a reader of them gets is what was wanted."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from gpufleet import catalog
from gpufleet.catalog import Model
from gpufleet.config.plan import files
from gpufleet.errors import FleetError
from gpufleet.settings import Settings, parse

#: MiniGPT-4's own files, eval_configs/minigpt4_eval.yaml and configs/models/minigpt4.yaml, but for
#: the two paths that its README has people edit and the sizes that a model brings.
UPSTREAM_MODEL = {
    "arch": "mini_gpt4",
    "drop_path_rate": 0,
    "use_grad_checkpoint": False,
    "freeze_vit": True,
    "freeze_qformer": True,
    "prompt": "",
}
UPSTREAM_EVAL = {
    "arch": "mini_gpt4",
    "model_type": "pretrain_vicuna",
    "freeze_vit": True,
    "freeze_qformer": True,
    "max_txt_len": 160,
    "end_sym": "###",
    "low_resource": False,
    # the application's own, which upstream ignores
    "precision": "auto",
    "prompt_path": "",
    "prompt_template": "###Human: {} ###Assistant: ",
    "ckpt": "/opt/minigpt4/weights/small/projection.pth",
}


def read(model: Model, **data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = parse({"model": "small", **data}, "host")
    config, evaluation = files(settings, model, settings.root / "weights" / "small")
    return yaml.safe_load(config.content), yaml.safe_load(evaluation.content)


def changed(model_data: dict[str, Any], **parts: Any) -> Model:
    return Model.model_validate({**model_data, "minigpt4": {**model_data["minigpt4"], **parts}})


def test_the_files_lie_in_the_deploys_folder_and_are_roots(model: Model):
    settings = parse({"model": "small", "root": "/srv/demo"}, "host")
    config, evaluation = files(settings, model, settings.root / "weights" / "small")
    assert config.path == "/srv/demo/config/minigpt4.yaml"
    assert evaluation.path == "/srv/demo/config/minigpt4_eval.yaml"
    assert {(file.mode, file.owner) for file in (config, evaluation)} == {("644", "root")}


def test_the_model_file_has_upstreams_keys_and_this_models_values(model: Model):
    config, _ = read(model)
    weights = "/opt/minigpt4/weights/small"
    assert config["model"] == {
        **UPSTREAM_MODEL,
        "image_size": 64,
        "num_query_token": 16,
        "vit_precision": "fp16",
        "llama_model": f"{weights}/llama",
        "vit_model_path": f"{weights}/vit.pth",
        "q_former_model": f"{weights}/qformer.pth",
        "vit": {"width": 128, "depth": 4, "heads": 4, "mlp_width": 256, "patch_size": 8},
        "qformer": {
            "hidden_size": 128,
            "layers": 2,
            "heads": 4,
            "intermediate_size": 256,
            "cross_attention_frequency": 1,
        },
    }


def test_the_evaluation_file_has_upstreams_keys_and_values(model: Model):
    _, evaluation = read(model)
    assert evaluation["model"] == UPSTREAM_EVAL
    assert evaluation["run"] == {"task": "image_text_pretrain"}


def test_the_processors_are_upstreams_at_the_models_image_size(model: Model):
    config, evaluation = read(model)
    caption = {"name": "blip_caption"}
    assert config["preprocess"] == {
        "vis_processor": {
            "train": {"name": "blip2_image_train", "image_size": 64},
            "eval": {"name": "blip2_image_eval", "image_size": 64},
        },
        "text_processor": {"train": caption, "eval": caption},
    }
    assert evaluation["datasets"] == {
        "cc_sbu_align": {
            "vis_processor": {"train": {"name": "blip2_image_eval", "image_size": 64}},
            "text_processor": {"train": caption},
        }
    }


def test_a_model_of_the_original_sizes_does_not_mention_them(model_data: dict[str, Any]):
    full = changed(
        model_data,
        image_size=224,
        num_query_token=32,
        vit=None,
        qformer=None,
        precision="8bit",
        vit_precision="fp32",
    )
    config, evaluation = read(full)
    assert "vit" not in config["model"]
    assert "qformer" not in config["model"]
    assert config["model"]["image_size"] == 224
    assert config["model"]["num_query_token"] == 32
    assert config["model"]["vit_precision"] == "fp32"
    assert config["preprocess"]["vis_processor"]["eval"]["image_size"] == 224
    assert evaluation["model"]["low_resource"] is True


@pytest.mark.parametrize("root", ["/opt/yes", "/1.5/0x10", "/a-b_c+d.e", "/null"])
def test_every_path_that_the_settings_allow_survives(model: Model, root: str):
    config, evaluation = read(model, root=root)
    assert config["model"]["llama_model"] == f"{root}/weights/small/llama"
    assert evaluation["model"]["ckpt"] == f"{root}/weights/small/projection.pth"


@pytest.mark.parametrize(
    "name",
    [
        "a b.pth",
        "a: b #c.pth",
        'it\'s "quoted".pth',
        "back\\slash.pth",
        "{{ x }}.pth",
        "{% raw %}.pth",
        "模型.pth",
        "*anchor&.pth",
        "<tag>&.pth",
        "no",
        "1e3",
    ],
)
def test_every_file_name_that_the_catalogue_allows_survives(model_data: dict[str, Any], name: str):
    model = changed(
        model_data, vit_file=name, qformer_file=name, llama_dir=name, projection_file=name
    )
    config, evaluation = read(model)
    path = f"/opt/minigpt4/weights/small/{name}"
    for key in ("vit_model_path", "q_former_model", "llama_model"):
        assert config["model"][key] == path
    assert evaluation["model"]["ckpt"] == path


def test_a_value_that_does_not_survive_the_template_is_refused_in_one_line(
    model_data: dict[str, Any],
):
    """YAML knows no pairs of surrogates, which is how JSON writes such a letter."""
    with pytest.raises(FleetError, match="vit_model_path became") as error:
        files(Settings(), changed(model_data, vit_file="\N{OTTER}.pth"), PurePosixPath("/w"))
    assert "\n" not in str(error.value)


OF_MINIGPT4 = [name for name in catalog.names() if catalog.model(name).system == "mini_gpt4"]
OF_ONE_FOLDER = sorted(set(catalog.names()) - set(OF_MINIGPT4))


@pytest.mark.parametrize("name", OF_MINIGPT4)
def test_every_minigpt4_has_upstreams_two_files(name: str):
    settings = parse({"model": name}, "host")
    config, evaluation = files(settings, catalog.model(name), PurePosixPath("/w"))
    both = {**yaml.safe_load(config.content), **yaml.safe_load(evaluation.content)}
    assert set(both) == {"model", "preprocess", "datasets", "run"}
    assert PurePosixPath(both["model"]["ckpt"]).is_absolute()


@pytest.mark.parametrize("name", OF_ONE_FOLDER)
@pytest.mark.parametrize("asked", ["auto", "bf16"])
def test_every_model_of_one_folder_has_one_file(name: str, asked: str):
    model = catalog.model(name)
    settings = parse({"model": name, "demo": {"precision": asked}}, "host")
    (config,) = files(settings, model, PurePosixPath("/w"))
    assert config.path == "/opt/minigpt4/config/demo.yaml"
    parts = model.parts
    assert isinstance(parts, catalog.Checkpoint)
    assert yaml.safe_load(config.content) == {
        "model": {
            "arch": model.system,
            "path": f"/w/{parts.folder}",
            "precision": parts.precision if asked == "auto" else asked,
        }
    }


def test_starchat_is_in_8_bits_unless_a_setting_says_otherwise():
    model = catalog.model("starchat-beta")
    (config,) = files(parse({"model": "starchat-beta"}, "host"), model, PurePosixPath("/w"))
    assert yaml.safe_load(config.content)["model"]["precision"] == "8bit"
