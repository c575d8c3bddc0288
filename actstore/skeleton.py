"""The hierarchy of a store without its activations: labels, arrays' metadata, groups.

Built in memory with xarray and zarr themselves, so that the metadata is theirs to the letter;
the writer then makes the objects durable one by one. The groups' own `zarr.json` come last, at
seal, and the root's last of all: until then stock tools find no store.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from .errors import PlanError
from .plan import Plan, StagePlan
from .schema import (
    CHUNK_NBYTES,
    DIMS,
    GRANULE_TOKENS,
    KEYS,
    METADATA_NBYTES,
    MOMENTS,
    RANKS,
    STAGES,
    TABLES,
    TOKEN_COORDS,
    Categorical,
    layer_name,
)

__all__ = ["Skeleton", "build", "build_sketches", "table_chunk"]

LABEL_CHUNK = 2**20
MAX_FLAGS = 1024
TEXT_CHUNK_NBYTES = 2**26


@dataclass(frozen=True)
class Skeleton:
    """Objects of a store by key.

    Attributes
    ----------
    objects : dict
        Label arrays and all arrays' metadata: written when the dump begins.
    groups : dict
        The groups' `zarr.json`, consolidated, the root's (key "zarr.json") last: written at seal.
    """

    objects: dict[str, bytes]
    groups: dict[str, bytes]


def build(
    plan: Plan,
    vocabulary: np.ndarray | None,
    attributes: Mapping[str, Any],
    strata: Sequence[str] | None = None,
) -> Skeleton:
    """Lay out the empty store of a plan.

    Parameters
    ----------
    plan : Plan
        What will be in it.
    vocabulary : ndarray of str or None
        Text of each token id.
    attributes : mapping
        The root's ``actstore`` attribute.
    strata : sequence of str, optional
        Names of the classes of tokens that sketches keep apart; None for no sketches.
    """
    memory = MemoryStore()
    zarr.create_group(memory, zarr_format=3, attributes={"actstore": dict(attributes)})
    _write(memory, "inputs", _inputs(plan))
    _write(memory, "sequences", _sequences(plan))
    if vocabulary is not None:
        _write(memory, "vocabulary", _vocabulary(vocabulary))
    for stage in plan.stages:
        coords = _stage_coords(plan, stage)
        _write(memory, stage.name, coords)
        _create_activation(memory, plan, stage, [str(name) for name in coords.coords])
    _create_tables(memory, plan)
    if strata is not None:
        create_sketches(memory, plan.stages, plan.n_tokens, plan.block_tokens, strata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        for group in [*(stage.name for stage in plan.stages), *_table_groups(plan)]:
            zarr.consolidate_metadata(memory, path=group, zarr_format=3)
        zarr.consolidate_metadata(memory, zarr_format=3)
    made = _collected(memory)
    root = len(made.groups["zarr.json"])
    if root > METADATA_NBYTES // 2:
        raise PlanError(
            f"the labels' values would make metadata of {root / 2**20:,.0f} MiB, where "
            f"{METADATA_NBYTES // 2**21} are most: attach fewer text labels, or shorter ones"
        )
    return made


def build_sketches(
    stages: Sequence[StagePlan],
    n_tokens: int,
    strata: Sequence[str],
    covariance: bool,
) -> Skeleton:
    """Lay out ``sketch/`` alone, for a store that is sealed already."""
    memory = MemoryStore()
    zarr.create_group(memory, zarr_format=3)
    create_sketches(memory, stages, n_tokens, stages[0].layout.rows, strata, covariance)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(memory, zarr_format=3)
    return _collected(memory)


def _collected(memory: MemoryStore) -> Skeleton:
    everything = {key: value.to_bytes() for key, value in memory._store_dict.items()}
    groups = {k: v for k, v in everything.items() if _is_group(k, v)}
    objects = {k: v for k, v in sorted(everything.items()) if k not in groups}
    inner = {k: v for k, v in sorted(groups.items()) if k != "zarr.json"}
    return Skeleton(objects, {**inner, "zarr.json": groups["zarr.json"]})


def _is_group(key: str, value: bytes) -> bool:
    return key.endswith("zarr.json") and json.loads(value)["node_type"] == "group"


def _write(memory: MemoryStore, group: str, dataset: xr.Dataset) -> None:
    encoding = {
        name: {"chunks": (min(_chunk_rows(var), max(1, var.size)),)}
        for name, var in dataset.variables.items()
        if var.ndim == 1
    }
    with warnings.catch_warnings():
        # Variable-length strings work in every zarr that exists, but await a specification.
        warnings.filterwarnings("ignore", category=zarr.errors.UnstableSpecificationWarning)
        warnings.filterwarnings("ignore", message=".*vlen-utf8.*")
        dataset.to_zarr(
            memory, group=group, zarr_format=3, consolidated=False, encoding=encoding, mode="a"
        )


def _chunk_rows(variable: xr.Variable) -> int:
    """Values of a chunk of a column; fewer where they are long texts, which are read by chunks."""
    if variable.dtype != object:
        return LABEL_CHUNK
    nbytes = sum(map(len, variable.values))
    return min(LABEL_CHUNK, max(1, variable.size * TEXT_CHUNK_NBYTES // max(1, nbytes)))


def _create_activation(
    memory: MemoryStore, plan: Plan, stage: StagePlan, coordinates: list[str]
) -> None:
    layout = stage.layout
    blosc = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=4)
    zarr.create_array(
        memory,
        name=f"{stage.name}/activation",
        shape=(len(stage.layers), plan.n_tokens, layout.width),
        shards=(1, layout.rows, layout.width),
        chunks=(1, layout.chunk_rows, layout.chunk_width),
        dtype=layout.dtype,
        compressors=[*([blosc] if layout.compressed else []), Crc32cCodec()],
        fill_value=float("nan"),
        dimension_names=DIMS,
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes={
            "long_name": f"{stage.name} activation",
            "description": STAGES.get(stage.name, f"value at the module path named {stage.name}"),
            "units": "1",
            "source_dtype": layout.source_dtype,
            "coordinates": " ".join(c for c in coordinates if c not in DIMS),
        },
        zarr_format=3,
    )


def table_chunk(plan: Plan) -> int:
    """Tokens of a chunk of predictions and outcomes: whole blocks, of at most 2^20 values."""
    values = LABEL_CHUNK // max(1, plan.predictions)
    return max(plan.block_tokens, 1 << (values.bit_length() - 1))


def _table_groups(plan: Plan) -> list[str]:
    return list(dict.fromkeys(key.partition("/")[0] for key in plan.tables))


def _create_tables(memory: MemoryStore, plan: Plan) -> None:
    """Lay out ``predictions/`` and ``outcomes/``, where they are asked for."""
    for group in _table_groups(plan):
        _group(memory, group)
    sizes = {"token": plan.n_tokens, "rank": plan.predictions}
    chunk = {"token": min(table_chunk(plan), plan.n_tokens)}
    for key in plan.tables:
        table = TABLES[key]
        own = {dim: sizes[dim] for dim in table.dims}
        _array(memory, key, own, table.dtype, table.meaning, chunk, table.units, -1)


def create_sketches(
    memory: MemoryStore,
    stages: Sequence[StagePlan],
    n_tokens: int,
    block_tokens: int,
    strata: Sequence[str],
    covariance: bool = False,
) -> None:
    """Lay out ``sketch/``: for each stage its totals, and by granule its zone maps."""
    granule = block_tokens * max(1, GRANULE_TOKENS // block_tokens)
    n = len(strata)
    _check_sketches(stages, n)
    names = np.array(strata, dtype=object)
    _group(memory, "sketch")
    for stage in stages:
        folder, layers, width = f"sketch/{stage.name}", len(stage.layers), stage.layout.width
        coords = {
            "stratum": ("stratum", names, {"long_name": "class of tokens"}),
            "layer": ("layer", np.array(stage.layers, np.int64)),
            "neuron": ("neuron", np.arange(width)),
        }
        moments = np.array(list(MOMENTS), dtype=object)
        coords["moment"] = ("moment", moments, {"description": "; ".join(MOMENTS.values())})
        _write(memory, folder, xr.Dataset(coords=coords))
        each = {"stratum": n, "layer": layers, "neuron": width}
        nine = {"moment": len(MOMENTS), **each}
        zones = {"granule": -(-n_tokens // granule), **nine}
        _array(memory, f"{folder}/moments", nine, "float64", "moments of each neuron")
        what = f"moments of each neuron by runs of {granule:,} tokens"
        _array(memory, f"{folder}/zones", zones, "float64", what, {"granule": 1})
        keys = {"stratum": n, "layer": layers, "key": KEYS}
        _array(memory, f"{folder}/counts", keys, "uint64", "values by their upper 16 bits")
        ranked = {**each, "rank": RANKS}
        one = {"layer": 1}
        for side in ("largest", "smallest"):
            value, token = f"{folder}/{side}_value", f"{folder}/{side}_token"
            _array(memory, value, ranked, "float32", f"{side} values, best first", one)
            _array(memory, token, ranked, "int64", "their tokens; -1 for none", one)
        if covariance:
            square = {"stratum": n, "layer": layers, "neuron": width, "neuron_b": width}
            rows = min(width, max(1, CHUNK_NBYTES // (8 * width)))
            scatter, one_each = f"{folder}/scatter", {"stratum": 1, "layer": 1, "neuron": rows}
            what = "sums of products of two neurons about the stratum's means"
            _array(memory, scatter, square, "float64", what, one_each)
        norms = {"layer": layers, "token": n_tokens}
        _array(memory, f"{folder}/norm", norms, "float32", "Euclidean norm", {"token": granule})


def _check_sketches(stages: Sequence[StagePlan], n_strata: int) -> None:
    """A stage's table of moments or of counts is one chunk, which readers take whole."""
    for stage in stages:
        most = max(len(MOMENTS) * stage.layout.width, KEYS)
        nbytes = 8 * n_strata * len(stage.layers) * most
        if nbytes > CHUNK_NBYTES:
            raise PlanError(
                f"sketches of {stage.name} in {n_strata} classes of tokens take a table of "
                f"{nbytes / 1e9:.1f} GB, more than {CHUNK_NBYTES / 1e9:.2f}: sketch by no label, "
                "or by one of fewer values, or keep fewer layers in a store"
            )


def _group(memory: MemoryStore, path: str) -> None:
    zarr.create_group(memory, path=path, zarr_format=3)


def _array(
    memory: MemoryStore,
    path: str,
    sizes: Mapping[str, int],
    dtype: str,
    description: str,
    chunks: Mapping[str, int] | None = None,
    units: str | None = None,
    no_number: int = 0,
) -> None:
    whole = {**sizes, **(chunks or {})}
    zarr.create_array(
        memory,
        name=path,
        shape=tuple(sizes.values()),
        chunks=tuple(whole.values()),
        dtype=dtype,
        fill_value=float("nan") if dtype.startswith("float") else no_number,
        dimension_names=tuple(sizes),
        attributes={"long_name": description, **({"units": units} if units else {})},
        zarr_format=3,
    )


def _inputs(plan: Plan) -> xr.Dataset:
    corpus = plan.corpus
    columns: dict[str, Any] = {
        "token_id": corpus.token_ids,
        "sequence": corpus.sequence.astype(np.int32),
        "position": corpus.position.astype(np.int32),
        "special": corpus.special,
        "kept": corpus.keep,
    }
    described = {
        **TOKEN_COORDS,
        "special": "token that the tokenizer adds or reserves",
        "kept": "whether the token's activations are in the store",
    }
    if corpus.char_start is not None and corpus.char_end is not None:
        columns |= {"char_start": corpus.char_start, "char_end": corpus.char_end}
        described |= {
            "char_start": "first character of the token in the text of its sequence",
            "char_end": "end of the token in the text of its sequence",
        }
    variables = {k: ("input", v, {"long_name": described[k]}) for k, v in columns.items()}
    labels = {k: _label("input", k, v) for k, v in corpus.token_labels.items()}
    return xr.Dataset(variables | labels)


def _sequences(plan: Plan) -> xr.Dataset:
    corpus = plan.corpus
    starts = corpus.starts[:-1].astype(np.int64)
    variables: dict[str, Any] = {
        "start": ("sequence", starts, {"long_name": "first token, as an index into inputs/"}),
        "length": ("sequence", np.diff(corpus.starts).astype(np.int32), {"long_name": "tokens"}),
    }
    if corpus.texts is not None:
        text = np.array(corpus.texts, dtype=object)
        variables["text"] = ("sequence", text, {"long_name": "text of the sequence"})
    for name, column in corpus.sequence_labels.items():
        variables[name] = _label("sequence", name, column)
    return xr.Dataset(variables)


def _vocabulary(vocabulary: np.ndarray) -> xr.Dataset:
    text = np.asarray(vocabulary, dtype=object)
    return xr.Dataset({"token_text": ("vocab", text, {"long_name": "text of the token"})})


def _stage_coords(plan: Plan, stage: StagePlan) -> xr.Dataset:
    corpus, kept = plan.corpus, plan.kept
    sequence = corpus.sequence[kept]
    columns = {
        "input": kept.astype(np.int64),
        "sequence": sequence.astype(np.int32),
        "position": corpus.position[kept].astype(np.int32),
        "token_id": corpus.token_ids[kept],
    }
    coords: dict[str, Any] = {
        k: ("token", v, {"long_name": TOKEN_COORDS[k]}) for k, v in columns.items()
    }
    for name, column in corpus.sequence_labels.items():
        if not _many_values(column):
            coords[name] = _label("token", name, column[sequence])
    for name, column in corpus.token_labels.items():
        if not _many_values(column):
            coords[name] = _label("token", name, column[kept])
    layers = np.array(stage.layers, np.int64)
    coords["layer"] = ("layer", layers, {"long_name": "block index, as the model counts"})
    neurons = np.arange(stage.layout.width)
    coords["neuron"] = ("neuron", neurons, {"long_name": "index into the stage's width"})
    if stage.name == "hidden":
        names = np.array([layer_name(stage.name, n) for n in stage.layers], dtype=object)
        coords["layer_name"] = ("layer", names)
    if stage.heads:
        head = neurons // (stage.layout.width // stage.heads)
        coords["head"] = ("neuron", head.astype(np.int32), {"long_name": "attention head"})
    return xr.Dataset(coords=coords)


def _many_values(column: np.ndarray | Categorical) -> bool:
    """Whether a column has too many values to be spelt out as flags beside every token.

    Such columns stay in sequences/ (or inputs/), a look-up away.
    """
    return isinstance(column, Categorical) and len(column.values) > MAX_FLAGS


def _label(dim: str, name: str, column: np.ndarray | Categorical) -> tuple[Any, ...]:
    """A label column as a variable; strings as codes with CF flags."""
    if not isinstance(column, Categorical):
        return (dim, column, {"long_name": name})
    if _many_values(column):
        return (dim, column.decode(), {"long_name": name})
    values = [str(v) for v in column.values]
    codes = column.codes.astype(np.min_scalar_type(max(len(values) - 1, 1)))
    attributes = {
        "long_name": name,
        "flag_values": list(range(len(values))),
        # CF separates meanings by blanks; `label_values` keeps the text itself.
        "flag_meanings": " ".join("_".join(v.split()) or "_" for v in values),
        "label_values": values,
    }
    return (dim, codes, attributes)
