"""What a fetch decides: what an answer is worth, when to ask again, which file is which."""

from __future__ import annotations

from typing import Any

import pytest

from gpufleet.catalog import ListedFile, WeightSet, WeightSource
from gpufleet.weights.fetch.plan import (
    MARGIN,
    Answer,
    Content,
    Policy,
    Remote,
    Take,
    Turn,
    amount,
    completed,
    contradiction,
    impostor,
    judge,
    ordered,
    pause,
    retry_after,
    room,
    same_name,
    wanted,
)

FILE = Content(1000, "a" * 64)


def verdict(status: int, start: int = 0, content: Content = FILE, **headers: str) -> Take | Turn:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return judge(Answer(status, named), start, content, now=0)


class TestAnAnswer:
    def test_with_the_whole_file_is_taken_from_the_start_even_where_a_part_was_asked_for(self):
        assert verdict(200, 300, content_length="1000") == Take(0, 1000)

    def test_with_the_part_that_was_asked_for_is_taken_there(self):
        assert verdict(206, 300, content_range="bytes 300-999/1000") == Take(300, 1000)

    def test_that_does_not_say_its_size_is_taken(self):
        assert verdict(200) == Take(0, None)
        assert verdict(206, 300, content_range="bytes 300-999/*") == Take(300, None)

    @pytest.mark.parametrize("said", ["bytes 0-999/1000", "bytes 301-999/1000", "", "garbage"])
    def test_with_another_part_is_asked_for_anew(self, said: str):
        assert verdict(206, 300, content_range=said).then == "anew"

    @pytest.mark.parametrize(
        ("status", "headers", "then"),
        [
            (200, {"content_length": "999"}, "strike"),
            (206, {"content_range": "bytes 0-999/1001"}, "strike"),
            (200, {"content_encoding": "gzip"}, "strike"),
            (416, {}, "anew"),
            (429, {}, "later"),
            (500, {}, "later"),
            (503, {}, "later"),
            (408, {}, "later"),
            (401, {}, "never"),
            (403, {}, "never"),
            (404, {}, "never"),
            (410, {}, "never"),
            (400, {}, "never"),
            (304, {}, "never"),
        ],
    )
    def test_that_is_no_file_says_what_comes_then(
        self, status: int, headers: dict[str, str], then: str
    ):
        assert verdict(status, **headers).then == then

    def test_of_any_size_is_taken_where_the_size_is_not_known(self):
        assert verdict(200, content=Content(None, "a" * 64), content_length="5") == Take(0, 5)

    def test_that_refuses_where_a_hub_redirects_to_may_be_another_the_next_time(self):
        answer = Answer(403, {}, moved=True)
        assert judge(answer, 0, FILE, now=0).then == "strike"


class TestAPause:
    def test_doubles_up_to_its_longest_and_half_of_it_is_luck(self):
        policy = Policy(first=1, most=600)
        assert [pause(policy, n, 1) for n in (1, 2, 3, 10, 1000)] == [1, 2, 4, 512, 600]
        assert [pause(policy, n, 0) for n in (1, 2, 1000)] == [0.5, 1, 300]

    def test_is_never_shorter_than_the_server_asks_for_but_for_an_hour(self):
        assert pause(Policy(), 1, 0, asked=40) == 40
        assert pause(Policy(), 1, 0, asked=86400) == 3600

    def test_is_asked_for_in_seconds_or_by_a_date(self):
        assert retry_after("120", now=0) == 120
        assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=20) == 40
        assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=90) == 0
        assert retry_after("soon", now=0) is None
        assert retry_after("", now=0) is None


class TestAnImpostor:
    @pytest.mark.parametrize(
        "head",
        [b"<!DOCTYPE html>", b"\n  <html lang='en'>", b"\xef\xbb\xbf<?xml version", b"<HTML>"],
    )
    def test_is_a_page(self, head: bytes):
        assert impostor(head) == "a web page: a login portal?"

    def test_is_a_pointer(self):
        assert impostor(b"version https://git-lfs.github.com/spec/v1\noid") == "a Git LFS pointer"

    @pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x80\x02}", b"{}", b"", b"<unk> 0"])
    def test_is_nothing_else(self, head: bytes):
        assert impostor(head) is None


class TestContents:
    def test_that_differ_in_what_both_know_are_not_the_same(self):
        assert contradiction(FILE, Content(1000, "b" * 64)) == (
            "has another file: sha256 bbbbbbbbbbbb…, not aaaaaaaaaaaa…"
        )
        assert contradiction(FILE, Content(999)) == "has another file: 999 bytes, not 1000"
        assert contradiction(Content(5, blob="1" * 40), Content(5, blob="2" * 40)) is not None

    def test_that_may_be_the_same_are_no_contradiction(self):
        assert contradiction(FILE, FILE) is None
        assert contradiction(Content(None, "a" * 64), FILE) is None
        assert contradiction(Content(5, blob="1" * 40), Content(5, "a" * 64)) is None

    def test_complete_each_other_unless_they_contradict(self):
        assert completed(Content(None, "a" * 64), Content(1000)) == FILE
        assert completed(Content(1000), Content(1000, "a" * 64)) == FILE
        assert completed(Content(1000), Content(999, "a" * 64)) == Content(1000)


def of(**changes: Any) -> WeightSet:
    evidence = {"source": "this test", "seen": "2026-11-21", "state": "verified"}
    given = {"schema": 1, "title": "a set", "kind": "delta", "evidence": evidence, **changes}
    return WeightSet.model_validate({"sources": [{"huggingface": "a/b"}], **given})


def test_a_set_is_what_the_catalogue_lists_and_what_a_source_has_of_its_patterns():
    weights = of(include=["*.bin"], files=[ListedFile(path="x.bin", bytes=7), {"path": "gone.bin"}])
    remote = {
        path: Remote(path, "", Content(size, "a" * 64))
        for path, size in {"x.bin": 8, "y.bin": 9, "README.md": 1}.items()
    }
    assert wanted(weights, remote) == {
        "x.bin": Content(7),
        "gone.bin": Content(None),
        "y.bin": Content(9, "a" * 64),
    }


def test_sources_keep_their_order_but_those_of_the_other_hub_come_last():
    hub, scope = WeightSource(huggingface="a/b"), WeightSource(modelscope="a/b")
    plain, hand = WeightSource(url="https://example.org/x"), WeightSource(by_hand="https://e.org/")
    given = [hub, hand, scope, plain]
    assert ordered(given, "huggingface") == [hub, plain, scope]
    assert ordered(given, "modelscope") == [scope, plain, hub]


@pytest.mark.parametrize(
    "found",
    [
        "x.bin",
        "x (1).bin",
        "x(2).bin",
        "x.bin.crdownload",
        "x (1).bin.crdownload",
        "x.bin.part",
        "x.Ab3dE9fg.bin.part",
        "x.bin.download",
    ],
)
def test_a_browser_s_name_for_a_file_is_known(found: str):
    assert same_name("folder/x.bin", found)


@pytest.mark.parametrize("found", ["y.bin", "x.bin.gz", "xx.bin", "x.Ab3dE9fg.bin", "x-1.bin", "x"])
def test_another_file_s_name_is_not(found: str):
    assert not same_name("folder/x.bin", found)


def test_a_disk_must_have_room_for_what_is_missing_and_some_more():
    assert room(100, 100 + MARGIN) is None
    assert room(2**30, 2**30) == "needs 1.0 GiB, 1.0 GiB are free"
    assert room(0, 0) is None


def test_amounts_are_said_as_people_read_them():
    said = [amount(size) for size in (0, 1023, 1024, 1536 * 1024, 40 * 2**30, 3000 * 2**30)]
    assert said == ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 MiB", "40.0 GiB", "3000.0 GiB"]
