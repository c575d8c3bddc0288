"""Cards, exports and imports: what others read, and what comes back."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import actstore_cli
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import xarray as xr
import yaml
from helpers import (
    STAGES,
    VOCABULARY,
    assert_same_tree,
    plan_of,
    put_all,
    random_tables,
    random_values,
    scratch,
    small_corpus,
    stored,
    write_store,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_faults import s3_server

import actstore
from actstore.concatenation import concat
from actstore.errors import (
    HalfOverflowError,
    NonFiniteError,
    PlanError,
    UnfinishedStoreError,
    UnknownNameError,
    UsageError,
    WriteError,
)
from actstore.remote import object_store
from actstore.schema import Categorical
from actstore.storage import LocalStorage
from actstore.travel import chosen as chosen_module
from actstore.travel import files as files_module
from actstore.travel.card import write_card
from actstore.travel.table import UNKNOWN_TEXT, corpus_of_columns
from actstore.writer import Writer

pytestmark = pytest.mark.filterwarnings("ignore:Object at journal is not recognized")

FILES = {"safetensors": ".safetensors", "parquet": ".parquet", "netcdf": ".nc"}
ALL = {**FILES, "zarr": ".zarr"}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with scratch() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
    """A store with every element type, kind of label, and gaps; and its values."""
    with scratch() as folder:
        yield made_at(Path(folder) / "small.zarr")


def made_at(path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    model = {"name": "tiny <model> | `x`", "class": "Tiny"}
    corpus = small_corpus()
    plan = plan_of(corpus, STAGES, 64, predictions=2, outcomes=True, provenance={"model": model})
    values = random_values(plan)
    with Writer(path, plan, vocabulary=VOCABULARY) as writer:
        put_all(writer, values)
        writer.put_tables(0, random_tables(plan))
    return path, {s.name: stored(values[s.name], s.source_dtype) for s in STAGES}


@pytest.fixture
def path(made: tuple[Path, dict[str, np.ndarray]]) -> Path:
    return made[0]


@pytest.fixture
def values(made: tuple[Path, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return made[1]


def plain(column: np.ndarray | Categorical) -> np.ndarray:
    return column.decode() if isinstance(column, Categorical) else column


def broken(path: Path) -> list[Any]:
    return [problem for _, problem in actstore.verify(path) if problem]


# -- cards -----------------------------------------------------------------------------------


def front_matter(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_a_card_says_what_there_is(path: Path) -> None:
    text = actstore.card(path)
    front = front_matter(text)
    assert front["pretty_name"] == "Activations of tiny <model> | `x`"
    assert front["license"] == "unknown"
    assert front["task_categories"] == ["feature-extraction"]
    assert front["size_categories"] == ["n<1K"]
    assert {"activations", "zarr"} <= set(front["tags"])
    assert front["viewer"] is False
    store = actstore.open(path)
    for fact in (store.id, store.attrs["config_hash"], "| `mlp_out` | 0, 1 | 32 | bfloat16 |"):
        assert fact in text
    for label in store.labels:
        assert f"`{label}`" in text
    assert text.count("[More Information Needed]") == 5  # revision, weights, tokenizer, data ...
    assert "<model>" not in text.replace(front["pretty_name"], "").replace("`tiny <model>", "")


@pytest.mark.parametrize(
    ("tokens", "bounds"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (2 * 10**6, "1M<n<10M"), (10**12, "n>1T")],
)
def test_sizes_as_the_hub_has_them(tokens: int, bounds: str, path: Path) -> None:
    store = actstore.open(path)
    store.attrs["corpus"] = {**store.attrs["corpus"], "tokens": tokens}
    assert front_matter(actstore.card(store))["size_categories"] == [bounds]


def test_a_card_loads_the_store_without_actstore(
    path: Path, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    shutil.copytree(path, tmp_path / path.name)
    snippet = re.search(r"```python\n(import numpy.*?)```", actstore.card(path), re.DOTALL)
    assert snippet
    check = """
import sys
sys.modules["actstore"] = None  # whoever imports it fails
exec(open("snippet.py").read())
columns = {n: acts[n].values.tolist() for n in ("play", "year", "condition", "token_text")}
np.save("values.npy", acts.values)
import json; json.dump(columns, open("columns.json", "w"))
try:
    import actstore
except ImportError:
    print("no actstore")
"""
    (tmp_path / "snippet.py").write_text(snippet[1])
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("no actstore\n")
    assert "token_text" in done.stdout  # the snippet prints what it loaded
    store = actstore.open(path)
    stage = re.search(r"group='(\w+)'", snippet[1])
    assert stage
    np.testing.assert_array_equal(np.load(tmp_path / "values.npy"), values[stage[1]])
    for name, found in json.loads((tmp_path / "columns.json").read_text()).items():
        assert found == plain(store.column(name)).tolist(), name


def test_a_card_in_the_store_is_no_damage(path: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.zarr"
    shutil.copytree(path, own)
    where = write_card(own)
    assert where == str(own / "README.md")
    assert write_card(own) == where  # the same again
    assert broken(own) == []
    assert actstore.open(own).id == actstore.open(path).id
    assert xr.open_zarr(own, group="hidden")["activation"].shape == (3, 147, 24)
    filled = Path(where).read_text().replace("license: unknown", "license: mit")
    Path(where).write_text(filled)
    with pytest.raises(UsageError, match="what was filled in there is kept"):
        write_card(own)
    assert Path(where).read_text() == filled
    assert write_card(own, tmp_path / "other.md") == str(tmp_path / "other.md")
    with pytest.raises(UsageError, match="there is no folder"):
        write_card(own, tmp_path / "none" / "other.md")


# -- exports, read by others -----------------------------------------------------------------

CHOICE = {"stages": "hidden,attn_z,mlp_out", "layers": "1", "tokens": "position > 0 and good"}


def chosen(path: Path, tokens: str | None) -> np.ndarray:
    """Numbers of the tokens of an expression that this module uses, found by hand."""
    store = actstore.open(path)
    mask = np.ones(store.n_tokens, bool)
    if tokens == CHOICE["tokens"]:
        mask = (plain(store.column("position")) > 0) & plain(store.column("good"))
    return np.flatnonzero(mask)


def test_safetensors_as_torch_reads_them(
    path: Path, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "part.safetensors"
    result = actstore.export(path, out, **CHOICE)
    rows = chosen(path, CHOICE["tokens"])
    tensors = safetensors.torch.load_file(out)
    kinds = {"hidden": torch.float32, "attn_z": torch.float16, "mlp_out": torch.bfloat16}
    for stage, kind in kinds.items():
        own = tensors.pop(f"{stage}.1")
        assert own.dtype == kind
        np.testing.assert_array_equal(own.float().numpy(), values[stage][1][rows])
        assert result.stages[stage].max_error == result.stages[stage].rms_error == 0
    assert result.tokens == len(rows)
    assert result.nbytes == out.stat().st_size
    assert set(tensors) > {"token.sequence", "token.position", "token.token_id", "token.play"}
    with safetensors.safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["actstore"])
    store = actstore.open(path)
    assert facts["origin"]["id"] == store.id
    assert facts["origin"]["tokens"] == CHOICE["tokens"]
    for name, tensor in tensors.items():
        found = tensor.numpy()
        if name in facts["texts"]:
            found = np.array(facts["texts"][name], object)[found]
        expected = plain(store.column(name.removeprefix("token.")))[rows]
        np.testing.assert_array_equal(found, expected, name)


def test_parquet_as_pandas_and_datasets_read_it(
    path: Path, values: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "ROW_GROUP_NBYTES", 4 * 20 * (24 + 32 + 32))
    out = tmp_path / "part.parquet"
    actstore.export(path, out, **CHOICE)
    rows = chosen(path, CHOICE["tokens"])
    assert pq.ParquetFile(out).num_row_groups == -(-len(rows) // 20) > 1
    frame = pd.read_parquet(out)
    data = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
    store = actstore.open(path)
    for stage in ("hidden", "attn_z", "mlp_out"):
        expected = values[stage][1][rows]
        np.testing.assert_array_equal(np.stack(frame.pop(f"{stage}.1")), expected)
        found = data.with_format("numpy")[f"{stage}.1"]
        np.testing.assert_array_equal(np.asarray(found[:]), expected)
    for name in frame:
        np.testing.assert_array_equal(frame[name], plain(store.column(name))[rows], name)
    assert frame["play"].tolist() == data["play"][:]


def test_netcdf_as_xarray_reads_it(
    path: Path, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "part.nc"
    actstore.export(path, out, tokens=CHOICE["tokens"], layers="0,1")
    rows, store = chosen(path, CHOICE["tokens"]), actstore.open(path)
    for stage in store.stages:
        with xr.open_dataset(out, group=stage, engine="h5netcdf") as data:
            acts = data["activation"]
            assert acts.dims == ("layer", "token", "neuron")
            assert acts["layer"].values.tolist() == [0, 1]
            np.testing.assert_array_equal(acts.values, values[stage][:2][:, rows])
            assert acts.attrs["source_dtype"] == store.info()["stages"][stage]["dtype"]
            for name in ("sequence", "token_text", "play", "good", "score", "offset", "loss"):
                np.testing.assert_array_equal(acts[name], plain(store.column(name))[rows], name)
            assert ("head" in acts.coords) == (stage == "attn_z")
            assert ("layer_name" in acts.coords) == (stage == "hidden")


def test_a_smaller_store_is_a_store(
    path: Path, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "part.zarr"
    actstore.export(path, out, stages="hidden,attn_z", layers="1", tokens=CHOICE["tokens"])
    rows = chosen(path, CHOICE["tokens"])
    big, small = actstore.open(path), actstore.open(out)
    assert broken(out) == []
    assert small.attrs["origin"] == {
        "what": "export",
        "store": "small.zarr",
        "id": big.id,
        "stages": {"hidden": [1], "attn_z": [1]},
        "tokens": CHOICE["tokens"],
    }
    assert small.attrs["model"] == big.attrs["model"]
    np.testing.assert_array_equal(small["hidden"].values[0], values["hidden"][1][rows])
    np.testing.assert_array_equal(small["attn_z"].values[0], values["attn_z"][1][rows])
    np.testing.assert_array_equal(small.heads("attn_z"), big.heads("attn_z"))
    for name in [n for n in big.columns if n not in ("input", "sequence", "start")]:
        np.testing.assert_array_equal(plain(small.column(name)), plain(big.column(name))[rows])
    sequence = plain(big.column("sequence"))[rows]
    np.testing.assert_array_equal(plain(small.column("source_sequence")), sequence)
    np.testing.assert_array_equal(
        plain(small.column("sequence")), np.unique(sequence, return_inverse=True)[1]
    )
    assert small.sequences.sizes["sequence"] == len(np.unique(sequence))
    assert small.predictions is not None
    assert big.predictions is not None
    for name in ("token_id", "probability"):
        np.testing.assert_array_equal(
            small.predictions[name].values, big.predictions[name].values[rows]
        )
    for i, row in enumerate(rows[:12].tolist()):
        assert small.decode(i, 4, 3) == big.decode(row, 4, 3)
    mask = np.isin(np.arange(big.n_tokens), rows)
    asked = [
        actstore.moments(small, stages="hidden"),
        actstore.moments(big, stages="hidden", layers=1, tokens=mask),
    ]
    assert [a.attrs["source"] for a in asked] == ["sketch", "scan"]
    found, expected = actstore.compute(*asked)
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-5, atol=1e-7)


def test_everything_as_a_store_keeps_the_numbers(path: Path, tmp_path: Path) -> None:
    """Twice: what is exported again says so, and no label is added where numbers stay."""
    actstore.export(path, tmp_path / "all.zarr")
    big, again = actstore.open(path), actstore.open(tmp_path / "all.zarr")
    kept = np.unique(plain(big.column("sequence")))
    assert len(kept) == big.sequences.sizes["sequence"] - 1  # nothing of one is kept
    whole = actstore.export(tmp_path / "all.zarr", tmp_path / "twice.zarr")
    twice = actstore.open(whole.path)
    assert twice.labels == again.labels
    np.testing.assert_array_equal(plain(twice.column("sequence")), plain(again.column("sequence")))
    assert twice.attrs["origin"]["id"] == again.id


# -- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [None, CHOICE["tokens"]], ids=["all", "some"])
@pytest.mark.parametrize("form", FILES)
def test_there_and_back(
    form: str, tokens: str | None, path: Path, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / f"part{FILES[form]}"
    actstore.export(path, out, tokens=tokens)
    back = actstore.import_from(out, tmp_path / "back.zarr")
    assert broken(tmp_path / "back.zarr") == []
    rows, store = chosen(path, tokens), actstore.open(path)
    assert back.stages == store.stages
    for stage in store.stages:
        expected = values[stage][:, rows]
        np.testing.assert_array_equal(back[stage].values, expected)
        kept = back.info()["stages"][stage]
        assert kept["layers"] == store.info()["stages"][stage]["layers"]
        wide = form == "parquet" and stage == "mlp_out"  # Parquet has no bfloat16
        assert kept["dtype"] == ("float32" if wide else store.info()["stages"][stage]["dtype"])
    names = [n for n in store.columns if n not in ("input", "sequence", "length", "start", "text")]
    for name in [n for n in names if not n.startswith("char_") and n != "kept"]:
        found, expected = plain(back.column(name)), plain(store.column(name))[rows]
        np.testing.assert_array_equal(found, expected, name)
        assert found.dtype.kind == expected.dtype.kind, name
    numbers = plain(store.column("sequence"))[rows]
    np.testing.assert_array_equal(plain(back.column("source_sequence")), numbers)
    assert {"play", "year", "score", "good"} <= set(back.sequences.data_vars)
    assert back.attrs["model"]["name"] == store.attrs["model"]["name"]
    assert back.attrs["origin"]["of"]["id"] == store.id
    assert back.info()["outcomes"] == ["loss", "entropy", "rank"]
    # What lies between the tokens was not handed on, and is said to be not known.
    unknown = ~back.inputs["kept"].values
    assert back.info()["notes"].get("inputs_not_known", 0) == np.count_nonzero(unknown) > 0
    assert set(back.vocabulary[back.inputs["token_id"].values[unknown]]) == {UNKNOWN_TEXT}


def test_a_copy_answers_the_same(path: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", path, tmp_path / "copy.zarr"], check=True)
    assert broken(tmp_path / "copy.zarr") == []
    found, expected = (
        actstore.compute(
            actstore.moments(p, stages="hidden"),
            actstore.moments(p, stages="hidden", tokens="position != 3"),
            actstore.rsa(p, pairs="layers", stages="hidden"),
        )
        for p in (tmp_path / "copy.zarr", path)
    )
    for a, b in zip(found, expected, strict=True):
        assert a.attrs["store_id"] == b.attrs["store_id"]
        xr.testing.assert_equal(a, b)


@pytest.mark.parametrize("form", ALL)
def test_several_stores_become_one(form: str, path: Path, tmp_path: Path) -> None:
    both = concat({"base": path, "chat": path})
    out = tmp_path / f"both{ALL[form]}"
    actstore.export(both, out, stages="hidden", tokens="position > 0")
    made = actstore.open(out) if form == "zarr" else actstore.import_from(out, tmp_path / "b.zarr")
    mask = np.tile(plain(actstore.open(path).column("position")) > 0, 2)
    np.testing.assert_array_equal(made["hidden"].values, both["hidden"].values[:, mask])
    assert plain(made.column("store")).tolist() == plain(both.column("store"))[mask].tolist()


# -- how exactly -----------------------------------------------------------------------------


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """To so many bits behind the leading one, ties to even, by arithmetic."""
    fraction, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.rint(np.ldexp(fraction, bits + 1)), exponent - bits - 1)


@pytest.mark.parametrize("form", ALL)
def test_rounding_is_as_said(
    form: str, path: Path, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out, full = tmp_path / f"r{ALL[form]}", tmp_path / f"f{ALL[form]}"
    result = actstore.export(path, out, stages="hidden,mlp_post", keep_bits=5)
    actstore.export(path, full, stages="hidden,mlp_post")
    back = actstore.open(out) if form == "zarr" else actstore.import_from(out, tmp_path / "b.zarr")
    for stage in ("hidden", "mlp_post"):
        exact, expected = values[stage].astype(np.float64), rounded(values[stage], 5)
        np.testing.assert_array_equal(back[stage].values, expected)
        off = np.abs(expected - exact)
        told = result.stages[stage]
        assert told.max_error == off.max()
        assert told.max_relative_error == (off[exact != 0] / np.abs(exact[exact != 0])).max()
        assert told.max_relative_error <= 2**-6
        assert told.rms_error == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-9)
    if form == "zarr":  # which stores so few bits as bfloat16, as exactly
        assert {s["dtype"] for s in back.info()["stages"].values()} == {"bfloat16"}


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_type(
    dtype: str, form: str, path: Path, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / f"t{ALL[form]}"
    result = actstore.export(path, out, stages="hidden,attn_z", dtype=dtype)
    back = actstore.open(out) if form == "zarr" else actstore.import_from(out, tmp_path / "b.zarr")
    for stage in ("hidden", "attn_z"):
        expected = stored(values[stage].astype(np.float32), dtype)
        np.testing.assert_array_equal(back[stage].values, expected)
        off = np.abs(expected.astype(np.float64) - values[stage])
        assert result.stages[stage].max_error == off.max()
        assert result.stages[stage].dtype == dtype


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=20),
    st.integers(1, 23),
)
def test_rounding_of_any_number(numbers: list[float], bits: int) -> None:
    values = np.array([numbers], np.float32)
    stage = chosen_module.ChosenStage("s", None, [0], np.arange(1), "float32", bits)  # type: ignore[arg-type]
    found = stage._rounded(values)
    odd = ~np.isfinite(values)
    np.testing.assert_array_equal(found[odd], values[odd])
    with np.errstate(over="ignore"):
        expected = rounded(np.where(odd, 0, values), bits).astype(np.float32)
    # Numbers too small for a leading one have fewer bits; those rounded over the top stay.
    normal = ~odd & (np.abs(values) >= 2.0**-100) & np.isfinite(expected)
    np.testing.assert_array_equal(found[normal], expected[normal])
    top = ~odd & ~np.isfinite(expected)
    np.testing.assert_array_equal(found[top], values[top])


# -- what goes wrong with exports ------------------------------------------------------------


def nothing_left(folder: Path, *but: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(but)


@pytest.mark.parametrize("form", FILES)
def test_a_value_that_does_not_fit_leaves_nothing(form: str, tmp_path: Path) -> None:
    plan = plan_of(actstore.build_corpus([[1, 2, 3]]), [actstore.StageSpec("hidden", (4,), 16)], 16)
    values = {"hidden": np.full((1, 3, 16), 1e6, np.float32)}
    write_store(tmp_path / "a.zarr", plan, values)
    with pytest.raises(HalfOverflowError, match=r"hidden, layer 4.*1e\+06"):
        actstore.export(tmp_path / "a.zarr", tmp_path / f"b{ALL[form]}", dtype="float16")
    assert nothing_left(tmp_path, "a.zarr")


@pytest.mark.parametrize("form", FILES)
def test_what_is_there_stays(form: str, path: Path, tmp_path: Path) -> None:
    out = tmp_path / f"there{ALL[form]}"
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists: remove it, or choose another name"):
        actstore.export(path, out)
    assert out.read_text() == "precious"
    assert nothing_left(tmp_path, out.name)


def test_a_store_that_is_there(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "part.zarr"
    actstore.export(path, out, stages="hidden", layers=1)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    actstore.export(path, out, stages="hidden", layers=1)  # the same: nothing to do
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(PlanError, match="begun with other arguments"):
        actstore.export(path, out, stages="hidden", layers=2)


def test_wrong_questions(path: Path, tmp_path: Path) -> None:
    def asks(out: str = "a.parquet", **options: Any) -> None:
        actstore.export(path, tmp_path / out, **options)

    with pytest.raises(UsageError, match="its ending names no format"):
        asks("a.csv")
    with pytest.raises(UnknownNameError, match="unknown format 'parque': did you mean 'parquet'"):
        asks(format="parque")
    with pytest.raises(UnknownNameError, match="mlp_post"):
        asks(stages="mlp_pots")
    with pytest.raises(UnknownNameError, match="unknown layer 7"):
        asks(layers=7)
    with pytest.raises(UsageError, match="no token satisfies"):
        asks(tokens="position > 1000")
    with pytest.raises(UnknownNameError, match="float16"):
        asks(dtype="float8")
    for bits in (0, 24):
        with pytest.raises(UsageError, match="keep 1 to 23"):
            asks(keep_bits=bits)
    with pytest.raises(UsageError, match="there is no folder"):
        asks("none/a.parquet")
    with pytest.raises(UsageError, match="is written to a path; zarr also to a URL"):
        actstore.export(path, "s3://bucket/a.parquet")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("form", ALL)
def test_a_disk_that_is_too_small_is_said_before(
    form: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: 1000)
    with pytest.raises(WriteError, match="are free at"):
        actstore.export(path, tmp_path / f"a{ALL[form]}")
    assert nothing_left(tmp_path)


RUN = """
import resource, signal, sys, time
import actstore
store, out, mode = sys.argv[1:]
if mode == "full":  # writing beyond fails, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

def progress(done, total):
    if mode == "wait" and done > total // 2:
        print("half", flush=True)
        time.sleep(600)

try:
    actstore.export(store, out, stages="hidden,mlp_post", buffer="64KiB", progress=progress)
except actstore.errors.WriteError as error:
    print(error)
    sys.exit(1)
"""


def run(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def slowly(forms: Any, but: str) -> list[Any]:
    """Formats, all but one for the slow run: their tests start processes."""
    return [pytest.param(f, marks=[] if f == but else [pytest.mark.slow]) for f in forms]


@pytest.mark.parametrize("form", slowly(FILES, "netcdf"))
def test_a_disk_that_fills_leaves_nothing(form: str, path: Path, tmp_path: Path) -> None:
    process = run(path, tmp_path / f"a{FILES[form]}", "full")
    told, noise = process.communicate(timeout=100)
    assert process.returncode == 1, noise
    assert "Nothing of it is left" in told
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("form", slowly(ALL, "zarr"))
def test_a_killed_export(form: str, path: Path, tmp_path: Path) -> None:
    """Nothing that looks finished; the same again makes what an uninterrupted one makes."""
    out, other = tmp_path / f"a{ALL[form]}", tmp_path / f"b{ALL[form]}"
    process = run(path, out, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    if form == "zarr":
        with pytest.raises(UnfinishedStoreError):
            actstore.open(out)
    else:
        assert not out.exists()
        assert any(p.suffix == ".partial" for p in tmp_path.iterdir())
    for target in (out, other):
        actstore.export(path, target, stages="hidden,mlp_post", buffer="64KiB")
    assert nothing_left(tmp_path, out.name, other.name)
    if form == "zarr":
        assert_same_tree(out, other)
    elif form != "netcdf":  # HDF5 writes times
        assert out.read_bytes() == other.read_bytes()


def test_an_interrupt_leaves_nothing(path: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for ending in FILES.values():
        with pytest.raises(KeyboardInterrupt):
            actstore.export(path, tmp_path / f"a{ending}", progress=stop)
    assert nothing_left(tmp_path)


# -- imports from other tools ----------------------------------------------------------------


def acts(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_one_array(tmp_path: Path) -> None:
    own = acts(6, 16)
    np.save(tmp_path / "a.npy", own)
    store = actstore.import_from(tmp_path / "a.npy", tmp_path / "a.zarr", stages="hidden", layers=5)
    np.testing.assert_array_equal(store["hidden"].values[0], own)
    assert store["hidden"]["layer"].values.tolist() == [5]
    assert plain(store.column("position")).tolist() == list(range(6))
    assert store.attrs["origin"]["source"] == "a.npy"


@pytest.mark.parametrize(
    "order", ["layer token neuron", "neuron token layer", "token layer neuron"]
)
def test_axes(order: str, tmp_path: Path) -> None:
    own = xr.DataArray(acts(3, 7, 16), dims=("layer", "token", "neuron"))
    np.save(tmp_path / "a.npy", own.transpose(*order.split()).values)
    options: dict[str, Any] = {"stages": "mlp_out", "axes": order}
    store = actstore.import_from(tmp_path / "a.npy", tmp_path / "a.zarr", **options)
    np.testing.assert_array_equal(store["mlp_out"].values, own.values)
    named = actstore.import_from(tmp_path / "a.npy", tmp_path / "b.zarr", layers="2,4-5", **options)
    assert named["mlp_out"]["layer"].values.tolist() == [2, 4, 5]
    with pytest.raises(UsageError, match="has 3 layers and 2 are named"):
        actstore.import_from(tmp_path / "a.npy", tmp_path / "c.zarr", layers="2,4", **options)
    assert not (tmp_path / "c.zarr").exists()


def test_sequences_heads_and_labels(tmp_path: Path) -> None:
    """TransformerLens's own shapes and names; padding is left out; labels of every shape."""
    post, z = acts(3, 4, 16), acts(3, 4, 2, 8)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    ids = np.arange(12).reshape(3, 4) * mask
    arrays = {
        "blocks.0.mlp.hook_post": post,
        "blocks.7.mlp.hook_post": post + 1,
        "input_ids": ids,
        "attention_mask": mask,
        "label": np.array(["x", "y", "x"]),
        "surprise": acts(3, 4, seed=3).astype(np.float64),
        "matrix": acts(5, 5),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    kept = mask.astype(bool).ravel()
    for name in "ab":
        store = actstore.import_from(
            tmp_path / f"{name}.npz",
            tmp_path / f"{name}.zarr",
            stages="mlp_post=blocks.{layer}.mlp.hook_post",
        )
        assert store["mlp_post"]["layer"].values.tolist() == [0, 7]
        expected = post.reshape(12, 16)[kept]
        np.testing.assert_array_equal(store["mlp_post"].values, [expected, expected + 1])
        assert plain(store.column("sequence")).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
        assert plain(store.column("position")).tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
        assert plain(store.column("token_id")).tolist() == ids.ravel()[kept].tolist()
        assert store.sequences["label"].values.tolist() == ["x", "y", "x"]
        np.testing.assert_array_equal(
            plain(store.column("surprise")), arrays["surprise"].ravel()[kept]
        )
        assert store.info()["notes"]["left_out"] == {
            "matrix": "its shape (5, 5) is that of no label"
        }
    np.savez(tmp_path / "z.npz", **{"blocks.2.attn.hook_z": z})
    store = actstore.import_from(
        tmp_path / "z.npz", tmp_path / "z.zarr", axes="sequence position head neuron"
    )
    np.testing.assert_array_equal(store["attn_z"].values[0], z.reshape(12, 16))
    np.testing.assert_array_equal(store.heads("attn_z"), np.repeat([0, 1], 8))


def test_recognised_without_being_told(tmp_path: Path) -> None:
    own = {f"blocks.{n}.hook_resid_pre": acts(2, 5, 16, seed=n) for n in (0, 1, 2)}
    torch.save({k: torch.from_numpy(v) for k, v in own.items()}, tmp_path / "cache.pt")
    store = actstore.import_from(tmp_path / "cache.pt", tmp_path / "a.zarr", layers="0,2")
    assert store["resid_pre"]["layer"].values.tolist() == [0, 2]
    np.testing.assert_array_equal(
        store["resid_pre"].values[1], own["blocks.2.hook_resid_pre"].reshape(10, 16)
    )


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_a_folder_of_batches(old: bool, tmp_path: Path) -> None:
    """In the order of their numbers; bfloat16 stays what it is; more tokens in some than others."""
    folder = tmp_path / "batches"
    folder.mkdir()
    parts = [torch.from_numpy(acts(n, 16, seed=n)).to(torch.bfloat16) for n in range(1, 13)]
    for i, part in enumerate(parts):
        batch = {"acts": {"layer_3": part}, "doc": [f"d{i}"] * len(part), "batch": torch.tensor(i)}
        torch.save(batch, folder / f"batch_{i}.pt", _use_new_zipfile_serialization=not old)
    store = actstore.import_from(
        folder, tmp_path / "a.zarr", stages=["mlp_post=acts.layer_{layer}"]
    )
    whole = torch.cat(parts)
    np.testing.assert_array_equal(store["mlp_post"].values[0], whole.float().numpy())
    assert store.info()["stages"]["mlp_post"]["dtype"] == "bfloat16"
    expected = [f"d{i}" for i, part in enumerate(parts) for _ in range(len(part))]
    assert plain(store.column("doc")).tolist() == expected


def test_files_without_names(tmp_path: Path) -> None:
    """One tensor in each: batches of one array, or layers by the names of the files."""
    batches, layers = tmp_path / "batches", tmp_path / "layers"
    batches.mkdir()
    layers.mkdir()
    parts = [acts(4, 16, seed=n) for n in range(11)]
    for i, part in enumerate(parts):
        torch.save(torch.from_numpy(part), batches / f"b{i}.pt")
        np.save(layers / f"resid_{i}.npy", part)
    one = actstore.import_from(batches, tmp_path / "a.zarr", stages="hidden", layers=3)
    np.testing.assert_array_equal(one["hidden"].values[0], np.concatenate(parts))
    many = actstore.import_from(layers, tmp_path / "b.zarr", stages="hidden=resid_{layer}")
    np.testing.assert_array_equal(many["hidden"].values, np.stack(parts))
    assert many["hidden"]["layer"].values.tolist() == list(range(11))


def test_tensors_over_several_files(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for n in (0, 1):
        own = {f"h.{n}": torch.from_numpy(acts(5, 16, seed=n)).to(torch.bfloat16)}
        safetensors.torch.save_file(own, folder / f"part-{n}.safetensors")
    store = actstore.import_from(folder, tmp_path / "a.zarr", stages="resid_pre=h.{layer}")
    expected = [torch.from_numpy(acts(5, 16, seed=n)).bfloat16().float().numpy() for n in (0, 1)]
    np.testing.assert_array_equal(store["resid_pre"].values, expected)


class Bomb:
    """Pickled, it writes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.marker, "executed")


def test_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"acts": torch.zeros(3, 16), "more": Bomb(marker)}, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.array([Bomb(marker)]), allow_pickle=True)
    np.savez(tmp_path / "a.npz", acts=np.array([Bomb(marker)]))
    for name, why in (("pt", "would run code"), ("npy", "Python objects"), ("npz", "objects")):
        with pytest.raises(UsageError, match=why):
            actstore.import_from(
                tmp_path / f"a.{name}", tmp_path / "out.zarr", stages="hidden", layers=0
            )
    assert not marker.exists()
    assert not (tmp_path / "out.zarr").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # and it would have
    assert marker.read_text() == "executed"


def test_a_dataset_of_tokens(tmp_path: Path) -> None:
    own = acts(50, 16)
    features = datasets.Features(
        {
            "activation": datasets.Sequence(datasets.Value("float32"), 16),
            "input_ids": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=["noun", "verb"]),
            "text": datasets.Value("string"),
            "note": datasets.Value("string"),
        }
    )
    rows = {
        "activation": own.tolist(),
        "input_ids": list(range(50)),
        "kind": [i % 2 for i in range(50)],
        "text": ["t"] * 50,
        "note": [None if i % 3 else f"n{i}" for i in range(50)],
    }
    data = datasets.Dataset.from_dict(rows, features)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "data.parquet"))
    sources = [data, tmp_path / "saved", tmp_path / "data.parquet"]
    for i, source in enumerate(sources):
        store = actstore.import_from(
            source, tmp_path / f"{i}.zarr", stages="mlp_post=activation", layers=2
        )
        np.testing.assert_array_equal(store["mlp_post"].values[0], own)
        assert plain(store.column("token_id")).tolist() == rows["input_ids"]
        assert plain(store.column("note")).tolist() == [n or "" for n in rows["note"]]
        kinds = [["noun", "verb"][k] for k in rows["kind"]]
        assert plain(store.column("kind")).tolist() == (kinds if i < 2 else rows["kind"])
        assert "text" in store.info()["notes"]["left_out"]  # a name that every store has
    shuffled = data.shuffle(seed=3)
    store = actstore.import_from(
        shuffled, tmp_path / "s.zarr", stages="mlp_post=activation", layers=2
    )
    np.testing.assert_array_equal(store["mlp_post"].values[0], own[plain(store.column("token_id"))])


@pytest.mark.parametrize("rows_nbytes", [2**26, 500])
def test_a_dataset_of_sequences(
    rows_nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged lists of vectors, in one piece and in many; in groups of rows of a Parquet file."""
    monkeypatch.setattr("actstore.travel.sources.ROWS_NBYTES", rows_nbytes)
    lengths = [3, 1, 5, 2, 4]
    parts = [acts(n, 16, seed=n) for n in lengths]
    rows = {
        "acts.3": [p.tolist() for p in parts],
        "input_ids": [list(range(n)) for n in lengths],
        "weight": [[0.5 * i for i in range(n)] for n in lengths],
        "author": [f"a{n}" for n in lengths],
    }
    vectors = pa.list_(pa.list_(pa.float32()))
    table = pa.table({**rows, "acts.3": pa.array(rows["acts.3"], vectors)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    for i, source in enumerate([datasets.Dataset(table), tmp_path / "rows.parquet"]):
        store = actstore.import_from(source, tmp_path / f"{i}.zarr", stages="hidden=acts.{layer}")
        np.testing.assert_array_equal(store["hidden"].values[0], np.concatenate(parts))
        assert store.sequences["length"].values.tolist() == lengths
        assert store.sequences["author"].values.tolist() == rows["author"]
        flat = [v for row in rows["weight"] for v in row]
        assert plain(store.column("weight")).tolist() == flat
        assert plain(store.column("token_id")).tolist() == plain(store.column("position")).tolist()


def test_float64_is_rounded_and_whole_numbers_refused(tmp_path: Path) -> None:
    own = np.random.default_rng(0).normal(size=(4, 16))
    np.save(tmp_path / "a.npy", own)
    store = actstore.import_from(tmp_path / "a.npy", tmp_path / "a.zarr", stages="hidden", layers=0)
    np.testing.assert_array_equal(store["hidden"].values[0], own.astype(np.float32))
    np.savez(tmp_path / "i.npz", a=np.ones((4, 16), int))
    with pytest.raises(UsageError, match="'a' is int64: activations are float32"):
        actstore.import_from(tmp_path / "i.npz", tmp_path / "b.zarr", stages="hidden=a", layers=0)


def test_names_that_do_not_say(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=acts(4, 16), two=acts(4, 16), three=acts(5, 16))

    def asks(**options: Any) -> None:
        actstore.import_from(tmp_path / "a.npz", tmp_path / "a.zarr", **options)

    with pytest.raises(UsageError, match=r"no name says what the arrays are: 'one' float32 \(4"):
        asks()
    with pytest.raises(UsageError, match="which array is hidden"):
        asks(stages="hidden", layers=0)
    with pytest.raises(UsageError, match="say which layer 'one' is of"):
        asks(stages="hidden=one")
    with pytest.raises(UnknownNameError, match="unknown array 'on': did you mean 'one'"):
        asks(stages="hidden=on", layers=0)
    with pytest.raises(UsageError, match="two arrays are stage hidden at layer 0"):
        asks(stages="hidden=one,hidden=two", layers=0)
    with pytest.raises(UsageError, match="'one' has 4 tokens and 'three' 5"):
        asks(stages="hidden=one,mlp_in=three", layers=0)
    for name in ("../up", "journal", "a b", ""):
        with pytest.raises(UsageError, match="is not a name for a stage"):
            asks(stages=f"{name}=one", layers=0)
    with pytest.raises(UnknownNameError, match="unknown axis 'tokn': did you mean 'token'"):
        asks(stages="hidden=one", layers=0, axes="tokn neuron")
    for axes in ("token token", "token", "sequence neuron", "token position neuron"):
        with pytest.raises(UsageError, match=r"name each dimension once|dimensions"):
            asks(stages="hidden=one", layers=0, axes=axes)
    assert not (tmp_path / "a.zarr").exists()


def test_sources_that_are_none(tmp_path: Path) -> None:
    def asks(name: str, content: bytes | None = None) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        actstore.import_from(tmp_path / name, tmp_path / "out.zarr", stages="hidden", layers=0)

    with pytest.raises(UsageError, match="does not exist"):
        asks("none.npy")
    for ending in ("npy", "npz", "pt", "safetensors", "parquet", "nc"):
        with pytest.raises(UsageError, match="is not"):
            asks(f"junk.{ending}", b"not of this kind at all")
    with pytest.raises(UsageError, match="is not of"):
        asks("a.csv", b"1,2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no file of the kinds"):
        asks("empty")
    (tmp_path / "mixed").mkdir()
    np.save(tmp_path / "mixed" / "a.npy", acts(2, 16))
    np.savez(tmp_path / "mixed" / "b.npz", a=acts(2, 16))
    with pytest.raises(UsageError, match="several kinds"):
        asks("mixed")
    (tmp_path / "odd").mkdir()
    for i, names in enumerate(("ab", "ac")):
        torch.save({n: torch.zeros(2, 16) for n in names}, tmp_path / "odd" / f"{i}.pt")
    with pytest.raises(UsageError, match="does not have the same arrays"):
        asks("odd")
    assert not (tmp_path / "out.zarr").exists()


def test_what_a_file_says_of_itself_is_not_believed(tmp_path: Path) -> None:
    """Of a stranger's file: stages that are none, models that are none, codes without texts."""

    def asks(facts: Any, **more: torch.Tensor) -> actstore.Store:
        shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
        tensors = {"hidden.0": torch.ones(3, 16), **more}
        said = facts if isinstance(facts, str) else json.dumps(facts)
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"actstore": said})
        return actstore.import_from(tmp_path / "a.safetensors", tmp_path / "a.zarr")

    codes = {"token.word": torch.tensor([0, 1, 7])}
    with pytest.raises(UsageError, match="into 2 texts holds what is no code"):
        asks({"texts": {"token.word": ["x", "y"]}}, **codes)
    fine = asks({"texts": {"token.word": ["x"] * 7 + ["y"]}}, **codes)
    assert plain(fine.column("word")).tolist() == ["x", "x", "y"]
    for facts in (
        *("[]", "{", '{"model": NaN}', "[" * 10_000),
        {"model": 3, "origin": 4, "texts": 5},
        {"model": {"name": ["x"], "config": 3}, "origin": {"stages": [1]}},
        {"origin": {"stages": {"journal": [0], "../x": [0]}}},
    ):
        store = asks(facts)
        assert store.stages == ["hidden"]
        assert "model" not in store.attrs
        assert broken(tmp_path / "a.zarr") == []


def test_a_store_is_no_source(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`actstore export` takes parts of stores"):
        actstore.import_from(path, tmp_path / "out.zarr")


def test_not_a_number_is_refused_unless_allowed(tmp_path: Path) -> None:
    own = acts(4, 16)
    own[1, 2] = np.nan
    np.save(tmp_path / "a.npy", own)
    options: dict[str, Any] = {"stages": "hidden", "layers": 0}
    with pytest.raises(NonFiniteError):
        actstore.import_from(tmp_path / "a.npy", tmp_path / "a.zarr", **options)
    store = actstore.import_from(
        tmp_path / "a.npy", tmp_path / "a.zarr", allow_nonfinite=True, **options
    )
    np.testing.assert_array_equal(store["hidden"].values[0], own)
    out = actstore.export(store, tmp_path / "part.zarr", keep_bits=3)
    assert np.isnan(actstore.open(out.path)["hidden"].values[0, 1, 2])


def test_a_stopped_import_goes_on(tmp_path: Path) -> None:
    own = acts(200, 16)
    np.save(tmp_path / "a.npy", own)
    options: dict[str, Any] = {"stages": "hidden", "layers": 0, "buffer": "4KiB"}

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actstore.import_from(tmp_path / "a.npy", tmp_path / "a.zarr", progress=stop, **options)
    with pytest.raises(UnfinishedStoreError):
        actstore.open(tmp_path / "a.zarr")
    for name in "ab":
        actstore.import_from(tmp_path / "a.npy", tmp_path / f"{name}.zarr", **options)
    assert_same_tree(tmp_path / "a.zarr", tmp_path / "b.zarr")
    np.save(tmp_path / "a.npy", own + 1)  # of the same shape, and something else
    with pytest.raises(PlanError, match="begun with other arguments"):
        actstore.import_from(tmp_path / "a.npy", tmp_path / "a.zarr", **options)


# -- columns to sequences --------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_places_come_back(data: st.DataObject) -> None:
    """Any sequences with any gaps: kept tokens stand where they stood, under their own numbers."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    keep = [sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))) for n in lengths]
    numbers = data.draw(
        st.lists(st.integers(0, 99), min_size=len(keep), max_size=len(keep), unique=True)
    )
    position = np.array([p for own in keep for p in own])
    sequence = np.repeat(numbers, [len(own) for own in keep])
    ids = data.draw(st.lists(st.integers(0, 9), min_size=len(position), max_size=len(position)))
    texts = np.array([f"t{i}" for i in ids], object)
    flag = position % 2 == 0
    columns = {
        "sequence": sequence,
        "position": position,
        "token_id": np.array(ids),
        "token_text": texts,
        "flag": flag,
        "number": position * 10,
    }
    corpus, vocabulary = corpus_of_columns(columns, None, len(position))
    kept = np.flatnonzero(corpus.keep)
    assert corpus.position[kept].tolist() == position.tolist()
    assert corpus.token_ids[kept].tolist() == ids
    assert vocabulary is not None
    assert vocabulary[corpus.token_ids[kept]].tolist() == texts.tolist()
    spread = {
        **corpus.token_labels,
        **{k: v[corpus.sequence] for k, v in corpus.sequence_labels.items()},
    }
    assert plain(spread["flag"])[kept].tolist() == flag.tolist()
    assert plain(spread["number"])[kept].tolist() == columns["number"].tolist()
    found = spread.get("source_sequence")
    own = corpus.sequence[kept] if found is None else plain(found)[kept]
    assert own.tolist() == sequence.tolist()
    assert set(vocabulary[corpus.token_ids[~corpus.keep]]) <= {UNKNOWN_TEXT}


def test_columns_that_say_nothing_of_order() -> None:
    """Shuffled tokens are one sequence, and keep what they said as labels."""
    columns = {"sequence": np.array([1, 0, 1, 0]), "position": np.array([0, 0, 1, 1])}
    corpus, vocabulary = corpus_of_columns(columns, None, 4)
    assert corpus.n_sequences == 1
    assert vocabulary is None
    assert plain(corpus.token_labels["source_sequence"]).tolist() == [1, 0, 1, 0]
    assert plain(corpus.token_labels["source_position"]).tolist() == [0, 0, 1, 1]
    assert corpus.token_ids.tolist() == [-1] * 4


@pytest.mark.parametrize(
    "columns",
    [
        {"position": np.array([0, 2**40])},
        {"position": np.array([-5, 3])},
        {"sequence": np.array([0, 0]), "position": np.array([3, 3])},
        {"token_id": np.array([0, 2**40])},
        {"token_id": np.array([-1, 3])},
        {"token_id": np.array([0, 2**31 - 3]), "token_text": np.array(["a", "b"], object)},
        {"token_id": np.array([1, 1]), "token_text": np.array(["a", "b"], object)},
        {"a b": np.array([1, 2])},
        {"../x": np.array([1, 2])},
    ],
    ids=str,
)
def test_columns_of_strangers(columns: dict[str, np.ndarray]) -> None:
    """Places and ids that would take all memory, or mean nothing, are labels or left out."""
    corpus, vocabulary = corpus_of_columns(columns, None, 2)
    assert len(corpus.token_ids) < 100
    assert vocabulary is None or len(vocabulary) < 100
    assert np.count_nonzero(corpus.keep) == 2
    labels = {**corpus.token_labels, **corpus.sequence_labels}
    told = {n.removeprefix("source_") for n in labels} | set(corpus.notes.get("left_out", {}))
    bad = set(columns) if "token_text" not in columns else {"token_text"}
    assert bad & told


# -- the command line ------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    argv, sys.argv = sys.argv, ["actstore", *map(str, arguments)]
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as left:
            actstore_cli.main()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_commands(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capsys, "card", path, "--out", "-")
    assert (status, out) == (0, actstore.card(path))
    assert not (path / "README.md").exists()

    status, out, err = command(
        capsys,
        *("export", path, tmp_path / "part.safetensors", "--stages", "hidden,mlp_out"),
        *("--layers", "1", "--tokens", "position > 0", "--keep-bits", "4", "--json"),
    )
    assert status == 0, err
    facts = json.loads(out)
    assert facts["format"] == "safetensors"
    assert 0 < facts["stages"]["hidden"]["max_relative_error"] <= 2**-5

    status, out, err = command(
        capsys, "import", tmp_path / "part.safetensors", tmp_path / "back.zarr", "--json"
    )
    assert status == 0, err
    assert json.loads(out)["tokens"] == facts["tokens"]
    status, _, err = command(capsys, "verify", tmp_path / "back.zarr")
    assert status == 0
    status, _, err = command(
        capsys, "import", tmp_path / "part.safetensors", tmp_path / "b.zarr", "--stages", "x=y"
    )
    assert (status, "unknown array 'y'" in err) == (2, True)
    status, out, err = command(capsys, "export", path, tmp_path / "part.safetensors")
    assert (status, out) == (2, "")
    assert "exists: remove it" in err
    status, out, _ = command(capsys, "export", path, tmp_path / "part.nc", "--layers", "0")
    assert (status, out) == (0, "")
    status, out, _ = command(capsys, "export", path, tmp_path / "b.nc", "--dtype", "float16")
    assert status == 0
    assert out.splitlines()[0].split("\t")[:4] == ["stage", "layers", "neurons", "type"]


# -- memory ----------------------------------------------------------------------------------

PEAK = """
import resource, sys
import actstore, h5netcdf, psutil, pyarrow.parquet, safetensors.torch
from actstore.travel import chosen, files, imports
chosen.READ_NBYTES = imports.READ_NBYTES = 2**22
files.ROW_GROUP_NBYTES = 2**24
what, source, out = sys.argv[1:]
before = psutil.Process().memory_info().rss
getattr(actstore, what)(source, out, buffer="32MiB")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def peak(what: str, source: Path, out: Path) -> float:
    """MiB that a fresh process takes for an export or import, beside its modules."""
    command = [sys.executable, "-c", PEAK, what, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """Four times the tokens, in about the same memory."""
    peaks: dict[str, list[float]] = {}
    for n in (2**15, 2**17):
        corpus = actstore.build_corpus([list(range(1024))] * (n // 1024))
        plan = actstore.Plan.build(
            corpus, [actstore.StageSpec("hidden", (0, 1), 512)], buffer="32MiB", sketch=False
        )
        source, back = tmp_path / f"{n}.zarr", tmp_path / "back.zarr"
        rng = np.random.default_rng(0)
        with Writer(source, plan) as writer:
            for top in range(0, n, 1024):
                for layer in (0, 1):
                    own = rng.normal(size=(1024, 512)).astype(np.float32)
                    writer.put("hidden", layer, top, own)
        for form, ending in ALL.items():
            out = tmp_path / f"{n}-{form}{ending}"
            peaks.setdefault(form, []).append(peak("export", source, out))
            if form in ("parquet", "netcdf"):  # the others are mapped, and count as read
                peaks.setdefault(f"from {form}", []).append(peak("import_from", out, back))
                shutil.rmtree(back)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    for what, (small, large) in peaks.items():
        assert large < small + 60, (what, peaks)  # MiB; the larger store has 512


# -- object stores ---------------------------------------------------------------------------


@pytest.mark.slow
def test_out_to_an_object_store_and_together_with_it(path: Path, tmp_path: Path) -> None:
    """An export at a URL; a card in it; with a local store as one, opened by other processes."""
    with s3_server(), ExitStack() as stack:
        stack.callback(object_store.cache_clear)  # other tests have servers of their own
        url = "s3://runs/part.zarr"
        actstore.export(path, url, stages="hidden", tokens="position > 0")
        local = actstore.export(
            path, tmp_path / "part.zarr", stages="hidden", tokens="position > 0"
        )
        assert actstore.open(url).id == actstore.open(local.path).id
        write_card(url)
        assert broken(url) == []  # type: ignore[arg-type]
        cut = {"stages": "hidden", "by": "store", "tokens": "position != 2"}
        asked = [
            actstore.moments(concat({"a": path, "b": place}), **cut) for place in (url, local.path)
        ]
        found = actstore.compute(asked[0], scheduler="processes")
        xr.testing.assert_allclose(found, actstore.compute(asked[1]))
