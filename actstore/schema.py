"""The words of the format: stages, dimensions, coordinates, attributes. No I/O.

FORMAT.md is the normative page; a test checks its tables against this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UnknownNameError, UsageError

__all__ = [
    "BLOCKS",
    "CHUNK_NBYTES",
    "DIMS",
    "FORMAT",
    "GRANULE_TOKENS",
    "KEYS",
    "METADATA_NBYTES",
    "MLP_STAGES",
    "MOMENTS",
    "RANKS",
    "STAGES",
    "STRATA",
    "TABLES",
    "TOKEN_COORDS",
    "Categorical",
    "TokenTable",
    "layer_name",
    "pick",
]

FORMAT = 1
"""Version of the on-disk format that this package writes; older ones stay readable."""

DIMS = ("layer", "token", "neuron")
"""Dimensions of every activation array."""

STAGES: dict[str, str] = {
    "hidden": "hidden state: 0 is the embeddings, i the input of block i, the last after the "
    "final norm",
    "resid_pre": "residual stream before the block",
    "resid_mid": "residual stream between attention and MLP",
    "resid_post": "residual stream after the block",
    "attn_z": "concatenated head outputs, just before the output projection",
    "attn_out": "what attention adds to the residual stream",
    "mlp_in": "input of the MLP, after its norm",
    "mlp_pre": "MLP before the nonlinearity (gated MLPs: the gate branch)",
    "mlp_post": "what enters the MLP's down projection (gated MLPs: act(gate) times up)",
    "mlp_out": "what the MLP adds to the residual stream",
}
"""Stage names and their meaning, in the order in which a block computes them."""

MLP_STAGES = ("mlp_in", "mlp_pre", "mlp_post", "mlp_out")
"""The four MLP stages: what `dump` keeps when no stages are named."""

TOKEN_COORDS: dict[str, str] = {
    "input": "index of the token in inputs/, where the tokens that were not kept are too",
    "sequence": "index of the token's sequence in sequences/",
    "position": "index of the token in its sequence",
    "token_id": "index of the token in vocabulary/",
}
"""Coordinates that every stage carries along `token`, beside the label columns."""

STRATA = ("first", "special", "rest")
"""Classes of tokens that sketches keep apart: position 0, special tokens elsewhere, the rest."""

MOMENTS: dict[str, str] = {
    "count": "values",
    "mean": "mean",
    "m2": "sum of squares about the mean",
    "m3": "sum of cubes about the mean",
    "m4": "sum of fourth powers about the mean",
    "min": "smallest value",
    "max": "largest value",
    "zeros": "exact zeros",
    "positives": "values above zero",
}
"""What sketches keep of every neuron."""

KEYS = 2**16
"""Entries of a count table: one for each value of an element's upper 16 bits."""

RANKS = 20
"""Length of a sketch's lists of largest and smallest values."""

GRANULE_TOKENS = 2**14
"""Least number of tokens that a zone map's entry is about."""


BLOCKS = 2**20
"""Most blocks of a store; what is larger is cut into several, seen as one by `actstore.concat`."""

CHUNK_NBYTES = 2**29
"""Most bytes of a chunk, decoded; of the inner chunks of activations, an eighth of it."""

METADATA_NBYTES = 2**25
"""Most bytes of any `zarr.json` and of the manifest: more are not read."""


@dataclass(frozen=True)
class TokenTable:
    """An array of what the model itself says of every token.

    Attributes
    ----------
    dims : tuple of str
        ``("token",)`` or ``("token", "rank")``.
    dtype : str
        "int32" or "float32".
    units : str
    meaning : str
    """

    dims: tuple[str, ...]
    dtype: str
    units: str
    meaning: str

    @property
    def ranked(self) -> bool:
        """Whether a token has several values, one for each of the likeliest next tokens."""
        return "rank" in self.dims


TABLES: dict[str, TokenTable] = {
    "predictions/token_id": TokenTable(
        ("token", "rank"), "int32", "1", "next tokens that the model finds likeliest, best first"
    ),
    "predictions/probability": TokenTable(("token", "rank"), "float32", "1", "their probabilities"),
    "outcomes/loss": TokenTable(
        ("token",), "float32", "nat", "-ln of the probability of the true next token"
    ),
    "outcomes/entropy": TokenTable(
        ("token",), "float32", "nat", "entropy of the distribution of the next token"
    ),
    "outcomes/rank": TokenTable(
        ("token",), "int32", "1", "tokens that the model finds likelier than the true next token"
    ),
}
"""The model's own predictions, and how they come out: arrays that a dump may be asked for."""


@dataclass(frozen=True)
class Categorical:
    """A column of few distinct values: ``values[codes]``.

    Attributes
    ----------
    codes : ndarray of int
        One index into `values` for each row.
    values : ndarray
        The distinct values (usually strings).

    Examples
    --------
    >>> Categorical.of(["comma", "stop", "comma"]).codes.tolist()
    [0, 1, 0]
    """

    codes: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, column: Sequence[str]) -> Categorical:
        """Code a column; values in order of first appearance."""
        index: dict[str, int] = {}
        codes = np.fromiter((index.setdefault(v, len(index)) for v in column), np.int32)
        values = np.empty(len(index), dtype=object)
        values[:] = list(index)
        return cls(codes, values)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: np.ndarray | slice) -> Categorical:
        return Categorical(self.codes[rows], self.values)

    def decode(self) -> np.ndarray:
        """The column itself, as an object array."""
        return self.values[self.codes]


def layer_name(stage: str, layer: int) -> str:
    """Display name of a layer.

    Examples
    --------
    >>> layer_name("hidden", 0), layer_name("hidden", 1), layer_name("mlp_post", 1)
    ('emb', 'h.0', '1')
    """
    if stage != "hidden":
        return str(layer)
    return "emb" if layer == 0 else f"h.{layer - 1}"


def pick(spec: str | int | Sequence[int] | None, available: Sequence[int], kind: str) -> list[int]:
    """Resolve a slice expression such as ``"0,3-5"`` or ``"-1"`` against what is there.

    Parameters
    ----------
    spec : str, int, sequence of int or None
        Comma list of numbers and inclusive ranges ``a-b``; a negative number counts from the
        end of `available`; None takes everything.
    available : sequence of int
        The coordinate's values, ascending.
    kind : str
        "layer" or "neuron", for the message.

    Returns
    -------
    list of int
        Values out of `available`, ascending, without repeats.

    Raises
    ------
    UnknownNameError
        A value that is not there.
    UsageError
        Text that is not a list of numbers and ranges.

    Examples
    --------
    >>> pick("0,3-5", range(12), "layer"), pick("-1", range(12), "layer")
    ([0, 3, 4, 5], [11])
    """
    present = [int(a) for a in available]
    if spec is None:
        return present
    if isinstance(spec, str):
        # One after another: of a long range the first number that is not there ends it.
        wanted = (n for part in spec.split(",") for n in _numbers(part.strip(), spec, kind))
    else:
        wanted = (int(n) for n in np.atleast_1d(np.asarray(spec)).tolist())
    known = set(present)
    found = set()
    for n in wanted:
        value = present[n] if -len(present) <= n < 0 else n
        if value not in known:
            shown = present if len(present) <= 64 else [f"{present[0]} to {present[-1]}"]
            raise UnknownNameError(kind, n, shown, f"Ask for {kind}s like '0,3-5' or '-1'.")
        found.add(value)
    return sorted(found)


def _numbers(part: str, spec: str, kind: str) -> Iterable[int]:
    match = re.fullmatch(r"(-?\d{1,9})|(\d{1,9})-(\d{1,9})", part)
    if not match:
        raise UsageError(
            f"{kind}s {spec!r}: {part!r} is not a number or a range; write for example '0,3-5' "
            "or '-1'"
        )
    single, low, high = match.groups()
    if single:
        return [int(single)]
    if int(high) < int(low) or int(high) - int(low) > 10_000_000:
        raise UsageError(f"{kind}s {spec!r}: the range {part!r} is empty; write it as '3-5'")
    return range(int(low), int(high) + 1)
