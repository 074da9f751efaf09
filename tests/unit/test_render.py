"""Templates: each is used, and a broken one never travels."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest

from gpufleet import ROOT, render
from gpufleet.errors import FleetError

TEXTS = {path.name: path.read_text("utf-8") for path in (ROOT / "templates").iterdir()}
#: What others include: a part of their files, which begin by themselves.
PARTS = set(re.findall(r'{% include "([^"]+)" %}', "".join(TEXTS.values())))
TEMPLATES = sorted(TEXTS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of templates of a test's own."""
    monkeypatch.setattr(render._ENVIRONMENT, "loader", jinja2.FileSystemLoader(tmp_path))
    return tmp_path


def one_line(error: pytest.ExceptionInfo[FleetError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_used(name: str):
    code = "".join(path.read_text("utf-8") for path in (ROOT / "gpufleet").rglob("*.py"))
    assert name in PARTS or f'"{name}"' in code


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_says_who_wrote_the_file_and_ends_with_a_newline(name: str):
    text = TEXTS[name]
    first, second = [*text.splitlines(), "", ""][:2]
    own = second if first.startswith("#!") else first  # a program begins with its interpreter
    written = own.startswith(("# Written by gpufleet", "// Written by gpufleet"))
    assert written is (name not in PARTS)
    assert text.endswith("\n")
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)


def test_values_are_put_in_as_they_are(folder: Path):
    (folder / "x.j2").write_text("a = {{ a }}\n{% if b %}\nb\n{% endif %}\n")
    assert render.text("x.j2", a="<&'\">", b=True) == "a = <&'\">\nb\n"


def test_a_value_that_was_not_given_is_refused_naming_template_and_value(folder: Path):
    (folder / "x.j2").write_text("{{ wheels }}\n")
    with pytest.raises(FleetError) as error:
        render.text("x.j2", wheel=1)
    assert one_line(error).startswith("templates/x.j2: 'wheels' is undefined")


@pytest.mark.parametrize("text", ["{{ a", "{% for %}", "{{ a | nofilter }}"])
def test_a_template_that_is_none_is_refused_naming_it(folder: Path, text: str):
    (folder / "x.j2").write_text(text)
    with pytest.raises(FleetError) as error:
        render.text("x.j2", a=1)
    assert one_line(error).startswith("templates/x.j2: ")


def test_a_template_that_is_missing_is_named(folder: Path):
    with pytest.raises(FleetError) as error:
        render.text("none.j2")
    assert "templates/none.j2" in one_line(error)


def test_yaml_is_parsed_back(folder: Path):
    (folder / "x.yaml.j2").write_text("a: {{ a | tojson }}\n")
    text, value = render.checked_yaml("x.yaml.j2", a="#: x")
    assert text == 'a: "#: x"\n'
    assert value == {"a": "#: x"}


def test_what_renders_no_yaml_is_refused_in_one_line(folder: Path):
    (folder / "x.yaml.j2").write_text("a: [{{ a }}\nb\n")
    with pytest.raises(FleetError) as error:
        render.checked_yaml("x.yaml.j2", a=1)
    assert one_line(error).startswith("templates/x.yaml.j2 renders no YAML: ")
