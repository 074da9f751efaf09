"""The catalogue: every entry loads and is true; a wrong one is refused in one line."""

from __future__ import annotations

import datetime as dt
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpufleet import ROOT, catalog
from gpufleet.catalog import Model
from gpufleet.errors import FleetError, UsageError
from gpufleet.weights import manifest

SITES = catalog.mirrors().sites


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_data: dict[str, Any]) -> Path:
    """A catalogue that a test may spoil: the real mirrors and one small model."""
    folder = tmp_path / "catalog"
    (folder / "models").mkdir(parents=True)
    shutil.copy(catalog.CATALOG / "mirrors.yaml", folder)
    (folder / "models" / "small.yaml").write_text(yaml.safe_dump(model_data), "utf-8")
    monkeypatch.setattr(catalog, "CATALOG", folder)
    catalog.model.cache_clear()
    catalog.mirrors.cache_clear()
    yield folder
    catalog.model.cache_clear()
    catalog.mirrors.cache_clear()


def one_line(error: pytest.ExceptionInfo[FleetError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_default_model_is_in_the_catalogue():
    assert "pico" in catalog.names()


@pytest.mark.parametrize("name", catalog.names() or ["pico"])
class TestEveryModel:
    def test_its_entry_loads(self, name: str):
        assert catalog.model(name).title

    def test_its_parts_and_its_picture_are_among_its_files(self, name: str):
        model = catalog.model(name)
        paths = {file.path for file in model.files}
        parts = model.minigpt4
        assert {parts.vit_file, parts.qformer_file, parts.projection_file} <= paths
        assert model.health.picture in paths
        assert any(path.startswith(f"{parts.llama_dir}/") for path in paths)
        assert len(paths) == len(model.files)

    def test_its_manifest_is_what_lies_in_the_checkout(self, name: str):
        model = catalog.model(name)
        if model.weights_in_checkout is None:
            return
        folder = ROOT / model.weights_in_checkout
        assert folder.is_dir(), f"{folder} is missing"
        assert sorted(model.files, key=lambda f: f.path) == manifest.of(folder)

    def test_the_disk_that_it_asks_for_holds_its_files(self, name: str):
        model = catalog.model(name)
        assert model.needs.disk_mib * 2**20 > model.total_bytes


def test_the_manifest_of_a_folder_is_every_file_but_its_readme(weights: Path, model: Model):
    (weights / "README.md").write_text("where these come from\n")
    (weights / "an empty folder").mkdir()
    assert manifest.of(weights) == sorted(model.files, key=lambda f: f.path)
    (weights / "llama" / "more.bin").write_bytes(b"1")
    assert [f.path for f in manifest.of(weights) if f not in model.files] == ["llama/more.bin"]


def test_an_unknown_model_lists_the_choices(copy: Path):
    with pytest.raises(UsageError) as error:
        catalog.model("smal")
    assert one_line(error) == "setting model: no model 'smal'; choose one of: small"


def test_an_unknown_site_lists_the_choices():
    with pytest.raises(UsageError) as error:
        catalog.site("tsinghua")
    message = one_line(error)
    assert message.startswith("setting mirrors.site: no site 'tsinghua'; choose official or one of")
    assert all(name in message for name in SITES)


@pytest.mark.parametrize("name", sorted(SITES))
class TestEverySite:
    def test_its_addresses_are_https_below_its_own_host(self, name: str):
        site = catalog.site(name)
        conda = site.conda
        paths = [site.pypi] if site.pypi else []
        paths += [conda.base, *conda.cloud.values()] if conda else []
        for path in paths:
            assert re.fullmatch(rf"https://{re.escape(site.host)}(/[\w.-]+)+", site.url(path))

    def test_it_says_where_it_is_known_from_and_when_that_was_seen(self, name: str):
        evidence = catalog.site(name).evidence
        assert evidence.source
        assert dt.date(2026, 1, 1) <= dt.date.fromisoformat(evidence.seen)

    def test_it_carries_something(self, name: str):
        site = catalog.site(name)
        assert site.pypi or site.conda or site.apt


def test_no_two_sites_share_a_host():
    hosts = [site.host for site in SITES.values()]
    assert len(set(hosts)) == len(hosts)


def test_sites_that_took_a_service_down_do_not_offer_it():
    """BFSU has no conda since 2024-04-28, ZJU's PyPI redirects off campus."""
    assert SITES["bfsu"].conda is None
    assert SITES["zju"].pypi is None
    assert SITES["hust"].conda is None
    assert SITES["tuna"].conda is not None
    assert SITES["tuna"].conda.subchannels == ("main",)


def test_official_is_no_site():
    assert "official" not in SITES


def broken(copy: Path, change: Any, name: str = "models/small.yaml") -> str:
    """The message after a change of an entry: a function of its data, or its whole new bytes."""
    path = copy / name
    if callable(change):
        data = yaml.safe_load(path.read_text("utf-8"))
        change(data)
        path.write_text(yaml.safe_dump(data), "utf-8")
    else:
        path.write_bytes(change)
    with pytest.raises(FleetError) as error:
        catalog.model("small") if name.startswith("models/") else catalog.mirrors()
    message = one_line(error)
    assert message.startswith(f"{path}: ")
    return message


def test_the_unspoilt_copy_loads(copy: Path, model: Model):
    assert catalog.model("small") == model
    assert set(catalog.mirrors().sites) == set(SITES)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d.update(titel="x"), "titel"),
        (lambda d: d.pop("title"), "title"),
        (lambda d: d.update(schema=2), "schema"),
        (lambda d: d.update(system="starchat"), "system"),
        (lambda d: d["needs"].update(disk_mib=0), "needs.disk_mib"),
        (lambda d: d["needs"].update(gpu_mib=1), "needs.gpu_mib"),
        (lambda d: d["accelerators"].append("tpu"), "accelerators.2"),
        (lambda d: d["minigpt4"].update(vit_precision="fp8"), "minigpt4.vit_precision"),
        (lambda d: d["minigpt4"].update(vit_file="/etc/passwd"), "minigpt4.vit_file"),
        (lambda d: d["minigpt4"]["vit"].update(width="wide"), "minigpt4.vit.width"),
        (lambda d: d["health"].pop("answer"), "health.answer"),
        (lambda d: d["files"][0].update(path="../x"), "files.0.path"),
        (lambda d: d["files"][0].update(path="-rf"), "files.0.path"),
        (lambda d: d["files"][0].update(path="a//b"), "files.0.path"),
        (lambda d: d["files"][0].update(path="a\nb"), "files.0.path"),
        (lambda d: d["files"][0].update(path="a\tb"), "files.0.path"),
        (lambda d: d["files"][1].update(bytes=-1), "files.1.bytes"),
        (lambda d: d["files"][1].update(sha256="abc"), "files.1.sha256"),
        (lambda d: d["files"][1].update(sha256="A" * 64), "files.1.sha256"),
        (lambda d: d["files"].clear(), "files"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_model_entry_is_refused_naming_file_and_key(copy: Path, change: Any, key: str):
    assert f"{key}: " in broken(copy, change)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d["sites"]["nju"].update(hots="x"), "sites.nju.hots"),
        (lambda d: d["sites"]["nju"].pop("evidence"), "sites.nju.evidence"),
        (lambda d: d["sites"]["nju"]["apt"].append("fedora"), "sites.nju.apt"),
        (lambda d: d["sites"]["nju"]["conda"]["subchannels"].append("free"), "conda.subchannels"),
        (lambda d: d["sites"]["nju"]["evidence"].update(state="sure"), "evidence.state"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_site_is_refused_naming_file_and_key(copy: Path, change: Any, key: str):
    assert key in broken(copy, change, "mirrors.yaml")


@pytest.mark.parametrize(
    "text",
    [b"schema: 1\n  title: x\n", b"a: [1\n", b"\tx: 1\n", b"a: !!python/name:os.system\n"],
    ids=["indent", "bracket", "tab", "object"],
)
def test_what_is_not_yaml_is_refused_naming_the_file(copy: Path, text: bytes):
    assert "not YAML" in broken(copy, text)


@pytest.mark.parametrize("text", [b"", b"pico\n", b"\xff\xfe\x00"], ids=["empty", "word", "binary"])
def test_what_is_no_catalogue_entry_at_all_is_refused_naming_the_file(copy: Path, text: bytes):
    broken(copy, text)
