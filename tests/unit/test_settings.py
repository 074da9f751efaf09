"""Settings: documented defaults, errors of one line, immutability."""

from __future__ import annotations

import ast
import json
import tokenize
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pyinfra.api.arguments import all_argument_meta
from pyinfra.api.connectors import get_all_connectors

from gpufleet import ROOT
from gpufleet.errors import UsageError
from gpufleet.settings import Settings, parse

ALL = ROOT / "inventory" / "group_data" / "all.py"


def documented() -> dict[str, Any]:
    """What inventory/group_data/all.py sets, as pyinfra would read it."""
    names: dict[str, Any] = {}
    exec(compile(ALL.read_text("utf-8"), str(ALL), "exec"), names)  # noqa: S102
    return {key: value for key, value in names.items() if not key.startswith("__")}


def refusal(data: dict[str, Any], host: str = "demo-1") -> str:
    with pytest.raises(UsageError) as caught:
        parse(data, host)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{host}: ")
    assert message.endswith("; see inventory/group_data/all.py")
    return message


def test_all_py_documents_every_setting_with_the_default_that_holds_without_it():
    assert json.loads(json.dumps(documented())) == Settings().model_dump(mode="json")


def test_all_py_changes_nothing():
    assert parse(documented(), "host") == parse({}, "host") == Settings()


def test_all_py_explains_every_setting():
    with ALL.open("rb") as stream:
        comments = {
            token.start[0]
            for token in tokenize.tokenize(stream.readline)
            if token.type == tokenize.COMMENT
        }
    for statement in ast.parse(ALL.read_text("utf-8")).body[1:]:
        assert isinstance(statement, ast.Assign)
        value = statement.value
        lines = [key.lineno for key in value.keys if key] if isinstance(value, ast.Dict) else []
        for line in lines or [statement.lineno]:
            assert line - 1 in comments, f"all.py:{line} has no explanation above it"


def test_every_setting_is_explained_where_it_is_defined():
    for name, field in Settings.model_fields.items():
        if name in documented() and isinstance(documented()[name], dict):
            for inner, inner_field in field.annotation.model_fields.items():
                assert inner_field.description, f"{name}.{inner}"
        else:
            assert field.description, name


def keys_of_pyinfra() -> list[str]:
    """Inventory data that pyinfra itself reads: of every connector, and its global arguments."""
    keys = {key for connector in get_all_connectors().values() for key in connector.data_meta}
    return sorted(keys | set(all_argument_meta) - {"name"})


@pytest.mark.parametrize("name", keys_of_pyinfra())
def test_keys_of_pyinfra_pass(name: str):
    assert parse({name: "x", "model": "pico"}, "host") == Settings()


def test_a_partial_dictionary_keeps_the_other_defaults():
    parsed = parse({"demo": {"port": 7861}}, "host")
    assert parsed.demo.port == 7861
    assert parsed.demo.queue == Settings().demo.queue
    assert parsed.health == Settings().health


def test_an_unknown_setting_is_refused_with_the_nearest_name():
    assert "unknown setting modle, did you mean model?" in refusal({"modle": "pico"})


def test_an_unknown_nested_setting_is_refused_with_the_nearest_full_name():
    message = refusal({"demo": {"prot": 7860}})
    assert "unknown setting demo.prot, did you mean demo.port?" in message


def test_a_typo_in_an_own_site_is_refused_with_the_nearest_full_name():
    site = {"hosts": ["m.example.net"], "services": {"pypi": {"indx": "/simple"}}}
    message = refusal({"mirrors": {"sites": {"work": site}}})
    wrong = "mirrors.sites.work.services.pypi.indx"
    assert f"unknown setting {wrong}, did you mean {wrong[:-4]}index?" in message


def test_an_unknown_setting_that_resembles_none_is_refused_without_a_guess():
    message = refusal({"zzzzzz": 1})
    assert "unknown setting zzzzzz;" in message
    assert "did you mean" not in message


def test_every_wrong_setting_is_named_at_once():
    message = refusal({"demo": {"port": 80}, "usre": "x", "root": "here"})
    assert "demo.port" in message
    assert "did you mean user?" in message
    assert "setting root" in message


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"demo": {"port": "high"}}, "setting demo.port: "),
        ({"demo": {"port": 1023}}, "setting demo.port: "),
        ({"demo": {"port": 65536}}, "setting demo.port: "),
        ({"demo": {"port": None}}, "setting demo.port: "),
        ({"demo": {"bind": "everywhere"}}, "setting demo.bind: "),
        ({"demo": {"bind": "127.0.0.256"}}, "setting demo.bind: "),
        ({"demo": {"bind": "127.0.0.1/8"}}, "setting demo.bind: "),
        ({"demo": {"memory_max": "24 GB"}}, "setting demo.memory_max: "),
        ({"demo": {"memory_max": "1G\nUser=root"}}, "setting demo.memory_max: "),
        ({"demo": {"threads": -1}}, "setting demo.threads: "),
        ({"demo": {"queue": 0}}, "setting demo.queue: "),
        ({"demo": {"start_timeout": 0}}, "setting demo.start_timeout: "),
        ({"demo": 7860}, "setting demo: "),
        ({"root": "opt/minigpt4"}, "setting root: "),
        ({"root": "/"}, "setting root: "),
        ({"root": "/opt/../etc"}, "setting root: "),
        ({"root": "/opt/mini gpt4"}, "setting root: "),
        ({"root": "/opt/$(reboot)"}, "setting root: "),
        ({"root": "/opt/a%n"}, "setting root: "),
        ({"root": "/opt/a\n"}, "setting root: "),
        ({"user": "Mini"}, "setting user: "),
        ({"user": "mini gpt4"}, "setting user: "),
        ({"user": "-x"}, "setting user: "),
        ({"user": "u" * 32}, "setting user: "),
        ({"user": "minigpt4\n"}, "setting user: "),
        ({"model": "../pico"}, "setting model: "),
        ({"model": 7}, "setting model: "),
        ({"accelerator": "tpu"}, "setting accelerator: "),
        ({"python_env": {"source": "conda"}}, "setting python_env.source: "),
        ({"mirrors": {"site": 5}}, "setting mirrors.site: "),
        ({"mirrors": {"provider": "aws"}}, "setting mirrors.provider: "),
        ({"mirrors": {"ttl_hours": 0}}, "setting mirrors.ttl_hours: "),
        ({"mirrors": {"hysteresis": 0.9}}, "setting mirrors.hysteresis: "),
        ({"mirrors": {"exclude": "tuna"}}, "setting mirrors.exclude: "),
        ({"mirrors": {"pinned": {"pipy": "nju"}}}, "setting mirrors.pinned.pipy"),
        ({"mirrors": {"git_proxy": "http://x/"}}, "setting mirrors.git_proxy: "),
        ({"mirrors": {"git_proxy": "https://a:token@x/"}}, "setting mirrors.git_proxy: "),
        ({"mirrors": {"sites": {"a": {"services": {}}}}}, "setting mirrors.sites.a.hosts: "),
        ({"mirrors": {"sites": {"auto": {}}}}, "auto is no name for a site"),
        ({"mirrors": {"apt_security": "maybe"}}, "setting mirrors.apt_security: "),
        ({"base": {"packages": "git"}}, "setting base.packages: "),
        ({"base": {"packages": [1]}}, "setting base.packages.0: "),
        ({"weights": {"source": ["a"]}}, "setting weights.source: "),
        ({"weights": {"bandwidth_kib": -1}}, "setting weights.bandwidth_kib: "),
        ({"health": {"timeout": 0}}, "setting health.timeout: "),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_an_invalid_value_is_refused_naming_host_and_field(data: dict[str, Any], where: str):
    assert where in refusal(data)


def test_a_refusal_quotes_what_it_was_given():
    assert refusal({"demo": {"port": 80}}).count("not 80;") == 1


def test_a_long_wrong_value_is_cut():
    assert len(refusal({"model": "X" * 10_000})) < 300


def test_the_superuser_cannot_be_the_service_account():
    """Making the account gives it a shell that nobody can log in with."""
    assert "setting user: " in refusal({"user": "root"})


@pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0", "10.1.2.3", "::1", "::", "fd00::7"])
def test_any_address_of_a_host_can_be_listened_on(bind: str):
    assert str(parse({"demo": {"bind": bind}}, "host").demo.bind) == bind


def test_settings_are_immutable():
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.model = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.demo.port = 1  # type: ignore[misc]


def test_lists_of_the_inventory_become_immutable_and_keep_their_order():
    packages = ["nvtop", "htop"]
    settings = parse({"base": {"packages": packages}}, "host")
    packages.append("later")
    assert settings.base.packages == ("nvtop", "htop")


def test_the_example_inventory_holds_valid_settings_only():
    names: dict[str, Any] = {}
    path = Path(ROOT / "inventory" / "example.py")
    exec(compile(path.read_text("utf-8"), str(path), "exec"), names)  # noqa: S102
    groups = {k: v for k, v in names.items() if not k.startswith("__")}
    assert set(groups) == {"hosts", "china"}
    for group in groups.values():
        members, shared = group if isinstance(group, tuple) else (group, {})
        for member in members:
            name, data = member if isinstance(member, tuple) else (member, {})
            assert parse({**shared, **data}, name) != Settings() or not (shared or data)
