"""`actstore bench`: similarity and dimensionality against the plain route, and their growth."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import print_json, print_table, say, size

if TYPE_CHECKING:
    import numpy as np

__all__ = ["make_stages", "peak_memory", "profile", "ratio_row", "rsa"]

STAGES = {"mlp_in": 768, "mlp_pre": 3072, "mlp_post": 3072, "mlp_out": 768}


def make_stages(path: Path, layers: int, tokens: int) -> None:
    """A store of the MLP stages of a model of GPT-2 small's size, of correlated normal values."""
    import numpy as np

    from actstore.corpus import build
    from actstore.plan import Plan, StageSpec
    from actstore.writer import Writer

    rng = np.random.default_rng(0)
    lengths = [1000] * (tokens // 1000) + [tokens % 1000] * (tokens % 1000 > 0)
    corpus = build([rng.integers(0, 50_000, n).tolist() for n in lengths], None)
    specs = [StageSpec(name, tuple(range(layers)), width) for name, width in STAGES.items()]
    plan = Plan.build(corpus, specs, buffer=2**28, sketch=False)
    maps = {name: rng.normal(size=(100, width)).astype("f4") for name, width in STAGES.items()}
    with Writer(path, plan) as writer:
        for start in range(0, tokens, 1000):
            n = min(1000, tokens - start)
            for layer in range(layers):
                shared = rng.standard_normal((n, 100), dtype=np.float32)
                for name, width in STAGES.items():
                    own = rng.standard_normal((n, width), dtype=np.float32)
                    writer.put(name, layer, start, shared @ maps[name] / 10 + own)


def profile(scratch: Path, repeats: int) -> tuple[dict[str, list[float]], str]:
    """Dimensionality and RSA of 12 layers x 4 stages at 500 tokens, ours and the plain way."""
    import actstore

    path = scratch / "profile.zarr"
    make_stages(path, 12, 500)
    store = actstore.open(path)

    def ours() -> None:
        actstore.compute(actstore.dimensionality(store), actstore.rsa(store))

    def plain() -> None:
        for layer in range(12):
            _plain_layer([store[name].sel(layer=layer).values for name in STAGES])

    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats + 1):
        for name, run in (("ours", ours), ("plain", plain)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: s[1:] for name, s in seconds.items()}, "SVD, triangles, np.corrcoef"


def _plain_layer(stages: list[np.ndarray]) -> None:
    """Participation ratios, effective dimensions and all RSA of one layer, straightforwardly."""
    import numpy as np

    for x in stages:
        squares = np.linalg.svd(x - x.mean(axis=0, keepdims=True), compute_uv=False) ** 2
        assert squares.sum() ** 2 / (squares**2).sum() > 1
        assert np.flatnonzero(np.cumsum(squares) / squares.sum() >= 0.95)[0] > 0
    for x, y in combinations(stages, 2):
        assert abs(np.corrcoef(_triangle(x), _triangle(y))[0, 1]) <= 1


def _triangle(x: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of tokens."""
    import numpy as np

    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(x), 1)]


def rsa(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, as a comma list.")] = (
        "50000,100000,200000"
    ),
    memory: Annotated[str, typer.Option(help="What the query may take.")] = "1GiB",
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; default the temporary folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """RSA of all six pairs of MLP stages of a layer, exactly, over many tokens from disk."""
    import actstore

    counts = [int(n) for n in tokens.split(",")]
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "rsa.zarr"
        make_stages(path, 1, max(counts))
        store = actstore.open(path)
        for n in counts:
            began = time.perf_counter()
            result = actstore.compute(
                actstore.rsa(store, tokens=_first(store.n_tokens, n), memory=memory)
            )
            seconds = time.perf_counter() - began
            peak = peak_memory()
            rows.append(
                {
                    "tokens": n,
                    "seconds": seconds,
                    "us_per_token": seconds / n * 1e6,
                    "passes": result.attrs["passes"],
                    "peak_bytes": peak,
                    "matrix_bytes": 8 * n * n,
                }
            )
    if as_json:
        print_json({"rows": rows})
        return
    print_table(list(rows[0]), [list(r.values()) for r in rows])
    matrix = size(8 * max(counts) ** 2)
    say(f"peak memory {size(rows[-1]['peak_bytes'])}; an N x N matrix: {matrix}")


def ratio_row(
    what: str, seconds: list[float], against: str, reference: list[float]
) -> dict[str, Any]:
    """A row of a table: seconds of two things timed in turn, and the median ratio."""
    ratios = [r / s for s, r in zip(seconds, reference, strict=True)]
    return {
        "what": what,
        "seconds": statistics.median(seconds),
        "against": against,
        "its_seconds": statistics.median(reference),
        "ratio": statistics.median(ratios),
    }


def peak_memory() -> int:
    """Most bytes that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts what the parent held before it became this one
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _first(total: int, n: int) -> Any:
    import numpy as np

    return np.arange(total) < n
