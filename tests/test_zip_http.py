"""Stores in a zip archive and on plain web servers answer as the folder does."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from helpers import (
    STAGES,
    VOCABULARY,
    plan_of,
    random_tables,
    random_values,
    small_corpus,
    write_store,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore import remote
from actstore.errors import (
    ActstoreError,
    CorruptStoreError,
    NotAStoreError,
    StoreError,
    UnfinishedStoreError,
    WriteError,
)
from actstore.places import storage_at
from actstore.readonly import Recent
from actstore.resketch import add_sketches
from actstore.storage import counters
from actstore.writer import Writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("places") / "run.zarr"
    plan = plan_of(small_corpus(), STAGES, 64, predictions=2, outcomes=True)
    with Writer(path, plan, vocabulary=VOCABULARY) as writer:
        values, tables = random_values(plan), random_tables(plan)
        for stage in plan.stages:
            for i, layer in enumerate(stage.layers):
                writer.put(stage.name, layer, 0, values[stage.name][i])
        writer.put_tables(0, tables)
    return path


def zipped(folder: Path, out: Path, method: int = zipfile.ZIP_STORED, top: str = "") -> Path:
    with zipfile.ZipFile(out, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, top + str(path.relative_to(folder)))
    return out


class Ranged(SimpleHTTPRequestHandler):
    """Python's own server, which knows whole files only, or taught to give parts of them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the one before
    ranges = True
    sent: Counter[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        type(self).sent[f"{self.path} {wanted}"] += 1
        if not (wanted and self.ranges and path.is_file()):
            return super().do_GET()
        size = path.stat().st_size
        first, last = wanted.removeprefix("bytes=").split("-")
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        data = path.read_bytes()[start:stop]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        self.wfile.write(data)
        return None


@contextmanager
def web(root: Path, ranges: bool) -> Iterator[tuple[str, Counter[str]]]:
    kind = type("Own", (Ranged,), {"ranges": ranges, "sent": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", kind.sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PLACES = ("zip", "zip in a folder", "deflated", "web", "web without ranges")


@pytest.fixture(scope="module")
def places(folder: Path) -> Iterator[dict[str, str]]:
    beside = folder.parent
    with web(beside, True) as (ranged, _), web(beside, False) as (plain, _):
        yield {
            "zip": str(zipped(folder, beside / "run.zarr.zip")),
            "zip in a folder": str(zipped(folder, beside / "within.zip", top="a/run.zarr/")),
            "deflated": str(zipped(folder, beside / "small.zarr.zip", zipfile.ZIP_DEFLATED)),
            "web": f"{ranged}/run.zarr",
            "web without ranges": f"{plain}/run.zarr/",
        }


def answers(store: actstore.Store) -> dict[str, object]:
    """All kinds of questions."""
    position = "position > 1 and play == 'Lear'"
    queries = {
        "sketches": actstore.moments(store, per="layer"),
        "moments": actstore.moments(store, tokens=position, by="condition"),
        "histogram": actstore.histogram(store, stages="mlp_post,mlp_out", bins=20, range=(-2, 2)),
        "quantiles": actstore.quantiles(store, stages="attn_z", per="layer"),
        "top": actstore.top_tokens(store, stages="hidden", tokens=position, k=2),
        "rsa": actstore.rsa(store, layers="1"),
        "outcomes": actstore.mean_activation(store, stages="mlp_out", tokens="loss > 0.5"),
    }
    found = actstore.compute(*queries.values())
    return {
        **dict(zip(queries, found, strict=True)),
        "one neuron": store["mlp_post"].sel(layer=1, neuron=17).load(),
        "tokens": store.tokens.load(),
        "predictions": store.predictions.load(),
        "sequences": store.sequences.load(),
        "text": [store.decode(i, 5, 2) for i in (0, 40, -1)],
        "info": store.info() | {"name": ""},
    }


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, object]:
    return answers(actstore.open(folder))


def same(found: object, own: object) -> bool:
    if isinstance(own, xr.DataTree):
        nodes = ((found[n.path], n) for n in own.subtree)
        return all(same(a.to_dataset(), b.to_dataset()) for a, b in nodes)
    if isinstance(own, (xr.Dataset, xr.DataArray)):
        return found.equals(own)  # type: ignore[attr-defined]
    return found == own


@pytest.mark.parametrize("kind", PLACES)
def test_every_question_is_answered_the_same(places, expected, folder: Path, kind: str) -> None:
    store = actstore.open(places[kind])
    found = answers(store)
    wrong = [name for name, own in expected.items() if not same(found[name], own)]
    assert not wrong
    assert store.id == actstore.open(folder).id and store.name in places[kind]
    checked = list(actstore.verify(places[kind]))
    assert [k for k, _ in checked] == [k for k, _ in actstore.verify(folder)]
    assert not [problem for _, problem in checked if problem]
    batch = next(iter(store.loader("mlp_post", 1, 64, shuffle=False)))
    np.testing.assert_array_equal(batch, store["mlp_post"].sel(layer=1)[:64])


@pytest.mark.slow
def test_python_s_own_server_process_and_the_command_line(folder: Path, tmp_path: Path) -> None:
    """`python -m http.server`, as anybody would start it, and commands on it and on a zip."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().split("port ")[1].split()[0]
        url = f"http://127.0.0.1:{port}/run.zarr"
        archive = str(zipped(folder, tmp_path / "run.zarr.zip"))
        ask = ["query", "moments", "--per", "layer", "--tokens", "position > 1", "--json"]
        outs = [command(*ask[:2], place, *ask[2:]).stdout for place in (str(folder), url, archive)]
        outs = [out.replace("run.zarr.zip", "run.zarr") for out in outs]
        assert outs[0] == outs[1] == outs[2] != ""
        get = "/api/stores/run/moments?per=layer&format=csv"
        outs = [command("serve", place, "--get", get).stdout for place in (folder, url, archive)]
        assert outs[0] == outs[1] == outs[2] != ""
        assert "all as they were written" in command("verify", url).stderr
        assert "5" in command("info", archive, "--json").stdout
    finally:
        server.terminate()
        server.wait()


def command(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, "-m", "actstore_cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLACES)
def test_processes_read_them_too(places, expected, kind: str) -> None:
    query = actstore.moments(places[kind], tokens="position > 1 and play == 'Lear'", by="condition")
    assert same(actstore.compute(query, scheduler="processes"), expected["moments"])


def test_parts_are_read_where_the_server_gives_them(folder: Path) -> None:
    """One neuron of a store with larger shards: a fraction of the bytes, of a zip as well."""
    big = folder.parent / "big.zarr"
    plan = plan_of(small_corpus(), [actstore.StageSpec("mlp_post", (0,), 48 * 512)], 256)
    write_store(big, plan, random_values(plan))
    shard = (big / "mlp_post/activation/c.0.0.0").stat().st_size
    archive = zipped(big, folder.parent / "big.zarr.zip")
    with web(folder.parent, True) as (ranged, _), web(folder.parent, False) as (plain, sent):
        seen = {}
        for place in (str(archive), f"{ranged}/big.zarr", f"{plain}/big.zarr"):
            store = actstore.open(place)
            counters.reset()
            for neuron in (3, 4, 20_000):
                own = actstore.open(big)["mlp_post"].sel(layer=0, neuron=neuron).values
                before = counters.bytes
                np.testing.assert_array_equal(
                    store["mlp_post"].sel(layer=0, neuron=neuron).values, own
                )
                seen[place, neuron] = counters.bytes - before
        assert all(
            nbytes < shard / 4 for (p, _), nbytes in seen.items() if p != f"{plain}/big.zarr"
        )
        # Who gives only whole files is asked for each just once, after trying for a part.
        whole = [n for request, n in sent.items() if "c.0.0.0 None" in request]
        assert whole == [1]
        tries = [n for request, n in sent.items() if "c.0.0.0 bytes" in request]
        assert sum(tries) <= 1


def test_a_file_that_changed_is_not_taken_from_what_was_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "c.0.0.0"
    out = np.empty(4, np.uint8)
    with web(tmp_path, False) as (url, _):
        for text in (b"abcd", b"efgh"):
            file.write_bytes(text)
            os.utime(file, (len(text) * text[0],) * 2)
            with storage_at(f"{url}/run").reader("c.0.0.0") as reader:
                reader.read_into(out, offset=0)
            assert out.tobytes() == text
            with (
                storage_at(f"{url}/run").reader("c.0.0.0") as reader,
                pytest.raises(CorruptStoreError, match="truncated at 4 bytes"),
            ):
                reader.read_into(out, offset=1)
    assert f"{url}/run" in remote._whole_only


def test_what_is_kept_is_bounded() -> None:
    kept = Recent(100)
    taken: Counter[int] = Counter()

    def take(n: int) -> bytes:
        taken[n] += 1
        return bytes(40)

    for n in (0, 1, 0, 2, 0, 1):
        kept.get(n, partial(take, n))
    assert taken == {0: 1, 1: 2, 2: 1}  # 1 was the one not asked for longest
    assert sum(map(len, kept._kept.values())) <= 100
    assert len(kept.get("large", lambda: bytes(500))) == 500 and len(kept._kept) == 1


# -- what cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "web"])
def test_writing_is_refused(places, kind: str, tmp_path: Path) -> None:
    place = places[kind]
    before = Path(place).read_bytes() if kind == "zip" else b""
    what = {"zip": "a zip archive", "web": "on a web server"}[kind]
    plan = plan_of(small_corpus(), STAGES, 64)
    with pytest.raises(WriteError, match=what):
        Writer(place, plan)
    with pytest.raises(WriteError, match=what):
        add_sketches(place)
    storage = storage_at(place)
    for call in (
        lambda: storage.put("a", b"b"),
        lambda: storage.put_once("a", b"b"),
        lambda: storage.put_durable("a", b"b"),
        lambda: storage.delete("zarr.json"),
        lambda: storage.make_folder("a"),
        storage.free_bytes,
    ):
        with pytest.raises(WriteError, match=f"cannot be written: it is {what}"):
            call()
    if kind == "zip":
        text = tmp_path / "text.txt"
        text.write_text("The sea was slow and wide. " * 4)
        refused = command("dump", "demo", text, place, "--layers", "0", status=1)
        assert what in refused.stderr
        assert Path(place).read_bytes() == before


def test_a_zip_that_does_not_exist_yet(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="a zip archive, which is only read"):
        Writer(tmp_path / "new.zarr.zip", plan_of(small_corpus(), STAGES, 64))
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotAStoreError, match="does not exist"):
        actstore.open(tmp_path / "new.zarr.zip")


def test_damage_in_a_zip_is_found(folder: Path, tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        archive = zipped(folder, tmp_path / "run.zarr.zip", method)
        with zipfile.ZipFile(archive) as file:
            info = file.getinfo("mlp_post/activation/c.1.0.0")
        data = bytearray(archive.read_bytes())
        name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
        data[info.header_offset + 30 + name + extra + info.compress_size // 3] ^= 0x40
        archive.write_bytes(data)
        store = actstore.open(archive)
        with pytest.raises(CorruptStoreError, match=r"mlp_post/activation/c\.1\.0\.0"):
            _ = store["mlp_post"].sel(layer=1).values
        problems = _problems(archive)
        assert set(problems) == {"mlp_post/activation/c.1.0.0"}
        assert store["mlp_post"].sel(layer=0).notnull().all()


def _problems(place: Path | str) -> list[str]:
    return [key for key, problem in actstore.verify(place) if problem is not None]


def test_an_object_that_is_missing(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run.zarr"
    shutil.copytree(folder, copy)
    (copy / "mlp_post/activation/c.1.0.0").unlink()
    with web(tmp_path, True) as (ranged, _), web(tmp_path, False) as (plain, _):
        for place in (
            zipped(copy, tmp_path / "run.zarr.zip"),
            f"{ranged}/run.zarr",
            f"{plain}/run.zarr",
        ):
            with pytest.raises(CorruptStoreError, match=r"c\.1\.0\.0 is missing from"):
                _ = actstore.open(place)["mlp_post"].sel(layer=1).values
            assert _problems(place) == ["mlp_post/activation/c.1.0.0"]
        with pytest.raises(NotAStoreError, match="there is nothing at"):
            actstore.open(f"{plain}/nothing.zarr")
        (copy / "zarr.json").unlink()
        for place in (f"{ranged}/run.zarr", zipped(copy, tmp_path / "unsealed.zip")):
            with pytest.raises(UnfinishedStoreError, match="is not finished"):
                actstore.open(place)


def test_archives_that_are_something_else(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.zip"
    with zipfile.ZipFile(odd, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(NotAStoreError, match="is not a store"):
        actstore.open(odd)
    with zipfile.ZipFile(odd, "w") as archive:
        for name in ("a.zarr", "b.zarr"):
            archive.write(folder / "zarr.json", f"{name}/zarr.json")
    with pytest.raises(NotAStoreError, match=r"several stores \(a.zarr/, b.zarr/\): unzip it"):
        actstore.open(odd)
    packed = zipped(folder, tmp_path / "lzma.zip", zipfile.ZIP_LZMA)
    with pytest.raises(StoreError, match=r"not read in place: unzip the store, or .*zip -0"):
        actstore.open(packed)
    whole = zipped(folder, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NotAStoreError, match="cannot be read as a zip archive"):
        actstore.open(tmp_path / "cut.zip")


def test_a_bomb_is_not_unpacked(folder: Path, tmp_path: Path) -> None:
    """An object that says it is small and is not, or says that it is huge."""
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zarr.json", bytes(200_000_000))
    with pytest.raises(StoreError, match="200,000,000 bytes, and at most"):
        actstore.open(bomb)
    data = bytearray(bomb.read_bytes())
    at = data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, at + 24, 1000)
    bomb.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"zarr.json in the archive .* is damaged"):
        actstore.open(bomb)


@pytest.fixture(scope="module")
def sound(folder: Path) -> tuple[bytes, list[int], int, np.ndarray]:
    """An archive, where its headers are, where its directory begins, and values in it."""
    archive = zipped(folder, folder.parent / "sound.zip")
    with zipfile.ZipFile(archive) as file:
        headers = [info.header_offset for info in file.infolist()]
        start = file.start_dir
    values = actstore.open(folder)["mlp_post"].values
    return archive.read_bytes(), headers, start, values


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_damaged_archive_is_an_error_of_ours_or_the_same(sound, folder: Path, data) -> None:
    """Any few bytes of an archive's directory and headers changed."""
    bytes_, headers, start, values = sound
    whole = bytearray(bytes_)
    spots = st.one_of(
        st.integers(start, len(whole) - 1),
        st.tuples(st.sampled_from(headers), st.integers(0, 29)).map(sum),
    )
    for at in data.draw(st.lists(spots, min_size=1, max_size=4)):
        whole[at] ^= data.draw(st.integers(1, 255))
    archive = folder.parent / "damaged.zip"
    archive.write_bytes(whole)
    os.utime(archive, ns=(time.time_ns(), time.time_ns()))
    try:
        found = actstore.open(archive)["mlp_post"].values
    except ActstoreError:
        return
    np.testing.assert_array_equal(found, values)
