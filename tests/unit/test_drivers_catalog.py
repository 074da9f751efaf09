"""The catalogue of drivers: it is true of real cards, it is whole, and typos are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gpufleet import ROOT, catalog
from gpufleet.catalog import Drivers
from gpufleet.errors import FleetError

#: PCI device id -> card, generation, flavours and last branch, from supported-gpus.json of driver
#: 595.91.07 (kernelopen, gsp_proprietary_supported, legacybranch).
CARDS = {
    "102d": ("Tesla K80", "Kepler", {"proprietary"}, "470"),
    "17fd": ("Tesla M40", "Maxwell", {"proprietary"}, "580"),
    "13f2": ("Tesla M60", "Maxwell", {"proprietary"}, "580"),
    "15f8": ("Tesla P100-PCIE-16GB", "Pascal", {"proprietary"}, "580"),
    "1b38": ("Tesla P40", "Pascal", {"proprietary"}, "580"),
    "1db5": ("Tesla V100-SXM2-32GB", "Volta", {"proprietary"}, "580"),
    "1db6": ("Tesla V100-PCIE-32GB", "Volta", {"proprietary"}, "580"),
    "1eb8": ("Tesla T4", "Turing", {"open", "proprietary"}, None),
    "1e07": ("NVIDIA GeForce RTX 2080 Ti", "Turing", {"open", "proprietary"}, None),
    "2182": ("NVIDIA GeForce GTX 1660 Ti", "Turing", {"open", "proprietary"}, None),
    "20b2": ("NVIDIA A100-SXM4-80GB", "Ampere", {"open", "proprietary"}, None),
    "20b7": ("NVIDIA A30", "Ampere", {"open", "proprietary"}, None),
    "2204": ("NVIDIA GeForce RTX 3090", "Ampere", {"open", "proprietary"}, None),
    "2235": ("NVIDIA A40", "Ampere", {"open", "proprietary"}, None),
    "2236": ("NVIDIA A10", "Ampere", {"open", "proprietary"}, None),
    "2684": ("NVIDIA GeForce RTX 4090", "Ada Lovelace", {"open", "proprietary"}, None),
    "26b9": ("NVIDIA L40S", "Ada Lovelace", {"open", "proprietary"}, None),
    "27b8": ("NVIDIA L4", "Ada Lovelace", {"open", "proprietary"}, None),
    "2324": ("NVIDIA H800", "Hopper", {"open", "proprietary"}, None),
    "2329": ("NVIDIA H20", "Hopper", {"open", "proprietary"}, None),
    "2330": ("NVIDIA H100 80GB HBM3", "Hopper", {"open", "proprietary"}, None),
    "2335": ("NVIDIA H200", "Hopper", {"open", "proprietary"}, None),
    "2342": ("NVIDIA GH200 480GB", "Grace Hopper", {"open"}, None),
    "2901": ("NVIDIA B200", "Blackwell", {"open"}, None),
    "2941": ("NVIDIA GB200", "Blackwell", {"open"}, None),
    "2b85": ("NVIDIA GeForce RTX 5090", "Blackwell", {"open"}, None),
    "3182": ("NVIDIA B300 SXM6 AC", "Blackwell Ultra", {"open"}, None),
}


@pytest.mark.parametrize("device", CARDS, ids=lambda device: CARDS[device][0])
def test_a_card_is_known_by_its_device_id(device: str):
    _, title, modules, last = CARDS[device]
    generation = catalog.drivers().generation(device)
    assert generation is not None
    assert (generation.title, set(generation.modules), generation.last) == (title, modules, last)


@pytest.mark.parametrize("device", ["ffff", "3500", "2380"])
def test_a_device_that_nobody_listed_is_of_no_generation(device: str):
    assert catalog.drivers().generation(device) is None


def test_every_cuda_has_a_floor_that_the_driver_it_came_with_meets():
    cuda = catalog.drivers().cuda
    for version, driver in cuda.pairs.items():
        assert int(driver.partition(".")[0]) >= int(cuda.floors[version.partition(".")[0]])


def test_a_branch_of_a_distribution_is_one_that_the_catalogue_tells_of():
    drivers = catalog.drivers()
    for packages in (drivers.packages.debian, drivers.packages.ubuntu):
        assert {branch for had in packages.branches.values() for branch in had} <= set(
            drivers.branches
        )


def test_every_row_says_where_it_comes_from():
    drivers = catalog.drivers()
    packages = drivers.packages
    rows = [drivers.cuda, *drivers.generations.values(), *drivers.branches.values()]
    rows += [getattr(packages, name) for name in type(packages).model_fields]
    assert all(row.evidence.source and row.evidence.seen for row in rows)


def spoilt(tmp_path: Path, change: Any) -> str:
    """What is said of the catalogue's own text after a change to it."""
    document = yaml.safe_load((ROOT / "catalog/drivers.yaml").read_text("utf-8"))
    change(document)
    path = tmp_path / "drivers.yaml"
    path.write_text(yaml.safe_dump(document), "utf-8")
    with pytest.raises(FleetError) as error:
        catalog._load(Drivers, path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["generations"]["volta"].update(modul=["open"]), "generations.volta.modul"),
        (lambda d: d["generations"]["volta"].update(modules=["opne"]), "volta.modules.0"),
        (lambda d: d["generations"]["volta"].update(modules=[]), "volta.modules"),
        (
            lambda d: d["generations"]["volta"].update(devices=["1dff-1d80"]),
            "must be two ids of four hex digits",
        ),
        (
            lambda d: d["generations"]["volta"].update(devices=["1d00-1dff"]),
            "generations pascal and volta both have device 1d00",
        ),
        (lambda d: d["branches"].update({"5350": d["branches"]["535"]}), "branches.5350"),
        (lambda d: d["branches"]["535"].update(support="LTS"), "branches.535.support"),
        (lambda d: d["branches"]["535"].pop("evidence"), "branches.535.evidence"),
        (lambda d: d["cuda"]["pairs"].update({"13.0": "580"}), "cuda.pairs.13.0"),
        (lambda d: d.update(environments={"cuda": "14.0"}), "CUDA 14 has no floor"),
        (lambda d: d["packages"].update(fedora={}), "packages.fedora"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, change: Any, said: str):
    message = spoilt(tmp_path, change)
    assert said in message
    assert "correct the catalogue entry" in message
