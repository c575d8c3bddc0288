"""`actstore plot NAME STORE --out FILE`: one command for each query that has a picture."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from actstore.errors import UsageError

from .options import option, query_command
from .output import check_out, say

__all__ = ["add_plot_commands"]


_EXAMPLES = {
    "histogram": "--stages mlp_post --bins=-2:4:121",
    "quantiles": "--stages hidden,mlp_post",
    "moments": '--tokens "position > 0"',
    "zeroness": "--stages mlp_pre,mlp_post",
    "peaks": "--stages hidden --height 0.02",
    "normality": "--stages mlp_pre",
    "mean_activation": "--stages hidden --layers 3 --by condition",
    "sample": "--stages hidden --layers 0-3 --unit value",
    "top_tokens": "--stages mlp_post --layers 3",
    "dimensionality": '--tokens "position > 0"',
    "spectrum": "--stages mlp_in,mlp_out",
    "intrinsic_dimension": "--stages hidden,mlp_out --n 1000",
    "cosine_matrix": '--stages mlp_in,mlp_out --layers 3 --tokens "sequence == 0"',
    "rsa": '--stages mlp_in,mlp_pre,mlp_post,mlp_out --tokens "position > 0"',
    "cka": '--stages hidden --pairs layers --debiased --tokens "position > 0"',
    "cosine_pairs": "--stages hidden --layers 3 --quantiles 0.01,0.5,0.99",
    "gaussian_baseline": "--stages hidden --dimensions 10,100",
    "mutual_information": "--stages hidden --by condition --reduce histogram",
    "pairwise_covariance": "--stages hidden --layers 3 --by condition",
    "layer_covariance": '--stages hidden --tokens "position > 0"',
    "label_information": "--stages hidden --layers 3 --label condition --null 100",
}


def add_plot_commands(app: typer.Typer) -> None:
    from actstore.plot import PLOTS
    from actstore.queries.registry import QUERIES

    group = typer.Typer(
        no_args_is_help=True, help="Draw the answer to a question into a picture file."
    )
    own = [
        option("out", Path, inspect.Parameter.empty, "File to write: .png, .svg or .pdf."),
        option("title", str | None, None, "Heading; default what was asked of which store."),
        option("size", str | None, None, "In inches, as 8x5; default what the panels need."),
        option("dpi", float, 150, "Dots per inch."),
    ]
    log = option(
        "log", bool | None, None, "Logarithmic scale; default by picture.", "--log/--linear"
    )
    for name, draw in PLOTS.items():
        query = QUERIES[name]
        takes_log = "log" in inspect.signature(draw).parameters
        group.command(
            name=name,
            help=f"Draw: {query.summary[0].lower()}{query.summary[1:]}",
            epilog=f"Example: actstore plot {name} book.zarr {_EXAMPLES[name]} --out {name}.png",
        )(query_command(query, [*own, log] if takes_log else own, _draw))
    app.add_typer(
        group, name="plot", epilog="Example: actstore plot moments book.zarr --out moments.png"
    )


def _draw(query: Any, ask: Callable[[], Any], out: Path, size: str | None, **options: Any) -> None:
    from actstore.plot import ENDINGS, save

    check_out(out, ENDINGS)
    inches = _inches(size) if size is not None else None
    save(ask(), out, size=inches, **options)
    say(f"drawn to {out}")


def _inches(size: str) -> tuple[float, float]:
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)x(\d{1,3}(?:\.\d+)?)", size)
    if match is None or not all(float(n) >= 1 for n in match.groups()):
        raise UsageError(f"--size {size!r}: write width and height in inches, as 8x5")
    return float(match[1]), float(match[2])
