"""`actstore bench scaling`: what a very large dump comes to, from its plan; nothing is written."""

from __future__ import annotations

import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import print_json, print_table, say

if TYPE_CHECKING:
    from actstore.plan import Plan, StageSpec

__all__ = ["scaling"]

LAYERS, WIDTH, MLP = 80, 8192, 28_672
"""Of a Llama of 70 billion parameters."""

STRATA = 3


def scaling(
    tokens: Annotated[float, typer.Option(help="Tokens in all.")] = 10e9,
    ranks: Annotated[int, typer.Option(help="Processes; each dumps stores of its own.")] = 64,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    buffer: Annotated[str, typer.Option(help="Host memory for blocks, of each rank.")] = "16GiB",
    tokens_per_second: Annotated[float, typer.Option(help="That a rank's model computes.")] = 2000,
    gigabytes_per_second: Annotated[float, typer.Option(help="That a rank can send.")] = 2.5,
    put_price: Annotated[float, typer.Option(help="Of 1,000 PUT or LIST requests.")] = 0.005,
    get_price: Annotated[float, typer.Option(help="Of 1,000 GET or HEAD requests.")] = 0.0004,
    month_price: Annotated[float, typer.Option(help="Of a gigabyte for a month.")] = 0.023,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A 70B model's activations in an object store: bytes, objects, requests, limits.

    The whole run is planned, and one rank's share of it; every key and request of that is counted
    (`tests/test_scaling.py` holds the counting against real dumps). Rates and prices are what is
    given, not what anybody charges.
    """
    rates = (tokens_per_second, gigabytes_per_second, put_price, get_price, month_price)
    columns = {
        name: _column(specs, tokens, ranks, sequence, buffer, *rates)
        for name, specs in _choices().items()
    }
    tables = _token_tables()
    tasks = _tasks_a_layer()
    for name, column in columns.items():
        layers = max(len(s.layers) for s in _choices()[name])
        column["memory of token tables, GB a rank"] = tables * tokens / ranks / 1e9
        column["dask tasks of moments by scan"] = tasks * layers
    if as_json:
        print_json({"columns": columns})
        return
    names = list(next(iter(columns.values())))
    print_table(["what", *columns], [[n, *(_shown(c[n]) for c in columns.values())] for n in names])
    say("rates and prices are the options'; everything else is counted from the plan")


def _choices() -> dict[str, list[StageSpec]]:
    from actstore.plan import StageSpec

    every = tuple(range(LAYERS))
    widths = {"mlp_in": WIDTH, "mlp_pre": MLP, "mlp_post": MLP, "mlp_out": WIDTH}
    return {
        "hidden, 5 layers": [StageSpec("hidden", (0, 20, 40, 60, 80), WIDTH, "bfloat16")],
        "hidden, all 81": [StageSpec("hidden", tuple(range(LAYERS + 1)), WIDTH, "bfloat16")],
        "4 MLP stages, all 80": [
            StageSpec(name, every, width, "bfloat16") for name, width in widths.items()
        ],
    }


def _planned(specs: list[StageSpec], sequences: int, length: int, buffer: str) -> Plan:
    import numpy as np

    from actstore.corpus import Corpus
    from actstore.plan import Plan

    corpus = Corpus.of_lengths(np.full(sequences, length))
    return Plan.build(corpus, specs, buffer=buffer, batch_tokens=2**16)


def _timed(make: Callable[[], Any]) -> tuple[Any, float, int]:
    """What is made, the seconds that took, and the peak of memory of doing it again."""
    began = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - began
    tracemalloc.start()
    make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return made, seconds, peak


def _column(
    specs: list[StageSpec],
    tokens: float,
    ranks: int,
    length: int,
    buffer: str,
    tokens_per_second: float,
    gigabytes_per_second: float,
    put_price: float,
    get_price: float,
    month_price: float,
) -> dict[str, float]:
    from actstore import scaling as arithmetic
    from actstore.schema import BLOCKS, GRANULE_TOKENS, METADATA_NBYTES, MOMENTS
    from actstore.sketch import merge_nbytes

    whole, seconds, peak = _timed(
        lambda: _planned(specs, math.ceil(tokens / length), length, buffer)
    )
    # A store has so many blocks, and its manifest so many bytes: ranks dump as many as that takes.
    stores = max(ranks, math.ceil(whole.n_blocks / BLOCKS))
    while True:
        part = _planned(specs, math.ceil(tokens / length / stores), length, buffer)
        if arithmetic.manifest_nbytes(part) < METADATA_NBYTES:
            break
        stores *= 2
    objects = arithmetic.count(part)
    asked = arithmetic.requests(part, objects)
    cells = sum(len(s.layers) * s.layout.width for s in part.stages)
    granules = -(-part.n_tokens // max(GRANULE_TOKENS, part.block_tokens))
    hours_model = whole.n_tokens / ranks / tokens_per_second / 3600
    hours_sent = whole.nbytes / ranks / gigabytes_per_second / 1e9 / 3600
    puts, gets = asked["PUT"] + asked["LIST"], asked["GET"] + asked["HEAD"]
    return {
        "bytes a token": whole.nbytes / whole.n_tokens,
        "petabytes": whole.nbytes / 1e15,
        "blocks of tokens": whole.block_tokens,
        "least shard, MB": min(s.layout.rows * s.layout.width * 2 for s in whole.stages) / 1e6,
        "seconds to plan it all": seconds,
        "memory to plan it all, GB": peak / 1e9,
        "stores": stores,
        "tokens of a store, millions": part.n_tokens / 1e6,
        "blocks of a store": part.n_blocks,
        "shards of a store": objects["shards"],
        "other objects of a store": objects.total() - objects["shards"],
        "bytes of a commit record": arithmetic.record_nbytes(part),
        "manifest of a store, MB": arithmetic.manifest_nbytes(part) / 1e6,
        "PUT of a store": asked["PUT"],
        "GET of a store": asked["GET"],
        "DELETE of a store": asked["DELETE"],
        "objects in all, millions": objects.total() * stores / 1e6,
        "requests in all, millions": asked.total() * stores / 1e6,
        "sketches of blocks until the seal, of the data": (
            2 * 8 * len(MOMENTS) * cells * part.n_blocks / part.nbytes
        ),
        "zone maps, uncompressed, of the data": (
            8 * STRATA * len(MOMENTS) * cells * granules / part.nbytes
        ),
        "memory of the seal, GB": max(merge_nbytes(s, STRATA) for s in part.stages) / 1e9,
        "hours of the model": hours_model,
        "hours of sending": hours_sent,
        "PUT a second, all ranks": asked["PUT"] * stores / 3600 / max(hours_model, hours_sent),
        "price of the requests": stores * (puts * put_price + gets * get_price) / 1000,
        "price of a month": whole.nbytes / 1e9 * month_price,
    }


def _token_tables(tokens: int = 2**20) -> float:
    """Bytes a token that labels take while a store is begun, measured."""
    import numpy as np

    from actstore import skeleton
    from actstore.corpus import build
    from actstore.plan import Plan, StageSpec
    from actstore.sketch import plan_strata

    ids = np.random.default_rng(0).integers(0, 128_000, (tokens // 4096, 4096))
    tracemalloc.start()
    corpus = build(list(ids))
    plan = Plan.build(corpus, [StageSpec("hidden", (0,), WIDTH)], buffer="1GiB")
    strata = plan_strata(plan, None)
    skeleton.build(plan, None, {}, strata.names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / tokens


def _tasks_a_layer() -> float:
    """Tasks of a query that reads all of a store of many blocks, for each layer, measured."""
    import numpy as np

    import actstore

    corpus = actstore.build_corpus([[1] * 64] * 64)
    plan = actstore.Plan.build(
        corpus, [actstore.StageSpec("mlp_post", (0, 1), 16)], buffer="8KiB", sketch=False
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        with actstore.Writer(path, plan) as writer:
            for layer in (0, 1):
                writer.put("mlp_post", layer, 0, np.ones((plan.n_tokens, 16), "float32"))
        return len(dict(actstore.moments(path).__dask_graph__())) / 2


def _shown(value: float) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.3g}"
        if value < 100
        else f"{value:,.0f}"
    )
