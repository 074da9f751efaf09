"""Decides the YAML files that a model is configured by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from gpufleet import render
from gpufleet.catalog import MiniGPT4, Model
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.settings import Settings
from gpufleet.upstream.plan import files as upstream_files


def files(settings: Settings, model: Model, weights: PurePosixPath) -> tuple[ManagedFile, ...]:
    """What the demo reads on this host, rendered and parsed back.

    MiniGPT-4 has upstream's two files, minigpt4.yaml and minigpt4_eval.yaml; the others have one,
    demo.yaml, and upstream's own code upstream.yaml. `weights` is the folder on the host that the
    model's files are in.

    Raises FleetError if a value did not survive the template.
    """
    if settings.runtime == "upstream":
        return upstream_files(settings, model, weights)
    parts = model.parts
    asked = settings.demo.precision
    precision = parts.precision if asked == "auto" else asked
    folder = settings.root / "config"
    values: dict[str, Any] = {"title": model.title, "model": parts, "precision": precision}
    if not isinstance(parts, MiniGPT4):
        path = str(weights / parts.folder)
        text, back = render.checked_yaml("demo.yaml.j2", system=model.system, path=path, **values)
        _same(back["model"], {"arch": model.system, "path": path, "precision": precision})
        return (ManagedFile(str(folder / "demo.yaml"), text),)
    paths = {
        "vit_path": str(weights / parts.vit_file),
        "qformer_path": str(weights / parts.qformer_file),
        "llama_path": str(weights / parts.llama_dir),
        "projection_path": str(weights / parts.projection_file),
    }
    values |= paths
    config, config_back = render.checked_yaml("minigpt4.yaml.j2", **values)
    evaluation, evaluation_back = render.checked_yaml("minigpt4_eval.yaml.j2", **values)
    wanted = {
        "arch": "mini_gpt4",
        "image_size": parts.image_size,
        "num_query_token": parts.num_query_token,
        "vit_precision": parts.vit_precision,
        "precision": precision,
        "low_resource": precision == "8bit",
        "vit": parts.vit and dict(parts.vit),
        "qformer": parts.qformer and dict(parts.qformer),
        "vit_model_path": paths["vit_path"],
        "q_former_model": paths["qformer_path"],
        "llama_model": paths["llama_path"],
        "ckpt": paths["projection_path"],
    }
    _same({**config_back["model"], **evaluation_back["model"]}, wanted)
    return (
        ManagedFile(str(folder / "minigpt4.yaml"), config),
        ManagedFile(str(folder / "minigpt4_eval.yaml"), evaluation),
    )


def _same(read: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if read.get(key) != value:
            raise FleetError(f"templates: {key} became {read.get(key)!r}, not {value!r}")
