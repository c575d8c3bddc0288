"""`actstore serve PATH...`: the service and its page."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from actstore.errors import UsageError

from .output import say

__all__ = ["add_serve_command"]


def add_serve_command(app: typer.Typer) -> None:
    app.command(epilog="Example: actstore serve book.zarr --open")(serve)


def serve(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Stores, and folders of stores.")
    ],
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that it may be called by. Repeatable.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    token: Annotated[
        str | None, typer.Option(help="What every request must show, for use through a tunnel.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where answers are kept; default ~/.cache/actstore.")
    ] = None,
    cache_size: Annotated[str, typer.Option(help="How much of them is kept.")] = "1GiB",
    jobs: Annotated[int, typer.Option(help="Long questions answered at once.", min=1)] = 2,
    time_limit: Annotated[float, typer.Option(help="Seconds that one may take.", min=1)] = 3600,
    get: Annotated[
        str | None,
        typer.Option(metavar="/api/...", help="Print the answer at an address, without a server."),
    ] = None,
) -> None:
    """Serve stores over HTTP, with a page to look at them."""
    from dask.utils import parse_bytes

    from actstore.server.app import create_app
    from actstore.server.cache import Cache
    from actstore.server.shelf import Shelf

    try:
        limit = int(parse_bytes(cache_size))
    except (ValueError, OverflowError):
        raise UsageError(f"--cache-size {cache_size!r}: write a size such as 1GiB") from None
    if token is not None and not token.strip():
        raise UsageError("--token is empty: give a secret, or leave it out")
    shelf, answers = Shelf(paths), cache_dir or _cache_dir()
    try:
        cache = Cache(answers, limit)
    except OSError as error:
        raise UsageError(
            f"{answers} cannot hold answers ({error.strerror}): name a folder with --cache-dir"
        ) from None
    app = create_app(
        shelf,
        cache,
        token=token,
        hosts=[host, *(allow_host or [])],
        jobs=jobs,
        seconds=time_limit,
        warm=get is None,
    )
    if get is not None:
        _print_answer(app, get, token)
        return
    with _listening(host, port) as listener:
        named = f"[{host}]" if ":" in host else host
        address = f"http://{named}:{listener.getsockname()[1]}/"
        shown = f"{address}?token={token}" if token else address
        stores = shelf.scan()
        say(f"{len(stores)} store{'s' * (len(stores) != 1)}: {', '.join(stores)}")
        say(f"{shown}  (Ctrl-C stops)")
        if open_page:
            webbrowser.open(shown)
        _run(app, listener)


def _cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "actstore" / "answers"


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio turns off the delay that small answers would have.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # who comes before all is ready waits
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen at {host}:{port} ({error.strerror}): --port 0 takes a free port"
        ) from None
    return listener


def _run(app: Any, listener: socket.socket) -> None:
    import uvicorn

    from actstore.server.protocol import Protocol

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    with suppress(KeyboardInterrupt):  # how it is stopped
        uvicorn.Server(config).run([listener])


def _print_answer(app: Any, address: str, token: str | None) -> None:
    from actstore.server.direct import get

    status, body = asyncio.run(get(app, address, token))
    sys.stdout.buffer.write(body)
    if not body.endswith(b"\n") and sys.stdout.isatty():
        sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    if status >= 400:
        raise typer.Exit(2 if status < 500 else 1)
