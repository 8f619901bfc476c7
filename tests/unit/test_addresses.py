"""Which shards a path, an address or a pattern stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign import indexed, shard

from lit_transfer.data import buckets, reach
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.addresses import expand
from lit_transfer.data.packing.verify import Verify, verify
from lit_transfer.data.store import ShardReader
from lit_transfer.errors import UserError


def test_addresses_expand_and_those_that_are_not_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        shard(tmp_path / f"{i:03d}.tar", [f"k{i}"])
    names = [str(tmp_path / f"{i:03d}.tar") for i in range(3)]
    for patterns in (["{000..002}.tar"], ["*.tar"], [""], ["000.tar", "00{1,2}.tar"], ["00[0-9].tar", "000.tar"]):
        assert expand([str(tmp_path / pattern) for pattern in patterns]) == names
    monkeypatch.chdir(tmp_path)
    assert expand(["*.tar"]) == ["000.tar", "001.tar", "002.tar"]
    assert indexed("{000..002}.tar", task="none").path.resolve() == tmp_path.resolve()
    for pattern, message in (
        ("pipe:cat 000.tar", "'pipe:' addresses are not read"),
        ("gopen:000.tar", "'gopen:000.tar' cannot be read"),
        ("gopen://000.tar", "'gopen:' addresses are not read"),
        ("none-*.tar", "'none-\\*.tar' matches no shards"),
        ("absent.tar", "'absent.tar' cannot be read"),
        ("{000..002.tar", "a brace without its other half"),
        ("https://user:word@host/000.tar", "'https://host/000.tar' is given with credentials"),
        ("https://host/000.tar?sig=word", "'https://host/000.tar' is given with credentials"),
        ("https://host/dir/", "does not list its files"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            indexed(pattern, out=str(tmp_path / "out"))
        assert "word" not in str(caught.value)
    with pytest.raises(UserError, match="say with --out where the manifest goes"):
        indexed("https://host/000.tar")


TREE = ["0.tar", "a/0.tar", "a/1.tar", "a/b/0.tar", "a/b/c/0.tar", "a/b/c/note.txt", "ab/0.tar", "b/b/0.tar"]
PATTERNS = {
    "*.tar": ["0.tar"],
    "a/*.tar": ["a/0.tar", "a/1.tar"],
    "a*/0.tar": ["a/0.tar", "ab/0.tar"],
    "*/*.tar": ["a/0.tar", "a/1.tar", "ab/0.tar"],
    "*/b/*": ["a/b/0.tar", "b/b/0.tar"],
    "**/b/*.tar": ["a/b/0.tar", "b/b/0.tar"],
    "a/**/*.tar": ["a/0.tar", "a/1.tar", "a/b/0.tar", "a/b/c/0.tar"],
    "**/c/*": ["a/b/c/0.tar", "a/b/c/note.txt"],
    "a/": ["a/0.tar", "a/1.tar", "a/b/0.tar", "a/b/c/0.tar"],
    "{a,ab}/*[01].tar": ["a/0.tar", "a/1.tar", "ab/0.tar"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_star_stops_at_a_slash_on_disk_and_in_buckets(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(bucket: str, prefix: str, _: float) -> list[str]:
        assert bucket == "bucket"
        return [key for name in TREE if (key := f"deep/{name}").startswith(prefix)]

    monkeypatch.setattr(buckets, "list_s3", listing)
    monkeypatch.setattr(buckets, "list_gs", listing)
    for name in TREE:
        (tmp_path / "deep" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / name).touch()
    for root in (str(tmp_path), "s3://bucket", "gs://bucket"):
        assert expand([f"{root}/deep/{pattern}"]) == [f"{root}/deep/{name}" for name in PATTERNS[pattern]], root


def test_a_file_name_may_hold_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a:b.tar", "scp:host.tar"]
    for i, name in enumerate(names):
        shard(tmp_path / name, [f"k{i}", f"l{i}"])
    monkeypatch.chdir(tmp_path)
    assert expand(["*.tar"]) == expand(names) == names
    manifest = indexed(*names)
    opened = Manifest.open(tmp_path)
    assert [one.name for one in opened.shards] == names and opened.digest == manifest.digest
    assert len(ShardReader(opened).read(3)) == opened.table["size"][3].as_py()
    assert not verify(Verify(verify=str(tmp_path), workers=1)).faults
    assert [reach.is_remote(name) for name in names] == [False, False]


@pytest.mark.parametrize("name", ["pipe:b.tar", "file:b.tar", "s3:b.tar"])
def test_a_file_named_like_an_address_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    shard(tmp_path / name, ["k"])
    with pytest.raises(UserError, match=name.partition(":")[0] + ":.*(rename a file of such a name|has no host)"):
        indexed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
