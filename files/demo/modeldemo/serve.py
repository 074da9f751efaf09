"""Starts the service: binds the port at once, loads the model behind it, tells systemd, stops."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from modeldemo import __version__, auth
from modeldemo.auth import Users
from modeldemo.engine import Engine, ModelDemoError
from modeldemo.limits import Limits

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

log = logging.getLogger("modeldemo")

GRACE = 4  # seconds that a running answer gets after SIGTERM
BACKLOG = 128  # connections that wait to be taken
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without NOTIFY_SOCKET there is nobody to tell."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            log.warning("cannot reach NOTIFY_SOCKET %s: %s", os.environ["NOTIFY_SOCKET"], error)


def bind(
    host: str, port: int, unread_seconds: float, *, share: bool = False, late: bool = False
) -> tuple[socket.socket, bool]:
    """Return a socket and whether it listens; raises ModelDemoError that says what to do.

    Where it is to `share` the port with other processes of its user and one of these listens, or
    where it shall be `late`, it does not yet. Linux itself ends its connections to clients that
    take nothing for `unread_seconds`.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ModelDemoError(f"--host {host}: {error.strerror}; give an address") from None
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = int(unread_seconds * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        if share:
            late = late or _taken(family, address)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        if not late:
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        advice = {
            errno.EADDRINUSE: f"something listens there already; stop it "
            f"(ss -ltnp 'sport = :{port}' names it) or choose another --port",
            errno.EACCES: "this user may not bind it; choose a --port above 1023",
            errno.EADDRNOTAVAIL: "this host has no such address; choose another --host",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
        raise ModelDemoError(f"cannot listen on {host} port {port}: {advice}") from None
    return sock, not late


def _taken(family: int, address: Any) -> bool:
    """Whether somebody has the port."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def serve(
    load: Callable[[], Engine],
    *,
    model_id: str,
    limits: Limits,
    revision: str = "",
    weights: str = "",
    host: str = "127.0.0.1",
    port: int = 7860,
    share_port: bool = False,
    late: bool = False,
    users: Users | None = None,
    examples: Sequence[Path] = (),
) -> int:
    """Serve what `load` returns until SIGTERM or SIGINT; SIGQUIT lets all answers end first.

    `load` runs in the model's thread and may take minutes; meanwhile /healthz answers 503.
    Returns the exit status: 0 after a stop, 1 when the model could not be loaded or its device
    was lost. Raises ModelDemoError when the port is not to be had.

    One that is `late`, or has `share_port` where another process listens, takes connections only
    once it can answer.
    """
    server: uvicorn.Server | None = None
    stopped_early = False

    def stop_early(number: int, frame: FrameType | None) -> None:
        # No exception: raised within an import, it may be swallowed there.
        nonlocal stopped_early
        stopped_early = True
        if server:
            server.should_exit = True

    # Until uvicorn handles them; it raises them again for this handler when it has stopped.
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(sig, stop_early)
    sock, listens = bind(host, port, limits.unread_seconds, share=share_port, late=late)
    address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    if listens:
        log.info("listening on %s, loading the model", address)
    else:
        log.info("loading the model, then listening on %s", address)
    notify("STATUS=loading the model")
    # The web framework takes most of a second to import: only once the port is ours.
    import uvicorn

    from modeldemo import api, drain, gate
    from modeldemo.metrics import Metrics
    from modeldemo.runner import Runner, failure
    from modeldemo.slot import Slot

    metrics = Metrics(model_id, revision, weights)
    runner = Runner(model_id, metrics, revision=revision, weights=weights, limits=limits)
    slot = Slot(model_id)

    def build_page() -> FastAPI:
        # After the model: its own imports are as long, and two threads would not be faster.
        from modeldemo import page

        return page.build(runner, examples)

    async def prepare() -> None:
        try:
            runner.engine = await runner.in_thread(load)
            await slot.fill(await runner.in_thread(build_page))
            await runner.prove()
        except Exception as error:
            if runner.state == "stopping":  # its thread takes nothing any more
                return
            runner.fail(failure(error, "the service cannot start"))
            notify(f"STATUS=failed: {runner.error}")
            running.should_exit = True
            return
        runner.open()
        if not listens:
            sock.listen(BACKLOG)
        log.info("%s answers after %.1f s", model_id, runner.uptime)
        notify(f"READY=1\nSTATUS={model_id} answers")

    class Server(uvicorn.Server):
        """Uvicorn that lets the model and the page know when it begins to stop."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            notify("STOPPING=1\nSTATUS=stopping")
            loop = asyncio.get_running_loop()
            # First: whom nobody lets in may ask somebody else.
            loop.call_soon_threadsafe(drain.stop_listening, self)
            loop.call_soon_threadsafe(runner.close)
            loop.call_soon_threadsafe(slot.stop)
            loop.call_soon_threadsafe(loop.call_later, GRACE, runner.abort)
            super().handle_exit(sig, frame)

        async def on_tick(self, counter: int) -> bool:
            """Uvicorn's question, ten times a second, whether to end: systemd starts us again."""
            return await super().on_tick(counter) or runner.state == "failed"

    server = running = Server(
        uvicorn.Config(
            api.create_app(runner, slot, users),
            http=partial(gate.Connection, patience=limits.header_seconds),  # type: ignore[arg-type]
            limit_concurrency=limits.connections,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=GRACE + 1,
        )
    )
    running.should_exit = stopped_early
    running.servers = []  # before its start too

    async def end() -> None:
        notify("STATUS=ending its last answers")
        await drain.drained(running)
        running.handle_exit(signal.SIGTERM, None)

    async def run() -> None:
        ending: list[asyncio.Task[None]] = []
        preparing = asyncio.create_task(prepare())
        while not (listens or preparing.done() or running.should_exit):
            await asyncio.sleep(0.05)
        if listens or not running.should_exit:
            asyncio.get_running_loop().add_signal_handler(
                signal.SIGQUIT, lambda: ending.append(asyncio.create_task(end()))
            )
            await running.serve(sockets=[sock])
        preparing.cancel()
        await slot.close()

    asyncio.run(run())
    return 1 if runner.state == "failed" else 0


def run(
    load: Callable[[], Engine],
    *,
    debug: bool = False,
    auth_file: Path | None = None,
    **settings: Any,
) -> NoReturn:
    """Run `serve` as a whole process: logs to stderr, temporary files, exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        if auth_file:
            settings["users"] = auth.read(auth_file)
        with tempfile.TemporaryDirectory(prefix="modeldemo-") as uploads:
            os.environ["GRADIO_TEMP_DIR"] = uploads
            status = serve(load, **settings)
    except ModelDemoError as error:
        log.error("%s", error)
        status = 1
    logging.shutdown()
    # The model's thread may be deep in a matrix product, and Python would wait for it.
    os._exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m modeldemo", description="Serve a picture-chat model to people and programs."
    )
    parser.add_argument("--version", action="version", version=__version__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve", help="load a model and answer over HTTP"
    )
    option = command.add_argument
    option("--cfg-path", type=Path, required=True, metavar="FILE", help="the model's YAML")
    under = "YAML that it lies over: minigpt4.yaml under minigpt4_eval.yaml"
    option("--model-config", type=Path, metavar="FILE", help=under)
    option("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override the files")
    option("--model-id", default="pico", help="name in the API (default: %(default)s)")
    option("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    option("--port", type=_port, default=7860, help="default: %(default)s; 0 takes a free one")
    share = "let other processes of this user listen there too; beside one, do so once ready"
    option("--share-port", action="store_true", help=share)
    option("--late", action="store_true", help="listen only once the model answers")
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    option("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    waiting = "questions that may wait before the service says busy (default: %(default)s)"
    option("--max-waiting", type=_positive, default=8, metavar="N", help=waiting)
    longest = "seconds for an answer, waiting included (default: %(default)s)"
    option("--max-seconds", type=_positive, default=300, metavar="N", help=longest)
    users = "ask for the passwords of this file's USER:PASSWORD lines"
    option("--auth-file", type=Path, metavar="FILE", help=users)
    option("--weights", default="", metavar="VERSION", help="which weights, to show to people")
    option("--examples", type=_pictures, default=[], metavar="FOLDER", help="to offer on the page")
    option("--debug", action="store_true", help="log the stack of every error")
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to 65535")
    return int(text)


def _pictures(text: str) -> list[Path]:
    folder = Path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return sorted(p.resolve() for p in folder.iterdir() if p.suffix.lower() in PICTURES)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def _load(args: argparse.Namespace) -> Engine:
    from modeldemo import config

    settings = config.load(args.model_config, args.cfg_path, args.options)
    import torch

    from modeldemo import systems

    if args.threads:
        torch.set_num_threads(args.threads)
    return systems.load(settings, args.device, args.model_id)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 stopped, 1 failed, 2 usage."""
    args = _parser().parse_args(argv)
    # Hosts have no internet: a hub library that asks for it would hang before it fails.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(
        lambda: _load(args),
        debug=args.debug,
        model_id=args.model_id,
        revision=os.environ.get("MODELDEMO_REVISION", ""),
        host=args.host,
        port=args.port,
        share_port=args.share_port,
        late=args.late,
        weights=args.weights,
        limits=Limits(waiting=args.max_waiting, seconds=args.max_seconds),
        auth_file=args.auth_file,
        examples=args.examples,
    )
