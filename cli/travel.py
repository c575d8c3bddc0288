"""`actstore card`, `actstore export` and `actstore import`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .output import print_json, print_table, progress, say, size

__all__ = ["add_travel_commands"]

StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A sealed store, a path or URL.")]
Layers = Annotated[str | None, typer.Option(help='Layers, as "0,3-5"; default all.')]
Buffer = Annotated[str, typer.Option(help="Memory for the blocks of a store being written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_travel_commands(app: typer.Typer) -> None:
    app.command(epilog="Example: actstore card book.zarr")(card)
    app.command(
        epilog="Example: actstore export book.zarr part.parquet --layers -1 --tokens 'position > 0'"
    )(export)
    app.command(
        "import",
        epilog="Example: actstore import acts.safetensors run.zarr "
        "--stages 'mlp_post=blocks.{layer}.mlp.hook_post'",
    )(import_)


def card(
    store: StorePath,
    out: Annotated[
        str | None,
        typer.Option(help="Another file than README.md in the store; - prints it."),
    ] = None,
) -> None:
    """Write a store's README: what it holds, and how to load it without actstore.

    Its front matter is that of a Hugging Face dataset. What is there to fill in is marked.
    """
    import actstore
    from actstore.travel.card import write_card

    if out == "-":
        sys.stdout.write(actstore.card(store))
        return
    say(f"written to {write_card(store, out)}: fill in the licence, and what is marked")


def export(
    store: StorePath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file or store to write.")],
    format: Annotated[
        str | None,
        typer.Option(help="safetensors, parquet, netcdf or zarr; default by OUT's ending."),
    ] = None,
    stages: Annotated[str | None, typer.Option(help="Stages; default all.")] = None,
    layers: Layers = None,
    tokens: Annotated[
        str | None, typer.Option(help='Tokens, as "position > 0"; default all.')
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default each stage's own.")
    ] = None,
    keep_bits: Annotated[
        int | None,
        typer.Option(help="Round values to so many bits of mantissa, 1 to 23: they compress."),
    ] = None,
    buffer: Buffer = "1GiB",
    as_json: Json = False,
) -> None:
    """Write a part of a store to safetensors, Parquet or NetCDF, or to a smaller store.

    With --dtype or --keep-bits, what rounding did to each stage is printed.
    """
    import actstore

    with progress("export", 1, "bytes") as bar:
        made = actstore.export(
            store,
            out,
            format=format,
            stages=stages,
            layers=layers,
            tokens=tokens,
            dtype=dtype,
            keep_bits=keep_bits,
            buffer=buffer,
            progress=lambda done, total: bar(done, size(done), total),
        )
    if as_json:
        print_json(made.as_dict())
        return
    rows = (
        []
        if dtype is None and keep_bits is None
        else [
            [
                name,
                ",".join(map(str, s.layers)),
                s.width,
                s.dtype,
                s.max_error,
                s.max_relative_error,
                s.rms_error,
            ]
            for name, s in made.stages.items()
        ]
    )
    header = ["stage", "layers", "neurons", "type", "max error", "max relative error", "RMS error"]
    if rows:
        print_table(header, rows)
    say(f"{made.tokens:,} tokens written to {made.path} ({size(made.nbytes)})")


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file or folder of .safetensors, .parquet, .nc, .npy, .npz or .pt; or a "
            "Hugging Face dataset.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The store to write.")],
    stages: Annotated[
        list[str] | None,
        typer.Option(
            help="STAGE=NAME of an array, with {layer} in it for the layer; or STAGE of the only "
            "one. Default: names as mlp_post.3 and TransformerLens's. May be repeated."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers where names do not say them, else which are taken.")
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(help="Dimensions in order, of layer sequence position token head neuron."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default the source's.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Of a dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Of a dataset; default train.")] = None,
    sketch_by: Annotated[
        str | None, typer.Option(help="A label whose values sketches keep apart.")
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Store NaN and inf instead of refusing them.")
    ] = False,
    buffer: Buffer = "1GiB",
    as_json: Json = False,
) -> None:
    """Make a store of activations that other tools wrote.

    Arrays with a value for each token become labels. Run again to go on after a stop.
    """
    import actstore

    with progress("import", 1, "tokens") as bar:
        store = actstore.import_from(
            source,
            out,
            stages=[entry for each in stages or [] for entry in each.split(",")] or None,
            layers=layers,
            axes=axes,
            dtype=dtype,
            config=config,
            split=split,
            sketch_by=sketch_by,
            allow_nonfinite=allow_nonfinite,
            buffer=buffer,
            progress=lambda done, total: bar(done, "", total),
        )
    facts = store.info()
    if as_json:
        print_json(facts)
        return
    for name, why in facts["notes"].get("left_out", {}).items():
        say(f"left out: {name}: {why}")
    held = ", ".join(f"{n} at layers {s['layers']}" for n, s in facts["stages"].items())
    say(f"{facts['tokens']:,} tokens written to {out}: {held}")
