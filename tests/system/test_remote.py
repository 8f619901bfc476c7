"""Shards behind real servers: nginx, S3 by moto, Google Cloud Storage as it answers; killed in mid-transfer."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from packing import folder, packed, payload
from system.servers import FaultServer, Nginx, check_authorisation, s3_server

from lit_transfer.data import buckets, cache, reach, transfer
from lit_transfer.data.cache import ShardCache
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.addresses import expand
from lit_transfer.data.store import ShardReader
from lit_transfer.errors import UserError

SIZE = 3_000_000
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ODD = "ä 漢 #1?&=%41;+.tar"
"""A name of an object that no address could hold as it is."""
RATE_BYTES_PER_S = 1_500_000
FETCH = """
import sys
from pathlib import Path
from lit_transfer.data.cache import ShardCache
print(ShardCache(Path(sys.argv[1]), 10**9).fetch(sys.argv[2], sha256=sys.argv[3], bytes=int(sys.argv[4])))
"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials, proxies or settings but those of a test."""
    for name in [*os.environ]:
        if name.startswith(("AWS_", "GOOGLE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(cache, "_warned", set())
    buckets._s3.cache_clear()
    buckets._gs_credentials.cache_clear()


# ---- nginx ----


@pytest.fixture
def served(tmp_path: Path) -> Path:
    root = tmp_path / "www"
    root.mkdir()
    (root / "a.tar").write_bytes(CONTENT)
    return root


def test_nginx_whole_and_by_range(tmp_path: Path, served: Path) -> None:
    with Nginx(tmp_path / "nginx", served) as nginx:
        url = f"{nginx.url}/a.tar"
        assert reach.size(url) == SIZE
        assert reach.read(url, 1000, 2000) == CONTENT[1000:2000]
        path = ShardCache(tmp_path / "cache", 10 * SIZE).fetch(url, sha256=SHA256, bytes=SIZE)
        assert path is not None and path.read_bytes() == CONTENT
        with pytest.raises(UserError, match="does not exist"):
            reach.size(f"{nginx.url}/b.tar")


def test_nginx_killed_and_started_again_in_mid_transfer(tmp_path: Path, served: Path) -> None:
    with Nginx(tmp_path / "nginx", served, RATE_BYTES_PER_S) as nginx:
        again = threading.Timer(0.7, lambda: (nginx.kill(), time.sleep(0.5), nginx.start()))
        again.start()
        path = ShardCache(tmp_path / "cache", 10 * SIZE).fetch(f"{nginx.url}/a.tar", sha256=SHA256, bytes=SIZE)
        again.join()
        assert path is not None and path.read_bytes() == CONTENT
        ranges = [line.split()[-1] for line in nginx.log.read_text().splitlines()]
        assert ranges[-1].startswith("bytes=") and ranges[-1] != "bytes=0-", "gone on from, not begun anew"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_download_is_gone_on_from(tmp_path: Path, served: Path, number: int) -> None:
    with Nginx(tmp_path / "nginx", served, RATE_BYTES_PER_S) as nginx:
        command = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), f"{nginx.url}/a.tar", SHA256, str(SIZE)]
        killed = subprocess.Popen(command)
        partial = _wait_for_bytes(tmp_path / "cache", SIZE // 5)
        killed.send_signal(number)
        assert killed.wait() == -number
        left = partial.stat().st_size
        assert 0 < left < SIZE
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()).read_bytes() == CONTENT
        assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.name != ".lock"] == [".tar"]
        assert f"200 {SIZE - left}" in nginx.log.read_text().replace("206", "200"), "only the rest was sent"


def _wait_for_bytes(store: Path, size: int) -> Path:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for partial in store.glob("*.partial"):
            if partial.stat().st_size >= size:
                return partial
        time.sleep(0.02)
    raise TimeoutError("the download did not begin")


# ---- samples ----


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    place = tmp_path_factory.mktemp("dataset")
    return packed(folder(place / "pictures", per_class=8), place / "packed", workers=1)


@pytest.fixture
def server(dataset: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.01)
    with FaultServer({path.name: path.read_bytes() for path in dataset.path.iterdir()}) as running:
        yield running


def at(dataset: Manifest, url: str, store: ShardCache | None = None) -> ShardReader:
    return ShardReader(replace(dataset, places=(url,), cache=store))


def test_samples_of_a_web_server_with_and_without_a_cache(
    dataset: Manifest, server: FaultServer, tmp_path: Path
) -> None:
    expected = [payload(dataset, row) for row in range(dataset.table.num_rows)]
    cached = at(dataset, server.url, ShardCache(tmp_path / "cache", 10**9, 2.0))
    assert [cached.read(row) for row in range(len(expected))] == expected
    assert len(server.requests) == len(dataset.shards), "one request a shard"
    assert [at(dataset, server.url).read(row) for row in range(len(expected))] == expected
    assert len(server.requests) == len(dataset.shards) + len(expected), "one request a sample"
    with pytest.warns(UserWarning, match="read through"):
        small = at(dataset, server.url, ShardCache(tmp_path / "small", 10))
        assert [small.read(row) for row in range(len(expected))] == expected


def test_a_reader_of_a_forked_worker(dataset: Manifest, server: FaultServer, tmp_path: Path) -> None:
    expected = [payload(dataset, row) for row in range(dataset.table.num_rows)]
    for store in (ShardCache(tmp_path / "cache", 10**9, 2.0), None):
        reader = at(dataset, server.url, store)
        assert reader.read(0) == expected[0]
        ours, theirs = multiprocessing.get_context("fork").Pipe()
        child = multiprocessing.get_context("fork").Process(target=_send_all, args=(reader, len(expected), theirs))
        child.start()
        assert ours.poll(60) and ours.recv() == expected
        child.join()
        assert [reader.read(row) for row in range(len(expected))] == expected


def _send_all(reader: ShardReader, rows: int, pipe: multiprocessing.connection.Connection) -> None:
    pipe.send([reader.read(row) for row in range(rows)])


def test_a_wrong_sample_is_fetched_once_more(dataset: Manifest, server: FaultServer, tmp_path: Path) -> None:
    store = ShardCache(tmp_path / "cache", 10**9, 2.0)
    place = dataset.table.slice(3, 1).to_pylist()[0]
    shard = dataset.shards[place["shard"]]
    at(dataset, server.url, store).read(3)
    (file,) = (path for path in store.folder.iterdir() if path.name.endswith(shard.name))
    _flip(file, place["offset"] + 5)
    assert at(dataset, server.url, store).read(3) == payload(dataset, 3)
    server.order(shard.name, "flip")
    sample = at(dataset, server.url).read(3)
    assert sample == payload(dataset, 3)


def test_a_sample_that_stays_wrong_is_refused(dataset: Manifest, server: FaultServer) -> None:
    shard = dataset.shards[dataset.table["shard"][3].as_py()]
    server.order(shard.name, "flip", "flip")
    with pytest.raises(UserError, match=r"\(row 3\) are not those that were packed"):
        at(dataset, server.url).read(3)
    assert len(server.requests) == 2


def test_a_shard_that_stays_wrong_is_not_downloaded_again_for_each_sample(
    dataset: Manifest, server: FaultServer, tmp_path: Path
) -> None:
    shards = dataset.table["shard"].to_pylist()
    rows = [row for row, shard in enumerate(shards) if shard == shards[3]][:3]
    server.order(dataset.shards[shards[3]].name, *["flip"] * 100)
    reader = at(dataset, server.url, ShardCache(tmp_path / "cache", 10**9, 2.0))
    asked = []
    for row in rows:
        with pytest.raises(UserError, match="are not those that were packed"):
            reader.read(row)
        asked.append(len(server.requests))
    assert asked == [4, 6, 8], "the shard twice, then each sample twice by range"


def _flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_a_reader_holds_few_shards_open(dataset: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_transfer.data.store.OPEN_SHARDS", 1)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    reader = ShardReader(dataset)
    for _ in range(3):
        for row in range(dataset.table.num_rows):
            assert reader.read(row) == payload(dataset, row)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before + 1


# ---- S3 ----


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with objects; the environment has credentials of a user who may read them."""
    admin = {
        "endpoint_url": s3_url,
        "region_name": "us-east-1",
        "aws_access_key_id": "x",
        "aws_secret_access_key": "x",
    }
    client = boto3.client("s3", **admin)
    client.create_bucket(Bucket="shards")
    for key in ("train/a b.tar", "train/deep/1+%.tar", "train_old/2.tar", "train/notes.txt", f"odd/{ODD}"):
        client.put_object(Bucket="shards", Key=key, Body=CONTENT[:10_000])
    iam = boto3.client("iam", **admin)
    iam.create_user(UserName="reader")
    everything = {"Effect": "Allow", "Action": "*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
    iam.put_user_policy(UserName="reader", PolicyName="reads", PolicyDocument=policy)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_url)
    use_key(monkeypatch, iam.create_access_key(UserName="reader")["AccessKey"])
    check_authorisation(s3_url, 0)
    yield s3_url
    check_authorisation(s3_url, 10**9)
    requests.post(f"{s3_url}/moto-api/reset", timeout=10)


def use_key(monkeypatch: pytest.MonkeyPatch, key: dict[str, str]) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])


def test_s3_lists_and_reads(s3: str, tmp_path: Path) -> None:
    found = reach.list_files("s3://shards/train", ".tar")
    assert found == ["s3://shards/train/a b.tar", "s3://shards/train/deep/1+%.tar"]
    assert len(reach.list_files("s3://shards", ".tar")) == 4
    assert expand(["s3://shards/train/*.tar"]) == found[:1] and expand(["s3://shards/*/*/*.tar"]) == found[1:]
    odd = expand(["s3://shards/odd/*"])
    assert odd == [f"s3://shards/odd/{ODD}"] == [reach.join("s3://shards/odd", ODD)]
    for address in found + odd:
        assert reach.size(address) == 10_000
        assert reach.read(address, 10, 99) == CONTENT[10:99]
        path = ShardCache(tmp_path, 10**9).fetch(address, sha256=None, bytes=10_000)
        assert path is not None and path.read_bytes() == CONTENT[:10_000]
    with pytest.raises(UserError, match="does not exist"):
        reach.size("s3://shards/train/none.tar")
    with pytest.raises(UserError, match="NoSuchBucket"):
        reach.list_files("s3://other-bucket/train", ".tar")


def test_wrong_credentials_of_s3_are_said_and_never_shown(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    use_key(monkeypatch, {"AccessKeyId": "AKIAHIDDEN42", "SecretAccessKey": "HIDDEN42"})
    monkeypatch.setenv("AWS_SESSION_TOKEN", "HIDDEN42")
    for ask in (lambda: reach.size("s3://shards/train/a b.tar"), lambda: reach.list_files("s3://shards", "")):
        with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as caught:
            ask()
        assert "HIDDEN42" not in str(caught.value)
    assert "HIDDEN42" not in caplog.text
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    buckets._s3.cache_clear()
    with pytest.raises(UserError, match="PartialCredentials"):
        reach.size("s3://shards/train/a b.tar")


def test_credentials_of_s3_that_expire_are_read_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "s3://shards/train/a b.tar"
    assert reach.read(address, 0, 9) == CONTENT[:9]
    iam = boto3.client("iam", region_name="us-east-1")
    fresh = iam.create_access_key(UserName="reader")["AccessKey"]
    iam.delete_access_key(UserName="reader", AccessKeyId=os.environ["AWS_ACCESS_KEY_ID"])
    with pytest.raises(UserError, match="refused"):
        reach.read(address, 0, 9)
    use_key(monkeypatch, fresh)
    assert reach.read(address, 0, 9) == CONTENT[:9]


def test_s3_without_credentials_is_asked_unsigned(dataset: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer({"shards/a.tar": CONTENT}) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert reach.read("s3://shards/a.tar", 0, 9) == CONTENT[:9]
        assert "authorization" not in server.requests[-1].headers


def test_a_token_of_s3_that_expires_in_mid_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.01)
    use_key(monkeypatch, {"AccessKeyId": "OLD", "SecretAccessKey": "s"})
    with FaultServer({"shards/a.tar": CONTENT}) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.order("shards/a.tar", "cut", "expired")
        pieces = reach.stream("s3://shards/a.tar", timeout_s=2.0)
        data = next(pieces)
        use_key(monkeypatch, {"AccessKeyId": "NEW", "SecretAccessKey": "s"})
        assert data + b"".join(pieces) == CONTENT
        signed = [request.headers["authorization"] for request in server.requests]
        assert ["OLD" in signed[0], "OLD" in signed[1], "NEW" in signed[2]] == [True, True, True]


# ---- Google Cloud Storage ----


def test_google_cloud_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "storage/v1/b/shards/o?prefix=train%2F&pageToken={}&fields=items%2Fname%2CnextPageToken"
    pages = [
        {"items": [{"name": "train/1.tar"}, {"name": "train/x.txt"}], "nextPageToken": "more"},
        {"items": [{"name": "train/0 0.tar"}]},
    ]
    files = {listing.format(token): json.dumps(page).encode() for token, page in zip(("", "more"), pages, strict=True)}
    token = json.dumps({"access_token": "TOKEN", "expires_in": 3600, "token_type": "Bearer"}).encode()
    with FaultServer(files | {"shards/train/0 0.tar": CONTENT, f"shards/{ODD}": CONTENT}, token=token) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(_service_account(tmp_path, server.url)))
        assert reach.list_files("gs://shards/train", ".tar") == ["gs://shards/train/0 0.tar", "gs://shards/train/1.tar"]
        for address in ("gs://shards/train/0 0.tar", reach.join("gs://shards", ODD)):
            assert b"".join(reach.stream(address, 100)) == CONTENT[100:]
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer TOKEN"}
        server.order("shards/train/0 0.tar", "denied", "denied")
        with pytest.raises(UserError, match=r"refused \(status 403\); check GOOGLE_APPLICATION_CREDENTIALS"):
            reach.size("gs://shards/train/0 0.tar")


def test_wrong_credentials_of_google_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"gs://shards/a\.tar: no credentials"):
        reach.size("gs://shards/a.tar")


def _service_account(folder: Path, token_url: str) -> Path:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {"type": "service_account", "client_email": "a@b", "private_key": pem, "token_uri": f"{token_url}/token"}
    file = folder / "account.json"
    file.write_text(json.dumps(account | {"project_id": "p", "private_key_id": "1"}))
    return file
