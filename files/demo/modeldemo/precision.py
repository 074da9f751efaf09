"""What a language model computes in, as its YAML says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from .engine import ModelDemoError

if TYPE_CHECKING:
    from .config import Section

Precision = Literal["auto", "fp32", "fp16", "bf16", "8bit", "4bit"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def read_precision(model: Section) -> Precision:
    """`model.precision`; `auto` with upstream's `low_resource: True` is 8bit.

    Raises ModelDemoError that names file and key.
    """
    said = model.get("precision", str, "auto")
    for precision in PRECISIONS:
        if said == precision:
            break
    else:
        raise ModelDemoError(
            f"{model.origin('precision')}: model.precision is {said!r}; "
            f"it must be one of {', '.join(PRECISIONS)}"
        )
    return "8bit" if precision == "auto" and model.get("low_resource", bool, False) else precision
