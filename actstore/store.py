"""Open a store: labelled lazy arrays, tokens, context text, verification."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr
import zarr

from . import journal
from .aliases import stage_of
from .arrays import ShardedArray
from .errors import (
    CorruptStoreError,
    NotAStoreError,
    StoreError,
    UnfinishedStoreError,
    UnknownNameError,
    UsageError,
)
from .guard import Guard, stamp_of
from .like import select_like
from .places import absolute, is_url, last_name, storage_at
from .root import AGAIN, check_hash, read_manifest, read_root
from .schema import METADATA_NBYTES, STAGES, TABLES, TOKEN_COORDS, Categorical, pick
from .shard import Layout
from .sketched import Sketched, Sketches, strata_codes
from .storage import Storage

if TYPE_CHECKING:
    from .loader import Loader

__all__ = ["Store", "open_store"]


class Store:
    """A sealed store, read only. Open one with `actstore.open`.

    Indexing with a stage name gives a lazy `xarray.DataArray` (layer, token, neuron).

    Attributes
    ----------
    path : str
        Where it is.
    attrs : dict
        The root's ``actstore`` attribute: format, model, tokenizer, capture, versions ...

    Examples
    --------
    >>> import actstore, tempfile
    >>> corpus = actstore.build_corpus([[1, 2, 3], [4, 5]])
    >>> plan = actstore.Plan.build(corpus, [actstore.StageSpec("mlp_post", (0, 1), width=32)])
    >>> folder = tempfile.TemporaryDirectory()
    >>> with actstore.Writer(f"{folder.name}/run.zarr", plan) as writer:
    ...     for layer in (0, 1):
    ...         writer.put("mlp_post", layer, token=0, values=np.ones((5, 32), "float32"))
    >>> store = actstore.open(f"{folder.name}/run.zarr")
    >>> store.stages, dict(store["mlp_post"].sizes), store.tokens["position"].values.tolist()
    (['mlp_post'], {'layer': 2, 'token': 5, 'neuron': 32}, [0, 1, 2, 0, 1])
    >>> store.decode(4, before=1)
    '4 5'
    """

    def __init__(self, path: str, root: Mapping[str, Any], guard: Guard) -> None:
        self.path = path
        self.attrs: dict[str, Any] = root["attributes"]["actstore"]
        self._nodes: dict[str, Any] = root["consolidated_metadata"]["metadata"]
        self._guard = guard

    # -- what there is -----------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[str]:
        """Stage names, in the order in which a block computes them."""
        found = [k.removesuffix("/activation") for k in self._nodes if k.endswith("/activation")]
        order = {name: i for i, name in enumerate(STAGES)}
        return sorted(found, key=lambda name: (order.get(name, len(order)), name))

    @property
    def id(self) -> str:
        """Digest of all that the store holds."""
        return self.attrs["id"]

    @property
    def n_tokens(self) -> int:
        """Tokens that are kept."""
        return self.attrs["corpus"]["tokens"]

    @property
    def name(self) -> str:
        """The last part of its path."""
        return last_name(self.path)

    def __repr__(self) -> str:
        lines = (
            [f"<actstore.Store {self.name}: {self.attrs['model']['name']}>"] if self._model else []
        )
        lines = lines or [f"<actstore.Store {self.name}>"]
        lines.append(f"{self.n_tokens:,} tokens of {self.attrs['corpus']['sequences']:,} sequences")
        for stage, row in self.info()["stages"].items():
            layers = row["layers"]
            lines.append(
                f"  {stage:<11} {len(layers):>3} layers × {row['width']:>6,} neurons  "
                f"{row['dtype']:<9} {row['nbytes'] / 1e6:>10,.1f} MB"
            )
        lines += [f"  {line}" for line in self._own_words()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(stage)}</th>"
            f"<td>{len(row['layers'])}</td>"
            f"<td>{row['width']:,}</td><td>{html.escape(row['dtype'])}</td>"
            f"<td>{row['nbytes'] / 1e6:,.1f}</td>"
            f"<td style='text-align:left'>{html.escape(row['meaning'])}</td></tr>"
            for stage, row in self.info()["stages"].items()
        )
        model = html.escape(self.attrs["model"]["name"]) if self._model else "activations"
        return (
            f"<div><b>{html.escape(self.name)}</b>: {model}, {self.n_tokens:,} tokens of "
            f"{self.attrs['corpus']['sequences']:,} sequences"
            "<table><tr><th>stage</th><th>layers</th><th>neurons</th><th>type</th><th>MB</th>"
            f"<th>meaning</th></tr>{rows}</table>{'<br>'.join(self._own_words())}</div>"
        )

    def _own_words(self) -> list[str]:
        """What the store has of the model's own predictions, in words."""
        facts, lines = self.info(), []
        if facts["predictions"]:
            lines.append(f"predictions: the {facts['predictions']} likeliest next tokens of each")
        if facts["outcomes"]:
            lines.append(f"outcomes: {', '.join(facts['outcomes'])} of the true next token")
        return lines

    @property
    def _model(self) -> Mapping[str, Any] | None:
        return self.attrs.get("model")

    @property
    def _config(self) -> Mapping[str, Any] | None:
        """The model's configuration."""
        return (self._model or {}).get("config")

    def info(self) -> dict[str, Any]:
        """What the store holds, JSON only: stages with layers, widths, types and bytes ...

        ``predictions`` is how many of the model's own next tokens are kept of every token (0 for
        none), ``outcomes`` the names of the columns on how its prediction came out.

        Returns
        -------
        dict
        """
        stages = {}
        for stage in self.stages:
            node = self._nodes[f"{stage}/activation"]
            kept = self.attrs["capture"]["stages"][stage]
            item = 2 if kept["dtype"] in ("bfloat16", "float16") else 4
            stages[stage] = {
                "layers": kept["layers"],
                "width": kept["width"],
                "dtype": kept["dtype"],
                "nbytes": int(np.prod(node["shape"], dtype=np.int64)) * item,
                "meaning": node["attributes"].get("description", ""),
            }
        return {
            "name": self.name,
            "id": self.id,
            "format": self.attrs["format"],
            "tokens": self.n_tokens,
            "sequences": self.attrs["corpus"]["sequences"],
            "inputs": self.attrs["corpus"]["inputs"],
            "block_tokens": self.attrs["capture"]["block_tokens"],
            "stages": stages,
            "labels": self.labels,
            "predictions": self.attrs["capture"].get("predictions", 0),
            "outcomes": self._table_names("outcomes"),
            **{k: self.attrs[k] for k in ("model", "tokenizer", "versions") if k in self.attrs},
            "notes": self.attrs.get("notes", {}),
        }

    @property
    def labels(self) -> list[str]:
        """Names of the label columns that tokens carry."""
        members = [k.partition("/")[2] for k in self._nodes if k.startswith(f"{self.stages[0]}/")]
        own = {"activation", "layer", "neuron", "layer_name", "head", *TOKEN_COORDS}
        return [name for name in members if name not in own]

    # -- data --------------------------------------------------------------------------------

    def __getitem__(self, stage: str) -> xr.DataArray:
        """A stage's activations, lazily, with all token coordinates attached.

        A name of TransformerLens, as ``blocks.3.mlp.hook_post``, gives that layer's.
        """
        hint = f"This is what {self.name} holds."
        stage, layer = stage_of(stage, self.stages, self._config, hint=hint)
        if stage not in self._labelled:
            values = self._dataset(stage)["activation"].rename(stage)
            if self.outcomes is not None:
                values = values.assign_coords(self.outcomes.data_vars)
            self._labelled[stage] = values
        values = self._labelled[stage].copy()  # the caller may change it
        if layer is None:
            return values
        pick(layer, values["layer"].values.tolist(), "layer")
        return values.sel(layer=layer)

    def __contains__(self, stage: object) -> bool:
        try:
            return isinstance(stage, str) and bool(stage_of(stage, self.stages, self._config))
        except UsageError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def sel_like(self, other: xr.DataArray | xr.Dataset, stage: str | None = None) -> xr.DataArray:
        """The activations at the layers, tokens and neurons of another array, lazily.

        Parameters
        ----------
        other : DataArray or Dataset
            Its coordinates layer and neuron are looked up; tokens by its coordinate ``token``
            (numbers of this store's), else by ``input``, which what was selected from a store has,
            of another store over the same texts, too. Of what it has no coordinates for, all.
        stage : str, optional
            Default the array's name.

        Returns
        -------
        DataArray
            In the other's order; without the dims at which it stands at one place.

        Raises
        ------
        UnknownNameError
            A stage, layer or neuron that is not there.
        UsageError
            Tokens that are not there, or that are others: sequence, position and token_id are
            compared where both have them.

        Examples
        --------
        >>> import tempfile, actstore
        >>> folder = tempfile.TemporaryDirectory()
        >>> stages = [actstore.StageSpec(name, (0, 1), 16) for name in ("mlp_pre", "mlp_post")]
        >>> plan = actstore.Plan.build(actstore.build_corpus([[7, 8, 9]]), stages)
        >>> with actstore.Writer(f"{folder.name}/run.zarr", plan) as writer:
        ...     for name in ("mlp_pre", "mlp_post"):
        ...         for layer in (0, 1):
        ...             writer.put(name, layer, 0, np.full((3, 16), layer, "float32"))
        >>> store = actstore.open(f"{folder.name}/run.zarr")
        >>> some = store["mlp_pre"].sel(layer=1).isel(token=[2, 0])
        >>> store.sel_like(some, "mlp_post").sizes
        Frozen({'token': 2, 'neuron': 16})
        >>> folder.cleanup()
        """
        name = stage if stage is not None else getattr(other, "name", None)
        if name is None:
            raise UsageError(f"say which stage, as stage={self.stages[0]!r}: other has no name")
        return select_like(self[str(name)], other)

    def array(self, stage: str) -> ShardedArray | zarr.Array:
        """A stage's activations as a sliceable array, every checksum checked, without labels.

        Parameters
        ----------
        stage : str
            One of `stages`.

        Returns
        -------
        ShardedArray or zarr.Array
            (layer, token, neuron); zarr's own where the layout is not actstore's.
        """
        node = self._guard.node(f"{stage}/activation")
        layout = Layout.of_array(node)
        if layout is None:  # a layout that is not ours still opens through zarr
            return self._guard.array(f"{stage}/activation")
        shape = tuple(node["shape"])
        return ShardedArray(self.path, f"{stage}/activation", shape, layout)

    def loader(
        self,
        stage: str | Sequence[str],
        layer: int | str | Sequence[int] | None = None,
        batch_size: int = 4096,
        *,
        shuffle: bool = True,
        seed: int = 0,
        tokens: str | np.ndarray | None = None,
        with_tokens: bool = False,
        device: Any = None,
        dtype: Any = "float32",
        buffer: int | str = "1GiB",
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> Loader:
        """Shuffled batches for training, as torch tensors, read ahead by a thread.

        Every iteration is an epoch: each token once, in an order that follows from (seed, epoch).
        Runs of tokens (rows of inner chunks, some thousand tokens) are drawn at random and fill a
        window of half the buffer, within which order is uniformly random; where the data fits into
        a window, that is a full shuffle. Where a window holds fewer than 16 runs, a warning says
        so: batches are then of few texts, and training learns worse.

        The result is a `torch.utils.data.IterableDataset`: iterate over it, or hand it to
        ``DataLoader(loader, batch_size=None, num_workers=2)``, whose workers share the tokens and
        the buffer. Ranks of torch.distributed share them too.

        Parameters
        ----------
        stage : str or sequence of str
            Several give a dict of tensors over the same tokens.
        layer : int, str or sequence of int
            One layer gives tensors (batch, neuron), several (``[3, 4]`` or ``"0,3-5"``) tensors
            (batch, layer, neuron).
        batch_size : int
            Tokens; the last batch has the rest, unless `drop_last`.
        shuffle : bool
            Random order; else the store's.
        seed : int
            Of the order.
        tokens : str or ndarray of bool, optional
            A token expression or a mask: which tokens; default all.
        with_tokens : bool
            Give pairs of the batch and its token numbers (batch,), to look up labels by.
        device : torch.device or str, optional
            Where tensors go; copies to a GPU are asynchronous, from pinned memory.
        dtype : str or torch.dtype
            Element type of the tensors.
        buffer : int or str
            Bounds the host's memory: two windows, and the batches that wait (at most four). Readers
            hold up to 16 MiB besides.
        drop_last : bool
            Leave out the last, smaller batch, and what would give ranks unequal numbers of them.
        rank, world_size : int, optional
            Default torch.distributed's, where it is initialised.

        Returns
        -------
        Loader
            With `len`, `set_epoch`, `state_dict` and `load_state_dict`.

        Raises
        ------
        UnknownNameError
            A stage, layer or column that is not there.
        UsageError
            A buffer that is too small, no token, no batch ...

        Examples
        --------
        >>> import tempfile, actstore
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/run.zarr"
        >>> plan = actstore.Plan.build(
        ...     actstore.build_corpus([[1, 2, 3]]), [actstore.StageSpec("mlp_post", (0,), 16)])
        >>> with actstore.Writer(path, plan) as writer:
        ...     writer.put("mlp_post", 0, 0, np.ones((3, 16), "float32"))
        >>> for batch in actstore.open(path).loader("mlp_post", layer=0, batch_size=2):
        ...     print(tuple(batch.shape))
        (2, 16)
        (1, 16)
        >>> folder.cleanup()
        """
        from .loader import Loader  # here, for it loads torch

        return Loader(
            self,
            stage,
            layer,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            tokens=tokens,
            with_tokens=with_tokens,
            device=device,
            dtype=dtype,
            buffer=buffer,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )

    def heads(self, stage: str) -> np.ndarray | None:
        """Attention head of each neuron, where a stage is made of heads.

        Parameters
        ----------
        stage : str
            One of `stages`.

        Returns
        -------
        ndarray of int (neuron,) or None
        """
        if f"{stage}/head" not in self._nodes:
            return None
        return self._values(f"{stage}/head")

    def column(self, name: str) -> np.ndarray | Categorical:
        """A column over the kept tokens, in memory: a coordinate, a label, ``token_text`` ...

        Parameters
        ----------
        name : str
            A coordinate or label of the tokens, ``special``, ``token_text``, a column of
            `sequences` (``length``, labels of many values) or of `outcomes` (``loss`` ...).

        Returns
        -------
        ndarray or Categorical (token,)

        Raises
        ------
        UnknownNameError
            With the columns that there are.
        """
        stage = self.stages[0]
        if name in self._columns[stage]:
            return self._read(f"{stage}/{name}")
        if name == "token_text" and self.vocabulary is not None:
            return Categorical(self._index(f"{stage}/token_id", "vocab"), self.vocabulary)
        if name in self._columns["inputs"]:
            return self._read(f"inputs/{name}")[self._index(f"{stage}/input", "inputs")]
        if name in self._columns["sequences"]:
            return self._read(f"sequences/{name}")[self._index(f"{stage}/sequence", "sequences")]
        if name in self._table_names("outcomes"):
            return self._read(f"outcomes/{name}")
        raise UnknownNameError("column", name, self.columns)

    @property
    def columns(self) -> list[str]:
        """Every name that `column` knows."""
        texts = ["token_text"] if self.vocabulary is not None else []
        groups = (self.stages[0], "inputs", "sequences")
        every = [name for group in groups for name in self._columns[group]]
        return [*dict.fromkeys(every), *self._table_names("outcomes"), *texts]

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        """Names of the columns along tokens, inputs and sequences."""
        dims = {self.stages[0]: "token", "inputs": "input", "sequences": "sequence"}
        return {
            group: [
                key.partition("/")[2]
                for key, node in self._nodes.items()
                if key.startswith(f"{group}/") and node.get("dimension_names") == [dim]
            ]
            for group, dim in dims.items()
        }

    def sketched(self, stage: str) -> Sketches | None:
        """A stage's sketches, which queries ask; `actstore sketch` makes them.

        Parameters
        ----------
        stage : str
            One of `stages`.

        Returns
        -------
        Sketches or None
            None where the store has none.
        """
        if f"sketch/{stage}/moments" not in self._nodes:
            return None
        return Sketched(*self._guard.place, stage)

    @cached_property
    def strata(self) -> tuple[tuple[str, ...], np.ndarray] | None:
        """Names of the classes of tokens that the sketches keep apart, and each token's class."""
        settings = self.attrs.get("sketch")
        if settings is None:
            return None
        label = self.column(settings["by"]) if settings["by"] else None
        position, special = self.column("position"), self.column("special")
        if isinstance(position, Categorical) or isinstance(special, Categorical):
            return None
        strata = strata_codes(position, special, label if isinstance(label, Categorical) else None)
        for stage in self.stages:
            key = f"sketch/{stage}/stratum"
            if key in self._nodes and tuple(self._values(key)) != strata[0]:
                raise self._damaged(key, "does not name the classes of tokens that there are")
        return strata

    @cached_property
    def _labelled(self) -> dict[str, xr.DataArray]:
        """Stages that have been asked for: to open one takes longer than to read a neuron."""
        return {}

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        """Arrays of columns that have been opened."""
        return {}

    def _values(self, key: str, where: Any = Ellipsis) -> np.ndarray:
        """A column, or some of it."""
        if key not in self._arrays:
            self._arrays[key] = self._guard.array(key)
        array = self._arrays[key]
        if where is Ellipsis:
            _check_memory(key, array.size * array.dtype.itemsize)
        return np.asarray(array[where])

    def _index(self, key: str, of: str) -> np.ndarray:
        """A column that counts rows of another table, or codes of labels: all within it."""
        if of == "vocab":
            words = self._nodes.get("vocabulary/token_text")
            size = words["shape"][0] if words else 0
        else:
            size = self.attrs["corpus"][of]
        return self._within(key, self._values(key), size)

    def _within(self, key: str, values: np.ndarray, size: int) -> np.ndarray:
        sound = values.dtype.kind in "iu" and (
            not values.size or (int(values.min()) >= 0 and int(values.max()) < size)
        )
        if not sound:
            raise self._damaged(key, f"holds what is no index below {size:,}")
        return values

    def _damaged(self, key: str, what: str) -> CorruptStoreError:
        return CorruptStoreError(f"{key} of {self.path} is damaged: it {what}. {AGAIN}")

    def _read(self, key: str) -> np.ndarray | Categorical:
        values = self._values(key)
        attributes = self._nodes[key]["attributes"]
        if "label_values" in attributes:
            labels = np.array(attributes["label_values"], dtype=object)
            return Categorical(self._within(key, values, len(labels)), labels)
        if attributes.get("dtype") == "bool":
            return values.astype(bool)
        if values.dtype.kind not in "bifu":
            return Categorical.of(list(values))
        return values

    def _dataset(self, stage: str) -> xr.Dataset:
        dataset = self._group(stage)
        array = self.array(stage)
        if not isinstance(array, ShardedArray):
            return dataset
        shape, layout = array.shape, array.layout
        lazy = da.from_array(
            array,
            chunks=((1,) * shape[0], _chunks(shape[1], layout.rows), (shape[2],)),
            asarray=False,  # not fancy=False: dask would read whole shards for every slice
            name=f"{stage}-{self.id}",
            meta=np.empty((0, 0, 0), array.dtype),
        )
        return dataset.assign(activation=dataset["activation"].copy(data=lazy))

    def _group(self, group: str) -> xr.Dataset:
        try:
            return xr.open_zarr(self._guard, group=group, consolidated=False, chunks={})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise CorruptStoreError(
                f"{group} of {self.path} cannot be read: {str(error)[:200]}. {AGAIN}"
            ) from None

    @property
    def tree(self) -> xr.DataTree:
        """Everything as one `xarray.DataTree`, lazily."""
        groups = [k for k, v in self._nodes.items() if v["node_type"] == "group"]
        return xr.DataTree.from_dict(
            {g: self._dataset(g) if g in self.stages else self._group(g) for g in groups}
        )

    @cached_property
    def tokens(self) -> xr.Dataset:
        """Columns of the kept tokens (token,), lazily: of `store.tokens.to_dataframe()`, too.

        input, sequence, position, token_id, the token's text, labels, outcomes.
        """
        group = self._group(self.stages[0]).reset_coords()
        columns = _decoded(group[[*TOKEN_COORDS, *self.labels]])
        if self.vocabulary is not None and "token_text" not in columns:
            columns = columns.assign(token_text=_looked_up(self.vocabulary, columns["token_id"]))
            columns = columns[[*TOKEN_COORDS, "token_text", *self.labels]]
        return columns if self.outcomes is None else columns.assign(self.outcomes.data_vars)

    @cached_property
    def predictions(self) -> xr.Dataset | None:
        """The model's own likeliest next tokens (token, rank), best first: token_id, probability.

        None where they were not asked for (``dump --predictions N``).
        """
        return self._tables("predictions")

    @cached_property
    def outcomes(self) -> xr.Dataset | None:
        """How the model's prediction of each next token came out (token,): loss, entropy, rank.

        Rank 0 is the likeliest token. After the last token of a sequence there is none: its loss
        is NaN, its rank -1. None where they were not asked for (``dump --outcomes``).
        """
        return self._tables("outcomes")

    def _tables(self, group: str) -> xr.Dataset | None:
        names = self._table_names(group)
        return self._group(group)[names] if names else None

    def _table_names(self, group: str) -> list[str]:
        """Arrays of predictions or outcomes that there are, as FORMAT.md lists them."""
        found = [key.partition("/") for key in TABLES if key in self._nodes]
        return [name for own, _, name in found if own == group]

    @cached_property
    def inputs(self) -> xr.Dataset:
        """Every input token (input,), kept or not."""
        return _decoded(self._group("inputs"))

    @cached_property
    def sequences(self) -> xr.Dataset:
        """One row a sequence (sequence,): text, start, length, labels."""
        return _decoded(self._group("sequences"))

    @cached_property
    def vocabulary(self) -> np.ndarray | None:
        """Text of each token id; None where no tokenizer was given."""
        if "vocabulary" not in self._nodes:
            return None
        return self._group("vocabulary")["token_text"].values

    def decode(self, token: int, before: int = 10, after: int = 0) -> str:
        """Text around a kept token, from all inputs of its sequence, kept or not.

        Parameters
        ----------
        token : int
            Index along the store's token dimension.
        before, after : int
            How many input tokens to show on either side, within the sequence.

        Returns
        -------
        str
            The original text where the store has it; else the tokens' own texts, one after
            another (or their ids, where there was no tokenizer).
        """
        if not -self.n_tokens <= token < self.n_tokens:
            raise UsageError(f"token {token} is not within the store's {self.n_tokens:,}")
        stage, token = self.stages[0], token % self.n_tokens
        at = int(self._values(f"{stage}/input", token))
        sequence = int(self._values(f"{stage}/sequence", token))
        if not 0 <= sequence < self.attrs["corpus"]["sequences"]:
            raise self._damaged(f"{stage}/sequence", f"says {sequence} at token {token}")
        start = int(self._values("sequences/start", sequence))
        stop = start + int(self._values("sequences/length", sequence))
        if not 0 <= start <= at < stop <= self.attrs["corpus"]["inputs"]:
            raise self._damaged("sequences", f"puts token {token} at {at} of {start} to {stop}")
        window = slice(max(start, at - before), min(stop, at + after + 1))
        has = {"sequences/text", "inputs/char_start"} <= self._nodes.keys()
        text = str(self._values("sequences/text", sequence)) if has else ""
        if text:
            spans = np.stack(
                [self._values(f"inputs/char_{end}", window) for end in ("start", "end")]
            )
            if spans.size and not 0 <= spans.min() <= spans.max() <= len(text):
                raise self._damaged("inputs/char_start", f"lies outside of the text of {sequence}")
            spans = spans[:, spans[0] < spans[1]]  # special tokens have no text
            return text[spans[0].min() : spans[1].max()] if spans.size else ""
        ids = self._values("inputs/token_id", window)
        if self.vocabulary is None:
            return " ".join(map(str, ids))
        return "".join(self.vocabulary[self._within("inputs/token_id", ids, len(self.vocabulary))])


def _check_memory(key: str, nbytes: int) -> None:
    """Refuse what the machine cannot hold, before it dies of it."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > free:
        raise StoreError(
            f"{key} takes {nbytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free: ask "
            "on a larger machine, or ask of a part of the store"
        )


def _chunks(size: int, step: int) -> tuple[int, ...]:
    whole, rest = divmod(size, step)
    return (step,) * whole + ((rest,) if rest else ())


def _decoded(dataset: xr.Dataset) -> xr.Dataset:
    """Label codes as their text, lazily."""
    columns = {}
    for name, variable in dataset.data_vars.items():
        values = variable.attrs.get("label_values")
        if values is not None:
            decoded = _looked_up(np.array(values, dtype=object), variable)
            columns[name] = decoded.assign_attrs(long_name=variable.attrs.get("long_name", name))
    return dataset.assign(columns)


def _looked_up(table: np.ndarray, codes: xr.DataArray) -> xr.DataArray:
    """``table[codes]``, lazily."""

    def look_up(own: np.ndarray) -> np.ndarray:
        if own.size and not (own.min() >= 0 and own.max() < len(table)):
            raise CorruptStoreError(f"{codes.name} holds what is no index below {len(table):,}")
        return table[own]

    return xr.apply_ufunc(look_up, codes, dask="parallelized", output_dtypes=[object])


# -- opening -------------------------------------------------------------------------------


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a sealed store.

    Parameters
    ----------
    path : path
        The store's folder, a zip archive of it (``run.zarr.zip``), or a URL: ``s3://...`` and
        what else obstore knows, ``http://...`` of a web server that has the folder.

    Returns
    -------
    Store

    Raises
    ------
    NotAStoreError
        There is nothing, or something else, at the path.
    UnfinishedStoreError
        The dump that writes it has not ended; says how far it is and how to go on.
    NewerFormatError
        It needs a newer actstore.
    CorruptStoreError
        Its metadata is damaged or does not match its manifest.

    Examples
    --------
    >>> import actstore, tempfile
    >>> corpus = actstore.build_corpus([[1, 2, 3], [4, 5]])
    >>> plan = actstore.Plan.build(corpus, [actstore.StageSpec("mlp_post", (0, 1), width=32)])
    >>> folder = tempfile.TemporaryDirectory()
    >>> with actstore.Writer(f"{folder.name}/run.zarr", plan) as writer:
    ...     for layer in (0, 1):
    ...         writer.put("mlp_post", layer, token=0, values=np.ones((5, 32), "float32"))
    >>> store = actstore.open(f"{folder.name}/run.zarr")
    >>> float(store["mlp_post"].sel(layer=1).mean())
    1.0
    """
    root, store = opened(path)
    check_hash(root, os.fspath(path))
    return store


def opened(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any], Store]:
    """A store and its root, whose facts may still be others than those that were sealed."""
    storage, shown = storage_at(path), os.fspath(path)
    data = storage.get("zarr.json", METADATA_NBYTES)
    if data is None:
        raise _not_open(storage, shown)
    root = read_root(storage, data, shown)
    manifest = read_manifest(storage)
    identity = root["attributes"]["actstore"]["id"]
    if manifest["id"] != identity:
        raise CorruptStoreError(
            f"{storage.root} was put together from two stores: its root says id {identity}, its "
            f"manifest {manifest['id']}"
        )
    nodes, place = root["consolidated_metadata"]["metadata"], (absolute(shown), stamp_of(data))
    return root, Store(place[0], root, Guard(storage, place, nodes, manifest["objects"]))


def _stores_in(folder: Path, where: str) -> str:
    """What a message says of the stores in a folder."""
    stores = sorted(p.name for p in folder.glob("*.zarr"))
    return f" {where}: {', '.join(stores[:8])}." if stores else ""


def _not_open(storage: Storage, shown: str) -> NotAStoreError | UnfinishedStoreError:
    if is_url(shown):
        if storage.is_vacant() and not storage.keys("journal"):
            return NotAStoreError(f"there is nothing at {shown}")
    elif not storage.root.exists():
        beside = _stores_in(storage.root.absolute().parent, "Beside it")
        return NotAStoreError(f"{shown} does not exist.{beside}")
    stored = journal.read_plan(storage)
    if stored is None:
        inside = "" if is_url(shown) else _stores_in(storage.root, "In it")
        return NotAStoreError(
            f"{shown} is not a store: it has neither zarr.json nor a journal.{inside}"
        )
    total = stored["blocks"] * stored["passes"]
    if not storage.lists:
        return UnfinishedStoreError(f"{shown} is not finished: open it once its dump is done")
    done = sum(journal.is_record(key) for key in storage.keys("journal"))
    return UnfinishedStoreError(
        f"{shown} is not finished: {done} of {total} blocks are complete. Run the same dump "
        "command again to go on with it"
    )
