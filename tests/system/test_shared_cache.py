"""Many processes at one cache, and at one server."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from packing import folder, packed, payload
from system.cache_worker import read_hash, read_rows
from system.servers import FaultServer

from lit_transfer.config import Cache, Data, Stream
from lit_transfer.data import reach
from lit_transfer.data.cache import ShardCache
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import open_streams

SIZE = 200_000
FILES = {f"{i}.tar": hashlib.shake_128(bytes([i])).digest(SIZE) for i in range(4)}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(dict(FILES)) as running:
        yield running


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_one_process_of_many_downloads(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path, 10 * SIZE)
    server.order("0.tar", "cut")  # so that it takes a moment
    jobs = [(store, f"{server.url}/0.tar", sha(FILES["0.tar"]), SIZE)] * 8
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        assert pool.starmap(read_hash, jobs, chunksize=1) == [sha(FILES["0.tar"])] * 8
    assert server.asked("0.tar") == [None, f"bytes={SIZE // 2}-"]


def test_processes_that_evict_each_others_files_read_the_right_bytes(tmp_path: Path, server: FaultServer) -> None:
    store = ShardCache(tmp_path, 2 * SIZE)
    hashes = [sha(FILES[f"{i % 4}.tar"]) for i in range(60)]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        jobs = [(store, f"{server.url}/{i % 4}.tar", known, SIZE) for i, known in enumerate(hashes)]
        found = pool.starmap(read_hash, jobs, chunksize=1)
    assert all(one in (None, known) for one, known in zip(found, hashes, strict=True))
    assert sum(one is not None for one in found) >= 30
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * SIZE


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_started_process_makes_its_own_connections(server: FaultServer, method: str) -> None:
    url, opened = f"{server.url}/0.tar", server.count_connections()
    assert reach.read(url, 0, 100) == FILES["0.tar"][:100]  # this connection stays open, and the parent's own
    with multiprocessing.get_context(method).Pool(1) as pool:
        jobs = [pool.apply_async(reach.read, (url, at, at + 50)) for at in range(20)]
        assert [job.get(60) for job in jobs] == [FILES["0.tar"][at : at + 50] for at in range(20)]
    assert reach.read(url, 100, 200) == FILES["0.tar"][100:200]
    assert len(opened) == 2, "one each"


def test_the_streams_of_a_config_in_a_new_process(tmp_path: Path) -> None:
    dataset = packed(folder(tmp_path / "pictures", per_class=8), tmp_path / "packed", workers=1)
    expected = [payload(dataset, row) for row in range(dataset.table.num_rows)]
    with FaultServer({f"set/{path.name}": path.read_bytes() for path in dataset.path.iterdir()}) as server:
        train = Stream(manifest=f"{server.url}/set", split="train")
        samples = open_streams(Data(train=train, cache=Cache(folder=str(tmp_path / "cache"))), 0)["train"]
        reader = pickle.dumps(ShardReader(samples.manifest))
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            jobs = [pool.apply_async(read_rows, (reader, len(expected))) for _ in range(2)]
            assert [job.get(100) for job in jobs] == [expected, expected]
        asked = [request.path for request in server.requests if request.headers.get("range") is None]
        assert sorted(asked) == sorted(f"set/{name}" for name in ("manifest.arrow", *(s.name for s in dataset.shards)))
