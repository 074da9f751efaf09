"""Says in words what pydantic found wrong, with the nearest name for a key that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def nearest(model: type[BaseModel], location: Sequence[int | str]) -> str:
    """The key that was probably meant by the last part of an error's location, or nothing."""
    *parents, wrong = location
    known = _inside(model, parents)
    near = difflib.get_close_matches(str(wrong), known, n=1)
    return near[0] if near else ""


def _inside(annotation: Any, parents: Sequence[int | str]) -> list[str]:
    """The keys of what lies at a place below a type: fields of a model, and nothing elsewhere."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _inside(arguments[0], parents)
    if origin in (Union, UnionType):
        return [key for one in arguments for key in _inside(one, parents)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = {field.alias or name: field for name, field in annotation.model_fields.items()}
        if not parents:
            return list(fields)
        field = fields.get(str(parents[0]))
        return _inside(field.annotation, parents[1:]) if field else []
    if not parents or not isinstance(origin, type):
        return []
    if issubclass(origin, Mapping):
        return _inside(arguments[1], parents[1:])
    if issubclass(origin, Sequence):
        return _inside(arguments[0], parents[1:])
    return []
