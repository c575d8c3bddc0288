"""Make or remake the sketches of a sealed store, from its shards: `actstore sketch STORE`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zarr

from . import journal, sketch
from .arrays import ShardedArray
from .errors import UsageError
from .places import storage_at, zarr_at
from .plan import StagePlan
from .schema import Categorical
from .seal import put_all, root_document, scan_part
from .skeleton import Skeleton, build_sketches
from .sketched import strata_codes
from .storage import Storage
from .store import Store, open_store

__all__ = ["add_sketches"]


def add_sketches(
    path: str | os.PathLike[str],
    *,
    by: str | None = None,
    covariance: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Make the sketches of a sealed store, in one pass over its shards.

    The data and the store's id stay as they are; sketches that are there are replaced.

    Parameters
    ----------
    path : path
        The store.
    by : str, optional
        A text label of at most 64 values, which the sketches keep apart.
    covariance : bool
        Also keep every stage's second moments, neuron by neuron (large: width squared a layer).
    progress : callable, optional
        Called with shards done and shards in all.

    Returns
    -------
    Store
        Opened anew.

    Raises
    ------
    UsageError
        An unknown or unfit label, or a store whose layout is not ours.
    """
    store = open_store(path)
    storage = storage_at(path)
    stages = _stages(store)
    strata = sketch.Strata(*strata_codes(*_columns(store, by)))
    made = build_sketches(stages, store.n_tokens, strata.names, covariance)
    total = sum(len(s.layers) for s in stages) * -(-store.n_tokens // stages[0].layout.rows)
    done = 0

    def load(stage: StagePlan, block: int) -> sketch.Part:
        nonlocal done
        layers = tuple(range(len(stage.layers)))
        rows = min(stage.layout.rows, store.n_tokens - block * stage.layout.rows)
        part = scan_part(storage, stage, layers, block, rows, strata)
        done += len(layers)
        if progress is not None:
            progress(done, total)
        return part

    with storage.lock("journal"):
        _rewrite_root(storage, None, None)  # until they are whole, the store has none
        digests = put_all(storage, made.objects.items())
        merged = sketch.merge(stages, store.n_tokens, len(strata.names), made.objects, load)
        digests |= put_all(storage, merged)
        if covariance:
            digests |= put_all(storage, _scatters(stages, store, strata, made))
        groups = {k: v for k, v in made.groups.items() if k != "zarr.json"}
        digests |= put_all(storage, groups.items())
        _rewrite_manifest(storage, digests, {"by": by})
        _rewrite_root(storage, made, {"by": by})
    return open_store(path)


def _columns(store: Store, by: str | None) -> tuple[np.ndarray, np.ndarray, Categorical | None]:
    position, special = store.column("position"), store.column("special")
    if isinstance(position, Categorical) or isinstance(special, Categorical):
        raise UsageError(f"{store.name} keeps positions as text: it is not a store of actstore's")
    label = store.column(by) if by is not None else None
    if label is not None and (not isinstance(label, Categorical) or len(label.values) > 64):
        raise UsageError(f"--by {by}: it takes a text label of at most 64 values")
    return position, special, label if isinstance(label, Categorical) else None


def _stages(store: Store) -> list[StagePlan]:
    stages = []
    for name in store.stages:
        array = store.array(name)
        if not isinstance(array, ShardedArray):
            raise UsageError(
                f"stage {name} of {store.name} has a layout of another writer: sketches are made "
                "of stores that actstore wrote"
            )
        layers = tuple(store.attrs["capture"]["stages"][name]["layers"])
        stages.append(StagePlan(name, layers, array.layout, None))
    return stages


def _scatters(
    stages: list[StagePlan], store: Store, strata: sketch.Strata, made: Skeleton
) -> Iterator[tuple[str, bytes]]:
    """Second moments of every stage, layer and stratum about the stratum's means."""
    for stage in stages:
        array, drain = store.array(stage.name), sketch.Drain(made.objects)
        moments: Any = zarr.open_array(
            zarr_at(store.path), path=f"sketch/{stage.name}/moments", mode="r"
        )
        means = np.asarray(moments[1])
        width, rows = stage.layout.width, stage.layout.rows
        for i in range(len(stage.layers)):
            total = np.zeros((len(strata.names), width, width))
            for top in range(0, store.n_tokens, rows):
                values = np.asarray(array[i, top : top + rows], np.float32)
                codes = strata.codes[top : top + rows]
                for s in np.unique(codes):
                    # About the mean, single precision loses nothing that matters in a block.
                    x = values[codes == s] - np.float32(means[s, i])
                    total[s] += x.T @ x
            for s in range(len(strata.names)):
                drain.write(f"sketch/{stage.name}/scatter", (s, i), total[s])
            yield from drain.objects()


def _rewrite_manifest(
    storage: Storage, digests: dict[str, list[int]], settings: dict[str, str | None]
) -> None:
    manifest = journal.opened_json(storage.get(journal.MANIFEST) or b"")
    others = {k: v for k, v in manifest["objects"].items() if not k.startswith("sketch/")}
    manifest |= {"objects": others | digests, "sketch": settings}
    storage.put_durable(journal.MANIFEST, journal.sealed_json(manifest))


def _rewrite_root(
    storage: Storage, made: Skeleton | None, settings: dict[str, str | None] | None
) -> None:
    """Take the sketches out of the root's metadata, and put new ones in."""
    root = json.loads(storage.get("zarr.json") or b"")
    nodes = root["consolidated_metadata"]["metadata"]
    for key in [k for k in nodes if k == "sketch" or k.startswith("sketch/")]:
        del nodes[key]
    root["attributes"]["actstore"].pop("sketch", None)
    if made is not None:
        new = json.loads(made.groups["zarr.json"])["consolidated_metadata"]["metadata"]
        nodes |= new
        root["attributes"]["actstore"]["sketch"] = settings
    storage.put_durable("zarr.json", root_document(root))
