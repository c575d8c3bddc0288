"""`actstore bench`: speeds beside a reference in the same run; the groups are in `speed`."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .bench_all import everything
from .bench_query import query
from .bench_scaling import scaling
from .bench_serve import serve
from .bench_similarity import rsa
from .output import print_json, print_table, say
from .speed.passes import bare_pass, gpt2, timed_dump

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["add_bench_commands"]

SHAPES = {
    "full": "sequences of the whole context, 1,024 tokens",
    "ragged": "lognormal lengths, median 400",
    "texts": "texts of 1,000 tokens",
}


def add_bench_commands(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Measure speeds on this machine.")
    group.command("all", epilog="Example: actstore bench all --only writer,reading")(everything)
    group.command(epilog="Example: actstore bench capture --pairs 10")(capture)
    group.command(epilog="Example: actstore bench query --gigabytes 2")(query)
    group.command(epilog="Example: actstore bench rsa --tokens 50000,100000")(rsa)
    group.command(epilog="Example: actstore bench scaling --tokens 10e9 --ranks 64")(scaling)
    group.command(epilog="Example: actstore bench serve --gigabytes 1")(serve)
    app.add_typer(group, name="bench", epilog="Example: actstore bench capture")


def capture(
    tokens: Annotated[int, typer.Option(help="Tokens of one run.")] = 8192,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of runs for each shape.")] = 10,
    shape: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(SHAPES)}; default all. Repeatable.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Element type.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    layers: Annotated[int, typer.Option(help="Layers of the GPT-2 (small has 12).")] = 12,
    width: Annotated[int, typer.Option(help="Width of the GPT-2 (small has 768).")] = 768,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; default the temporary folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Dump against the bare forward pass: GPT-2 small's size, four MLP stages, all layers.

    All run the same batches, without a language-model head. A dump is timed from opening the
    writer to the sealed store, so the drain is in it. In each round the bare pass, the dump and
    the dump without sketches follow one another; ratios are of their speeds within a round.
    """
    from actstore.errors import UnknownNameError

    model, where = gpt2(dtype, device, layers, width)
    rows = []
    for name in shape or SHAPES:
        if name not in SHAPES:
            raise UnknownNameError("shape", name, SHAPES)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for row in _compare(model, _lengths(name, tokens), Path(scratch), pairs):
                rows.append({"shape": name, **row})
    if as_json:
        print_json({"device": where, "dtype": dtype, "rows": rows})
        return
    say(f"{where}, {dtype}, {layers} layers x {width}, mlp_in mlp_pre mlp_post mlp_out")
    print_table(list(rows[0]), [list(r.values()) for r in rows])


def _lengths(shape: str, tokens: int) -> list[int]:
    import numpy as np

    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = {"full": 1024, "texts": 1000, "ragged": rng.lognormal(np.log(400), 0.8)}[shape]
        lengths.append(int(np.clip(drawn, 8, 1024)))
    return lengths


def _compare(
    model: Any, lengths: list[int], scratch: Path, pairs: int
) -> Iterator[dict[str, float | int | str]]:
    import numpy as np

    from actstore.corpus import build
    from actstore.fill import plan_model

    rng = np.random.default_rng(0)
    corpus = build([rng.integers(0, 50_000, n).tolist() for n in lengths], None)
    plans = {
        "sketches": plan_model(model, None, corpus),
        "no sketches": plan_model(model, None, corpus, sketch=False),
    }
    bare: list[float] = []
    dumps: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(pairs + 1):  # the first warms up
        bare.append(bare_pass(model, plans["sketches"][0]))
        for name, (made, points) in plans.items():
            dumps[name].append(timed_dump(model, made, points, scratch))
    for name, (made, _) in plans.items():
        seconds = statistics.median(dumps[name][1:])
        ratios = [b / d for b, d in zip(bare[1:], dumps[name][1:], strict=True)]
        yield {
            "dump": name,
            "tokens": made.n_tokens,
            "computed_per_kept": made.computed_tokens / made.n_tokens,
            "bare_tokens_per_s": made.n_tokens / statistics.median(bare[1:]),
            "dump_tokens_per_s": made.n_tokens / seconds,
            "dump_gb_per_s": made.nbytes / seconds / 1e9,
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "pairs": pairs,
        }
