"""What strangers hand over: stores made to harm, models that come with code. See tests/fuzz.py."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import hostile
import numcodecs
import numpy as np
import pytest
import torch
import transformers
import zarr
from helpers import scratch, small_corpus, write_small
from zarr.storage import MemoryStore

import actstore
from actstore.codecs import bounded, zstd_nbytes
from actstore.errors import CorruptStoreError, ModelError, StoreError, UnknownNameError
from actstore.schema import METADATA_NBYTES, pick
from actstore.storage import LocalStorage, check_key

BOMBS = list(hostile.BOMBS)
FUZZ = Path(fuzz.__file__)

# -- bombs, in a process that may hold a gigabyte more than it does ------------------------------


@pytest.fixture(scope="module")
def watched() -> Iterator[fuzz.Child]:
    child = fuzz.Child("stores, hand-written")
    yield child
    child.end()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_memory_and_time(watched: fuzz.Child, name: str) -> None:
    answer = watched.ask(BOMBS.index(name))
    assert answer["outcome"] in fuzz.GOOD, answer.get("why")


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    """A child that takes too much, dies or hangs is said to."""
    script = tmp_path / "child.py"
    script.write_text(
        "import os, sys, time\n"
        "print('{\"ready\": true}', flush=True)\n"
        "asked = sys.stdin.readline().strip()\n"
        "if asked == '1': held = bytearray(os.urandom(1)) * (2**30 + 2**28); time.sleep(60)\n"
        "if asked == '2': os.abort()\n"
        "time.sleep(60)\n"
    )
    for number, outcome in ((1, "over memory"), (2, "crashed"), (3, "hung")):
        child = fuzz.Child("", [sys.executable, str(script)])
        assert child.ask(number, 30.0 if number < 3 else 0.5)["outcome"] == outcome
        assert child.process.returncode is not None


def test_an_act_over_the_limit_is_told(tmp_path: Path) -> None:
    def case(number: int) -> str:
        if number == 1:
            raise MemoryError
        if number == 2:
            raise fuzz.WrongError("no")
        if number == 3:
            raise KeyError("raw")
        return "answered"

    found = [fuzz._answer(case, n)["outcome"] for n in range(4)]
    assert found == ["answered", "over memory", "wrong", "failed"]


@pytest.mark.slow
def test_fuzzing_for_a_while() -> None:
    """As in SCALING.md, shorter; any outcome but an answer or a refusal fails."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FUZZ), "--minutes", "1", "--seed", "7"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    counted = dict(re.findall(r"^\| ([\w, -]+) \| ([\d,]+) ", done.stdout, flags=re.MULTILINE))
    assert set(counted) == set(fuzz.TARGETS)
    assert all(int(n.replace(",", "")) > 20 for n in counted.values())


def test_the_page_holds_the_table_of_all_targets() -> None:
    page = (FUZZ.parent.parent / "SCALING.md").read_text()
    text = page.partition(fuzz.MARKS[0])[2].partition(fuzz.MARKS[1])[0]
    rows = {
        cells[0]: [int(c.replace(",", "")) for c in cells[1:]]
        for cells in (
            [c.strip() for c in line.strip("|").split("|")]
            for line in text.splitlines()
            if re.match(r"\| .* \| [\d,]+ \|", line)
        )
    }
    assert set(rows) == set(fuzz.TARGETS)
    for inputs, refused, answered, *bad in rows.values():
        assert inputs == refused + answered > 0 and not any(bad)
    assert rows["stores, hand-written"][0] == len(BOMBS)


def test_writing_the_table_into_a_page(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text(f"before\n{fuzz.MARKS[0]}\nold\n{fuzz.MARKS[1]}\nafter\n")
    fuzz.write_page(page, "| a |")
    assert page.read_text() == f"before\n{fuzz.MARKS[0]}\n| a |\n{fuzz.MARKS[1]}\nafter\n"


# -- what damage is told of that used to pass ------------------------------------------------------


@pytest.fixture
def own() -> Iterator[Path]:
    with scratch() as folder:
        path = Path(folder) / "run.zarr"
        write_small(path)
        yield path


def test_a_lost_chunk_of_labels_is_not_fill_values(own: Path) -> None:
    (own / "hidden/position/c/0").unlink()
    store = actstore.open(own)
    with pytest.raises(CorruptStoreError, match=r"hidden/position/c/0 is missing .*verify"):
        store.column("position")
    with pytest.raises(CorruptStoreError, match="hidden/position/c/0 is missing"):
        store.tokens["position"].load()
    assert len(store["mlp_post"].values)  # what does not need it is answered


@pytest.mark.parametrize("key", ["hidden/position/c/0", "sketch/hidden/moments/c/0/0/0/0"])
def test_changed_values_that_decode_are_told(own: Path, key: str) -> None:
    plain = bytearray(numcodecs.Zstd().decode((own / key).read_bytes()))
    plain[8] ^= 1
    (own / key).write_bytes(numcodecs.Zstd().encode(bytes(plain)))
    with pytest.raises(CorruptStoreError, match=f"{key} (is damaged|has [0-9,]+ bytes)"):
        actstore.top_tokens(own, stages="hidden", tokens="position > 0").compute()
        actstore.moments(own, stages="hidden").compute()


def test_an_array_whose_metadata_are_not_the_roots(own: Path) -> None:
    file = own / "mlp_post/activation/zarr.json"
    file.write_text(file.read_text().replace("147", "146"))
    store = actstore.open(own)
    assert store["hidden"].shape == (3, 147, 24)
    with pytest.raises(CorruptStoreError, match=r"activation/zarr.json is not the root's"):
        store["mlp_post"]


def test_facts_that_were_changed(own: Path) -> None:
    root = json.loads((own / "zarr.json").read_text())
    root["attributes"]["actstore"]["capture"]["stages"]["mlp_post"]["layers"] = [4, 5]
    (own / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CorruptStoreError, match=r"facts .* were changed since its config_hash"):
        actstore.open(own)
    assert [p.key for _, p in actstore.verify(own) if p is not None] == ["zarr.json"]


def test_facts_of_later_versions_are_passed_over(own: Path) -> None:
    root = json.loads((own / "zarr.json").read_text())
    root["attributes"]["actstore"] |= {"license": "MIT", "later": [1]}
    (own / "zarr.json").write_text(json.dumps(root))
    assert actstore.open(own).n_tokens == 147


def test_a_store_that_changes_while_it_is_open(own: Path) -> None:
    store = actstore.open(own)
    sketched = store.sketched("hidden")
    assert sketched is not None
    root = json.loads((own / "zarr.json").read_text())
    (own / "zarr.json").write_text(json.dumps(root))  # the same, in other bytes
    with pytest.raises(CorruptStoreError, match="has changed since it was opened"):
        sketched.norms(0)


# -- links, pipes, names ---------------------------------------------------------------------------


def test_links_within_the_store_and_to_it_are_followed(own: Path) -> None:
    shard = own / "mlp_post/activation/c.0.0.0"
    shard.rename(own / "elsewhere")
    shard.symlink_to(own / "elsewhere")
    (own.parent / "link.zarr").symlink_to(own)
    expected = actstore.open(own)["mlp_post"].values
    assert np.array_equal(actstore.open(own.parent / "link.zarr")["mlp_post"], expected)


def test_nothing_outside_is_read(own: Path) -> None:
    secret = own.parent / "secret"
    secret.write_bytes((own / "mlp_post/activation/c.0.0.0").read_bytes())
    (own / "mlp_post/activation/c.0.0.0").unlink()
    (own / "mlp_post/activation/c.0.0.0").symlink_to("../../../secret")
    with pytest.raises(StoreError, match=r"c\.0\.0\.0 is a link to .*secret, outside of"):
        actstore.open(own)["mlp_post"].load()
    problems = [p for _, p in actstore.verify(own) if p is not None]
    assert [p.key for p in problems] == ["mlp_post/activation/c.0.0.0"]


@pytest.mark.parametrize("key", ["..", "a/../b", "/etc/passwd", "a//b", ".", "a\0b", "x" * 2000])
def test_names_that_lead_elsewhere(key: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptStoreError):
        check_key(key)
    storage = LocalStorage(tmp_path)
    for ask in (storage.get, storage.exists, storage.size, storage.delete):
        with pytest.raises(CorruptStoreError):
            ask(key)


def test_no_more_is_read_than_is_due(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("a", b"12345")
    assert storage.get("a", 5) == b"12345"
    with pytest.raises(CorruptStoreError, match="a has 5 bytes, and at most 4 are due"):
        storage.get("a", 4)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**36)
    with pytest.raises(CorruptStoreError, match="at most"):
        storage.get("huge", METADATA_NBYTES)


# -- codecs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_791, 65_792, 2**20, 2**24])
@pytest.mark.parametrize("level", [1, 9])
def test_the_size_that_a_zstd_frame_says(size: int, level: int) -> None:
    data = np.random.default_rng(0).integers(0, 4, size, np.uint8).tobytes()
    frame = np.frombuffer(numcodecs.Zstd(level).encode(data), np.uint8)
    assert zstd_nbytes(frame) == size
    for cut in range(min(6, len(frame))):
        assert zstd_nbytes(frame[:cut]) is None


COMPRESSORS: dict[str, Any] = {
    "none": None,
    "zstd": zarr.codecs.ZstdCodec(level=3, checksum=True),
    "blosc": zarr.codecs.BloscCodec(cname="zstd", shuffle="shuffle"),
    "gzip": zarr.codecs.GzipCodec(level=1),
}


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("shards", [None, (8, 20)])
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "uint8"])
def test_bounded_codecs_read_what_stock_zarr_writes(
    name: str, shards: tuple[int, int] | None, dtype: str
) -> None:
    memory, values = MemoryStore(), np.random.default_rng(0).integers(0, 2, (13, 17)).astype(dtype)
    made = zarr.create_array(
        memory,
        shape=values.shape,
        chunks=(4, 10),
        shards=shards,
        dtype=dtype,
        compressors=COMPRESSORS[name],
    )
    made[:] = values
    metadata = json.loads(memory._store_dict["zarr.json"].to_bytes())
    codecs = bounded(metadata["codecs"])
    assert "actstore." in json.dumps(codecs)
    again = MemoryStore(dict(memory._store_dict))
    make = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes
    again._store_dict["zarr.json"] = make(json.dumps({**metadata, "codecs": codecs}).encode())
    array = zarr.open_array(again, mode="r")
    assert np.array_equal(array[:], values)
    # What is written on from them has the standard names.
    written = [c.to_dict() for c in array.metadata.codecs]
    assert written[0]["name"] == ("bytes" if shards is None else "sharding_indexed")
    assert "actstore." not in json.dumps(written, default=str)
    if shards is None:
        assert pickle.loads(pickle.dumps(array.metadata.codecs)) == array.metadata.codecs


def test_texts_are_read_as_stock_zarr_reads_them(own: Path) -> None:
    stock = zarr.open_array(own / "sequences/text", mode="r")[:]
    assert actstore.open(own).sequences["text"].values.tolist() == stock.tolist()
    assert stock.tolist() == small_corpus().texts


def test_a_dataset_of_ours_is_saved_with_standard_codecs(own: Path, tmp_path: Path) -> None:
    actstore.open(own).sequences.drop_encoding().to_zarr(tmp_path / "a.zarr", zarr_format=3)
    actstore.open(own).inputs.to_zarr(tmp_path / "b.zarr", zarr_format=3)
    for file in tmp_path.rglob("zarr.json"):
        assert "actstore." not in file.read_text()


# -- names of numbers ------------------------------------------------------------------------------


def test_long_ranges_of_layers_take_no_memory() -> None:
    with pytest.raises(UnknownNameError, match="unknown layer 12"):
        pick("0-9999999," * 500 + "1", range(12), "layer")


# -- models ----------------------------------------------------------------------------------------


class _Opens:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model as save_pretrained leaves it."""
    made = transformers.GPT2Model(
        transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)
    )
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_that_are_pickles_are_not_opened(folder: Path, tmp_path: Path) -> None:
    """The pickle makes a folder, as loading it the plain way shows in the end."""
    sign = tmp_path / "was-here"
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": _Opens(sign)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        actstore.load_model(str(folder), device="cpu")
    assert not sign.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert sign.exists()


def test_pickles_beside_safetensors_are_passed_over(folder: Path, tmp_path: Path) -> None:
    sign = tmp_path / "was-here"
    torch.save({"wte.weight": _Opens(sign)}, folder / "pytorch_model.bin")
    model, _ = actstore.load_model(str(folder), device="cpu")
    assert sum(p.numel() for p in model.parameters()) > 0
    assert not sign.exists()


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path, part: str) -> None:
    sign = tmp_path / "was-here"
    code = f"import os\nos.mkdir({str(sign)!r})\nclass Own: pass\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    if part == "tokenizer":
        spec = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(spec))
    else:
        name = "AutoConfig" if part == "config" else "AutoModel"
        config |= {"auto_map": {name: "own.Own"}, "model_type": "own"}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        actstore.load_model(str(folder), device="cpu")
    assert not sign.exists()
    assert not (tmp_path / "was-here").exists()


def test_weights_that_are_no_safetensors(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for data in (b"", whole[:100], (2**60).to_bytes(8, "little") + whole[8:], zlib.compress(whole)):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match="cannot load model"):
            actstore.load_model(str(folder), device="cpu")
