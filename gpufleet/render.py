"""Renders the files of templates/ and parses YAML back, so that a broken file never travels."""

from __future__ import annotations

from typing import Any

import jinja2
import yaml

from gpufleet import ROOT
from gpufleet.errors import FleetError

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ROOT / "templates"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,  # configuration files, not HTML; YAML values go through tojson
)


def text(template: str, **values: Any) -> str:
    """Render a template; a value that it needs and was not given is a FleetError."""
    try:
        return _ENVIRONMENT.get_template(template).render(**values)
    except jinja2.TemplateError as error:
        raise FleetError(f"templates/{template}: {error}; correct the template") from None


def checked_yaml(template: str, **values: Any) -> tuple[str, Any]:
    """Render a YAML template and parse it back: the text and what a reader of it gets."""
    rendered = text(template, **values)
    try:
        return rendered, yaml.safe_load(rendered)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise FleetError(f"templates/{template} renders no YAML: {message}") from None
