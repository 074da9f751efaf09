"""Runs Vision-CAIR's demo.py as it is, and has its page served the way the service wants it.

    python launch.py --checkout DIR --server-name ADDRESS --server-port PORT --max-waiting N \\
        --model-id NAME [--auth-file FILE] -- WHAT demo.py IS GIVEN

demo.py ends with `demo.launch(share=True, enable_queue=True)`. Here that call gets the address and
the port, no share link, and a queue that answers one question at a time; it tells systemd when the
page answers. Nothing of the checkout is changed. Imports nothing but gradio, of any version from
3.24 on, and runs on Python 3.8 and later.
"""

from __future__ import annotations

import argparse
import inspect
import ipaddress
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn


class Refused(ConnectionRefusedError):
    """The demo wanted something from the network: all that it needs is on this machine."""


def failed(message: str) -> NoReturn:
    """End with one line, which the journal shows last."""
    raise SystemExit(f"launch: {message}")


def stay_inside(own: str) -> None:
    """Let this process connect to this machine alone, and look up no other names.

    `own` is the address that the page is served at, which gradio asks for its page once.
    """

    def allowed(host: Any) -> bool:
        if host is None or host in ("", "localhost", own):
            return True
        try:
            return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
        except ValueError:
            return False

    def numeric(host: Any) -> bool:
        try:
            ipaddress.ip_address(str(host).partition("%")[0])
        except ValueError:
            return False
        return True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(args[1], tuple):
            host, refused = args[1][0], not allowed(args[1][0])
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = args[0].decode() if isinstance(args[0], bytes) else args[0]
            refused = not (allowed(host) or numeric(host))
        else:
            return
        if refused:
            raise Refused(f"launch: the demo may not reach {host}: it runs offline")

    sys.addaudithook(hook)


def tell_systemd(message: str) -> None:
    """Say `READY=1` or the like where systemd waits for it."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.sendall(message.encode())


def accounts(path: str) -> list[tuple[str, str]]:
    """The accounts of a file with lines USER:PASSWORD."""
    lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    pairs = [line.partition(":") for line in lines if line and not line.startswith("#")]
    if not pairs or not all(user and password for user, _, password in pairs):
        failed(f"{path}: no lines of the form USER:PASSWORD")
    return [(user, password) for user, _, password in pairs]


def known(call: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those values that this version of gradio has parameters for."""
    parameters = inspect.signature(call).parameters
    return {name: value for name, value in values.items() if name in parameters}


def answer_health(app: Any, model: str) -> None:
    """Give the page's application the /healthz that the deploy asks, before its other routes."""
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    body = {
        "status": "ok",
        "model": model,
        "revision": os.environ.get("MODELDEMO_REVISION", ""),
        "runtime": "upstream",
    }
    app.router.routes.insert(0, Route("/healthz", lambda _: JSONResponse(body)))


def serve_as_told(
    blocks: Any, arguments: argparse.Namespace, people: list[tuple[str, str]]
) -> None:
    """Make `launch` of gradio's Blocks do what the arguments say, whatever demo.py asks of it."""
    original = blocks.launch
    page: dict[str, Any] = {
        "server_name": arguments.server_name,
        "server_port": arguments.server_port,
        "share": False,
        "inbrowser": False,
        "prevent_thread_lock": True,
        "show_error": True,
        # Upstream's model answers one at a time; the page's own API goes past the queue.
        "max_threads": 1,
        # gradio serves files of the working directory.
        "blocked_paths": [os.getcwd()],
    }
    if people:
        page["auth"] = people
    queue = {
        "concurrency_count": 1,
        "default_concurrency_limit": 1,
        "max_size": arguments.max_waiting,
    }

    def launch(self: Any, *_: Any, **asked: Any) -> None:
        asked.pop("enable_queue", None)
        self.queue(**known(self.queue, queue))
        app, *_rest = original(self, **known(original, {**asked, **page}))
        answer_health(app, arguments.model_id)
        tell_systemd("READY=1")
        print(f"launch: {arguments.model_id} is served", flush=True)
        self.block_thread()

    blocks.launch = launch


def main(words: list[str]) -> None:
    """Run demo.py of the checkout with the words after `--`."""
    own, given = (words[: words.index("--")], words[words.index("--") + 1 :])
    parser = argparse.ArgumentParser(prog="launch")
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--server-name", required=True)
    parser.add_argument("--server-port", type=int, required=True)
    parser.add_argument("--max-waiting", type=int, required=True)
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--auth-file")
    arguments = parser.parse_args(own)
    demo = arguments.checkout / "demo.py"
    if not demo.is_file():
        failed(f"no {demo}: apply again")
    people = accounts(arguments.auth_file) if arguments.auth_file else []
    stay_inside(arguments.server_name)
    # As `python demo.py` has it: the checkout's own packages come first.
    sys.path[0] = str(arguments.checkout)
    sys.argv = [str(demo), *given]
    import gradio

    serve_as_told(gradio.Blocks, arguments, people)
    runpy.run_path(str(demo), run_name="__main__")
    failed(f"{demo} ended and has launched no page")


if __name__ == "__main__":
    main(sys.argv[1:])
