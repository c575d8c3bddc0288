"""Results as text and as files: strict JSON, CSV that reads back, files for stock xarray."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import actstore_cli
import numpy as np
import pytest
import xarray as xr
from actstore_cli.output import print_table
from helpers import write_small

import actstore
from actstore import wire
from actstore.errors import UnknownNameError, UsageError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("output") / "small.zarr"
    write_small(path)
    return actstore.open(path)


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit status, stdout, stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["actstore", *map(str, argv)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            actstore_cli.main()
        return stop.value.code or 0, *capfd.readouterr()  # type: ignore[return-value]

    return run


RESULTS: dict[str, Callable[[Any], Any]] = {
    "histogram": lambda s: actstore.histogram(s, stages="hidden,mlp_post", bins="fd"),
    "histogram by group": lambda s: actstore.histogram(s, stages="hidden", bins=5, by="play"),
    "quantiles": lambda s: actstore.quantiles(s, per="layer"),
    "moments": lambda s: actstore.moments(s, per="layer", tokens="position == 0"),
    "moments, tree": actstore.moments,
    "zeroness": lambda s: actstore.zeroness(s, stages="mlp_post", threshold=100),
    "peaks": lambda s: actstore.peaks(s, stages="hidden"),
    "normality": lambda s: actstore.normality(s, stages="hidden"),
    "mean_activation": lambda s: actstore.mean_activation(s, stages="hidden", by="condition"),
    "sample": lambda s: actstore.sample(s, stages="attn_z", n=9, by="play"),
    "sample of values": lambda s: actstore.sample(s, n=9, unit="value"),
    "top_tokens": lambda s: actstore.top_tokens(s, k=4),
}

# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", wire.ENDINGS)
@pytest.mark.parametrize("name", RESULTS)
def test_saved_results_are_the_same_when_opened(
    name: str, ending: str, store: Any, tmp_path: Path
) -> None:
    lazy = RESULTS[name](store)
    result = actstore.compute(lazy)
    path = wire.save(lazy, tmp_path / f"a{ending}")
    assert [p.name for p in tmp_path.iterdir()] == [f"a{ending}"]
    if isinstance(result, xr.DataTree):
        with xr.open_datatree(path, engine=_engine(ending)) as opened:
            assert set(opened.children) == set(result.children)  # Zarr's groups have no order
            assert opened.attrs["query"] == result.attrs["query"]
            for stage, node in result.children.items():
                _same(node.to_dataset(), opened[stage].to_dataset())
    else:
        with xr.open_dataset(path, engine=_engine(ending)) as opened:
            _same(result, opened)


def _engine(ending: str) -> Any:
    return {".nc": "h5netcdf", ".zarr": "zarr"}[ending]


def _same(result: xr.Dataset, opened: xr.Dataset) -> None:
    xr.testing.assert_equal(result, opened)
    assert set(result.attrs) == set(opened.attrs)
    assert json.loads(opened.attrs["parameters"]) == json.loads(result.attrs["parameters"])
    for name, variable in result.variables.items():
        kinds = variable.dtype.kind, opened[name].dtype.kind
        assert kinds[0] == kinds[1] or set(kinds) <= set("OUT")  # text has three types
        for key, value in variable.attrs.items():
            np.testing.assert_array_equal(opened[name].attrs[key], value)


def test_stock_xarray_opens_them_without_actstore(store: Any, tmp_path: Path) -> None:
    one = actstore.top_tokens(store, stages="mlp_post", k=3).compute()
    wire.save(one, tmp_path / "one.nc")
    wire.save(one, tmp_path / "one.zarr")
    tree = actstore.moments(store)
    wire.save(tree, tmp_path / "tree.nc")
    wire.save(tree, tmp_path / "tree.zarr")
    code = f"""
import sys, warnings
sys.modules["actstore"] = None
warnings.simplefilter("error")
import xarray as xr
for kind in ("nc", "zarr"):
    one = xr.open_dataset("{tmp_path}/one." + kind).load()
    tree = xr.open_datatree("{tmp_path}/tree." + kind).load()
    print(float(one["value"].sum()), one["token_text"].values.ravel()[0], one.attrs["query"],
          one["value"].attrs["units"], float(tree["hidden/mean"].sum()), tree.attrs["tokens_used"])
"""
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    lines = out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert float(lines[0].split()[0]) == pytest.approx(float(one["value"].sum()))
    assert str(one["token_text"].values.ravel()[0]).strip() in lines[0]
    assert lines[0].endswith(str(store.n_tokens))


@pytest.mark.parametrize("ending", wire.ENDINGS)
def test_any_attribute_can_be_written(ending: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "nothing": None,
        "yes": True,
        "numpy_no": np.bool_(False),
        "nan": math.nan,
        "inf": np.float32(-np.inf),
        "whole": np.int64(2**40),
        "float": 0.25,
        "text": "é ü 象",
        "empty": "",
        "pair": (1, 2),
        "floats": [0.5, 1],
        "with_nan": [0.5, math.nan],
        "texts": ("a", "b"),
        "mixed": ["a", 1, None],
        "none_in_it": [],
        "nested": {"a": [1, (2, None)], "b": {"c": True}},
        "array": np.arange(3, dtype=np.int8),
        "square": np.eye(2),
        5: "a key that is a number",
    }
    wanted = {
        "yes": 1,
        "numpy_no": 0,
        "nan": "nan",
        "inf": "-inf",
        "whole": 2**40,
        "float": 0.25,
        "text": "é ü 象",
        "empty": "",
        "pair": [1, 2],
        "floats": [0.5, 1],
        "with_nan": "[0.5, nan]",
        "texts": ["a", "b"],
        "mixed": '["a", 1, null]',
        "none_in_it": "[]",
        "nested": '{"a": [1, [2, null]], "b": {"c": true}}',
        "array": [0, 1, 2],
        "square": "[[1.0, 0.0], [0.0, 1.0]]",
        "5": "a key that is a number",
    }
    result = xr.Dataset({"x": ("layer", [1.0], given)}, attrs=given)
    path = wire.save(result, tmp_path / f"a{ending}")
    with xr.open_dataset(path, engine=_engine(ending)) as opened:
        for attrs in (opened.attrs, opened["x"].attrs):
            assert set(attrs) == set(wanted)
            for key, value in wanted.items():
                found = attrs[key]
                assert (found.tolist() if isinstance(found, np.ndarray) else found) == value, key
    assert result.attrs is not given and result.attrs["yes"] is True  # as it was


def test_values_of_every_type(tmp_path: Path) -> None:
    result = xr.Dataset(
        {
            "half": ("n", np.array([0.5, np.nan], np.float16)),
            "truth": ("n", [True, False]),
            "texts": ("n", np.array(["a", "象\n"], dtype="U")),
            "mixed": ("n", np.array(["a", 1], dtype=object)),
            "string": ("n", np.array(["a", "b"], dtype=np.dtypes.StringDType())),
            "nothing": ("m", np.empty(0)),
        },
        {"stage": "mlp_post", "n": np.array(["x", "y"], dtype=object)},
    )
    for ending in wire.ENDINGS:
        path = wire.save(result, tmp_path / f"a{ending}")
        with xr.open_dataset(path, engine=_engine(ending)) as opened:
            assert opened["half"].dtype == np.float32 and opened["truth"].dtype == bool
            assert opened["texts"].values.tolist() == ["a", "象\n"]
            assert opened["mixed"].values.tolist() == ["a", "1"]
            assert opened["string"].values.tolist() == ["a", "b"]
            assert opened["n"].values.tolist() == ["x", "y"]
            assert opened["stage"].item() == "mlp_post" and opened.sizes["m"] == 0


def test_what_exists_and_what_fails(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = actstore.moments(store, per="layer").compute()
    path = tmp_path / "a.nc"
    path.write_text("an older one")
    wire.save(result, path)
    assert path.read_bytes()[1:4] == b"HDF"
    with pytest.raises(UsageError, match=r"small.zarr exists: remove it"):
        wire.save(result, store.path)  # a store is never written over
    with pytest.raises(UnknownNameError, match=r"'.csv'.* Known: .nc, .zarr"):
        wire.save(result, tmp_path / "a.csv")

    def fail(self: xr.Dataset, path: Any, **_: Any) -> None:
        Path(path).mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(xr.Dataset, "to_zarr", fail)
    with pytest.raises(OSError, match="disk full"):
        wire.save(result, tmp_path / "b.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["a.nc"]


# -- text -----------------------------------------------------------------------------------------


def refuse(word: str) -> Any:
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize("name", RESULTS)
def test_json_is_strict_and_csv_reads_back(name: str, store: Any) -> None:
    result = actstore.compute(RESULTS[name](store))
    text = wire.dumps(wire.to_json(result))
    found = json.loads(text, parse_constant=refuse)
    parts = (
        {k: (found["stages"][k], v.to_dataset()) for k, v in result.children.items()}
        if isinstance(result, xr.DataTree)
        else {"": (found, result)}
    )
    for plain, part in parts.values():
        for variable, values in part.data_vars.items():
            data = np.array(plain["variables"][str(variable)]["data"], dtype=object)
            undefined = values.dtype.kind == "f" and ~np.isfinite(values.values)
            np.testing.assert_array_equal(np.equal(data, None), undefined)
            given = ~np.equal(data, None)
            np.testing.assert_array_equal(data[given].astype(values.dtype), values.values[given])
    header, rows = wire.to_records(result)
    assert len(set(header)) == len(header)
    read = list(csv.reader(io.StringIO(wire.to_csv(result))))
    assert read[0] == header
    assert read[1:] == [["" if v is None else str(v) for v in row] for row in rows]
    if isinstance(result, xr.Dataset) and "bin" not in result.dims:
        for variable, values in result.data_vars.items():
            column = [row[header.index(str(variable))] for row in rows]
            if values.size == len(rows):
                wanted = [v if np.isfinite(v) else None for v in values.values.ravel().tolist()]
                assert column == wanted
            else:  # with a dimension less, repeated
                assert set(column) <= {*values.values.ravel().tolist(), None}


def test_csv_of_histograms_has_the_ends_of_each_bin(store: Any) -> None:
    result = actstore.histogram(store, stages="hidden", bins="fd").compute()
    rows = list(csv.DictReader(io.StringIO(wire.to_csv(result))))
    assert len(rows) == int(result["n_bins"].sum())  # without the padding
    for layer in range(3):
        own = [r for r in rows if r["layer"] == str(layer)]
        edges = result["edges"].sel(layer=layer).values
        edges = edges[np.isfinite(edges)].tolist()
        assert [float(r["bin_low"]) for r in own] == edges[:-1]
        assert [float(r["bin_high"]) for r in own] == edges[1:]
        counts = result["counts"].sel(layer=layer).values[: len(own)].tolist()
        assert [int(r["counts"]) for r in own] == counts


def test_csv_of_top_tokens_and_samples_has_their_labels(store: Any) -> None:
    top = actstore.top_tokens(store, stages="mlp_post", layers=1, k=2).compute()
    rows = list(csv.DictReader(io.StringIO(wire.to_csv(top))))
    assert [r["token_text"] for r in rows] == top["token_text"].values.ravel().tolist()
    assert [int(r["position"]) for r in rows] == top["position"].values.ravel().tolist()
    values = actstore.sample(store, stages="hidden", n=5, unit="value").compute()
    rows = list(csv.DictReader(io.StringIO(wire.to_csv(values))))
    assert [int(r["neuron"]) for r in rows] == values["neuron"].values.tolist() * 3


# -- the command ----------------------------------------------------------------------------------


def test_query_out(command: Any, store: Any, tmp_path: Path) -> None:
    result = actstore.moments(store, stages="hidden", per="layer").compute()
    ask = ("query", "moments", store.path, "--stages", "hidden", "--per", "layer")
    for ending in wire.ENDINGS:
        out = tmp_path / f"a{ending}"
        status, stdout, stderr = command(*ask, "--out", out)
        assert (status, stdout) == (0, "") and f"written to {out}" in stderr.replace("\n", "")
        with xr.open_dataset(out, engine=_engine(ending)) as opened:
            _same(result, opened)
    both = command(*ask, "--out", tmp_path / "b.nc", "--json")
    assert json.loads(both[1], parse_constant=refuse) == json.loads(
        wire.dumps(wire.to_json(result))
    )
    for out, words in (
        (
            tmp_path / "a.json",
            "unknown file ending '.json': did you mean '.nc'? Known: .nc, .zarr.",
        ),
        (tmp_path / "no" / "a.nc", "there is no folder"),
        (tmp_path / "a.zarr", "exists: remove it"),
    ):
        status, stdout, stderr = command(*ask, "--out", out)
        assert status == 2 and stdout == "" and words in stderr


def test_query_prints_one_form(command: Any, store: Any) -> None:
    ask = ("query", "moments", store.path, "--stages", "hidden", "--per", "layer")
    result = actstore.moments(store, stages="hidden", per="layer").compute()
    header, rows = wire.to_records(result)
    piped = command(*ask)[1]
    assert piped.splitlines()[0].split("\t") == header and len(piped.splitlines()) == 4
    drawn = command(*ask, "--table")[1]
    lines = drawn.splitlines()
    assert lines[0].startswith("┏") and len(lines) == 4 + len(rows)
    assert [c.strip() for c in lines[1].strip("┃").split("┃")] == header  # none left out
    status, stdout, stderr = command(*ask, "--table", "--csv")
    assert status == 2 and stdout == "" and "one of --json, --csv and --table" in stderr


@pytest.mark.parametrize("draw", [True, False])
def test_tables_show_any_text_as_it_is(draw: bool, capsys: pytest.CaptureFixture[str]) -> None:
    awkward = ["[bold]x[/bold]", "a\tb", "\n", " the", "象", "\x1b[31m"]
    print_table(["token", "value"], [[t, 0.5] for t in awkward], draw=draw)
    lines = capsys.readouterr().out.splitlines()
    lines = lines[3:-1] if draw else lines[1:]
    assert len(lines) == len(awkward)
    for line, shown in zip(
        lines, ["[bold]x[/bold]", "a\\tb", "\\n", " the", "象", "\\x1b[31m"], strict=True
    ):
        assert shown in line and "\x1b" not in line
