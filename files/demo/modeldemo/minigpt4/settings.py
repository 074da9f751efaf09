"""What MiniGPT-4 reads from its configuration, with every path checked before anything loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine import ModelDemoError
from ..precision import Precision, read_precision
from .files import check_file, check_llama, check_path
from .sizes import QFormerSizes, Sizes, VitSizes

if TYPE_CHECKING:
    from ..config import Section


@dataclass(frozen=True)
class Settings:
    """Sizes, files and precision of one MiniGPT-4."""

    sizes: Sizes
    llama: Path
    vit: Path
    qformer: Path
    projection: Path
    half_vit: bool = True  # on a GPU only
    precision: Precision = "auto"  # of the LLaMA


def read(model: Section) -> Settings:
    """The `model` section of both files; raises ModelDemoError naming file and key."""
    vit, qformer = model.section("vit"), model.section("qformer")
    v, q = VitSizes(), QFormerSizes()
    sizes = Sizes(
        VitSizes(
            vit.positive("width", v.width),
            vit.positive("depth", v.depth),
            vit.positive("heads", v.heads),
            vit.positive("mlp_width", v.mlp_width),
            vit.positive("patch_size", v.patch_size),
        ),
        QFormerSizes(
            qformer.positive("hidden_size", q.hidden_size),
            qformer.positive("layers", q.layers),
            qformer.positive("heads", q.heads),
            qformer.positive("intermediate_size", q.intermediate_size),
            qformer.positive("cross_attention_frequency", q.cross_attention_frequency),
        ),
        model.positive("image_size", 224),
        model.positive("num_query_token", 32),
    )
    for section, width, heads in (
        (vit, sizes.vit.width, sizes.vit.heads),
        (qformer, sizes.qformer.hidden_size, sizes.qformer.heads),
    ):
        if width % heads:
            raise ModelDemoError(
                f"{section.origin('heads')}: {section.name}.heads is {heads}, which does not "
                f"divide the width {width}"
            )
    if sizes.image_size % sizes.vit.patch_size:
        raise ModelDemoError(
            f"{model.origin('image_size')}: model.image_size is {sizes.image_size}, not a multiple "
            f"of model.vit.patch_size {sizes.vit.patch_size}"
        )
    vit_precision = model.get("vit_precision", str, "fp16")
    if vit_precision not in ("fp16", "fp32"):
        raise ModelDemoError(
            f"{model.origin('vit_precision')}: model.vit_precision is {vit_precision!r}; "
            "it must be fp16 or fp32"
        )
    end = model.get("end_sym", str, "###")
    if end != "###":
        raise ModelDemoError(
            f"{model.origin('end_sym')}: model.end_sym is {end!r}; the conversation ends with ###"
        )
    files = {key: _path(model, key) for key in ("vit_model_path", "q_former_model", "ckpt")}
    for file in files.values():
        check_file(file)
    llama = _path(model, "llama_model")
    check_llama(llama)
    return Settings(
        sizes,
        llama=llama,
        vit=files["vit_model_path"],
        qformer=files["q_former_model"],
        projection=files["ckpt"],
        half_vit=vit_precision == "fp16",
        precision=read_precision(model),
    )


def _path(model: Section, key: str) -> Path:
    return check_path(model.get(key, str), f"model.{key}", Path(model.origin(key)))
