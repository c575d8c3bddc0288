"""Results as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pytest
import xarray as xr

from actstore.wire import dumps, to_csv, to_json, to_records


def result() -> xr.Dataset:
    """As queries give them: two variables, one of them with a dimension less, NaN and inf."""
    return xr.Dataset(
        {
            "mean": (
                ("layer", "neuron"),
                [[1.5, np.nan, -np.inf], [0.1, 2.0, 3.0]],
                {"units": "activation"},
            ),
            "count": ("layer", np.array([7, 2**60])),
            "edges": ("edge", [0.0, 1.0]),
        },
        {"layer": [0, 3], "neuron": [4, 5, 9], "stage": "mlp_post"},
        {"query": "moments", "tokens_used": np.int64(7), "none": None},
    )


def strict(text: str) -> Any:
    """Parse JSON, but not its extensions such as NaN."""

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_json() -> None:
    found = strict(dumps(to_json(result())))
    assert found["attrs"] == {"query": "moments", "tokens_used": 7, "none": None}
    assert found["dims"] == {"layer": 2, "neuron": 3, "edge": 2}
    assert found["coords"]["layer"] == {"dims": ["layer"], "attrs": {}, "data": [0, 3]}
    assert found["coords"]["stage"] == {"dims": [], "attrs": {}, "data": "mlp_post"}
    assert found["variables"]["mean"] == {
        "dims": ["layer", "neuron"],
        "attrs": {"units": "activation"},
        "data": [[1.5, None, None], [0.1, 2.0, 3.0]],
    }
    assert found["variables"]["count"]["data"] == [7, 2**60]


def test_json_of_a_tree() -> None:
    tree = xr.DataTree.from_dict(
        {"/": xr.Dataset(attrs={"query": "moments"}), "a": result(), "b": result()[["count"]]}
    )
    found = to_json(tree)
    assert found["attrs"] == {"query": "moments"}
    assert found["stages"] == {"a": to_json(result()), "b": to_json(result()[["count"]])}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.bool_(True), True),
        (np.array(5), 5),
        (np.array([np.nan], np.float16), [None]),
        (np.array(np.nan), None),
        (np.array(["ü", "\n"], object), ["ü", "\n"]),
        (float("inf"), None),
        ({1: (2, np.int8(3))}, {"1": [2, 3]}),
        (xr.Dataset, str(xr.Dataset)),
    ],
)
def test_values(value: Any, plain: Any) -> None:
    assert strict(dumps(value)) == plain


def test_records() -> None:
    header, rows = to_records(result())
    assert header == ["stage", "layer", "neuron", "mean", "count"]
    assert rows == [
        ["mlp_post", 0, 4, 1.5, 7],
        ["mlp_post", 0, 5, None, 7],
        ["mlp_post", 0, 9, None, 7],
        ["mlp_post", 3, 4, 0.1, 2**60],
        ["mlp_post", 3, 5, 2.0, 2**60],
        ["mlp_post", 3, 9, 3.0, 2**60],
    ]


def test_records_of_a_tree_are_those_of_its_stages() -> None:
    tree = xr.DataTree.from_dict({"a": result(), "b": result().assign_coords(stage="mlp_out")})
    header, rows = to_records(tree)
    assert header == ["stage", "layer", "neuron", "mean", "count"]
    assert [r[0] for r in rows] == ["mlp_post"] * 6 + ["mlp_out"] * 6


def test_records_whatever_the_order_of_dimensions() -> None:
    other = result().transpose("neuron", "layer", "edge")
    header, rows = to_records(other)
    assert header == ["stage", "neuron", "layer", "mean", "count"]
    swapped = [[a, c, b, d, e] for a, b, c, d, e in to_records(result())[1]]
    assert sorted(rows, key=str) == sorted(swapped, key=str)


def test_csv() -> None:
    awkward = result().assign_coords(stage='a "b", c')
    text = to_csv(awkward)
    assert text.splitlines()[:3] == [
        "stage,layer,neuron,mean,count",
        '"a ""b"", c",0,4,1.5,7',
        '"a ""b"", c",0,5,,7',
    ]
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == 7
    assert {row[0] for row in rows[1:]} == {'a "b", c'}


def test_one_number() -> None:
    header, rows = to_records(xr.Dataset({"x": ((), 2.5)}))
    assert (header, rows) == (["x"], [[2.5]])


def test_records_are_of_what_most_variables_have() -> None:
    mixed = xr.Dataset(
        {
            "counts": (("layer", "bin"), np.zeros((2, 5), int)),
            "cosine": (("layer", "quantile"), [[0.1, 0.9], [0.2, 0.8]]),
            "context": (("layer", "quantile"), np.array([["a", "b"], ["c", "d"]], object)),
        },
        {"layer": [0, 1], "quantile": [0.5, 0.99]},
    )
    header, rows = to_records(mixed)
    assert header == ["layer", "quantile", "cosine", "context"]
    assert rows[1] == [0, 0.99, 0.9, "b"]
