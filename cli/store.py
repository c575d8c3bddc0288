"""`actstore info` and `actstore verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import print_json, print_table, progress, say, size

__all__ = ["add_store_commands"]

StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A sealed store, a path or URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_store_commands(app: typer.Typer) -> None:
    app.command(epilog="Example: actstore info book.zarr")(info)
    app.command(epilog="Example: actstore verify book.zarr")(verify)
    app.command(epilog="Example: actstore sketch book.zarr --by condition")(sketch)


def info(store: StorePath, as_json: Json = False) -> None:
    """Say what a store holds."""
    import actstore

    facts = actstore.open(store).info()
    if as_json:
        print_json(facts)
        return
    rows = [
        [name, _runs(s["layers"]), s["width"], s["dtype"], size(s["nbytes"]), s["meaning"]]
        for name, s in facts["stages"].items()
    ]
    print_table(["stage", "layers", "neurons", "type", "bytes", "meaning"], rows)
    model = facts.get("model")
    say(
        f"{facts['tokens']:,} tokens kept of {facts['inputs']:,}, {facts['sequences']:,} sequences"
        + (f", from {model['name']} ({model.get('class', 'of unknown class')})" if model else "")
    )
    say(f"labels: {', '.join(facts['labels']) or 'none'}")
    if facts["predictions"]:
        say(f"predictions: the {facts['predictions']} likeliest next tokens of every token")
    if facts["outcomes"]:
        say(f"outcomes: {', '.join(facts['outcomes'])}")
    say(f"id {facts['id']}, format {facts['format']}")


def verify(store: StorePath, as_json: Json = False) -> None:
    """Read every object of a store against its digest."""
    import actstore
    from actstore.verifying import object_count

    problems = []
    checked = 0
    with progress("verify", object_count(store), "objects") as bar:
        for _, problem in actstore.verify(store):
            checked += 1
            bar(checked, "")
            if problem is not None:
                problems.append(problem)
    if as_json:
        print_json({"objects": checked, "problems": [vars(p) for p in problems]})
    for problem in problems:
        say(f"{problem}")
    if problems:
        say(
            f"{len(problems)} of {checked:,} objects are wrong: run the dump that made the store "
            "again, with the same arguments, and only the damaged blocks are redone"
        )
        raise typer.Exit(1)
    if not as_json:
        say(f"{checked:,} objects, all as they were written")


def sketch(
    store: StorePath,
    by: Annotated[str | None, typer.Option(help="A label whose values are kept apart.")] = None,
    covariance: Annotated[
        bool, typer.Option("--covariance", help="Keep second moments of all neurons, too.")
    ] = False,
) -> None:
    """Make a store's sketches, the statistics that answer most questions at once.

    A dump makes them while it writes; this is for stores without, or for another label.
    """
    from actstore.resketch import add_sketches

    with progress("sketch", 1, "shards") as bar:
        made = add_sketches(
            store, by=by, covariance=covariance, progress=lambda n, of: bar(n, "", of)
        )
    names = made.strata[0] if made.strata else ()
    say(f"{store}: sketches of {', '.join(made.stages)}, apart for {', '.join(names)}")


def _runs(layers: list[int]) -> str:
    """Layers as people write them: 0-11, or 0,3-5."""
    runs: list[list[int]] = []
    for n in layers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ",".join("-".join(map(str, run)) for run in runs)
