"""The catalogue: every entry loads and is true; a wrong one is refused in one line."""

from __future__ import annotations

import datetime as dt
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from gpufleet import ROOT, catalog
from gpufleet.catalog import SERVICES, Model, Provider, WeightFile, WeightSource
from gpufleet.errors import FleetError, UsageError
from gpufleet.settings import Settings
from gpufleet.weights import inspect, manifest

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
        sets = [catalog.weight_set(one) for one in model.weights]
        paths = [one.place(file.path) for one in sets for file in one.files]
        folders = {one.folder for one in sets}
        parts = model.parts
        if isinstance(parts, catalog.MiniGPT4):
            assert {parts.vit_file, parts.qformer_file, parts.projection_file} <= set(paths)
            folder = parts.llama_dir
        else:
            folder = parts.folder
        assert folder in folders or any(path.startswith(f"{folder}/") for path in paths)
        assert model.health.picture is None or model.health.picture in paths
        assert len(set(paths)) == len(paths)

    def test_its_weight_sets_are_in_the_catalogue(self, name: str):
        assert set(catalog.model(name).weights) <= set(catalog.weight_sets())

    def test_its_projection_was_trained_with_its_language_model(self, name: str):
        parts = {one: catalog.weight_set(one) for one in catalog.model(name).weights}
        assert inspect.pair(Path("/nowhere"), parts) == []
        sizes = {one.hidden_size for one in parts.values()} - {None}
        assert len(sizes) <= 1

    def test_the_disk_that_it_asks_for_holds_its_files(self, name: str):
        model = catalog.model(name)
        sets = [catalog.weight_set(one) for one in model.weights]
        known = sum(file.bytes or 0 for one in sets for file in one.files)
        assert model.needs.disk_mib * 2**20 > known


@pytest.mark.parametrize("name", catalog.weight_sets())
class TestEveryWeightSet:
    def test_its_entry_loads_and_names_where_it_is_known_from(self, name: str):
        evidence = catalog.weight_set(name).evidence
        assert evidence.source
        assert dt.date(2026, 1, 1) <= dt.date.fromisoformat(evidence.seen)

    def test_the_sets_that_it_names_are_there(self, name: str):
        weights = catalog.weight_set(name)
        named = set(weights.pairs)
        if weights.made:
            named |= {weights.made.base, weights.made.delta}
        assert named <= set(catalog.weight_sets())

    def test_a_merged_set_fits_what_it_is_made_of(self, name: str):
        weights = catalog.weight_set(name)
        if weights.made is None:
            return
        base = catalog.weight_set(weights.made.base)
        delta = catalog.weight_set(weights.made.delta)
        assert weights.hidden_size == base.hidden_size == delta.hidden_size
        assert weights.vocabulary == delta.vocabulary
        assert base.vocabulary is not None
        assert delta.vocabulary == base.vocabulary + (weights.made.version == "v0")


def test_no_two_files_of_the_catalogue_have_the_same_hash_and_another_size():
    sizes: dict[str, int] = {}
    for name in catalog.weight_sets():
        for file in catalog.weight_set(name).files:
            if file.sha256 is not None and file.bytes is not None:
                assert sizes.setdefault(file.sha256, file.bytes) == file.bytes, (name, file.path)
    assert len(sizes) > 60


def test_the_weight_sets_in_the_checkout_are_all_that_lies_there():
    sets = [catalog.weight_set(name) for name in catalog.weight_sets()]
    inside = [one for one in sets if one.in_checkout is not None]
    (folder,) = {one.in_checkout for one in inside}
    listed = [
        WeightFile(path=one.place(file.path), bytes=file.bytes or -1, sha256=file.sha256 or "")
        for one in inside
        for file in one.files
    ]
    assert sorted(listed, key=lambda f: f.path) == manifest.of(ROOT / folder)


def test_the_manifest_of_a_folder_is_every_file_but_its_readme(weights: Path, model: Model):
    (weights / "README.md").write_text("where these come from\n")
    (weights / "an empty folder").mkdir()
    listed = yaml.safe_load(Path(model.weights[0]).read_text("utf-8"))["files"]
    found = [file.model_dump() for file in manifest.of(weights)]
    assert found == sorted(listed, key=lambda file: file["path"])


def test_an_unknown_weight_set_lists_its_nearest():
    with pytest.raises(UsageError) as error:
        catalog.weight_set("vicuna-7b-v0.0")
    assert "did you mean vicuna-7b-v0?" in one_line(error)


def test_a_set_with_two_places_in_one_source_is_refused():
    with pytest.raises(ValueError, match="exactly one of"):
        WeightSource(huggingface="a/b", url="https://c/d")
    with pytest.raises(ValueError, match="exactly one of"):
        WeightSource()


def test_an_unknown_model_lists_the_choices(copy: Path):
    with pytest.raises(UsageError) as error:
        catalog.model("smal")
    assert one_line(error) == "setting model: no model 'smal'; choose one of: small"


@pytest.mark.parametrize("name", sorted(SITES))
class TestEverySite:
    def test_its_addresses_are_https_below_its_own_host(self, name: str):
        site = SITES[name]
        for path in paths(site.services.model_dump(exclude={"hf"})):
            address = site.url(path.replace("{cuda}", "cu121"))
            assert re.fullmatch(rf"https://{re.escape(site.host)}(/[\w.-]+)+/?", address)

    def test_it_says_where_it_is_known_from_and_when_that_was_seen(self, name: str):
        evidence = SITES[name].evidence
        assert evidence.source
        assert dt.date(2026, 1, 1) <= dt.date.fromisoformat(evidence.seen)

    def test_it_carries_something(self, name: str):
        assert any(SITES[name].carries(service) for service in SERVICES)

    def test_it_does_not_carry_what_is_gone(self, name: str):
        site = SITES[name]
        assert [row.service for row in site.gone if site.carries(row.service)] == []

    def test_it_knows_its_own_name(self, name: str):
        assert SITES[name].name == name


def test_no_two_sites_share_a_host():
    hosts = [host for site in SITES.values() for host in site.hosts]
    hosts += [site.internal.host for site in SITES.values() if site.internal]
    assert len(set(hosts)) == len(hosts)


def test_sites_that_took_a_service_down_do_not_offer_it():
    """BFSU has no conda since 2024-04-28, ZJU's PyPI redirects off campus."""
    bfsu = SITES["bfsu"]
    assert not bfsu.carries("conda")
    assert ("conda", "2024-04-28") in {(row.service, row.since) for row in bfsu.gone}
    assert not SITES["zju"].carries("pypi")
    assert not SITES["hust"].carries("conda")
    tuna = SITES["tuna"].services.conda
    assert tuna is not None
    assert tuna.subchannels == ("main",)


def test_what_others_say_of_a_site_is_marked_as_that():
    for name in ("aliyun", "tencent", "huawei"):
        assert SITES[name].carries("conda")
        assert not SITES[name].listed("conda")


def test_torch_wheels_are_an_index_or_a_flat_page():
    styles = {n: s.services.torch.style for n, s in SITES.items() if s.services.torch}
    assert styles == {"nju": "simple", "sjtu": "simple", "aliyun": "find-links"}


def test_inside_a_cloud_a_site_has_another_name_and_fewer_services():
    https, http = SITES["aliyun"].inside("aliyun")
    assert https.url("/x") == "https://mirrors.cloud.aliyuncs.com/x"
    assert http.url("/x") == "http://mirrors.cloud.aliyuncs.com/x"
    assert [s for s in SERVICES if https.carries(s)] == ["apt", "pypi"]
    assert SITES["aliyun"].inside("tencent") == SITES["nju"].inside("aliyun") == ()


def test_every_cloud_has_its_internal_mirror():
    providers = {site.internal.provider for site in SITES.values() if site.internal}
    assert providers == set(get_args(Provider))


def test_alibabas_hosts_do_not_use_the_site_that_refuses_them():
    policy = catalog.mirrors().policy
    assert policy.excluded("aliyun") == {"tuna"}
    assert policy.excluded("") == policy.excluded("huawei") == frozenset()


def paths(value: Any) -> list[str]:
    """Every path in what a site says of its services."""
    if isinstance(value, Mapping):
        return [path for one in value.values() for path in paths(one)]
    return [value] if isinstance(value, str) and value.startswith("/") else []


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


def services(catalogue: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = catalogue["sites"]["nju"]["services"]
    return found


def test_the_unspoilt_copy_loads(copy: Path, model: Model):
    assert catalog.model("small") == model
    assert set(catalog.mirrors().sites) == set(SITES)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d.update(titel="x"), "titel"),
        (lambda d: d.pop("title"), "title"),
        (lambda d: d.update(schema=1), "schema"),
        (lambda d: d.update(system="startchat"), "system"),
        (lambda d: d["needs"].update(disk_mib=0), "needs.disk_mib"),
        (lambda d: d["needs"].update(gpu_mib=1), "needs.gpu_mib"),
        (lambda d: d["accelerators"].append("tpu"), "accelerators.2"),
        (lambda d: d["minigpt4"].update(vit_precision="fp8"), "minigpt4.vit_precision"),
        (lambda d: d["minigpt4"].update(vit_file="/etc/passwd"), "minigpt4.vit_file"),
        (lambda d: d["minigpt4"]["vit"].update(width="wide"), "minigpt4.vit.width"),
        (lambda d: d["health"].pop("question"), "health.question"),
        (lambda d: d["weights"].clear(), "weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_model_entry_is_refused_naming_file_and_key(copy: Path, change: Any, key: str):
    assert f"{key}: " in broken(copy, change)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d["files"][0].update(path="../x"), "files.0.path: "),
        (lambda d: d["files"][0].update(path="-rf"), "files.0.path: "),
        (lambda d: d["files"][0].update(path="a//b"), "files.0.path: "),
        (lambda d: d["files"][0].update(path="a\nb"), "files.0.path: "),
        (lambda d: d["files"][0].update(path="a\tb"), "files.0.path: "),
        (lambda d: d["files"][1].update(bytes=-1), "files.1.bytes: "),
        (lambda d: d["files"][1].update(sha256="abc"), "files.1.sha256: "),
        (lambda d: d["files"][1].update(sha256="A" * 64), "files.1.sha256: "),
        (lambda d: d["files"][1].update(sha265="a" * 64), "(did you mean sha256?)"),
        (lambda d: d["files"].append(d["files"][0]), "names a file twice"),
        (lambda d: d["files"].clear(), "neither files nor include"),
        (lambda d: d["sources"].clear(), "neither sources nor made"),
        (lambda d: d["sources"][0].update(huggingface="nobody"), "sources.0.huggingface: "),
        (lambda d: d["sources"][0].update(url="https://x.example/"), "exactly one of"),
        (lambda d: d["sources"][0].update(revision="main"), "sources.0.revision: "),
        (lambda d: d.update(folder="/abs"), "folder"),
        (lambda d: d.update(made={"base": "a", "delta": "b", "version": "v2"}), "made.version: "),
    ],
)
def test_a_wrong_weight_set_is_refused_naming_file_and_key(
    model: Model, tmp_path: Path, change: Any, key: str
):
    data = yaml.safe_load(Path(model.weights[0]).read_text("utf-8"))
    path = tmp_path / "spoilt.yaml"
    change(data)
    path.write_text(yaml.safe_dump(data), "utf-8")
    with pytest.raises(FleetError) as error:
        catalog.weight_set(str(path))
    message = one_line(error)
    assert message.startswith(f"{path}: ")
    assert key in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d["sites"]["nju"].update(hots="x"), "sites.nju.hots"),
        (lambda d: d["sites"]["nju"].update(hots="x"), "(did you mean hosts?)"),
        (lambda d: d["sites"]["nju"].pop("evidence"), "sites.nju.evidence"),
        (lambda d: d["sites"]["nju"].update(scheme="http"), "sites.nju.scheme"),
        (lambda d: d["sites"]["nju"].update(hosts=[]), "sites.nju.hosts"),
        (lambda d: d["sites"]["nju"].update(hosts=["https://x.example/"]), "sites.nju.hosts.0"),
        (lambda d: d["sites"]["nju"].update(hosts=["mirrors.zju.edu.cn"]), "nju and zju both"),
        (lambda d: services(d)["apt"]["archives"].update(fedora="/f"), "apt.archives.fedora"),
        (lambda d: services(d)["apt"]["archives"].update(debian="debian"), "archives.debian"),
        (lambda d: services(d).update(pypy={"index": "/p"}), "pypy: "),
        (lambda d: services(d).update(pypy={"index": "/p"}), "(did you mean pypi?)"),
        (lambda d: services(d)["pypi"].update(indx="/p"), "(did you mean index?)"),
        (lambda d: services(d)["pypi"].update(index="/../p"), "services.pypi.index"),
        (lambda d: services(d)["pypi"].update(index="/p q"), "services.pypi.index"),
        (lambda d: services(d)["conda"]["subchannels"].append("free"), "conda.subchannels"),
        (lambda d: services(d)["torch"].update(url="/whl"), "services.torch.url"),
        (lambda d: services(d)["torch"].update(style="flat"), "services.torch.style"),
        (
            lambda d: d["sites"]["bfsu"]["services"].update(conda={"base": "/anaconda"}),
            "conda is both carried and gone",
        ),
        (lambda d: d["sites"]["bfsu"]["gone"][0].update(since="2024"), "gone.0.since"),
        (lambda d: d["sites"]["aliyun"]["internal"].update(provider="aws"), "internal.provider"),
        (lambda d: d["sites"].update(auto=d["sites"].pop("nju")), "auto is no name for a site"),
        (lambda d: d["policy"]["exclude"][0].update(site="tona"), "no site tona"),
        (lambda d: d["policy"].update(hysteresis=0.5), "policy.hysteresis"),
        (lambda d: d["policy"]["order"].append("fastest"), "policy.order.4"),
        (lambda d: d.update(polcy={}), "(did you mean policy?)"),
        (lambda d: d.update(schema=1), "schema"),
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


def test_a_model_entry_with_another_systems_parts_is_refused(copy: Path):
    message = broken(copy, lambda d: d.update(clip={"folder": "clip"}))
    assert message.endswith("a mini_gpt4 has no clip; correct the catalogue entry")


@pytest.mark.parametrize(
    ("part", "said"), [("minigpt4", "a mini_gpt4 needs minigpt4"), ("health", "health: ")]
)
def test_a_model_entry_without_its_parts_is_refused(copy: Path, part: str, said: str):
    assert said in broken(copy, lambda d: d.pop(part))


def test_an_own_model_names_weight_sets_that_lie_beside_it(
    tmp_path: Path, model_data: dict[str, Any]
):
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({**model_data, "weights": ["small-set.yaml", "minigpt4-7b"]}))
    found = catalog.model(str(own))
    assert found.weights == (str(tmp_path / "small-set.yaml"), "minigpt4-7b")
    assert catalog.weight_set(found.weights[0]).title == "all files of the small model"
    assert Settings(model=str(own)).model_id == "own"


def test_an_own_model_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError) as error:
        catalog.model(str(tmp_path / "gone.yaml"))
    assert one_line(error).startswith(f"setting model: no file {tmp_path}/gone.yaml")
