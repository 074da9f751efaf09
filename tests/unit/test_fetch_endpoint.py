"""Where Hugging Face is asked: the option, then HF_ENDPOINT, then the inventory, then its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loopback import Server, serving

from gpufleet.errors import UsageError
from gpufleet.run import operator
from gpufleet.settings import Mirrors
from gpufleet.weights.fetch.endpoint import endpoints
from gpufleet.weights.fetch.hubs import HUGGINGFACE, MODELSCOPE

MIRROR = "https://hf-mirror.com"


def mirrors(**given: Any) -> Mirrors:
    return Mirrors.model_validate(given)


def own(*sites: Server, site: str = "auto") -> Mirrors:
    """Settings in which these sites are all there are for Hugging Face."""
    every = {
        f"own{i}": {
            "hosts": [server.place],
            "scheme": "http",
            "services": {"hf": {"endpoint": "/"}},
        }
        for i, server in enumerate(sites)
    }
    return mirrors(site=site, sites=every, exclude=["hf-mirror"])


def test_it_is_hugging_face_s_own_address_where_nothing_is_said():
    found = endpoints(None, None, {})
    assert (found.huggingface, found.modelscope) == (HUGGINGFACE, MODELSCOPE)
    assert endpoints(None, mirrors(), {}).huggingface == HUGGINGFACE


def test_the_option_wins_over_the_environment_and_that_over_the_inventory():
    inventory, environment = mirrors(pinned={"hf": "hf-mirror"}), {"HF_ENDPOINT": "http://x.org/"}
    assert endpoints(None, inventory, {}).huggingface == MIRROR
    assert endpoints(None, inventory, environment).huggingface == "http://x.org"
    assert endpoints("official", inventory, environment).huggingface == HUGGINGFACE
    assert endpoints("hf-mirror", None, environment).huggingface == MIRROR


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"])
@pytest.mark.parametrize("given", ["hf-mirror.com", "http://", "https:/x.org", "ftp://x.org"])
def test_a_variable_that_is_no_address_is_refused(variable: str, given: str):
    with pytest.raises(UsageError, match=f"^{variable} is no address: begin it with https://"):
        endpoints(None, None, {variable: given})


def test_a_site_of_the_inventory_s_own_can_be_named(tmp_path: Path):
    with serving() as site:
        found = endpoints("own0", own(site, site="official"), {})
    assert found.huggingface == f"http://{site.place}"


def test_a_site_without_hugging_face_is_refused_with_those_that_have_it():
    with pytest.raises(UsageError, match="--mirror: nju does not carry hf; choose official or one"):
        endpoints("nju", None, {})
    with pytest.raises(UsageError, match="--mirror: no site 'njuu'"):
        endpoints("njuu", None, {})


def test_auto_takes_a_site_that_works_from_this_machine_and_remembers_it(cache: Path):
    with serving() as well, serving(files={}) as empty:
        wanted = own(empty, well)
        found = endpoints(None, wanted, {})
        assert found.huggingface == f"http://{well.place}"
        assert "MB/s" in found.why
        well.asked.clear()
        assert endpoints(None, wanted, {}) == found
        assert well.asked == []
    assert (cache / "probed.json").is_file()


def test_a_site_that_nobody_named_is_told_from_one_that_somebody_did(cache: Path):
    with serving() as site:
        for wanted, named in ((own(site), False), (own(site, site="own0"), True)):
            found = endpoints(None, wanted, {})
            assert (found.huggingface, found.named) == (f"http://{site.place}", named)
    assert endpoints("hf-mirror", mirrors(), {}).named
    assert endpoints(None, None, {}).named


def test_auto_without_a_site_that_works_is_hugging_face_s_own_address():
    with serving(files={}) as empty:
        found = endpoints(None, own(empty), {})
    assert found.huggingface == HUGGINGFACE
    assert "no site passed" in found.why


def test_an_inventory_says_what_concerns_this_machine(tmp_path: Path):
    inventory = tmp_path / "mine.py"
    inventory.write_text(
        "hosts = (['10.0.0.1', '10.0.0.2'],"
        " {'mirrors': {'pinned': {'hf': 'hf-mirror'}}, 'weights': {'hub': 'modelscope'}})\n"
    )
    found, weights = operator.read(inventory)
    assert (found.pinned, weights.hub) == ({"hf": "hf-mirror"}, "modelscope")


def test_an_inventory_whose_hosts_differ_is_refused(tmp_path: Path):
    inventory = tmp_path / "mine.py"
    inventory.write_text("hosts = ['10.0.0.1', ('10.0.0.2', {'weights': {'hub': 'modelscope'}})]\n")
    with pytest.raises(UsageError, match="its hosts differ in Hugging Face"):
        operator.read(inventory)
    assert operator.read(inventory, ["10.0.0.2"])[1].hub == "modelscope"


def test_an_inventory_s_hosts_may_differ_in_what_is_their_own(tmp_path: Path):
    inventory = tmp_path / "mine.py"
    inventory.write_text(
        "hosts = [('10.0.0.1', {'weights': {'bandwidth_kib': 9}}),"
        " ('10.0.0.2', {'mirrors': {'provider': 'aliyun', 'site': 'nju'}})]\n"
    )
    assert operator.read(inventory)[1].hub == "huggingface"


def test_an_inventory_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(UsageError, match="no such inventory file"):
        operator.read(tmp_path / "mine.py")
