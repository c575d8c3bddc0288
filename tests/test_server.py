"""The service's answers: what the library gives, in every format, from every address."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import write_small
from serving import assert_error, client, finished, folder
from starlette.testclient import TestClient

import actstore
from actstore.plot import PLOTS
from actstore.queries import QUERIES
from actstore.queries.parse import kind_of
from actstore.wire import dumps, to_csv, to_json


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with client(warm=True) as made:
        yield made


@pytest.fixture(scope="module")
def book() -> actstore.Store:
    return actstore.open(folder() / "book.zarr")


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_alike(found: Any, expected: Any) -> None:
    """The same values, floats to rounding: another process may multiply in another order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_alike(a, b)
    elif isinstance(expected, float) and isinstance(found, (int, float)):
        assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9), (found, expected)
    else:
        assert found == expected


def example(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """A query's example as parameters of an address, and as arguments."""
    query = QUERIES[name]
    words = iter(shlex.split(query.example))
    text = {}
    for word in words:
        option, equals, value = word.removeprefix("--").partition("=")
        option = option.replace("-", "_")
        parameter = {p.name: p for p in query.parameters}.get(option)
        if parameter is None:  # --json and the like are the command line's own
            continue
        flag = kind_of(parameter.annotation).name == "boolean"
        text[option] = value if equals else "true" if flag else next(words)
    parsers = {p.name: kind_of(p.annotation).parse for p in query.parameters}
    return text, {n: parsers[n](n, t) for n, t in text.items()}


# -- queries -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_every_query_gives_what_the_library_gives(
    name: str, http: TestClient, book: actstore.Store
) -> None:
    text, arguments = example(name)
    response = finished(http, f"/api/stores/book/{name}", params={**text, "wait": "30"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    expected = actstore.compute(QUERIES[name].function(book, **arguments))
    assert_alike(strict(response.text), json.loads(dumps(to_json(expected))))


def test_sketches_give_the_very_same(http: TestClient, book: actstore.Store) -> None:
    for params in (
        {"per": "layer"},
        {"per": "layer", "tokens": "position > 0"},
        {"stages": "hidden,mlp_out", "layers": "1-2", "neurons": "0,5-9"},
        {"stages": "mlp_post,mlp_out"},  # of different widths: a tree
    ):
        response = http.get("/api/stores/book/moments", params=params)
        assert response.status_code == 200, response.text
        assert response.headers["x-actstore-cache"] == "miss"
        assert float(response.headers["x-actstore-seconds"]) > 0
        expected = actstore.compute(actstore.moments(book, **params))
        assert strict(response.text) == json.loads(dumps(to_json(expected)))


def test_stages_beside_one_another_as_xarray_would_put_them(book: actstore.Store) -> None:
    """Layers that a stage lacks, groups, and truth values."""
    from actstore.queries import result

    asked = [
        actstore.moments(book, per="layer"),
        actstore.moments(book, by="condition", stages="hidden,mlp_in"),
        actstore.zeroness(book, stages="hidden,mlp_in"),
        actstore.histogram(book, bins=7, stages="hidden,attn_z"),
        actstore.quantiles(book, q=(0.1, 0.5)),
    ]
    stacked = result._stacked
    for own in asked:
        assert isinstance(own, xr.Dataset) and own.sizes["stage"] > 1
    try:
        result._stacked = lambda stages: None  # type: ignore[assignment]
        plain = [
            actstore.moments(book, per="layer"),
            actstore.moments(book, by="condition", stages="hidden,mlp_in"),
            actstore.zeroness(book, stages="hidden,mlp_in"),
            actstore.histogram(book, bins=7, stages="hidden,attn_z"),
            actstore.quantiles(book, q=(0.1, 0.5)),
        ]
    finally:
        result._stacked = stacked
    for found, expected in zip(asked, plain, strict=True):
        found, expected = actstore.compute(found, expected)
        xr.testing.assert_identical(found, expected)
        assert list(found.coords) == list(expected.coords)
        assert {n: v.dtype for n, v in found.variables.items()} == {
            n: v.dtype for n, v in expected.variables.items()
        }


@pytest.mark.parametrize("query", ["moments", "histogram"])
def test_formats(query: str, http: TestClient, book: actstore.Store, tmp_path: Path) -> None:
    params = {"stages": "mlp_post,mlp_out", "layers": "1"}
    expected = actstore.compute(QUERIES[query].function(book, **params))

    def get(format_: str) -> Any:
        asked = {**params, "format": format_, "wait": "30"}
        response = finished(http, f"/api/stores/book/{query}", params=asked)
        assert response.status_code == 200, response.text
        return response

    table = get("csv")
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    assert table.headers["content-disposition"].endswith(f"book-{query}.csv")
    assert table.text == to_csv(expected)
    assert len(list(csv.reader(io.StringIO(table.text)))) > 2
    netcdf = tmp_path / "answer.nc"
    netcdf.write_bytes(get("nc").content)
    actstore.save(expected, tmp_path / "expected.nc")
    opened = [xr.open_datatree(p, engine="h5netcdf") for p in (netcdf, tmp_path / "expected.nc")]
    xr.testing.assert_identical(*opened)
    assert get("png").content.startswith(b"\x89PNG")
    drawn = get("svg")
    assert drawn.headers["content-type"] == "image/svg+xml" and "</svg>" in drawn.text
    actstore.plot.save(expected, tmp_path / "expected.svg")
    assert drawn.text == (tmp_path / "expected.svg").read_text()


def test_every_picture_can_be_had(http: TestClient) -> None:
    """Of a few: each takes a second. The rest is tests of plots."""
    for name in ("zeroness", "cosine_pairs"):
        assert name in PLOTS
        asked = {**example(name)[0], "format": "png", "wait": "30"}
        assert finished(http, f"/api/stores/book/{name}", params=asked).status_code == 200
    error = assert_error(
        http.get("/api/stores/book/layer_covariance", params={"format": "png"})
        if "layer_covariance" not in PLOTS
        else http.get("/api/stores/book/moments", params={"format": "gif"}),
        400,
        "bad_parameter" if "layer_covariance" not in PLOTS else "unknown_name",
    )
    assert "json" in error["message"]


def test_a_result_in_another_format_is_not_computed_again(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"stages": "hidden", "layers": "2", "tokens": "position > 3"}
    first = finished(http, "/api/stores/book/rsa", params={**asked, "pairs": "hidden:hidden"})
    assert first.status_code == 200
    jobs = len(http.get("/api/jobs").json()["jobs"])
    table = http.get(
        "/api/stores/book/rsa",
        params={**asked, "pairs": "hidden:hidden", "format": "csv", "wait": "10"},
    )
    assert table.status_code == 200
    last = http.get("/api/jobs").json()["jobs"][jobs]
    assert last["estimate"]["nbytes"] == 0


def test_two_stores(http: TestClient, book: actstore.Store) -> None:
    asked = {"stages": "hidden", "layers": "1", "data_b": "twin"}
    response = finished(http, "/api/stores/book/rsa", params=asked)
    other = actstore.open(folder() / "twin.zarr")
    expected = actstore.compute(actstore.rsa(book, **{**asked, "data_b": other}))
    assert_alike(strict(response.text), json.loads(dumps(to_json(expected))))
    for name in ("../small", "/elsewhere/twin.zarr", "nothing"):
        error = http.get("/api/stores/book/rsa", params={**asked, "data_b": name})
        assert_error(error, 400, "unknown_name")


def test_etags(http: TestClient) -> None:
    url, asked = "/api/stores/book/moments", {"per": "layer", "stages": "hidden"}
    first = http.get(url, params=asked)
    etag = first.headers["etag"]
    assert etag.startswith('"') and first.headers["cache-control"] == "no-cache"
    again = http.get(url, params=asked)
    assert again.headers["x-actstore-cache"] == "hit" and again.content == first.content
    assert again.headers["x-actstore-seconds"] == first.headers["x-actstore-seconds"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        unchanged = http.get(url, params=asked, headers={"if-none-match": known})
        assert unchanged.status_code == 304 and unchanged.content == b""
        assert unchanged.headers["etag"] == etag
    # The same question in other words; other questions.
    same = http.get(url, params={**asked, "by": "", "neurons": " ", "tokens": ""})
    assert same.headers["etag"] == etag
    for other in ({"per": "neuron"}, {"format": "csv"}, {"layers": "1"}, {"stages": "mlp_in"}):
        assert http.get(url, params={**asked, **other}).headers["etag"] != etag
    assert http.get("/api/stores/twin/moments", params=asked).headers["etag"] != etag


def test_estimates(http: TestClient) -> None:
    at_once = http.get("/api/stores/book/moments/estimate?per=layer").json()["estimate"]
    assert at_once["source"] == "sketch" and at_once["nbytes"] == 0
    some = http.get("/api/stores/book/rsa/estimate?layers=1").json()["estimate"]
    more = http.get("/api/stores/book/rsa/estimate").json()["estimate"]
    assert some["source"] == more["source"] == "scan"
    assert 0 < some["nbytes"] < more["nbytes"] and some["seconds"] < more["seconds"]
    long = http.get("/api/stores/book/rsa/estimate?null=1000000000").json()["estimate"]
    assert long["nbytes"] == more["nbytes"] and long["seconds"] > 1000 * more["seconds"]
    stages = http.get("/api/stores/book").json()["stages"]
    assert more["nbytes"] == sum(s["nbytes"] for s in stages)


def test_memory_and_sinks_are_asked_as_the_library_does(http: TestClient) -> None:
    asked = {"stages": "hidden", "layers": "1", "exclude_sinks": "hidden", "per": "layer"}
    response = finished(http, "/api/stores/book/moments", params=asked)
    assert response.json()["attrs"]["exclude_sinks"] == "hidden"
    error = http.get("/api/stores/book/rsa", params={"memory": "1TiB"})
    assert "2GiB" in assert_error(error, 413, "too_large")["message"]


def test_a_store_without_sketches_is_scanned(tmp_path: Path) -> None:
    from helpers import STAGES, plan_of, random_values, small_corpus, write_store

    plan = plan_of(small_corpus(), STAGES, 64, sketch=False)
    write_store(tmp_path / "bare.zarr", plan, random_values(plan))
    with client(tmp_path) as http:
        for asked in ({}, {"exclude_sinks": "mlp_out"}):
            params = {"stages": "hidden", "per": "layer", "wait": "30", **asked}
            response = http.get("/api/stores/bare/moments", params=params)
            assert response.json()["attrs"]["source"] == "scan"
            store = actstore.open(tmp_path / "bare.zarr")
            expected = actstore.compute(
                actstore.moments(store, stages="hidden", per="layer", **asked)
            )
            assert_alike(response.json(), json.loads(dumps(to_json(expected))))


# -- stores, tokens, texts -----------------------------------------------------------------


def test_stores_and_cards(http: TestClient, book: actstore.Store) -> None:
    stores = http.get("/api/stores").json()["stores"]
    assert [s["name"] for s in stores] == ["book", "small", "twin"]
    assert stores[0]["stages"] == book.stages and stores[0]["id"] == book.id
    card = http.get("/api/stores/book").json()
    assert card["tokens"] == book.n_tokens and card["outcomes"] in (True, False)
    stages = {s["name"]: s for s in card["stages"]}
    assert list(stages) == book.stages
    assert stages["attn_z"]["heads"] == 4 and stages["hidden"]["heads"] is None
    assert stages["hidden"]["layers"] == list(range(7)) and stages["hidden"]["width"] == 128
    labels = {s["name"]: s for s in card["labels"]}
    assert labels["condition"]["kind"] == "text"
    assert set(labels["condition"]["values"]) == {"internal", "terminal"}
    assert card["sketch"] == {"by": None}
    small = http.get("/api/stores/small").json()["labels"]
    kinds = {s["name"]: s["kind"] for s in small}
    assert {kinds[n] for n in ("good",)} == {"bool"} and kinds["year"] == "int"
    assert (kinds["score"], kinds["play"]) == ("float", "text")
    assert next(s for s in small if s["name"] == "good")["values"] == [False, True]


def test_tokens(http: TestClient, book: actstore.Store) -> None:
    page = http.get("/api/stores/book/tokens", params={"offset": 5, "limit": 3}).json()
    assert page["total"] == book.n_tokens and (page["offset"], page["limit"]) == (5, 3)
    rows = [dict(zip(page["columns"], row, strict=True)) for row in page["rows"]]
    tokens = book.tokens
    for row in rows:
        at = row["token"]
        assert row["token_id"] == int(tokens["token_id"][at])
        assert row["token_text"] == book.vocabulary[row["token_id"]]  # type: ignore[index]
        assert row["position"] == int(tokens["position"][at])
        assert row["condition"] == str(tokens["condition"][at].values)
    asked = {"where": "condition == 'terminal' and position > 2", "search": "TH", "limit": 1000}
    chosen = http.get("/api/stores/book/tokens", params=asked).json()
    texts = book.vocabulary[np.asarray(book.column("token_id"))]  # type: ignore[index]
    label = tokens["condition"].values
    expected = [
        i
        for i in range(book.n_tokens)
        if "th" in texts[i].lower() and label[i] == "terminal" and int(tokens["position"][i]) > 2
    ]
    assert [row[0] for row in chosen["rows"]] == expected and chosen["total"] == len(expected)
    past = http.get("/api/stores/book/tokens?offset=99999999").json()
    assert past["rows"] == []
    nan = http.get("/api/stores/small/tokens?limit=1000").json()
    at = nan["columns"].index("offset")
    assert any(row[at] is None for row in nan["rows"])


def test_sequences_and_values(http: TestClient) -> None:
    store = actstore.open(folder() / "small.zarr")
    page = http.get("/api/stores/small/sequences?offset=2&limit=4").json()
    assert page["total"] == 24 and len(page["rows"]) == 4
    rows = [dict(zip(page["columns"], row, strict=True)) for row in page["rows"]]
    sequences = store.sequences
    for row in rows:
        at = row["sequence"]
        assert row["tokens"] == int(sequences["length"][at])
        assert row["preview"] == str(sequences["text"][at].values)[:80]
        assert row["play"] == str(sequences["play"][at].values)
    inputs, kept = store.inputs, store.tokens["input"].values.tolist()
    stage = store["mlp_post"].sel(layer=1, neuron=7).values
    for number in (0, 5, 11):  # of 5 nothing is kept
        start = int(sequences["start"][number])
        length = int(sequences["length"][number])
        found = http.get(f"/api/stores/small/sequences/{number}").json()
        assert found["total"] == length == len(found["tokens"])
        shown = http.get(
            f"/api/stores/small/sequences/{number}/values?stage=mlp_post&layer=1&neuron=7"
        ).json()
        for i, token in enumerate(found["tokens"]):
            row = start + i
            assert token["id"] == int(inputs["token_id"][row]) and token["position"] == i
            expected = kept.index(row) if row in kept else None
            assert token["token"] == expected
            value = shown["values"][i]
            assert value == (None if expected is None else float(stage[expected]))
    part = http.get("/api/stores/small/sequences/11?offset=3&limit=2").json()
    assert [t["position"] for t in part["tokens"]] == [3, 4]
    assert_error(http.get("/api/stores/small/sequences/24"), 400, "bad_parameter")
    wrong = http.get("/api/stores/small/sequences/0/values?stage=mlp_pots&layer=1&neuron=7")
    assert assert_error(wrong, 400, "unknown_name")["nearest"] == "mlp_post"
    for bad in ("layer=9&neuron=7", "layer=1&neuron=48", "layer=1", "layer=x&neuron=0"):
        url = f"/api/stores/small/sequences/0/values?stage=mlp_post&{bad}"
        assert http.get(url).status_code == 400


@pytest.mark.parametrize("name", ["book", "small"])
def test_contexts(name: str, http: TestClient) -> None:
    store = actstore.open(folder() / f"{name}.zarr")
    at = [0, 3, store.n_tokens - 1, 77]
    url = f"/api/stores/{name}/contexts"
    asked = {"at": ",".join(map(str, at)), "before": "4", "after": "3"}
    for found, token in zip(http.get(url, params=asked).json()["contexts"], at, strict=True):
        assert found["token"] == token
        whole = found["before"] + found["text"] + found["after"]
        assert whole == store.decode(token, before=4, after=3)
        assert found["text"] == store.decode(token, before=0)
        assert found["position"] == int(store.tokens["position"][token])
    assert http.get(url).json() == {"contexts": []}
    assert_error(http.get(url, params={"at": ",".join(["1"] * 201)}), 413, "too_large")
    assert_error(http.get(url, params={"at": str(store.n_tokens)}), 400, "bad_parameter")


def test_predictions_and_outcomes(http: TestClient) -> None:
    store = actstore.open(folder() / "twin.zarr")
    assert store.predictions is not None and store.outcomes is not None
    card = http.get("/api/stores/twin").json()
    assert card["predictions"] == 3 and card["outcomes"] is True
    bare = http.get("/api/stores/book").json()
    assert bare["predictions"] is None and bare["outcomes"] is False
    found = http.get("/api/stores/twin/predictions?token=17").json()
    stored = store.predictions.isel(token=17)
    assert found["text"] == store.decode(17, before=0)
    assert found["text"] + found["next"] == store.decode(17, before=0, after=1)
    assert [p["id"] for p in found["predictions"]] == stored["token_id"].values.tolist()
    assert [p["probability"] for p in found["predictions"]] == (
        stored["probability"].values.tolist()
    )
    assert found["predictions"][0]["text"] == store.vocabulary[stored["token_id"].values[0]]
    assert_error(http.get("/api/stores/book/predictions?token=1"), 400, "bad_parameter")
    assert_error(http.get("/api/stores/twin/predictions?token=999999"), 400, "bad_parameter")
    assert_error(http.get("/api/stores/twin/predictions"), 400, "bad_parameter")

    rank = store.outcomes["rank"].values
    last = int(np.flatnonzero(rank < 0)[0])  # nothing follows it
    page = http.get(f"/api/stores/twin/tokens?offset={last - 1}&limit=2").json()
    rows = [dict(zip(page["columns"], row, strict=True)) for row in page["rows"]]
    assert rows[0]["loss"] == float(store.outcomes["loss"].values[last - 1])
    assert rows[0]["rank"] == rank[last - 1]
    assert rows[1]["loss"] is None and rows[1]["rank"] is None
    first = http.get("/api/stores/twin/sequences/0").json()["tokens"]
    kept = next(t for t in first if t["token"] is not None)
    assert kept["entropy"] == float(store.outcomes["entropy"].values[kept["token"]])
    unkept = [t for t in first if t["token"] is None]
    assert all(t["loss"] is None and t["rank"] is None for t in unkept)
    hard = http.get("/api/stores/twin/tokens", params={"where": "loss > 5"}).json()
    assert 0 < hard["total"] == int((store.outcomes["loss"].values > 5).sum())


def test_two_stores_of_one_name_and_new_ones(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        write_small(tmp_path / place / "run.zarr")
    with client(tmp_path / "a", tmp_path / "b", tmp_path / "a" / "run.zarr") as http:
        names = [s["name"] for s in http.get("/api/stores").json()["stores"]]
        assert names == ["run", "run-2"]
        shutil.copytree(tmp_path / "a" / "run.zarr", tmp_path / "a" / "later.zarr")
        names = [s["name"] for s in http.get("/api/stores").json()["stores"]]
        assert set(names) == {"later", "run", "run-2"}
        # Written anew at the same place.
        before = http.get("/api/stores/later/moments?stages=hidden").json()
        shutil.rmtree(tmp_path / "a" / "later.zarr")
        shutil.copytree(folder() / "book.zarr", tmp_path / "a" / "later.zarr")
        after = http.get("/api/stores/later/moments?stages=hidden").json()
        assert before["attrs"]["store_id"] != after["attrs"]["store_id"]


def test_queries_are_listed(http: TestClient) -> None:
    listed = {q["name"]: q for q in http.get("/api/queries").json()["queries"]}
    assert set(listed) == set(QUERIES)
    for name, query in listed.items():
        assert query["summary"] == QUERIES[name].summary
        assert query["plot"] == (name in PLOTS)
        assert [p["name"] for p in query["parameters"]] == [
            p.name for p in QUERIES[name].parameters
        ]
    types = {p["name"]: p for p in listed["histogram"]["parameters"]}
    assert types["bins"]["type"] == "array" and types["bins"]["default"] == 100
    assert types["per"]["choices"] == ["layer", "head", "neuron"]
    assert types["density"]["type"] == "boolean" and types["stages"]["type"] == "string"


def test_static_files(http: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from actstore.server import routes

    plotly = http.get("/static/plotly.min.js")
    assert plotly.headers["content-type"].startswith("text/javascript")
    assert len(plotly.content) > 10**6
    (tmp_path / "lib").mkdir()
    for name in ("index.html", "lib/a.js", "style.css"):
        (tmp_path / name).write_text(name)
    (tmp_path.parent / "secret.txt").write_text("secret")
    monkeypatch.setattr(routes, "STATIC", tmp_path)
    assert http.get("/").text == "index.html"
    for name, kind in (("lib/a.js", "text/javascript"), ("style.css", "text/css")):
        found = http.get(f"/static/{name}")
        assert found.text == name and found.headers["content-type"].startswith(kind)
        known = {"if-none-match": found.headers["etag"]}
        assert http.get(f"/static/{name}", headers=known).status_code == 304
    for name in ("../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "lib", "", "x.js"):
        assert_error(http.get(f"/static/{name}"), 404, "not_found")
