"""What a plan comes to in an object store: every key, and every request of a dump. No I/O.

Counted from the layout alone, so that a run of any size can be looked at before it is begun;
`tests/test_scaling.py` holds keys and requests against real dumps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from . import journal
from .errors import PlanError
from .journal import Record, ShardRecord
from .plan import Plan
from .schema import BLOCKS, GRANULE_TOKENS, METADATA_NBYTES, TOKEN_COORDS
from .shard import ShardSummary
from .skeleton import LABEL_CHUNK

__all__ = [
    "KINDS",
    "check_one_store",
    "count",
    "keys",
    "manifest_nbytes",
    "record_nbytes",
    "requests",
]

KINDS = ("shards", "records", "labels", "metadata", "sketches", "journal")
"""What the objects of a sealed store are."""

_LISTS = ("largest_value", "largest_token", "smallest_value", "smallest_token")
_TOTALS = ("moments", "zones", "counts", "norm", *_LISTS)


def keys(plan: Plan) -> Iterator[tuple[str, str]]:
    """Every object of the sealed store of a plan without tables, vocabulary and columns of text.

    Parameters
    ----------
    plan : Plan
        Of a corpus as `Corpus.of_lengths` makes it, but for special tokens in every chunk.

    Yields
    ------
    kind : str
        One of `KINDS`.
    key : str
        At most: a chunk that is all zeros is not stored.

    Examples
    --------
    >>> from collections import Counter
    >>> from actstore import Plan, StageSpec
    >>> from actstore.corpus import Corpus
    >>> plan = Plan.build(Corpus.of_lengths([100] * 50), [StageSpec("mlp_post", (0, 1), 64)])
    >>> Counter(kind for kind, _ in keys(plan))["shards"] == plan.shards
    True
    """
    for stage in plan.stages:
        for layer in range(len(stage.layers)):
            for block in range(plan.n_blocks):
                yield "shards", stage.key(layer, block)
    for index in range(len(plan.passes)):
        for block in range(plan.n_blocks):
            yield "records", journal.record_key(index, block)
    yield from _others(plan)


def count(plan: Plan) -> Counter[str]:
    """How many objects of each kind `keys` gives, however many they are.

    Examples
    --------
    >>> from actstore import Plan, StageSpec
    >>> from actstore.corpus import Corpus
    >>> plan = Plan.build(Corpus.of_lengths([100] * 50), [StageSpec("mlp_post", (0, 1), 64)])
    >>> count(plan) == Counter(kind for kind, _ in keys(plan))
    True
    """
    blocks = {"shards": plan.shards, "records": plan.n_blocks * len(plan.passes)}
    return Counter(blocks) + Counter(kind for kind, _ in _others(plan))


def _others(plan: Plan) -> Iterator[tuple[str, str]]:
    """All but shards and records: as many as labels and sketches have chunks."""
    yield "journal", journal.PLAN
    yield "journal", journal.MANIFEST
    yield "metadata", "zarr.json"
    yield from _labels(plan)
    if plan.sketch:
        yield from _sketches(plan)


def _labels(plan: Plan) -> Iterator[tuple[str, str]]:
    inputs, sequences = len(plan.corpus.token_ids), plan.corpus.n_sequences
    columns = {"token_id": 0, "sequence": 0, "position": 0, "special": 0, "kept": 0}
    yield from _group("inputs", dict.fromkeys(columns, inputs))
    yield from _group("sequences", dict.fromkeys(("start", "length"), sequences))
    for stage in plan.stages:
        names = ("layer_name",) if stage.name == "hidden" else ()
        along = dict.fromkeys(TOKEN_COORDS, plan.n_tokens)
        own = {"layer": 1, "neuron": stage.layout.width, **dict.fromkeys(names, 1)}
        heads = {"head": stage.layout.width} if stage.heads else {}
        yield from _group(stage.name, along | own | heads)
        yield "metadata", f"{stage.folder}/zarr.json"


def _group(name: str, sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    yield "metadata", f"{name}/zarr.json"
    for column, size in sizes.items():
        yield "metadata", f"{name}/{column}/zarr.json"
        for chunk in range(-(-size // LABEL_CHUNK)):
            yield "labels", f"{name}/{column}/c/{chunk}"


def _sketches(plan: Plan) -> Iterator[tuple[str, str]]:
    granule = plan.block_tokens * max(1, GRANULE_TOKENS // plan.block_tokens)
    granules = range(-(-plan.n_tokens // granule))
    yield "metadata", "sketch/zarr.json"
    for stage in plan.stages:
        folder = f"sketch/{stage.name}"
        yield from _group(folder, dict.fromkeys(("stratum", "layer", "neuron", "moment"), 1))
        for name in _TOTALS:
            yield "metadata", f"{folder}/{name}/zarr.json"
        yield "sketches", f"{folder}/moments/c/0/0/0/0"
        yield "sketches", f"{folder}/counts/c/0/0/0"
        for g in granules:
            yield "sketches", f"{folder}/zones/c/{g}/0/0/0/0"
            yield "sketches", f"{folder}/norm/c/0/{g}"
        for name in _LISTS:
            for layer in range(len(stage.layers)):
                yield "sketches", f"{folder}/{name}/c/0/{layer}/0/0"


def requests(plan: Plan, objects: Counter[str]) -> Counter[str]:
    """Requests of one process that dumps a whole plan into an object store and seals it.

    Parameters
    ----------
    plan : Plan
    objects : Counter
        How many of each kind there are: see `count`.

    Returns
    -------
    Counter
        By "GET", "PUT", "HEAD", "LIST", "DELETE". Listings of journals of more than 1,000 objects
        take a request for each 1,000.
    """
    records = objects["records"]
    parts = sum(bool(layers) for group in plan.passes for layers in group.values())
    parts *= plan.n_blocks * plan.sketch
    groups = 3 + len(plan.stages) + plan.sketch * (1 + len(plan.stages))  # root, inputs, sequences
    begun = objects["labels"] + objects["metadata"] - groups
    journaled = records + parts + 2
    return Counter(
        {
            # What is begun and what is sealed is put unless it is there already; records are
            # looked for when the dump begins and twice when it ends; parts are merged.
            "GET": 1 + begun + records + 2 * records + parts + groups + 1,
            "PUT": objects.total() + parts,
            "HEAD": 3,
            "LIST": 1 + -(-journaled // 1000),
            "DELETE": records + parts,  # records that may be stale, before; parts, after
        }
    )


def check_one_store(plan: Plan) -> None:
    """Refuse a plan that is too large for one store, which readers would refuse.

    Raises
    ------
    PlanError
        Says into how many the corpus is best split.
    """
    parts = -(-plan.n_blocks // BLOCKS)
    if parts == 1:
        parts = -(-manifest_nbytes(plan) // METADATA_NBYTES)
    if parts > 1:
        raise PlanError(
            f"{plan.n_tokens:,} tokens in {plan.n_blocks:,} blocks are too many for one store: "
            f"dump at least {parts} parts of the corpus, each a store, which actstore.concat shows "
            "as one, or raise --buffer"
        )


def record_nbytes(plan: Plan) -> int:
    """Bytes of a block's commit record, about."""
    summary = ShardSummary(-12.34567, 12.34567, 0)
    shards = [
        ShardRecord(stage.key(i, plan.n_blocks), stage.layout.image_nbytes, 2**31, summary)
        for stage in plan.stages
        for i in range(len(stage.layers))
    ]
    return len(Record(0, plan.n_blocks, tuple(shards)).encode())


def manifest_nbytes(plan: Plan) -> int:
    """Bytes of the manifest, about: it lists all objects but shards and the journal's."""
    listed = (key for kind, key in _others(plan) if kind != "journal")
    return sum(len(key) + len('"":[1234567,1234567890],') for key in listed)
