"""`actstore demo`: the main job on the embedded default, from nothing to answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import print_table, progress, say, size

__all__ = ["add_demo_command"]

STAGES = ("hidden", "mlp_in", "mlp_pre", "mlp_post", "mlp_out")


def add_demo_command(app: typer.Typer) -> None:
    app.command(epilog="Example: actstore demo /tmp/actstore-demo")(demo)


def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the store, the picture and the report go.")
    ] = Path("actstore-demo"),
    tokens: Annotated[int, typer.Option(help="Tokens to keep.")] = 8192,
) -> None:
    """Dump the shipped model over the shipped text, ask it questions, draw, write a report."""
    import actstore
    from actstore.demo.corpus import demo_records
    from actstore.fill import Progress
    from actstore.report import report as write_report

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.zarr"
    model, tokenizer = actstore.load_model("demo", head=True)
    say(f"1. dump: the demo model reads {tokens:,} tokens of Python's own documentation")
    with progress("dump", tokens, "tokens") as bar:

        def report(now: Progress) -> None:
            bar(now.tokens, size(now.nbytes))

        store = actstore.dump(
            model,
            tokenizer,
            demo_records(),
            path,
            stages=STAGES,
            max_tokens=tokens,
            predictions=5,
            outcomes=True,
            name="demo",
            progress=report,
        )
    assert store is not None  # a single process always seals
    say(repr(store))
    say("\n2. ask: moments per layer, the first position of each sequence left out")
    moments = actstore.moments(store, per="layer", tokens="position > 0")
    layers = store.attrs["capture"]["stages"]["mlp_post"]["layers"]
    middle = layers[len(layers) // 2]
    densities = actstore.histogram(
        store,
        stages=STAGES[1:],
        layers=[middle],
        bins=200,
        range=(-4, 4),
        density=True,
        tokens="position > 0",
    )
    inside = "position > 0"
    dimensions = actstore.dimensionality(store, stages=STAGES[1:], tokens=inside)
    similar = actstore.rsa(store, stages=STAGES[1:], tokens=inside)
    moments, densities, dimensions, similar = actstore.compute(
        moments, densities, dimensions, similar
    )
    print_table(
        ["stage", "layer", "mean", "std", "skewness", "kurtosis", "positive"],
        [
            [stage, int(layer), *(float(cell[v]) for v in _SHOWN)]
            for stage in STAGES
            for layer in moments["layer"].values
            if (cell := moments.sel(stage=stage, layer=layer))["count"] > 0
        ],
    )
    say("\nlaminar profile: participation ratios, and similarity (RSA) of the stages' geometries")
    pairs = [str(p) for p in similar["pair"].values]
    print_table(
        ["layer", *(f"PR {_short(s)}" for s in STAGES[1:]), *(f"RSA {_short(p)}" for p in pairs)],
        [
            [
                int(layer),
                *(float(v) for v in dimensions["participation_ratio"].sel(layer=layer)),
                *(float(v) for v in similar["rsa"].sel(layer=layer)),
            ]
            for layer in layers
        ],
    )
    largest = store["mlp_post"].sel(layer=middle).argmax(...)
    token = int(largest["token"].compute())
    neuron = int(largest["neuron"].compute())
    say(f"\nmlp_post, layer {middle}: neuron {neuron} is largest at the end of")
    say(f"  ...{store.decode(token, before=12)!r}")
    picture = folder / "demo.png"
    _draw(moments, densities, dimensions, similar, picture)
    page = write_report(
        store, folder / "report.html", tokens="position > 0", title="The demo model"
    )
    say(f"\n3. look: {picture}, and every figure in {page}")
    say(f"\nNext: actstore serve {path} --open\n      actstore info {path}")
    say(f"      actstore query histogram {path} --bins=-4:4:81")


def _short(name: str) -> str:
    return name.replace("mlp_", "")


_SHOWN = ("mean", "std", "skewness", "kurtosis", "positive_fraction")


def _draw(moments, densities, dimensions, similar, picture: Path) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from actstore import plot

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    plot.histogram(densities, axes[0, 0])
    plot.profile(moments, "std", axes[0, 1])
    plot.dimension_profile(dimensions, "participation_ratio", axes[1, 0])
    plot.pair_profile(similar, axes[1, 1])
    beside = axes[1, 0].get_legend()  # the lines of normal data lie where it would
    beside.set_loc("upper left")
    beside.set_bbox_to_anchor((1, 1))
    figure.suptitle("The demo model over Python's documentation")
    figure.savefig(picture, dpi=150)
