"""Reading a store: a scan of all of it, one stage-layer into memory, one neuron."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from .rounds import Reference, Row, Work, compare, seconds
from .setting import CORES, Setting, drop_cached

__all__ = ["reading"]

STAGE = "mlp_post"


def reading(setting: Setting) -> list[Row]:
    """From the page cache, after the first round; the scan also of files dropped from it."""
    return [*_scan(setting), *_layer(setting), *_neuron(setting)]


def _scan(setting: Setting) -> list[Row]:
    import numpy as np

    import actstore

    store = actstore.open(setting.store)
    array = store.array(STAGE)
    layers, tokens, _ = array.shape
    rows = store.attrs["capture"]["block_tokens"]
    places = [(i, a) for i in range(layers) for a in range(0, tokens, rows)]
    files = sorted(setting.store.glob(f"{STAGE}/activation/c.*"))
    most = np.arange(tokens) > 0  # sketches cannot answer for all tokens but one

    def scan() -> None:
        actstore.compute(
            actstore.moments(store, tokens=most, per="layer"),
            actstore.histogram(store, tokens=most, bins=300, range=(-8, 8)),
        )

    def read() -> None:
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(lambda p: np.size(array[p[0], p[1] : p[1] + rows]), places))

    def read_files() -> None:
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(lambda f: len(f.read_bytes()), files))

    def cold(run: Callable[[], None]) -> Callable[[], float]:
        def work() -> float:
            drop_cached(files)
            return seconds(run)()

        return work

    nbytes = sum(f.stat().st_size for f in files) / 1e9
    what = "scan: moments + 300 bins, one pass"
    named = "reading the shards", "reading their files"
    table = partial(compare, "reading", rounds=setting.rounds, amount=nbytes, unit="GB")
    warm = table(
        {what: (seconds(scan), {named[0]: 0.6, named[1]: None})},
        [Reference(named[0], seconds(read)), Reference(named[1], seconds(read_files))],
    )
    what = f"{what}, nothing cached"
    return warm + table({what: (cold(scan), {named[0]: 0.6})}, [Reference(named[0], cold(read))])


def _layer(setting: Setting) -> list[Row]:
    """One stage-layer as an array, against one file of the same bytes."""
    import numpy as np

    import actstore

    store = actstore.open(setting.store)
    array, labelled = store.array(STAGE), store[STAGE].isel(layer=0)
    file = setting.scratch / "layer.bin"
    labelled.values.tofile(file)
    # What was just written lies in the page cache in larger pieces, twice as fast to read.
    drop_cached([file, *setting.store.glob(f"{STAGE}/activation/c.0.*")])
    named = "np.fromfile of the same bytes"
    ours: dict[str, tuple[Work, dict[str, float | None]]] = {
        "one stage-layer into memory, store.array(stage)[0]": (
            seconds(lambda: array[0]),
            {named: 0.6},
        ),
        "the same with labels, store[stage].isel(layer=0)": (
            seconds(lambda: labelled.values),
            {named: None},
        ),
    }
    plain = Reference(named, seconds(lambda: np.fromfile(file, np.float32)))
    found = compare("reading", ours, [plain], setting.rounds, labelled.nbytes / 1e9, "GB")
    file.unlink()
    return found


def _neuron(setting: Setting) -> list[Row]:
    """Each way of reading one neuron against the same way of reading them all."""
    import actstore

    store = actstore.open(setting.store)
    array, neuron = store.array(STAGE), store[STAGE].sizes["neuron"] // 2

    def table(
        what: str, one: Callable[[], object], named: str, every: Callable[[], object]
    ) -> list[Row]:
        whole = [Reference(named, seconds(every))]
        return compare("reading", {what: (seconds(one), {named: 10})}, whole, setting.rounds)

    return [
        *table(
            "one neuron over all tokens, store.array(stage)[0, :, n]",
            lambda: array[0, :, neuron],
            "the whole stage-layer, store.array(stage)[0]",
            lambda: array[0],
        ),
        *table(
            "the same with labels, store[stage].isel(layer=0, neuron=n)",
            lambda: store[STAGE].isel(layer=0, neuron=neuron).values,
            "the whole with labels, store[stage].isel(layer=0)",
            lambda: store[STAGE].isel(layer=0).values,
        ),
    ]
