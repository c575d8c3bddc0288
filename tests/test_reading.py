"""A selection that meets many shards reads several side by side."""

import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import bare_corpus, flip, plan_of, random_values, write_store

import actstore
from actstore import StageSpec, shard
from actstore.errors import CorruptStoreError

BLOCKS, LAYERS = 7, 2


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("reading") / "run.zarr"
    stage = StageSpec("mlp_post", tuple(range(LAYERS)), 48, request.param)
    plan = plan_of(bare_corpus([64 * BLOCKS - 5]), [stage], 64)
    values = random_values(plan)
    if request.param == "bfloat16":  # what it keeps exactly
        values["mlp_post"].view(np.uint32)[:] &= 0xFFFF0000
    write_store(path, plan, values)
    return path, values["mlp_post"]


@pytest.mark.parametrize(
    "key",
    [
        (0,),
        (slice(None),),
        (1, slice(70, 420), slice(None, None, 2)),
        (0, slice(None), 17),
        (1, np.array([3, 300, 441, 100])),
        (0, slice(400, 60, -3), slice(5, 41)),
    ],
    ids=str,
)
def test_equal_to_the_values(written: tuple[Path, np.ndarray], key: tuple[object, ...]) -> None:
    path, values = written
    found = actstore.open(path).array("mlp_post")[key]
    np.testing.assert_array_equal(found, values[key])


def test_several_at_once(written: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(2, timeout=30)  # one reader alone would wait until it breaks
    real, first = shard._read_index, []

    def read_index(*args: object) -> np.ndarray:
        first.append(threading.get_ident())
        if len(first) <= 2:
            meeting.wait()
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "_read_index", read_index)
    path, values = written
    np.testing.assert_array_equal(actstore.open(path).array("mlp_post")[1], values[1])
    assert len(first) == BLOCKS


def test_a_damaged_shard_is_named(written: tuple[Path, np.ndarray]) -> None:
    path, values = written
    key = "mlp_post/activation/c.1.4.0"
    array = actstore.open(path).array("mlp_post")
    flip(path / key, 20)
    try:
        with pytest.raises(CorruptStoreError, match=r"c\.1\.4\.0"):
            array[1]
        np.testing.assert_array_equal(array[0], values[0])
    finally:
        flip(path / key, 20)
