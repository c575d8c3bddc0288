"""Activations that other tools wrote, to a store: `actstore import`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnknownNameError, UsageError
from ..plan import Plan, StageSpec
from ..schema import TABLES
from ..store import Store, open_store
from ..writer import Writer
from .sources import Array, Piece, Pieces, find_pieces
from .table import ALIASES, corpus_of_columns
from .wanted import Wanted, shown, want

__all__ = ["import_from"]

READ_NBYTES = 2**25
_KINDS = {"float32": "float32", "float64": "float32", "float16": "float16", "bfloat16": "bfloat16"}


def import_from(
    source: Any,
    out: str | os.PathLike[str],
    *,
    stages: str | Sequence[str] | None = None,
    layers: str | int | Sequence[int] | None = None,
    axes: str | None = None,
    dtype: str | None = None,
    config: str | None = None,
    split: str | None = None,
    sketch_by: str | None = None,
    allow_nonfinite: bool = False,
    buffer: int | str = "1GiB",
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Make a store of activations that other tools wrote.

    Rerunning the same call goes on where a stopped one left off.

    Parameters
    ----------
    source : path, str or Dataset
        A file ``.safetensors``, ``.parquet``, ``.nc``, ``.npy``, ``.npz`` or ``.pt``; a folder of
        such files of one kind; or a Hugging Face dataset, itself or by name or folder. Files of
        a folder that have the same arrays are batches, in the order of their names (numbers as
        numbers); those with other arrays are parts of one. ``.pt`` files hold tensors, dicts and
        lists of them; one that would run code is refused unread. What `actstore.export` wrote
        comes back as it was.
    out : path
        The store to write, by custom ``NAME.zarr``.
    stages : str or sequence of str, optional
        What the arrays (or columns) are: ``STAGE=NAME``, where ``{layer}`` in the name stands for
        the layer's number, as ``"mlp_post=blocks.{layer}.mlp.hook_post"``; or just ``STAGE`` for
        the only array there is. Default: names such as ``mlp_post.3`` and TransformerLens's.
        Files that hold one array without a name are called as the file, without its ending.
    layers : str, int or sequence of int, optional
        The layer, where names do not say it; of an array with an axis of layers their numbers;
        else those that are taken.
    axes : str, optional
        What the dimensions of arrays are, in order, of ``layer sequence position token head
        neuron``. Default "token neuron" for two, "sequence position neuron" for three.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Stored element type; default the source's own (float64 is rounded to float32).
    config, split : str, optional
        Of a dataset; default split "train".
    sketch_by : str, optional
        A text label of at most 64 values, which the sketches keep apart.
    allow_nonfinite : bool
        Store NaN and inf instead of refusing them.
    buffer : int or str
        Memory for the blocks being written.
    progress : callable, optional
        Called with tokens written, and in all.

    Returns
    -------
    Store
        Other arrays with a value for each token (or each sequence, where the source has such) are
        its labels; ``input_ids`` are token ids, ``token_text`` their texts, ``sequence`` and
        ``position`` say where they stand, and tokens whose ``attention_mask`` is 0 are left out.
        ``store.info()["notes"]`` says what else was.

    Raises
    ------
    UsageError
        A source that cannot be read, names that are not there, arrays of shapes that do not go
        together, or an array of which it is not said what it is.
    NonFiniteError
        NaN or inf among the values.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> np.save(f"{folder.name}/acts.npy", np.ones((5, 16), "float32"))
    >>> store = import_from(
    ...     f"{folder.name}/acts.npy", f"{folder.name}/run.zarr", stages="mlp_post", layers=3
    ... )
    >>> store["mlp_post"].sizes
    Frozen({'layer': 1, 'token': 5, 'neuron': 16})
    >>> folder.cleanup()
    """
    pieces = find_pieces(source, config=config, split=split)
    if not pieces.openers:
        raise UsageError(f"{source} has no rows")
    wanted = want(pieces, stages, layers, axes)
    table = _tabled(pieces, wanted)
    outcomes = _outcomes(pieces, table)
    corpus, vocabulary = corpus_of_columns(table.columns, table.lengths, table.tokens)
    left_out = {**table.left_out, **corpus.notes.pop("left_out", {})}
    if left_out:
        corpus.notes["left_out"] = left_out
    specs = _specs(pieces, wanted, table)
    plan = Plan.build(
        corpus,
        specs,
        dtype=dtype,
        buffer=buffer,
        provenance=_provenance(pieces, wanted, source),
        sketch_by=sketch_by,
        outcomes=bool(outcomes),
    )
    with Writer(out, plan, vocabulary=vocabulary, allow_nonfinite=allow_nonfinite) as writer:
        if outcomes:
            writer.put_tables(0, outcomes)
        _fill(writer, pieces, wanted, table, progress)
    return open_store(out)


# -- labels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """What goes with the tokens of all pieces.

    Attributes
    ----------
    tokens : int
        Without padding.
    columns : dict of str to ndarray (token,)
    lengths : ndarray of int or None
        Tokens of each sequence, where the source has sequences.
    masks : list of ndarray of bool, or None
        For each piece, which of its tokens are no padding.
    left_out : dict of str to str
        Arrays that are no labels, and why.
    widths, kinds : dict
        Of each stage.
    """

    tokens: int
    columns: dict[str, np.ndarray]
    lengths: np.ndarray | None
    masks: list[np.ndarray | None]
    left_out: dict[str, str]
    widths: dict[str, int]
    kinds: dict[str, str]


def _tabled(pieces: Pieces, wanted: Sequence[Wanted]) -> _Table:
    """Read the labels of all pieces, and check that their arrays go together."""
    parts: list[dict[str, np.ndarray]] = []
    lengths: list[np.ndarray | None] = []
    masks: list[np.ndarray | None] = []
    left_out: dict[str, str] = {}
    widths: dict[str, int] = {}
    kinds: dict[str, str] = {}
    total = 0
    for opener in pieces.openers:
        piece = opener()
        n, own = _tokens(piece, wanted)
        for one in wanted:
            _check_array(one, piece[one.name], widths, kinds)
        columns = _columns(piece, wanted, n, own, left_out)
        mask = columns.pop("attention_mask", None)
        if mask is not None:
            mask = mask.astype(bool)
            columns = {name: values[mask] for name, values in columns.items()}
            if own is not None:
                own = np.add.reduceat(mask, np.cumsum(own) - own).astype(np.int64)
            n = int(np.count_nonzero(mask))
        masks.append(mask)
        parts.append(columns)
        lengths.append(own)
        total += n
    names = [n for n in parts[0] if all(n in p for p in parts)]
    left_out |= {n: "some pieces lack it" for p in parts for n in p if n not in names}
    if not total:
        raise UsageError("the source has no token")
    known = [own for own in lengths if own is not None]
    return _Table(
        total,
        {name: np.concatenate([p[name] for p in parts]) for name in names},
        np.concatenate(known) if len(known) == len(lengths) else None,
        masks,
        left_out,
        widths,
        kinds,
    )


def _outcomes(pieces: Pieces, table: _Table) -> dict[str, np.ndarray]:
    """Outcomes of the model's predictions, out of the columns of an export of ours."""
    names = {key: key.partition("/")[2] for key in TABLES if key.startswith("outcomes/")}
    own = {key: table.columns.get(name) for key, name in names.items()}
    sound = {
        key: values
        for key, values in own.items()
        if values is not None and values.dtype == TABLES[key].dtype
    }
    if not pieces.facts or len(sound) < len(names):
        return {}
    for name in names.values():
        del table.columns[name]
    return sound


def _tokens(piece: Piece, wanted: Sequence[Wanted]) -> tuple[int, np.ndarray | None]:
    """Tokens of a piece, and of its sequences."""
    missing = [w.name for w in wanted if w.name not in piece]
    if missing:
        raise UnknownNameError("array", missing[0], piece)
    first = wanted[0]
    n, own = first.tokens(piece[first.name]), first.lengths(piece[first.name])
    for other in wanted[1:]:
        if other.tokens(piece[other.name]) != n:
            raise UsageError(
                f"{shown(first.name)} has {n:,} tokens and {shown(other.name)} "
                f"{other.tokens(piece[other.name]):,}: arrays of one store have the same"
            )
    return n, own


def _check_array(one: Wanted, array: Array, widths: dict[str, int], kinds: dict[str, str]) -> None:
    if array.dtype not in _KINDS:
        raise UsageError(f"{shown(one.name)} is {array.dtype}: activations are {', '.join(_KINDS)}")
    width = one.width(array)
    if widths.setdefault(one.stage, width) != width:
        raise UsageError(
            f"{shown(one.name)} has {width} neurons and others of stage {one.stage} "
            f"{widths[one.stage]}: a stage has as many in all layers and pieces"
        )
    if kinds.setdefault(one.stage, _KINDS[array.dtype]) != _KINDS[array.dtype]:
        kinds[one.stage] = "float32"  # holds them all


def _columns(
    piece: Piece,
    wanted: Sequence[Wanted],
    n: int,
    lengths: np.ndarray | None,
    left_out: dict[str, str],
) -> dict[str, np.ndarray]:
    """Arrays with a value for each token or each sequence."""
    taken, columns = {w.name for w in wanted}, {}
    for name, array in piece.items():
        if name in taken:
            continue
        label = name.removeprefix("token.")
        values = _along_tokens(array, n, lengths)
        if values is None:
            left_out[name] = f"its shape {tuple(array.shape)} is that of no label"
        else:
            columns[ALIASES.get(label, label)] = values
    return columns


def _along_tokens(array: Array, n: int, lengths: np.ndarray | None) -> np.ndarray | None:
    shape = tuple(array.shape)
    if lengths is not None and shape == (len(lengths),) and array.lengths is None:
        return np.repeat(array.read(), lengths)
    if lengths is not None and len(shape) == 2 and shape[0] == len(lengths):
        return array.read().reshape(-1) if (lengths == shape[1]).all() else None
    if shape != (n,):
        return None
    own = array.lengths  # of rows that are lists: of the same tokens, or it is no label
    if own is not None and (lengths is None or not np.array_equal(own, lengths)):
        return None
    return array.read()


# -- writing ---------------------------------------------------------------------------------


def _specs(pieces: Pieces, wanted: Sequence[Wanted], table: _Table) -> list[StageSpec]:
    piece = pieces.openers[0]()
    specs = []
    for stage in dict.fromkeys(w.stage for w in wanted):
        own = [w for w in wanted if w.stage == stage]
        heads = {w.sizes(piece[w.name]).get("head") for w in own}
        numbers = tuple(sorted(layer for w in own for layer in w.layers))
        head = heads.pop() if len(heads) == 1 else None
        specs.append(StageSpec(stage, numbers, table.widths[stage], table.kinds[stage], head))
    return specs


def _provenance(pieces: Pieces, wanted: Sequence[Wanted], source: Any) -> dict[str, Any]:
    """Where the values come from; of an export also what it says of the model."""
    said = pieces.facts.get("model")
    said = said if isinstance(said, dict) else {}
    model = {k: said[k] for k in ("name", "class", "dtype", "revision") if _is_text(said.get(k))}
    before = pieces.facts.get("origin")
    origin = {
        "what": "import",
        "format": pieces.format,
        "source": Path(source).name if isinstance(source, (str, os.PathLike)) else "",
        "digest": pieces.digest(),
        "arrays": {w.name: [w.stage, list(w.layers)] for w in wanted},
        **({"of": before} if isinstance(before, dict) else {}),
    }
    return {"origin": origin, **({"model": model} if "name" in model else {})}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 1000


def _fill(
    writer: Writer,
    pieces: Pieces,
    wanted: Sequence[Wanted],
    table: _Table,
    progress: Callable[[int, int], None] | None,
) -> None:
    done = 0
    for opener, mask in zip(pieces.openers, table.masks, strict=True):
        piece = opener()
        n = wanted[0].tokens(piece[wanted[0].name])
        before = None if mask is None else np.concatenate([[0], np.cumsum(mask)])
        step = _step(piece, wanted, writer.plan.block_tokens)
        for start in range(0, n, step):
            stop = min(n, start + step)
            token = start if before is None else int(before[start])
            for one in wanted:
                for layer, values in zip(
                    one.layers, one.read(piece[one.name], start, stop), strict=True
                ):
                    kept = values if mask is None else values[mask[start:stop]]
                    if len(kept):
                        writer.put(one.stage, layer, done + token, _as_floats(kept))
            if progress is not None:
                progress(done + token, table.tokens)
        done += n if before is None else int(before[-1])
    if progress is not None:
        progress(done, table.tokens)


def _step(piece: Mapping[str, Array], wanted: Sequence[Wanted], block: int) -> int:
    """Tokens read at a time: at most a block, which all arrays fill before the next begins."""
    widest = max(len(w.layers) * w.width(piece[w.name]) for w in wanted)
    return max(1, min(block, READ_NBYTES // (4 * widest)))


def _as_floats(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype == np.float64 else values
