"""Passwords protect page, API and metrics, and are shown nowhere."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from colors import Service, picture, user
from modeldemo.auth import Users, read
from modeldemo.engine import ModelDemoError

PASSWORD = "correct horse: battery"


def basic(user_name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user_name}:{password}".encode()).decode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("secret") / "auth"
    file.write_text(f"# who may\n\nada:{PASSWORD}\nбоб:пароль-пароль\n", "utf-8")
    file.chmod(0o600)
    service = Service("--auth-file", str(file))
    yield service
    assert "Traceback" not in service.stderr
    assert PASSWORD not in service.stderr
    service.stop()


def ask(service: Service, authorization: str | None) -> httpx.Response:
    body = {"model": "colors", "messages": [user("Which?", picture())]}
    headers = {"Authorization": authorization} if authorization else {}
    with service.client(headers=headers) as client:
        return client.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    "authorization",
    [
        basic("ada", PASSWORD),
        basic("ada", PASSWORD).replace("Basic", "basic"),
        basic("боб", "пароль-пароль"),
        f"Bearer {PASSWORD}",
        f"bearer  {PASSWORD}",
    ],
)
def test_a_user_or_a_password_as_api_key_is_let_in(service: Service, authorization: str) -> None:
    assert ask(service, authorization).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"\xff\xfe").decode(),
        basic("ada", PASSWORD + "x"),
        basic("ada", ""),
        basic("eve", PASSWORD),
        basic("", PASSWORD),
        "Bearer",
        "Bearer ada",
        f"Token {PASSWORD}",
        PASSWORD,
    ],
)
def test_nobody_else_is(service: Service, authorization: str | None) -> None:
    response = ask(service, authorization)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Basic realm=")
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_all_but_health_asks_for_a_password(service: Service) -> None:
    paths = ["/", "/zh/", "/config", "/metrics", "/v1/models", "/gradio_api/info", "/theme.css"]
    with service.client() as client:
        assert client.get("/healthz").status_code == 200
        assert {path: client.get(path).status_code for path in paths} == dict.fromkeys(paths, 401)
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
    with service.client(headers={"Authorization": basic("ada", PASSWORD)}) as client:
        allowed = {path: client.get(path).status_code for path in paths}
        assert allowed == dict.fromkeys(paths, 200)


def test_the_password_is_not_in_the_process_list(service: Service) -> None:
    command = Path(f"/proc/{service.process.pid}/cmdline").read_bytes()
    assert b"--auth-file" in command
    assert PASSWORD.encode() not in command


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (b"ada:long enough", 0o644, "every user of this host may read it; chmod 600"),
        (b"ada", 0o600, "line 1: write USER:PASSWORD"),
        (b":long enough", 0o600, "line 1: write USER:PASSWORD"),
        (b"# none\n\nada:short", 0o600, "line 3: the password has under 8 characters"),
        (b"ada:long enough\nada:long enough too", 0o600, "line 2: this user was named before"),
        (b"# none\n", 0o600, "no user in it"),
        (b"", 0o600, "no user in it"),
        (b"ada:\xff\xff\xff\xff\xff\xff\xff\xff", 0o600, "no UTF-8 text"),
    ],
)
def test_a_wrong_file_is_refused_by_line_and_never_shown(
    tmp_path: Path, content: bytes, mode: int, reason: str
) -> None:
    file = tmp_path / "auth"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(ModelDemoError) as refused:
        read(file)
    message = str(refused.value)
    assert reason in message
    assert str(file) in message
    assert "long enough" not in message
    assert "short" not in message


def test_a_missing_file_keeps_the_service_from_starting(tmp_path: Path) -> None:
    service = Service("--auth-file", str(tmp_path / "none"), wait=False)
    assert service.exit_status() == 1
    assert service.stderr.splitlines() == [
        f"modeldemo: {tmp_path}/none: No such file or directory; give a file to --auth-file"
    ]


def test_passwords_are_kept_as_hashes_alone() -> None:
    users = Users({"ada": PASSWORD})
    assert users.allows(f"Bearer {PASSWORD}")
    assert PASSWORD not in str(vars(users))
