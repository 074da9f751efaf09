"""Reads the model's two YAML files and the command line's overrides, and checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .engine import ModelDemoError

T = TypeVar("T", bool, int, str)


@dataclass(frozen=True)
class Section:
    """A mapping of the merged configuration that knows which file each key came from."""

    values: Mapping[str, Any]
    name: str
    origins: Mapping[str, str] = field(default_factory=dict)
    default_origin: str = ""

    def origin(self, key: str) -> str:
        """The file (or --options) that set a key, the longest known part of it."""
        path = f"{self.name}.{key}" if self.name else key
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path.rpartition(".")[0]
        return self.default_origin

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of exactly this type; ModelDemoError names the file and the key otherwise."""
        value = self.values.get(key, default)
        where = f"{self.origin(key)}: {self.name}.{key}"
        if value is None:
            raise ModelDemoError(f"{where} is missing; add it")
        # bool is an int to Python, and `width: True` is a mistake all the same.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelDemoError(f"{where} is {value!r}; it must be {_KINDS[kind]}")
        return value

    def positive(self, key: str, default: int) -> int:
        """A whole number of at least one."""
        value = self.get(key, int, default)
        if value < 1:
            raise ModelDemoError(f"{self.origin(key)}: {self.name}.{key} is {value}; at least 1")
        return value

    def section(self, key: str) -> Section:
        """The mapping under a key; empty when there is none."""
        value = self.values.get(key)
        name = f"{self.name}.{key}" if self.name else key
        if value is not None and not isinstance(value, Mapping):
            raise ModelDemoError(f"{self.origin(key)}: {name} is {value!r}; it must be a mapping")
        return Section(value or {}, name, self.origins, self.origin(key))


_KINDS = {bool: "True or False", int: "a whole number", str: "text"}


@dataclass(frozen=True)
class DemoConfig:
    """A checked configuration: which system, and what that system read from the files."""

    arch: str
    settings: Any


def load(model_yaml: Path | None, eval_yaml: Path, options: Sequence[str]) -> DemoConfig:
    """Merge the model's YAML < the evaluation's YAML < `key=value` options, and check the result.

    MiniGPT-4 has both files, the other systems one.

    Raises ModelDemoError, one line that names file and key; nothing heavy has been imported then.
    """
    from . import systems

    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in filter(None, (model_yaml, eval_yaml)):
        _merge(merged, _read(file), str(file), origins, "")
    for option in options:
        _merge(merged, _option(option), "--options", origins, "")
    model = Section(merged, "", origins, str(model_yaml or eval_yaml)).section("model")
    arch = model.get("arch", str)
    return DemoConfig(arch, systems.find(arch, model.origin("arch")).read(model))


def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelDemoError(f"{file}: cannot be read; check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ModelDemoError(f"{file}: not valid YAML{line}; correct it") from error
    if not isinstance(found, Mapping):
        raise ModelDemoError(f"{file}: holds no keys; it must start with `model:`")
    return found


def _option(option: str) -> dict[str, Any]:
    """`a.b=1` → {"a": {"b": 1}}; the value is YAML, as in upstream's --options."""
    path, equals, text = option.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ModelDemoError(f"--options: {option!r} is not of the form model.key=value")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelDemoError(f"--options: the value of {path} is not valid YAML") from error
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _merge(
    into: dict[str, Any], new: Mapping[str, Any], origin: str, origins: dict[str, str], path: str
) -> None:
    for key, value in new.items():
        at = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and isinstance(into.get(key, {}), Mapping):
            # A copy, for the files' own mappings must not change.
            into[key] = dict(into.get(key, {}))
            origins.setdefault(at, origin)
            _merge(into[key], value, origin, origins, at)
        else:
            into[key] = value
            origins[at] = origin
