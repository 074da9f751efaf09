"""The choice of a site per service, as data: policy, exclusion, measurement, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from gpufleet import catalog
from gpufleet.catalog import SERVICES, Provider, Service, Site
from gpufleet.errors import UsageError
from gpufleet.mirrors.choice import Choice, Found, Pick, candidates, decide, unmet
from gpufleet.mirrors.plan import CACHE, CONDARC, PIP_CONF, RECORD, AptSources, held, wanted
from gpufleet.mirrors.probe import FAILED_TTL, Kept, about, choose, digests, read
from gpufleet.settings import Mirrors, Settings, parse

CATALOGUE = catalog.mirrors()
MB = 1e6
WORK = {
    "hosts": ["mirror.example.net:8080"],
    "scheme": "http",
    "services": {"pypi": {"index": "/pypi/simple"}},
}


def mirrors(**settings: Any) -> Mirrors:
    return parse({"mirrors": {"site": "auto", **settings}}, "h").mirrors


def ok(site: str, speed: float | None = 1 * MB, service: Service = "pypi", **more: Any) -> Found:
    return Found(service, site, "ok", f"{site} is well", speed, **more)


def bad(site: str, service: Service = "pypi", **more: Any) -> Found:
    return Found(service, site, "cut", f"{site} cuts the connection", **more)


def pick(found: list[Found], held: Site | None = None, **settings: Any) -> Pick:
    current = {"pypi": held} if held else {}
    return decide(mirrors(**settings), CATALOGUE, found, current).picks["pypi"]


def summary(choice: Choice) -> dict[str, tuple[str, str]]:
    return {service: (pick.name, pick.policy) for service, pick in choice.picks.items()}


class TestPinned:
    def test_official_is_official_for_everything(self):
        choice = decide(Mirrors(), CATALOGUE, [ok("nju")])
        assert summary(choice) == dict.fromkeys(SERVICES, ("official", "official"))
        assert {choice.site(service) for service in SERVICES} == {None}

    def test_a_site_is_taken_for_all_that_it_is_known_to_carry(self):
        choice = decide(mirrors(site="aliyun"), CATALOGUE)
        taken = {s for s, (name, _) in summary(choice).items() if name == "aliyun"}
        assert taken == {"apt", "pypi", "torch"}
        assert choice.picks["apt"].policy == "pinned"
        assert choice.picks["hf"].why == "aliyun does not carry hf"
        assert choice.picks["conda"].why == "aliyun is not known to carry conda"

    def test_a_service_may_have_another_site_even_one_that_is_not_verified(self):
        choice = decide(
            mirrors(site="nju", pinned={"conda": "aliyun", "pypi": "official"}), CATALOGUE
        )
        assert summary(choice)["apt"] == ("nju", "pinned")
        assert summary(choice)["conda"] == ("aliyun", "pinned")
        assert summary(choice)["pypi"] == ("official", "official")
        assert choice.picks["conda"].why == "mirrors.pinned.conda says so"

    def test_wins_over_what_was_measured(self):
        found = [ok("nju", 9 * MB), bad("tuna")]
        assert pick(found, pinned={"pypi": "tuna"}).name == "tuna"

    def test_an_own_site_is_a_site(self):
        choice = decide(mirrors(site="work", sites={"work": WORK}), CATALOGUE)
        assert summary(choice)["pypi"] == ("work", "pinned")
        site = choice.site("pypi")
        assert site is not None
        assert site.url("/x") == "http://mirror.example.net:8080/x"

    @pytest.mark.parametrize(
        ("settings", "line"),
        [
            ({"site": "mars"}, "setting mirrors.site: no site 'mars'; choose official, auto or "),
            (
                {"pinned": {"apt": "mars"}},
                "setting mirrors.pinned.apt: no site 'mars'; choose one ",
            ),
            (
                {"pinned": {"hf": "nju"}},
                "setting mirrors.pinned.hf: nju does not carry hf; choose ",
            ),
            (
                {"exclude": ["nju", "mars"]},
                "setting mirrors.exclude.1: no site 'mars'; choose one ",
            ),
            ({"sites": {"nju": WORK}}, "setting mirrors.sites.nju: the catalogue has a site of th"),
        ],
    )
    def test_what_is_not_there_is_refused(self, settings: dict[str, Any], line: str):
        with pytest.raises(UsageError) as error:
            decide(mirrors(**settings), CATALOGUE)
        assert str(error.value).startswith(line)
        assert "\n" not in str(error.value)


class TestMeasured:
    def test_the_fastest_that_works_is_taken_with_its_evidence(self):
        chosen = pick([ok("tuna", 3 * MB), ok("nju", 8 * MB), bad("pku"), ok("ustc", 2 * MB)])
        assert (chosen.name, chosen.policy) == ("nju", "measured")
        assert chosen.why == "8.0 MB/s; nju is well"

    def test_one_that_does_not_work_never_competes(self):
        fast = replace(bad("pku"), speed=99 * MB)
        assert pick([fast, ok("nju", 1)]).name == "nju"

    def test_one_that_was_not_measured_comes_last(self):
        assert pick([ok("tuna", None), ok("nju", 1)]).name == "nju"
        assert pick([ok("tuna", None), bad("nju")]).why == "not measured; tuna is well"

    def test_services_are_chosen_one_by_one(self):
        found = [ok("tuna", 3 * MB), ok("nju", 1 * MB)]
        found += [ok("nju", 5 * MB, "miniconda"), ok("ustc", 6 * MB, "miniconda")]
        choice = decide(mirrors(), CATALOGUE, found)
        assert summary(choice)["pypi"] == ("tuna", "measured")
        assert summary(choice)["miniconda"] == ("ustc", "measured")
        assert summary(choice)["torch"] == ("official", "official")
        assert choice.picks["torch"].why == "no site was probed"

    def test_fallbacks_are_of_other_failure_domains_then_official(self):
        found = [ok(n, s * MB) for n, s in (("bfsu", 9), ("tuna", 8), ("sjtu", 7), ("nju", 8.5))]
        chosen = pick(found)
        assert chosen.name == "bfsu"
        # tuna is the same domain as bfsu
        assert chosen.fallbacks == ("nju", "sjtu", "official")

    def test_an_unverified_service_is_taken_where_it_was_found_to_work(self):
        found = [ok("aliyun", 5 * MB, "conda", parts=("conda-forge", "pkgs/main"))]
        assert decide(mirrors(), CATALOGUE, found).picks["conda"].name == "aliyun"

    def test_only_the_parts_that_passed_are_used(self):
        parts = ("conda-forge", "pkgs/main", "pkgs/msys2")
        site = decide(mirrors(), CATALOGUE, [ok("sjtu", 1, "conda", parts=parts)]).site("conda")
        assert site is not None
        assert site.services.conda is not None
        assert site.services.conda.subchannels == ("main", "msys2")
        assert set(site.services.conda.cloud) == {"conda-forge"}
        apt = decide(mirrors(), CATALOGUE, [ok("nju", 1, "apt", parts=("debian",))]).site("apt")
        assert apt is not None
        assert apt.services.apt is not None
        assert set(apt.services.apt.archives) == {"debian"}

    def test_results_of_a_site_that_is_no_longer_known_or_lost_the_service_do_not_count(self):
        assert pick([ok("atlantis", 9 * MB), ok("zju", 9 * MB), ok("nju", 1)]).name == "nju"


class TestHysteresis:
    NJU = CATALOGUE.sites["nju"]

    def test_the_site_in_use_stays_unless_another_is_clearly_faster(self):
        found = [ok("nju", 4 * MB), ok("tuna", 5.9 * MB)]
        chosen = pick(found, self.NJU)
        assert (chosen.name, chosen.policy) == ("nju", "measured")
        assert "stays: tuna (5.9 MB/s) is not 1.5 times as fast" in chosen.why
        assert pick(found).name == "tuna"
        assert pick([ok("nju", 4 * MB), ok("tuna", 6.1 * MB)], self.NJU).name == "tuna"

    def test_its_factor_is_a_setting(self):
        found = [ok("nju", 4 * MB), ok("tuna", 6.1 * MB)]
        assert pick(found, self.NJU, hysteresis=2).name == "nju"
        assert pick(found, self.NJU, hysteresis=1).name == "tuna"

    def test_a_site_in_use_that_fails_is_left(self):
        assert pick([bad("nju"), ok("tuna", 1)], self.NJU).name == "tuna"

    def test_a_site_in_use_that_was_excluded_is_left(self):
        found = [ok("nju", 4 * MB), ok("tuna", 1)]
        assert pick(found, self.NJU, exclude=["nju"]).name == "tuna"

    def test_two_probes_in_turn_do_not_flap(self):
        current, names = self.NJU, []
        for round_ in range(6):
            speeds = (4, 5) if round_ % 2 else (5, 4)
            chosen = pick([ok("nju", speeds[0] * MB), ok("tuna", speeds[1] * MB)], current)
            assert chosen.site is not None
            current = chosen.site
            names.append(chosen.name)
        assert set(names) == {"nju"}


class TestInside:
    def test_the_clouds_own_mirror_comes_first_however_slow(self):
        found = [ok("aliyun", 1 * MB, via="internal"), ok("nju", 50 * MB), ok("aliyun", 2 * MB)]
        chosen = pick(found, provider="aliyun")
        assert (chosen.name, chosen.policy) == ("aliyun", "internal")
        assert chosen.site is not None
        assert chosen.site.url("/x") == "https://mirrors.cloud.aliyuncs.com/x"
        assert chosen.fallbacks == ("nju", "official")

    def test_https_comes_before_http(self):
        inner = [ok("aliyun", 9 * MB, via="internal-http"), ok("aliyun", 1 * MB, via="internal")]
        assert pick(inner, provider="aliyun").site.scheme == "https"  # type: ignore[union-attr]
        assert pick(inner[:1], provider="aliyun").site.scheme == "http"  # type: ignore[union-attr]

    def test_one_that_fails_is_passed_over(self):
        found = [bad("aliyun", via="internal"), bad("aliyun", via="internal-http"), ok("nju", 1)]
        assert pick(found, provider="aliyun").name == "nju"

    def test_it_is_nothing_for_other_hosts(self):
        assert pick([ok("aliyun", 9 * MB, via="internal"), ok("nju", 1)]).name == "nju"

    def test_alibabas_hosts_never_take_tuna(self):
        found = [ok("tuna", 99 * MB), ok("nju", 1)]
        assert pick(found, provider="aliyun").name == "nju"
        assert pick(found, provider="tencent").name == "tuna"
        names = {one.site.name for one in candidates(mirrors(provider="aliyun"), CATALOGUE)}
        assert "tuna" not in names
        assert {"nju", "aliyun"} <= names

    def test_the_setting_knows_every_cloud(self):
        annotation = Mirrors.model_fields["provider"].annotation
        assert set(get_args(annotation)) == {"", *get_args(Provider)}


class TestKept:
    NJU = CATALOGUE.sites["nju"]

    def test_what_is_in_force_stays_when_every_site_fails(self):
        chosen = pick([bad("tuna"), bad("nju")], self.NJU)
        assert (chosen.name, chosen.policy) == ("nju", "kept")
        reasons = ["nju: nju cuts the connection", "tuna: tuna cuts the connection"]
        assert chosen.why == "no site passed: " + "; ".join(reasons)

    def test_sites_that_fail_alike_are_counted_and_the_one_in_force_is_named_first(self):
        alike = [replace(bad(name), why="cannot be had") for name in ("tuna", "sjtu", "pku")]
        chosen = pick([*alike, bad("nju")], self.NJU)
        reasons = "nju: nju cuts the connection; 3 sites: cannot be had"
        assert chosen.why == f"no site passed: {reasons}"
        names = ("tuna", "sjtu", "pku", "ustc", "hust")
        why = pick([bad(name) for name in names]).why
        assert why.count(": ") == 4
        assert why.endswith("; and 2 more reasons")

    def test_without_anything_in_force_it_is_official(self):
        chosen = pick([bad("tuna")])
        assert (chosen.name, chosen.policy) == ("official", "official")
        assert "tuna cuts the connection" in chosen.why

    def test_what_was_excluded_meanwhile_does_not_stay(self):
        assert pick([bad("tuna")], self.NJU, exclude=["nju"]).policy == "official"

    def test_the_files_stay_byte_for_byte(self):
        """The record that the first choice left is enough to render the same files again."""
        sources = AptSources("debian", "bookworm", {}, ())
        found = [ok("nju", 3 * MB), ok("sjtu", 1, "conda", parts=("conda-forge", "pkgs/main"))]
        before = wanted(decide(mirrors(), CATALOGUE, found), False, sources)
        assert {file.path for file in before} >= {PIP_CONF, CONDARC, RECORD}
        (record,) = [file.content for file in before if file.path == RECORD]
        failed = [bad("nju"), bad("sjtu", "conda")]
        choice = decide(mirrors(), CATALOGUE, failed, held(record))
        assert wanted(choice, False, sources) == before


class TestRemembered:
    """`choose`: from what the host remembers, and by a probe where that does not hold."""

    SETTINGS = Settings.model_validate({"mirrors": {"site": "auto"}})
    NOW = 1_800_000_000.0

    def run(
        self,
        kept: str = "",
        record: str = "",
        settings: Settings = SETTINGS,
        answer: str = "",
        refused: str = "",
    ) -> tuple[Choice, list[str]]:
        """The choice, and the plans that the host was asked to carry out."""
        asked: list[str] = []

        def ask(plan: str) -> Kept:
            asked.append(plan)
            return read(answer)

        sources = AptSources(
            "debian", "bookworm", {}, (), record, kept, self.NOW, "12", refused=refused
        )
        host = about(settings, catalog.drivers(), sources)
        return choose(settings.mirrors, CATALOGUE, host, ask, name="h"), asked

    @pytest.mark.parametrize(
        ("ago", "service", "site", "taken"),
        [
            (60, "pypi", "mirrors.nju.edu.cn", "sjtu"),
            (7200, "pypi", "mirrors.nju.edu.cn", "nju"),  # it was probed again since
            (60, "conda", "mirrors.nju.edu.cn", "nju"),
            (60, "pypi", "mirrors.example.org", "nju"),
        ],
    )
    def test_a_site_that_failed_a_client_since_is_left_out(self, ago, service, site, taken):
        refused = f"nonsense\n{self.NOW - ago:.0f}\t{service}\t{site}\tpip: 403\n"
        kept = self.cache(3600, ok("sjtu", 0.5, "pypi"), ok("nju", 1, "pypi"))
        choice, _ = self.run(kept, refused=refused)
        assert choice.picks["pypi"].name == taken

    def test_where_all_failed_a_client_it_says_what_the_client_said(self):
        refused = f"{self.NOW:.0f}\tpypi\tmirrors.nju.edu.cn\tpip: 403\n"
        choice, _ = self.run(self.cache(3600), refused=refused)
        assert choice.picks["pypi"].name == "official"
        assert "nju: passed the probe and then failed: pip: 403" in choice.picks["pypi"].why

    def cache(self, age: float, *rows: Found) -> str:
        """What a host keeps of a probe of all that it would be asked, so long ago."""
        sources = AptSources("debian", "bookworm", {}, (), version="12")
        host = about(self.SETTINGS, catalog.drivers(), sources)
        asked = digests(candidates(self.SETTINGS.mirrors, CATALOGUE), host)
        at = self.NOW - age
        every = [*rows, *(ok("nju", 1, service, parts=("conda-forge",)) for service in asked)]
        document = {
            "version": 1,
            "services": {
                service: {"at": at, "digest": digest} for service, digest in asked.items()
            },
            "found": [
                {
                    "service": row.service,
                    "site": row.site,
                    "via": row.via,
                    "state": row.state,
                    "why": row.why,
                    "speed": row.speed,
                    "parts": list(row.parts),
                    "at": at,
                }
                for row in every
            ],
        }
        return json.dumps(document)

    def test_a_fresh_result_is_used_without_asking(self):
        choice, asked = self.run(self.cache(3600, ok("tuna", 9 * MB)))
        assert asked == []
        assert summary(choice)["pypi"] == ("tuna", "measured")

    def test_an_old_one_is_asked_for_again(self):
        _, asked = self.run(self.cache(8 * 86400))
        assert len(asked) == 1

    def test_a_host_that_remembers_nothing_is_asked_once_and_its_answer_used(self):
        answer = self.cache(0, ok("ustc", 9 * MB))
        choice, asked = self.run(answer=answer)
        assert len(asked) == 1
        assert summary(choice)["pypi"] == ("ustc", "measured")

    def test_a_host_that_cannot_probe_keeps_what_it_has(self):
        record = held_record("nju")
        choice, asked = self.run(record=record)
        assert len(asked) == 1
        assert summary(choice)["pypi"] == ("nju", "kept")

    def test_pinned_services_are_not_probed(self):
        settings = Settings.model_validate({"mirrors": {"site": "nju"}})
        assert self.run(settings=settings)[1] == []
        pinned = {service: "official" for service in SERVICES if service != "hf"}
        one = Settings.model_validate({"mirrors": {"site": "auto", "pinned": pinned}})
        (plan,) = self.run(settings=one)[1]
        assert json.loads(plan)["services"] == ["hf"]

    def test_official_asks_nothing(self):
        assert self.run(settings=Settings())[1] == []

    def test_a_fruitless_probe_is_repeated_after_an_hour(self):
        text = self.cache(FAILED_TTL + 60).replace('"ok"', '"cut"')
        assert len(self.run(text)[1]) == 1
        text = self.cache(60).replace('"ok"', '"cut"')
        assert self.run(text)[1] == []


def held_record(name: str) -> str:
    """The record of a choice of that site for everything."""
    site = CATALOGUE.sites[name]
    picks = {s: Pick(s, site, "measured", "") for s in SERVICES if site.listed(s)}
    sources = AptSources("debian", "bookworm", {}, ())
    (text,) = [f.content for f in wanted(Choice(picks), False, sources) if f.path == RECORD]
    return text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "sites": 5}'])
def test_a_record_that_is_spoilt_is_none(text: str):
    assert held(text) == {}


def test_no_record_is_left_by_a_choice_that_settings_make():
    sources = AptSources("debian", "bookworm", {}, ())
    pinned = decide(mirrors(site="nju"), CATALOGUE)
    assert RECORD not in {file.path for file in wanted(pinned, False, sources)}


class TestRenderings:
    def test_hugging_face_goes_to_the_endpoint_and_xet_is_off(self):
        choice = decide(mirrors(site="hf-mirror"), CATALOGUE)
        assert choice.hf_environment() == {
            "HF_ENDPOINT": "https://hf-mirror.com",
            "HF_HUB_DISABLE_XET": "1",
        }
        assert decide(mirrors(site="nju"), CATALOGUE).hf_environment() == {}

    @pytest.mark.parametrize(
        ("site", "options"),
        [
            ("nju", ("--index-url", "https://mirrors.nju.edu.cn/pytorch/whl/cu121")),
            ("sjtu", ("--index-url", "https://mirror.sjtu.edu.cn/pytorch-wheels/cu121")),
            ("aliyun", ("--find-links", "https://mirrors.aliyun.com/pytorch-wheels/cu121/")),
            ("tuna", ()),
        ],
    )
    def test_torch_is_an_index_or_a_page_of_links(self, site: str, options: tuple[str, ...]):
        assert decide(mirrors(site=site), CATALOGUE).torch("cu121") == options

    def test_git_goes_through_the_proxy_per_command_without_passwords(self):
        choice = decide(mirrors(git_proxy="https://git.example.net/gh/"), CATALOGUE)
        assert choice.git_options("https://github.com/a/b") == (
            "-c",
            "url.https://git.example.net/gh/.insteadOf=https://github.com/",
            "-c",
            "credential.helper=",
        )
        for url in (
            "https://user:token@github.com/a/b",
            "https://token@github.com/a/b",
            "https://github.com/a/b?token=x",
            "https://example.net/a/b",
            "git@github.com:a/b",
        ):
            assert choice.git_options(url) == ()
        assert decide(mirrors(), CATALOGUE).git_options("https://github.com/a/b") == ()

    def test_an_http_site_is_trusted_and_no_other_host_is(self):
        sources = AptSources("debian", "bookworm", {}, ())
        choice = decide(mirrors(site="work", sites={"work": WORK}), CATALOGUE)
        (pip,) = [f.content for f in wanted(choice, False, sources) if f.path == PIP_CONF]
        assert pip.endswith(
            "[global]\nindex-url = http://mirror.example.net:8080/pypi/simple\n"
            "trusted-host = mirror.example.net:8080\n"
        )

    def test_an_https_site_needs_no_trust(self):
        sources = AptSources("debian", "bookworm", {}, ())
        for name in CATALOGUE.sites:
            for file in wanted(decide(mirrors(site=name), CATALOGUE), False, sources):
                assert "trusted-host" not in file.content
                assert "ssl_verify" not in file.content


def test_the_memory_of_probes_is_no_file_that_a_restore_takes_away():
    """It holds what was seen, not what was chosen, and is written by the host itself."""
    sources = AptSources("debian", "bookworm", {}, ())
    choice = decide(mirrors(), CATALOGUE, [ok("nju")])
    assert CACHE not in {file.path for file in wanted(choice, False, sources)}


def test_services_of_which_no_site_works_are_said_once_for_each_way_out():
    picks = {
        "apt": Pick("apt", CATALOGUE.sites["nju"], "kept", "no site passed: nju: down"),
        "pypi": Pick(
            "pypi", CATALOGUE.sites["nju"], "kept", "no site passed: nju: down; and 2 more"
        ),
        "hf": Pick("hf", None, "official", "no site passed: hf-mirror: 403"),
        "conda": Pick("conda", CATALOGUE.sites["nju"], "measured", "9 MB/s"),
        "torch": Pick("torch", None, "official", "mirrors.pinned.torch says so"),
    }
    assert unmet(Choice(picks)) == [
        "apt, pypi: kept at nju: no site passed: nju: down; look with fleet mirrors show",
        "hf: left to the official site: no site passed: hf-mirror: 403; "
        "look with fleet mirrors show",
    ]
