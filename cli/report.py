"""`actstore report`: every figure of a store in one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import check_out, say, size

__all__ = ["add_report_command"]


def add_report_command(app: typer.Typer) -> None:
    app.command(epilog="Example: actstore report book.zarr --out book.html")(report)


def report(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A sealed store, a path or URL.")],
    out: Annotated[Path, typer.Option(help="The file; replaced if it exists.")] = Path(
        "report.html"
    ),
    stages: Annotated[str | None, typer.Option(help="Stages; default all.")] = None,
    layers: Annotated[str | None, typer.Option(help='Layers, as "0,3-5"; default all.')] = None,
    tokens: Annotated[
        str | None, typer.Option(help='Tokens, as "position > 0"; default all.')
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Stage to look at closely.")] = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer to look at closely; default the middle one.")
    ] = None,
    neuron: Annotated[
        int | None,
        typer.Option(help="Neuron to look at closely; default the one that varies most."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Default the store's name.")] = None,
) -> None:
    """Write one HTML file with every figure of a store, live and offline."""
    from actstore.report import report as write

    check_out(out, (".html", ".htm"))
    write(
        store,
        out,
        stages=stages,
        layers=layers,
        tokens=tokens,
        stage=stage,
        layer=layer,
        neuron=neuron,
        title=title,
    )
    say(f"written to {out} ({size(out.stat().st_size)})")
