"""FORMAT.md against the code, and against stores."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import xarray as xr
import zarr
from crc32c import crc32c
from helpers import (
    STAGES,
    VOCABULARY,
    bare_corpus,
    plan_of,
    put_all,
    random_tables,
    random_values,
    small_corpus,
    write_store,
)

import actstore
from actstore import hookpoints, schema, skeleton
from actstore.resketch import add_sketches
from actstore.shard import Layout
from actstore.writer import Writer

pytestmark = pytest.mark.filterwarnings("ignore:Object at journal is not recognized")

PAGE = (Path(__file__).parent.parent / "FORMAT.md").read_text()


def table(heading: str) -> list[dict[str, str]]:
    """Rows of the one table whose header begins with `heading`."""
    ((head, body),) = re.findall(
        rf"^(\| {heading} \|.*)\n\| ---.*\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE
    )
    names = [c.strip() for c in head.strip("|").split("|")]
    return [
        dict(zip(names, (c.strip() for c in row.strip("|").split("|")), strict=True))
        for row in body.splitlines()
    ]


def tables(heading: str) -> Iterator[list[dict[str, str]]]:
    """All tables with such a header."""
    for head, body in re.findall(
        rf"^(\| {heading} \|.*)\n\| ---.*\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE
    ):
        names = [c.strip() for c in head.strip("|").split("|")]
        yield [
            dict(zip(names, (c.strip() for c in row.strip("|").split("|")), strict=True))
            for row in body.splitlines()
        ]


def name(cell: str) -> str:
    assert re.fullmatch(r"`[^`]+`", cell), cell
    return cell.strip("`")


# -- against the code ----------------------------------------------------------------------


def test_version() -> None:
    assert f"# Format {schema.FORMAT}\n" in PAGE
    assert {name(r["key"]): r["value"] for r in table("key")}["format"] == str(schema.FORMAT)


def test_stages() -> None:
    assert {name(r["stage"]): r["meaning"] for r in table("stage")} == schema.STAGES
    taken = re.search(r"not\n(`inputs`.*?`journal`)", PAGE, flags=re.DOTALL)
    assert taken
    assert set(re.findall(r"`(\w+)`", taken[1])) == hookpoints.RESERVED


def test_token_coordinates() -> None:
    found = {name(r["coordinate"]): r["meaning"] for r in table("coordinate")}
    assert found == schema.TOKEN_COORDS


def test_predictions_and_outcomes() -> None:
    rows = {name(r["array"]): r for t in tables("array") for r in t if "units" in r}
    assert {
        key: schema.TokenTable(tuple(r["dims"].split()), r["type"], r["units"], r["meaning"])
        for key, r in rows.items()
    } == schema.TABLES


def test_dims_and_numbers() -> None:
    rows = {name(r["array"]): r for t in tables("array") for r in t}
    assert tuple(rows["<stage>/activation"]["dims"].split()) == schema.DIMS
    assert "has dims " + " ".join(f"`{d}`" for d in schema.DIMS) in PAGE
    assert f"more than {skeleton.MAX_FLAGS:,} values" in " ".join(PAGE.split())
    assert f"at most 2^{skeleton.LABEL_CHUNK.bit_length() - 1}" in PAGE
    assert skeleton.LABEL_CHUNK == 2**20
    assert ", ".join(f"`{m}`" for m in ("zeros", "positives")) in PAGE
    moments = re.search(r"Moments are (.*?)\. ", " ".join(PAGE.split()))
    assert moments
    assert re.findall(r"`(\w+)`", moments[1]) == list(schema.MOMENTS)
    strata = re.search(r"Strata are (.*?);", " ".join(PAGE.split()))
    assert strata
    assert re.findall(r"`(\w+)`", strata[1]) == list(schema.STRATA)
    assert f"`counts` has {schema.KEYS:,} keys" in PAGE
    assert f"`rank` has {schema.RANKS} places" in PAGE
    assert f"has {schema.GRANULE_TOKENS:,} tokens or more" in PAGE


def test_element_types_and_codecs() -> None:
    block = re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block
    described = json.loads(block[1])
    kinds = {name(r["source_dtype"]): r for r in table("source_dtype")}
    assert list(kinds) == list(actstore.plan.DTYPES)
    for source, row in kinds.items():
        layout = Layout(1024, 768, 256, 48, row["data_type"], source)
        assert {"yes": True, "no": False}[row["compressed"]] == layout.compressed
        expected = json.loads(json.dumps(described))
        if not layout.compressed:
            del expected[0]["configuration"]["codecs"][1]
        assert layout.codecs() == expected


# -- against a store -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every array of the page: text, labels, heads, predictions, all sketches."""
    path = tmp_path_factory.mktemp("format") / "whole.zarr"
    plan = plan_of(small_corpus(), STAGES, 64, predictions=3, outcomes=True)
    with Writer(path, plan, vocabulary=VOCABULARY) as writer:
        put_all(writer, random_values(plan))
        writer.put_tables(0, random_tables(plan))
    add_sketches(path, covariance=True)
    return path


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with just what is always there."""
    path = tmp_path_factory.mktemp("format") / "least.zarr"
    bare = replace(bare_corpus([20, 13]), sequence_labels={}, token_labels={})
    plan = replace(plan_of(bare, STAGES[2:3], 16), sketch=False)
    write_store(path, plan, random_values(plan))
    return path


def arrays(path: Path) -> dict[str, zarr.Array]:
    root = zarr.open_group(path, mode="r", use_consolidated=False)
    return {k: v for k, v in root.members(max_depth=None) if isinstance(v, zarr.Array)}


LABELS = {
    "inputs/<token label>": ("offset", "condition"),
    "sequences/<sequence label>": ("document", "play", "year", "score", "good"),
    "<stage>/<label>": (
        *("offset", "condition"),
        *("document", "play", "year", "score", "good"),
    ),
}


def rows_by_array() -> dict[str, tuple[dict[str, str], bool]]:
    """Every described array of the `whole` store: its row, and whether it is always there."""
    found = {}
    for rows in tables("array"):
        for row in rows:
            pattern = name(row["array"])
            there = row.get("there", "with sketches")
            for stage in STAGES:
                if there == "where made of heads" and stage.name != "attn_z":
                    continue
                if there == "`hidden`" and stage.name != "hidden":
                    continue
                for label in LABELS.get(pattern, ("",)):
                    key = re.sub("<stage>", stage.name, pattern)
                    found[re.sub("<.*label>", label, key)] = (row, there == "always")
    return found


def test_every_array_is_described_and_every_described_array_is_there(whole: Path) -> None:
    described, found = rows_by_array(), arrays(whole)
    assert sorted(found) == sorted(described)
    for key, array in found.items():
        row, _ = described[key]
        assert list(array.metadata.dimension_names) == row["dims"].split(), key
        kind = array.metadata.data_type.to_json(zarr_format=3)
        if row["type"] != "any":
            assert kind in row["type"].split(" or "), key
        assert array.attrs.get("units", "") == row.get("units", array.attrs.get("units", ""))
        assert array.attrs.get("long_name") or key.endswith(
            ("layer", "neuron", "layer_name", "moment")
        )


def test_what_is_always_there(least: Path) -> None:
    always = {k for k, (_, always) in rows_by_array().items() if always}
    mine = {k for k in always if k.partition("/")[0] in ("inputs", "sequences", "mlp_post")}
    assert set(arrays(least)) == mine


def test_labels(whole: Path) -> None:
    play = arrays(whole)["mlp_post/play"]
    assert play.dtype == np.uint8
    assert set(play.attrs) == {"long_name", "flag_values", "flag_meanings", "label_values"}
    assert play.attrs["label_values"] == ["As You Like It", "Lear", "", "<b>Hamlet</b> & co"]
    assert play.attrs["flag_meanings"] == "As_You_Like_It Lear _ <b>Hamlet</b>_&_co"
    assert play.attrs["flag_values"] == [0, 1, 2, 3]
    kinds = {k: str(arrays(whole)[f"mlp_post/{k}"].dtype) for k in ("year", "score", "good")}
    assert kinds == {"year": "int64", "score": "float64", "good": "bool"}


def test_activations(whole: Path) -> None:
    for stage in STAGES:
        metadata = json.loads((whole / stage.name / "activation/zarr.json").read_text())
        assert metadata["fill_value"] == "NaN"
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [1, 64, stage.width]
        assert metadata["chunk_key_encoding"] == {
            "name": "default",
            "configuration": {"separator": "."},
        }
        listed = re.search(r"these attributes:(.*?)\.\n", PAGE, flags=re.DOTALL)
        assert listed
        assert set(re.findall(r"`(\w+)`", listed[1])) == set(metadata["attributes"])
        assert metadata["attributes"]["units"] == "1"
        assert metadata["attributes"]["source_dtype"] == stage.source_dtype
        group = json.loads((whole / stage.name / "zarr.json").read_text())
        named = set(metadata["attributes"]["coordinates"].split())
        assert set(group["attributes"]["coordinates"].split()) == named >= set(schema.TOKEN_COORDS)
        shards = {p.name for p in (whole / stage.name / "activation").iterdir()} - {"zarr.json"}
        assert shards == {f"c.{i}.{b}.0" for i in range(len(stage.layers)) for b in range(3)}


def test_padding_and_order_of_chunks(whole: Path) -> None:
    """Block 2 has 19 tokens: two rows of chunks, the second with 13 rows of NaN."""
    data = (whole / "mlp_post/activation/c.1.2.0").read_bytes()
    chunk = 16 * 24 * 4 + 4
    table = np.frombuffer(data[-(16 * 8 + 4) : -4], "<u8").reshape(4, 2, 2).tolist()
    absent = 2**64 - 1
    assert table == [
        [[0, chunk], [chunk, chunk]],
        [[2 * chunk, chunk], [3 * chunk, chunk]],
        [[absent, absent], [absent, absent]],
        [[absent, absent], [absent, absent]],
    ]
    last = np.frombuffer(data[3 * chunk : 4 * chunk - 4], "<u4").reshape(16, 24)
    assert (last[3:] == 0x7FC00000).all()
    half = (whole / "attn_z/activation/c.1.2.0").read_bytes()
    chunk = 16 * 32 * 2 + 4
    assert (np.frombuffer(half[chunk : 2 * chunk - 4], "<u2").reshape(16, 32)[3:] == 0x7E00).all()
    brain = zarr.open_array(whole / "mlp_out/activation", mode="r")[:]
    assert not (brain.view(np.uint32) & 0xFFFF).any()


def keys_of(row: dict[str, str]) -> set[str]:
    return set(re.findall(r"`(\w+)`", row["keys"]))


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def shard_digest(data: bytes, chunks: int) -> int:
    """By the page's words."""
    index = data[-(16 * chunks + 4) : -4]
    state = 0
    for offset, nbytes in np.frombuffer(index, "<u8").reshape(-1, 2).tolist():
        if offset != 2**64 - 1:
            state = crc32c(data[offset : offset + nbytes - 4], state)
    return crc32c(index, state)


def test_journal(whole: Path) -> None:
    described = {name(r["object"]): keys_of(r) for r in table("object")}
    files = {p.name: json.loads(p.read_text()) for p in (whole / "journal").iterdir()}
    records = [f"p0.b{b:08d}.json" for b in range(3)]
    assert set(files) == {"plan.json", "manifest.json", *records}
    for file, body in files.items():
        pattern = "pP.bBBBBBBBB.json" if file in records else file
        assert set(body) == described[f"journal/{pattern}"]
        rest = {k: v for k, v in body.items() if k != "crc32c"}
        assert body["crc32c"] == crc32c(canonical(rest))
        assert (whole / "journal" / file).read_bytes() == canonical(body) + b"\n"
    plan, manifest = files["plan.json"], files["manifest.json"]
    root = json.loads((whole / "zarr.json").read_text())["attributes"]["actstore"]
    assert plan["config_hash"] == hashlib.sha256(canonical(plan["config"])).hexdigest()
    marked = {name(r["key"]) for r in table("key") if r["value"].startswith("●")}
    assert plan["config"] == {k: v for k, v in root.items() if k in marked}
    raw = [(whole / "journal" / r).read_bytes() for r in records]
    assert manifest["records"] == {"count": 3, "crc32c": crc32c(b"".join(raw))}

    own = arrays(whole)
    for block, record in enumerate(records):
        shards = files[record]["shards"]
        assert [s[0] for s in shards] == sorted(s[0] for s in shards)
        for key, nbytes, digest, least, greatest, nonfinite in shards:
            data = (whole / key).read_bytes()
            array = own[key.rpartition("/")[0]]
            per_shard = np.prod(np.array(array.shards) // np.array(array.chunks))
            assert (len(data), shard_digest(data, int(per_shard))) == (nbytes, digest)
            layer = int(key.split(".")[-3])
            values = array[layer, 64 * block : 64 * (block + 1)]
            assert (values.min(), values.max(), nonfinite) == (least, greatest, 0)
        assert files[record]["tables"] == {
            key: crc32c(own[key][64 * block : 64 * (block + 1)].tobytes()) for key in schema.TABLES
        }

    files_there = {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()}
    shards_there = {k for k in files_there if re.search(r"/activation/c\.", k)}
    others = {k for k in files_there - shards_there if not k.startswith("journal/")}
    assert set(manifest["objects"]) == others - {"zarr.json"}
    for key, (nbytes, checksum) in manifest["objects"].items():
        data = (whole / key).read_bytes()
        assert (len(data), crc32c(data)) == (nbytes, checksum)
    groups = {
        k
        for k in others
        if k.endswith("zarr.json") and json.loads((whole / k).read_text())["node_type"] == "group"
    }
    labels = {
        k: v for k, v in manifest["objects"].items() if k not in groups and k[:7] != "sketch/"
    }
    identity = root["config_hash"].encode() + canonical(labels) + b"".join(raw)
    assert root["id"] == manifest["id"] == hashlib.sha256(identity).hexdigest()[:32]


def test_root_attribute(whole: Path, least: Path, tmp_path: Path) -> None:
    described = {name(r["key"]): r["value"] for r in table("key")}
    model = transformers.GPT2Model(
        transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)
    )
    dumped = actstore.dump(model, None, [[1, 2, 3]], tmp_path / "dumped.zarr")
    headed = transformers.GPT2LMHeadModel(model.config)
    predicted = actstore.dump(headed, None, [[1, 2, 3]], tmp_path / "b.zarr", outcomes=True)
    part = actstore.open(actstore.export(whole, tmp_path / "part.zarr", layers=0).path)
    stores = [actstore.open(whole), actstore.open(least), dumped, predicted, part]
    required = {k for k, v in described.items() if "optional" not in v}
    for store in stores:
        assert required <= set(store.attrs) <= set(described)
        assert (store.attrs["format"], store.attrs["state"]) == (1, "complete")
        assert set(store.attrs["capture"]) - {"predictions", "outcomes"} == {
            *("stages", "block_tokens", "passes", "padding_side", "batches"),
        }
        for key in ("capture", "corpus"):
            assert all(f"`{k}`" in described[key] for k in store.attrs[key])
    assert "sketch" not in stores[1].attrs
    assert {
        k: v for k, v in stores[0].attrs["capture"].items() if k in ("predictions", "outcomes")
    } == {
        "predictions": 3,
        "outcomes": True,
    }
    for key in ("model", "machine", "head"):
        assert set(predicted.attrs[key]) == set(re.findall(r"`(\w+)`", described[key]))
    assert set(described) - set(dumped.attrs) == {"tokenizer", "head", "origin"}
    assert f'"{part.attrs["origin"]["what"]}"' in described["origin"]


def test_states(tmp_path: Path) -> None:
    """Before the seal: metadata of arrays, labels, records; no group has its own."""
    plan = plan_of(small_corpus(), STAGES, 64)
    values = random_values(plan)
    with Writer(tmp_path / "run.zarr", plan) as writer:
        for stage in STAGES:
            for i, layer in enumerate(stage.layers):
                writer.put(stage.name, layer, 64, values[stage.name][i, 64:])
    root = tmp_path / "run.zarr"
    assert (root / "mlp_post/activation/zarr.json").exists()
    assert (root / "mlp_post/play/c/0").exists()
    records = {p.name for p in (root / "journal").glob("p0.*.json")}
    assert records == {"p0.b00000001.json", "p0.b00000002.json"}
    assert not (root / "journal/manifest.json").exists()
    for path in root.rglob("zarr.json"):
        assert json.loads(path.read_text())["node_type"] == "array"


def test_consolidated_metadata_repeats_the_objects(whole: Path) -> None:
    for folder in [".", "predictions", "outcomes", *(s.name for s in STAGES)]:
        group = json.loads((whole / folder / "zarr.json").read_text())
        inside = group["consolidated_metadata"]["metadata"]
        assert set(inside) >= {
            str(p.parent.relative_to(whole / folder))
            for p in (whole / folder).rglob("zarr.json")
            if p.parent != whole / folder
        }
        for key, node in inside.items():
            own = json.loads((whole / folder / key / "zarr.json").read_text())
            assert {**own, "consolidated_metadata": 0} == {**node, "consolidated_metadata": 0}


def test_a_sketch_opens_in_stock_xarray(whole: Path) -> None:
    sketch = xr.open_zarr(whole, group="sketch/mlp_post", consolidated=False)
    moments = sketch["moments"].sel(moment="count").sum("stratum")
    assert (moments == 147).all()
