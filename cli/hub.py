"""`actstore push` and `actstore pull`: stores on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, progress, say

__all__ = ["add_hub_commands"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_hub_commands(app: typer.Typer) -> None:
    app.command(epilog="Example: actstore push book.zarr me/book-activations")(push)
    app.command(epilog="Example: actstore pull me/book-activations book.zarr")(pull)


def push(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A sealed store in a folder.")],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="A dataset on the Hub.")],
    public: Annotated[
        bool,
        typer.Option("--public", help="If it is made: for everyone to see, the texts included."),
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commits.")] = None,
    as_json: Json = False,
) -> None:
    """Put a store on the Hugging Face Hub, as a dataset; the same command again goes on.

    `hf auth login` or HF_TOKEN says who you are.
    """
    import actstore

    address = actstore.push(store, name, private=not public, message=message)
    if as_json:
        print_json({"address": address})
    else:
        say(f"{store} is at {address}. Next: actstore pull {name}")


def pull(
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="A dataset on the Hub.")],
    folder: Annotated[
        Path | None, typer.Argument(help="Where it goes; default NAME.zarr here.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: Json = False,
) -> None:
    """Get a store from the Hugging Face Hub, and check every byte; the same command goes on."""
    import actstore

    checked = 0

    def report(_: str) -> None:
        nonlocal checked
        checked += 1
        bar(checked, "", checked)

    with progress("check", 1, "objects") as bar:
        store = actstore.pull(name, folder, revision=revision, progress=report)
    if as_json:
        print_json({"store": store.path, "objects": checked})
    else:
        say(f"{store.path}: {checked:,} objects, all right. Next: actstore info {store.path}")
