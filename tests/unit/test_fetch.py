"""Fetching, from a hub on this machine that breaks its answers in every way seen in the wild."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_double import Hub, Request, always, blob, once, pointer, serving, sha256
from loopback import certified
from loopback import serving as other_site

from gpufleet.errors import FleetError
from gpufleet.weights.digests import Digests
from gpufleet.weights.fetch import hubs
from gpufleet.weights.fetch.partial import FOLDER
from gpufleet.weights.fetch.plan import Content, Policy
from gpufleet.weights.fetch.run import Fetch, sets_of
from gpufleet.weights.fetch.work import File, Options
from gpufleet.weights.store import Store

#: As patient as a test may be.
POLICY = Policy(patience=20, first=0.01, most=0.05, connect=2, silence=0.5)

REPOSITORY = "lmsys/tiny-delta"
BIG = "model-00001-of-00002.bin"
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"

_random = random.Random(7)
FILES = {
    "config.json": b'{"vocab_size": 32001}\n',
    "tokenizer.model": _random.randbytes(1000),
    BIG: _random.randbytes(900_000),
    "model-00002-of-00002.bin": _random.randbytes(60_000),
    "README.md": b"# not part of the set\n",
}
WANTED = {path: body for path, body in FILES.items() if path != "README.md"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        found.repositories[REPOSITORY] = dict(FILES)
        found.plain = {f"/files/{path}": body for path, body in FILES.items()}
        yield found


class Site:
    """A store, a weight set, and fetches of it."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder = folder
        self.hub = hub
        self.store = Store(folder / "store")
        self.said: list[str] = []

    def set(self, *sources: dict[str, Any], **more: Any) -> str:
        """A weight set in a file of its own."""
        given = {
            "schema": 1,
            "title": "a small set",
            "kind": "delta",
            "folder": "tiny",
            "sources": list(sources) or [{"huggingface": REPOSITORY}],
            "include": ["*.bin", "*.json", "tokenizer.model"],
            "evidence": {"source": "this test", "seen": "2026-11-21", "state": "verified"},
            **more,
        }
        text = yaml.safe_dump(given)
        # The catalogue reads each file once.
        path = self.folder / f"tiny-{sha256(text.encode())[:8]}.yaml"
        path.write_text(text, "utf-8")
        return str(path)

    def one(self, *sources: dict[str, Any], known: tuple[str, ...] = ("bytes", "sha256")) -> str:
        """A set of one large file, of which the catalogue knows so much."""
        body = FILES[BIG]
        md5 = hashlib.md5(body).hexdigest()
        every = {"bytes": len(body), "sha256": sha256(body), "md5": md5}
        file = {"path": BIG, **{name: every[name] for name in known}}
        plain = {"url": f"{self.hub.address}/files"}
        return self.set(*(sources or (plain,)), include=[], files=[file])

    def fetch(self, *names: str, **options: Any) -> Fetch:
        endpoints = hubs.Endpoints(self.hub.address, self.hub.address)
        given = {"endpoints": endpoints, "policy": POLICY, **options}
        fetching = Fetch(names or (self.set(),), Options(self.store, **given), Digests(), self.say)
        fetching.run()
        return fetching

    def say(self, line: str) -> None:
        assert "\n" not in line
        self.said.append(line)

    def there(self) -> dict[str, bytes]:
        """Files that have their final names."""
        root = self.store.root
        return {
            path.relative_to(root / "tiny").as_posix(): path.read_bytes()
            for path in root.glob("tiny/**/*")
            if path.is_file()
        }

    def partial(self) -> list[Path]:
        found = (self.store.root / FOLDER).rglob("*")
        return [path for path in found if path.is_file() and path.suffix != ".origin"]

    def states(self, fetching: Fetch) -> set[str]:
        return {file.state for file in fetching.files}


@pytest.fixture
def site(tmp_path: Path, hub: Hub) -> Site:
    return Site(tmp_path, hub)


def respond(status: int, body: bytes = b"", **headers: str) -> Callable[[Request], None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: request.answer(status, body, named)


def cut_after(size: int) -> Callable[[Request], None]:
    """Says the right length and gives less."""

    def how(request: Request) -> None:
        start = request.asked_from()
        body = FILES[BIG][start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        if start:
            span = f"bytes {start}-{len(FILES[BIG]) - 1}/{len(FILES[BIG])}"
            request.send_header("Content-Range", span)
        request.end_headers()
        request.wfile.write(body[:size])
        request.server.sent += len(body[:size])
        request.close_connection = True

    return how


class TestAWholeSet:
    def test_is_what_the_repository_has_of_it_and_is_learnt_with_its_commit(self, site: Site):
        fetching = site.fetch()
        assert site.there() == WANTED
        learnt = site.store.learnt(site.set())
        assert learnt is not None
        assert learnt.origin == f"{REPOSITORY}@{site.hub.commit(REPOSITORY)}"
        assert {file.path: file.sha256 for file in learnt.files} == {
            path: sha256(body) for path, body in WANTED.items()
        }
        assert site.states(fetching) == {"fetched"}
        assert not (site.store.root / FOLDER).exists()

    def test_that_is_there_is_not_asked_for_again(self, site: Site):
        site.fetch()
        site.hub.asked.clear()
        assert site.states(site.fetch()) == {"present"}
        assert site.hub.asked == []

    def test_is_completed_where_a_file_is_gone_or_was_changed(self, site: Site):
        site.fetch()
        (site.store.root / "tiny" / "config.json").write_bytes(b"changed")
        (site.store.root / "tiny" / BIG).unlink()
        site.hub.asked.clear()
        assert site.fetch().sets[0].done
        assert site.there() == WANTED
        assert site.hub.paths("model-00002") == []

    def test_stays_at_the_commit_that_an_earlier_run_began_with(self, site: Site):
        site.hub.faults = [always("/cdn/", respond(404))]
        site.fetch()
        begun = site.hub.commit(REPOSITORY)
        site.hub.older[REPOSITORY] = {begun: dict(FILES)}
        site.hub.repositories[REPOSITORY]["config.json"] = b'{"vocab_size": 32000}\n'
        site.hub.faults = []
        assert site.fetch().sets[0].done
        assert site.there() == WANTED
        assert site.hub.paths(f"/revision/{begun}")

    def test_comes_from_the_commit_that_the_catalogue_names(self, site: Site):
        old = {"config.json": b"{}\n"}
        site.hub.older[REPOSITORY] = {"0" * 40: old}
        site.fetch(site.set({"huggingface": REPOSITORY, "revision": "0" * 40}))
        assert site.there() == old

    def test_comes_from_a_space_and_under_another_name(self, site: Site):
        site.hub.repositories["owner/demo"] = {"sub/prerained.pth": FILES[BIG]}
        source = {"huggingface": "owner/demo", "kind": "space", "paths": {BIG: "sub/prerained.pth"}}
        site.fetch(site.one(source))
        assert site.there() == {BIG: FILES[BIG]}
        assert site.hub.paths("/spaces/owner/demo/resolve/")

    def test_is_asked_of_modelscope_first_where_that_is_wanted(self, site: Site):
        sources = ({"huggingface": REPOSITORY}, {"modelscope": REPOSITORY})
        fetching = site.fetch(site.set(*sources), hub="modelscope")
        assert site.there() == WANTED
        assert fetching.sets[0].origin == f"{REPOSITORY}@{site.hub.commit(REPOSITORY)}"
        assert all(path.startswith("/api/v1/models/") for _, path, _ in site.hub.asked)

    def test_of_the_checkout_needs_no_fetch(self, site: Site):
        fetching = site.fetch(*sets_of(["pico"]))
        assert all(one.done for one in fetching.sets)
        assert "vicuna-pico is in this checkout: nothing to fetch" in site.said
        assert list(site.store.root.iterdir()) == []

    def test_is_unknown_only_by_a_name_that_is_neither_model_nor_set(self):
        with pytest.raises(FleetError, match="no weight set 'pio'"):
            sets_of(["pio"])
        assert sets_of(["minigpt4-vicuna-7b", "eva-vit-g"])[0] == "vicuna-7b-v0"
        merged = sets_of(["vicuna-7b-v0"], parts=True)
        assert merged == ["llama-7b-hf", "vicuna-7b-delta-v0"]


class TestATokenOfThePerson:
    def test_goes_to_the_hub_and_to_nobody_else(self, site: Site, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        # The same server under another name.
        site.hub.cdn = site.hub.address.replace("127.0.0.1", "localhost")
        site.fetch()
        assert site.there() == WANTED
        sent = {path: headers.get("authorization") for _, path, headers in site.hub.asked}
        assert {sent[path] for path in sent if "/cdn/" not in path} == {"Bearer hf_secret"}
        assert {sent[path] for path in sent if "/cdn/" in path} == {None}

    def test_goes_to_no_mirror_that_nobody_named(self, site: Site, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        endpoints = hubs.Endpoints(site.hub.address, site.hub.address, named=False)
        assert site.fetch(endpoints=endpoints).sets[0].done
        assert {headers.get("authorization") for _, _, headers in site.hub.asked} == {None}
        gated = respond(403, X_Error_Code="GatedRepo")
        site.hub.faults = [always("/api/models/", gated)]
        (one,) = site.fetch(site.set(folder="other"), endpoints=endpoints).sets
        assert one.error.endswith("; a token goes only to a site that you name with --mirror")

    def test_may_have_come_with_a_line_s_end(self, site: Site, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret\n")
        site.fetch(site.set({"modelscope": REPOSITORY}))
        assert site.there() == WANTED
        sent = {headers["authorization"] for _, _, headers in site.hub.asked}
        assert sent == {"Bearer ms_secret"}

    def test_is_in_no_message(self, site: Site, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        site.hub.faults = [always("/resolve/", respond(403))]
        fetching = site.fetch()
        assert "hf_secret" not in f"{site.said} {fetching.sets} {fetching.options}"


class TestASourceThatWillNot:
    def gated(self, request: Request) -> None:
        request.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})

    def test_leaves_the_set_to_the_next_one_and_is_named(self, site: Site):
        site.hub.repositories["copy/tiny"] = dict(FILES)
        site.hub.faults = [always(f"/api/models/{REPOSITORY}", self.gated)]
        site.fetch(site.set({"huggingface": REPOSITORY}, {"huggingface": "copy/tiny"}))
        assert site.there() == WANTED
        assert any("is gated" in line and "next source" in line for line in site.said)

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            (respond(404, X_Error_Code="RepoNotFound"), "is not there, or private"),
            (respond(401), "answers 401: it is private, or your token is wrong"),
            (respond(403, X_Error_Code="GatedRepo"), "accept its terms on its page"),
            (respond(403), "answers 403: access to it must be asked for"),
        ],
    )
    def test_ends_the_run_at_once_with_what_to_do(
        self, site: Site, how: Callable[[Request], None], words: str
    ):
        site.hub.faults = [always("/api/models/", how)]
        fetching = site.fetch()
        assert words in fetching.sets[0].error
        assert "\n" not in fetching.sets[0].error
        assert len(site.hub.asked) == 1

    def test_lists_its_files_and_gives_none_ends_the_run_at_once_too(self, site: Site):
        site.hub.faults = [always("/resolve/", self.gated)]
        fetching = site.fetch()
        assert site.states(fetching) == {"failed"}
        assert {"accept its terms on its page" in file.why for file in fetching.files} == {True}
        assert len(site.hub.paths("/resolve/")) == len(WANTED)

    @pytest.mark.parametrize("name", ["../../evil.json", "/evil.json", "a\nb.json", "a/../b.json"])
    @pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
    def test_names_a_file_that_no_folder_could_hold_is_refused(
        self, site: Site, kind: str, name: str
    ):
        site.hub.repositories[REPOSITORY][name] = b"{}"
        # As a server that wants it there would answer.
        site.hub.faults = [always("evil.json", respond(200, b"{}"))]
        fetching = site.fetch(site.set({kind: REPOSITORY}))
        assert f"lists {name!r}, no name of a file below its folder" in fetching.sets[0].error
        assert {path.name for path in site.folder.rglob("*.json")} == set()

    def test_has_an_odd_name_for_what_nobody_wants_is_asked_all_the_same(self, site: Site):
        site.hub.repositories[REPOSITORY]["notes\n.txt"] = b"notes"
        assert site.fetch().sets[0].done
        assert site.there() == WANTED

    @pytest.mark.parametrize(
        ("kind", "variable"),
        [("huggingface", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")],
    )
    def test_cannot_be_told_a_token_is_not_asked_for_days(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, kind: str, variable: str
    ):
        monkeypatch.setenv(variable, "s\u00e9cret")
        fetching = site.fetch(site.set({kind: REPOSITORY}))
        assert f"{variable} has characters that no token has" in fetching.sets[0].error
        assert site.hub.asked == []

    def test_has_a_wrong_certificate_and_is_not_asked_again(self, site: Site, tmp_path: Path):
        with other_site(certificate=certified(tmp_path, "127.0.0.1")) as other:
            address = f"https://{other.place}"
            endpoints = hubs.Endpoints(address, address)
            for source in ({"huggingface": REPOSITORY}, {"modelscope": REPOSITORY}):
                fetching = site.fetch(site.set(source), endpoints=endpoints)
                assert "its certificate is wrong: self" in fetching.sets[0].error
            (file,) = site.fetch(site.one({"url": f"{address}/files"})).files
        assert "its certificate is wrong: self" in file.why
        assert other.asked == []

    def test_answers_with_a_page_for_a_list_and_is_asked_again(self, site: Site):
        site.hub.faults = [once("/api/models/", respond(200, PAGE), 2)]
        assert site.fetch().sets[0].done
        assert "login portal" in site.said[0]

    def test_of_modelscope_says_why(self, site: Site):
        failed = b'{"Code": 10010205001, "Success": false, "Message": "record not found"}'
        site.hub.faults = [always("/api/v1/", respond(200, failed))]
        fetching = site.fetch(site.set({"modelscope": REPOSITORY}))
        assert "record not found" in fetching.sets[0].error

    def test_is_left_where_its_list_contradicts_the_catalogue(self, site: Site):
        site.hub.repositories[REPOSITORY][BIG] = FILES[BIG][::-1]
        site.hub.repositories["copy/tiny"] = dict(FILES)
        site.fetch(site.one({"huggingface": REPOSITORY}, {"huggingface": "copy/tiny"}))
        assert site.there() == {BIG: FILES[BIG]}
        assert any("has another file: sha256" in line for line in site.said)
        assert not site.hub.paths(sha256(FILES[BIG][::-1]))

    def test_does_not_mix_its_files_with_another_one_s(self, site: Site):
        """The second source has another version of a file whose hash nobody knows beforehand."""
        site.hub.repositories["copy/tiny"] = {**FILES, "config.json": b'{"vocab_size": 32000}\n'}
        site.hub.faults = [always(f"/{REPOSITORY}/resolve/", respond(404))]
        sources = ({"huggingface": REPOSITORY}, {"huggingface": "copy/tiny"})
        fetching = site.fetch(site.set(*sources))
        assert site.there() == {p: body for p, body in WANTED.items() if p != "config.json"}
        (failed,) = [file for file in fetching.files if file.state == "failed"]
        assert "has another file" in failed.why


class TestAnAnswerThatIsWrong:
    """Each fault hits the large file's first answers; then the server is well again."""

    @pytest.mark.parametrize(
        "how",
        [
            respond(503),
            respond(500, PAGE),
            respond(200, PAGE),
            respond(200, pointer(FILES[BIG])),
            respond(200, FILES[BIG][::-1]),
            respond(200, FILES[BIG] + b"more"),
            respond(200, FILES[BIG][:-5]),
            respond(206, FILES[BIG], Content_Range="bytes 5-9/10"),
            respond(200, FILES[BIG], Content_Encoding="gzip"),
            respond(416),
            cut_after(0),
            cut_after(400_000),
            lambda request: request.cut(FILES[BIG][:400_000]),
            lambda request: request.cut(b""),
            lambda request: request.cut(FILES[BIG], len(FILES[BIG]) + 100),
        ],
        ids=[
            *("503", "500-page", "page", "pointer", "other-content", "longer", "shorter"),
            *("other-range", "encoded", "416", "nothing", "cut", "no-length", "empty"),
            "says-more",
        ],
    )
    @pytest.mark.parametrize("known", [("bytes", "sha256"), ("sha256",)], ids=["size", "no-size"])
    def test_is_never_taken_for_the_file(
        self, site: Site, how: Callable[[Request], None], known: tuple[str, ...]
    ):
        site.hub.faults = [once("/files/", how)]
        fetching = site.fetch(site.one(known=known))
        assert site.there() == {BIG: FILES[BIG]}
        assert fetching.files[0].state == "fetched"
        assert site.partial() == []

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            (respond(200, PAGE), "a web page"),
            (respond(200, pointer(FILES[BIG])), "a Git LFS pointer"),
            (respond(200, FILES[BIG][::-1]), "gives another file: sha256"),
            (respond(200, FILES[BIG][:-5]), ""),
            (respond(404), "does not have it (404)"),
            (respond(403), "answers 403"),
        ],
        ids=["page", "pointer", "other-content", "shorter", "404", "403"],
    )
    @pytest.mark.parametrize("known", [("bytes", "sha256"), ("sha256",)], ids=["size", "no-size"])
    def test_that_stays_so_ends_soon_with_a_line_and_leaves_nothing(
        self, site: Site, how: Callable[[Request], None], words: str, known: tuple[str, ...]
    ):
        site.hub.faults = [always("/files/", how)]
        (file,) = site.fetch(site.one(known=known)).files
        assert file.state == "failed"
        assert words in file.why
        assert site.there() == {}
        assert site.partial() == []
        assert len(site.hub.asked) <= 2

    def test_of_one_source_is_made_good_by_the_next(self, site: Site):
        site.hub.faults = [always("/files/", respond(200, FILES[BIG][::-1]))]
        name = site.one({"url": f"{site.hub.address}/files"}, {"huggingface": REPOSITORY})
        (file,) = site.fetch(name).files
        assert site.there() == {BIG: FILES[BIG]}
        assert file.source == f"{REPOSITORY} of 127.0.0.1:{site.hub.server_port}"
        assert any("next source is tried" in line for line in site.said)

    def test_of_a_small_file_shows_by_git_s_own_hash(self, site: Site):
        other = b"x" * len(FILES["config.json"])
        site.hub.faults = [always("/config.json", respond(200, other))]
        fetching = site.fetch()
        assert "config.json" not in site.there()
        (failed,) = [file for file in fetching.files if file.state == "failed"]
        assert blob(FILES["config.json"])[:12] in failed.why


class TestATransferThatIsCutOff:
    def test_goes_on_where_it_was(self, site: Site):
        site.hub.faults = [once("/files/", cut_after(200_000), 3)]
        site.fetch(site.one())
        assert site.there() == {BIG: FILES[BIG]}
        ranges = [headers.get("range") for _, _, headers in site.hub.asked]
        assert ranges == [None, "bytes=200000-", "bytes=400000-", "bytes=600000-"]
        assert site.hub.sent == len(FILES[BIG])

    def test_goes_on_in_the_next_run(self, site: Site):
        site.hub.faults = [once("/files/", cut_after(500_000)), always("/files/", respond(404))]
        site.fetch(site.one())
        assert [path.stat().st_size for path in site.partial()] == [500_000]
        site.hub.faults = []
        site.hub.sent = 0
        site.fetch(site.one())
        assert site.there() == {BIG: FILES[BIG]}
        assert site.hub.sent == len(FILES[BIG]) - 500_000

    def test_goes_on_from_another_source(self, site: Site):
        site.hub.faults = [once("/files/", cut_after(500_000)), always("/files/", respond(404))]
        name = site.one({"url": f"{site.hub.address}/files"}, {"huggingface": REPOSITORY})
        site.fetch(name)
        assert site.there() == {BIG: FILES[BIG]}
        assert site.hub.sent == len(FILES[BIG])

    def test_ends_well_where_the_server_ignores_ranges(self, site: Site):
        def whole(request: Request) -> None:
            request.answer(200, FILES[BIG])

        site.hub.faults = [once("/files/", cut_after(500_000)), always("/files/", whole)]
        site.fetch(site.one())
        assert site.there() == {BIG: FILES[BIG]}

    def test_keeps_what_it_had_where_the_server_ignores_ranges_and_is_cut_again(self, site: Site):
        def shorter(request: Request) -> None:
            request.cut(FILES[BIG][:100_000], len(FILES[BIG]))

        site.hub.faults = [once("/files/", cut_after(500_000)), once("/files/", shorter, 2)]
        site.fetch(site.one())
        assert site.there() == {BIG: FILES[BIG]}
        assert site.hub.asked[-1][2]["range"] == "bytes=500000-"

    def test_begins_anew_where_what_was_there_is_not_the_file_s_start(self, site: Site):
        site.hub.faults = [once("/files/", cut_after(500_000)), always("/files/", respond(404))]
        site.fetch(site.one())
        (partial,) = site.partial()
        partial.write_bytes(b"\0" * 300_000)
        site.hub.faults = []
        (file,) = site.fetch(site.one()).files
        assert (file.state, site.there()) == ("fetched", {BIG: FILES[BIG]})
        assert any("from the start" in line for line in site.said)

    def test_by_a_reset_is_no_failure(self, site: Site):
        def reset(request: Request) -> None:
            request.head(200, {"Content-Length": str(len(FILES[BIG]))})
            request.wfile.write(FILES[BIG][:300_000])
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()
            request.close_connection = True

        site.hub.faults = [once("/files/", reset, 2)]
        assert site.fetch(site.one()).sets[0].done

    def test_by_silence_is_no_failure(self, site: Site):
        def silent(request: Request) -> None:
            cut_after(300_000)(request)
            request.wfile.flush()
            time.sleep(1.2)

        site.hub.faults = [once("/files/", silent)]
        assert site.fetch(site.one()).sets[0].done
        assert site.there() == {BIG: FILES[BIG]}

    def test_by_errors_for_a_while_is_no_failure(self, site: Site):
        site.hub.faults = [
            once("/api/models/", respond(502), 4),
            once("/resolve/", respond(503), 12),
            once("/cdn/", respond(403)),
        ]
        assert site.fetch().sets[0].done
        assert site.there() == WANTED

    def test_rests_as_long_as_the_server_asks(self, site: Site):
        site.hub.faults = [once("/files/", respond(429, Retry_After="1"))]
        begun = time.monotonic()
        site.fetch(site.one())
        assert 1 <= time.monotonic() - begun < 5
        assert site.said == [
            f"tiny/{BIG}: 127.0.0.1:{site.hub.server_port} answers 429; again in 1 s"
        ]

    def test_ends_when_patience_does(self, site: Site):
        site.hub.faults = [always("/files/", respond(503))]
        policy = Policy(patience=0.3, first=0.01, most=0.05)
        (file,) = site.fetch(site.one(), policy=policy).files
        assert file.state == "failed"
        assert file.why.startswith("nothing came for ")
        assert file.why.endswith("answers 503")

    def test_just_before_it_got_its_name_needs_no_source(self, site: Site):
        name = site.one()
        site.hub.faults = [once("/files/", cut_after(500_000)), always("/files/", respond(404))]
        site.fetch(name)
        (partial,) = site.partial()
        partial.write_bytes(FILES[BIG])
        site.hub.asked.clear()
        assert site.fetch(name).sets[0].done
        assert site.there() == {BIG: FILES[BIG]}
        assert site.hub.asked == []

    def test_leaves_nothing_once_the_file_is_there_by_other_means(self, site: Site):
        site.hub.faults = [once("/files/", cut_after(500_000)), always("/files/", respond(404))]
        site.fetch(site.one())
        assert site.partial()
        path = site.store.root / "tiny" / BIG
        path.parent.mkdir(parents=True)
        path.write_bytes(FILES[BIG])
        assert site.states(site.fetch(site.one())) == {"present"}
        assert not (site.store.root / FOLDER).exists()

    def test_by_nobody_listening_is_tried_again(self, site: Site):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        name = site.one({"url": f"http://127.0.0.1:{port}/files"}, {"huggingface": REPOSITORY})
        assert site.fetch(name).sets[0].done


class TestWhatIsThereUnderAFileSName:
    def test_is_the_start_where_it_was_cut_off(self, site: Site):
        path = site.store.root / "tiny" / BIG
        path.parent.mkdir(parents=True)
        path.write_bytes(FILES[BIG][:700_000])
        site.fetch(site.one())
        assert site.there() == {BIG: FILES[BIG]}
        assert site.hub.sent == 200_000

    @pytest.mark.parametrize("wrong", [PAGE, pointer(FILES[BIG]), FILES[BIG][::-1]])
    def test_stays_until_the_right_file_takes_its_place(self, site: Site, wrong: bytes):
        path = site.store.root / "tiny" / BIG
        path.parent.mkdir(parents=True)
        path.write_bytes(wrong)
        site.hub.faults = [always("/files/", respond(404))]
        site.fetch(site.one())
        assert path.read_bytes() == wrong
        site.hub.faults = []
        site.fetch(site.one())
        assert path.read_bytes() == FILES[BIG]
        assert site.hub.sent == len(FILES[BIG])

    def test_is_the_start_for_two_fetches_at_once(self, site: Site):
        path = site.store.root / "tiny" / BIG
        path.parent.mkdir(parents=True)
        path.write_bytes(FILES[BIG][:700_000])
        site.hub.rate = 1_000_000
        both = [threading.Thread(target=site.fetch, args=(site.one(),)) for _ in range(2)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        assert site.there() == {BIG: FILES[BIG]}
        assert (site.hub.sent, site.partial()) == (200_000, [])

    @pytest.mark.parametrize("link", [os.symlink, os.link])
    def test_is_left_alone_where_it_is_another_file_s_second_name(
        self, site: Site, tmp_path: Path, link: Callable[[Path, Path], None]
    ):
        other = tmp_path / "other.bin"
        other.write_bytes(FILES[BIG][:700_000])
        path = site.store.root / "tiny" / BIG
        path.parent.mkdir(parents=True)
        link(other, path)
        site.fetch(site.one())
        assert site.there() == {BIG: FILES[BIG]}
        assert other.read_bytes() == FILES[BIG][:700_000]

    def test_and_changes_while_it_is_read_is_not_taken_for_what_it_was(self, site: Site):
        path = site.store.root / "tiny" / BIG
        path.parent.mkdir(parents=True)
        path.write_bytes(FILES[BIG])
        seen: list[int] = []

        class Touched(File):
            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, value)
                if name == "bytes" and value and not seen:
                    seen.append(value)
                    with path.open("r+b") as stream:
                        stream.write(b"another beginning")

        fetching = Fetch((site.one(),), Options(site.store), Digests(), site.say)
        content = Content(len(FILES[BIG]), sha256(FILES[BIG]))
        file = Touched("tiny", BIG, f"tiny/{BIG}", content)
        with pytest.raises(OSError, match="changed while it was read"):
            fetching._single.look(file)
        assert Digests().known(path) is None


class TestAFolderOfABrowser:
    @pytest.fixture
    def downloads(self, tmp_path: Path) -> Path:
        folder = tmp_path / "Downloads" / "more"
        folder.mkdir(parents=True)
        return folder

    def test_has_files_under_any_name_and_keeps_them(self, site: Site, downloads: Path):
        taken = downloads / "download (3)"
        taken.write_bytes(FILES[BIG])
        (file,) = site.fetch(site.one(), folders=(downloads.parent,)).files
        assert (file.state, site.there()) == ("picked", {BIG: FILES[BIG]})
        assert taken.read_bytes() == FILES[BIG]
        assert taken.samefile(site.store.root / "tiny" / BIG)
        assert site.hub.sent == 0
        assert site.partial() == []

    def test_has_files_of_a_repository_too(self, site: Site, downloads: Path):
        for path, body in WANTED.items():
            (downloads / path).write_bytes(body)
        assert site.states(site.fetch(folders=(downloads,))) == {"picked"}
        assert site.there() == WANTED
        assert site.hub.sent == 0

    def test_is_of_no_harm_where_a_file_has_only_the_size(self, site: Site, downloads: Path):
        (downloads / BIG).write_bytes(FILES[BIG][::-1])
        (file,) = site.fetch(site.one(), folders=(downloads,)).files
        assert (file.state, site.there()) == ("fetched", {BIG: FILES[BIG]})

    @pytest.mark.parametrize("name", [f"{BIG}.crdownload", f"{BIG}.part", BIG])
    def test_has_the_start_of_a_file(self, site: Site, downloads: Path, name: str):
        (downloads / name).write_bytes(FILES[BIG][:600_000])
        site.fetch(site.one(), folders=(downloads,))
        assert site.there() == {BIG: FILES[BIG]}
        assert site.hub.sent == 300_000
        assert (downloads / name).stat().st_size == 600_000

    def test_has_what_looks_like_the_start_and_is_not(self, site: Site, downloads: Path):
        (downloads / f"{BIG}.crdownload").write_bytes(b"\0" * 600_000)
        site.fetch(site.one(), folders=(downloads,))
        assert site.there() == {BIG: FILES[BIG]}

    @pytest.mark.parametrize("name", [BIG, f"{BIG}.crdownload"])
    def test_may_lose_a_file_meanwhile(self, site: Site, downloads: Path, name: str):
        (downloads / name).write_bytes(FILES[BIG][: 900_000 if name == BIG else 600_000])

        def lose(request: Request) -> bool:
            (downloads / name).unlink(missing_ok=True)
            return False

        site.hub.faults = [lose]
        assert site.fetch(folders=(downloads,)).sets[0].done
        assert site.there() == WANTED

    def test_may_be_on_another_disk(self, site: Site):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            path = Path(folder, "download")
            path.write_bytes(FILES[BIG])
            if path.stat().st_dev == site.folder.stat().st_dev:
                pytest.skip("/dev/shm is this test's own disk")
            (file,) = site.fetch(site.one(), folders=(Path(folder),)).files
            assert (file.state, file.bytes) == ("picked", len(FILES[BIG]))
            assert path.exists()
        assert site.there() == {BIG: FILES[BIG]}
        assert (site.hub.sent, site.partial()) == (0, [])

    def test_must_be_there(self, site: Site, tmp_path: Path):
        with pytest.raises(FleetError, match=r"--from .*nowhere: no such folder"):
            site.fetch(site.one(), folders=(tmp_path / "nowhere",))

    def test_is_the_way_for_what_only_a_browser_gets(self, site: Site, downloads: Path):
        name = site.one({"by_hand": "https://drive.example.org/file/d/1RY9"})
        (file,) = site.fetch(name).files
        assert file.why == (
            "no program can fetch it: download it by hand from "
            "https://drive.example.org/file/d/1RY9 into a folder, then "
            f"./fleet weights fetch {name} --from FOLDER --store {site.store.root}"
        )
        (downloads / f"{BIG[:-4]} (1).bin").write_bytes(FILES[BIG])
        assert site.states(site.fetch(name, folders=(downloads,))) == {"picked"}


class TestAFileOfWhichOnlyTheMd5IsPublished:
    def test_is_held_to_it_and_its_sha256_is_learnt(self, site: Site):
        name = site.one(known=("bytes", "md5"))
        site.hub.faults = [once("/files/", respond(200, FILES[BIG][::-1]))]
        site.fetch(name)
        assert site.there() == {BIG: FILES[BIG]}
        assert site.store.files(name)[0].sha256 == sha256(FILES[BIG])

    def test_is_not_what_a_repository_has_in_its_place(self, site: Site):
        site.hub.repositories[REPOSITORY][BIG] = FILES[BIG][::-1]
        name = site.one({"huggingface": REPOSITORY}, known=("bytes", "md5"))
        (file,) = site.fetch(name).files
        assert (file.state, site.there(), site.partial()) == ("failed", {}, [])
        assert "gives another file: md5" in file.why


class TestAPlainAddress:
    def test_proves_nothing_of_a_file_without_a_hash(self, site: Site):
        (file,) = site.fetch(site.one(known=("bytes",))).files
        assert file.state == "failed"
        assert "give its sha256 in the catalogue" in file.why
        assert site.hub.asked == []


class TestTheDisk:
    def test_is_looked_at_before_anything_is_fetched(self, site: Site):
        file = {"path": BIG, "bytes": 2**60, "sha256": "0" * 64}
        name = site.set({"url": f"{site.hub.address}/files"}, include=[], files=[file])
        with pytest.raises(FleetError, match=r"needs 1073741824\.0 GiB, .* are free: make room"):
            site.fetch(name)
        assert site.hub.asked == []


class TestTwoFetchesAtOnce:
    def test_transfer_each_file_once(self, site: Site):
        name = site.set()
        site.hub.rate = 3_000_000
        others = [threading.Thread(target=site.fetch, args=(name,)) for _ in range(3)]
        for other in others:
            other.start()
        for other in others:
            other.join()
        assert site.there() == WANTED
        assert site.hub.sent == sum(map(len, WANTED.values()))


def test_many_small_files_fetched_by_several_processes_at_once_are_all_well(site: Site):
    """Folders of partial files come and go under the feet of the others."""
    small = {f"d{i % 3}/{i}.bin": _random.randbytes(i * 150) for i in range(30)}
    site.hub.repositories[REPOSITORY] = small
    name = site.set()

    def work() -> None:
        assert site.fetch(name, jobs=8).sets[0].done

    children = [forked(work) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert site.there() == small
    assert not (site.store.root / FOLDER).exists()


def forked(work: Callable[[], Any]) -> int:
    """A process of its own that does the work; its id. Its exit status says whether it ended."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def test_a_fetch_killed_at_40_random_points_never_leaves_a_wrong_file_under_a_final_name(
    site: Site,
):
    site.hub.rate = 2_000_000
    chance = random.Random(5)
    name = site.set()
    grown: list[int] = []
    importlib.import_module("huggingface_hub.hf_api")  # once, and not in every child
    for _ in range(40):
        until = site.hub.sent + chance.randrange(60_000)
        child = forked(lambda: site.fetch(name))
        while site.hub.sent < until and not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        there = site.there()
        assert there == {path: WANTED[path] for path in there}
        kept = sum(path.stat().st_size for path in site.partial())
        grown.append(kept + sum(map(len, there.values())))
    assert grown == sorted(grown), "what had come was lost"
    assert len(set(grown)) > 8, "hardly any came in the middle of a file"
    site.hub.rate = 0
    fetching = site.fetch(name)
    assert fetching.sets[0].done
    assert site.there() == WANTED
    assert not (site.store.root / FOLDER).exists()


def test_a_fetch_that_was_suspended_goes_on(site: Site):
    site.hub.rate = 1_000_000
    child = forked(lambda: site.fetch(site.one()))
    deadline = time.monotonic() + 10
    while site.hub.sent < 100_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGSTOP)
    # Longer than a connection may be silent; meanwhile the server gives up what it had open.
    time.sleep(1)
    os.kill(child, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    assert site.there() == {BIG: FILES[BIG]}
