"""`lit-transfer store`."""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path
from typing import Any

import pytest
from shelves import cuts, filled, open_shelf

from lit_transfer.activations import lease
from lit_transfer.activations.sharing import ABOUT
from lit_transfer.activations.store import ActivationStore
from lit_transfer.errors import UserError
from lit_transfer.launch.store import main, spans


@pytest.fixture
def kept(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path / "store", limit_bytes=10**9)


def command(kept: ActivationStore, *arguments: str) -> int:
    return main([*arguments, "--folder", str(kept.folder)])


def test_list(kept: ActivationStore, capsys: pytest.CaptureFixture[str]) -> None:
    made = filled(kept, "layer3", used_s=1.0)
    half = open_shelf(kept, "layer4")
    with half.in_use():
        assert command(kept, "list") == 0
    words = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert words[0][:7] == ["shelf", "backbone", "cut", "dataset", "view", "type", "records"]
    first, second = (dict(zip(words[0], row, strict=True)) for row in words[2:])
    assert first | {"MB": "", "last used": ""} == {
        **{"shelf": made.key[:12], "backbone": "timm/net", "cut": "layer3", "dataset": "d" * 12, "view": "d4/3"},
        **{"type": "float32", "records": "300", "MB": "", "parts": "2/2", "last used": "", "in use": "no"},
        **{"wasted": "0", "corrupted": "0"},
    }
    assert (second["cut"], second["parts"], second["in use"]) == ("layer4", "0/2", "yes")


def test_verify_says_what_is_wrong_and_removes_it_if_asked(
    kept: ActivationStore, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, made, stray = filled(kept, "sound"), filled(kept, "wrong"), filled(kept, "stray")
    assert command(kept, "verify") == 0 and "as it was written: 6 parts" in capsys.readouterr().out
    data = bytearray((made.folder / "part-00001.safetensors").read_bytes())
    for place in (3, 10, 11, 12):
        data[len(data) - 24 * (44 - place)] ^= 1
    (made.folder / "part-00001.safetensors").write_bytes(data)
    (stray.folder / ABOUT).write_text("{}")
    assert command(kept, "verify") == 1
    said = capsys.readouterr().out
    assert f"{made.key[:12]}     1  259, 266-268" in said and stray.key[:12] in said and "--remove" in said
    assert sound.key[:12] not in said and made.missing() == []
    assert command(kept, "verify", "--remove") == 1
    assert made.missing() == [1] and kept.strays() == [] and made.counts()["corrupted_records"] == 4
    assert command(kept, "verify") == 0


def test_what_is_not_ours_to_look_after_is_said(kept: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(kept, "a")
    (made.folder / "part-00000.safetensors").write_bytes(b"wrong")

    def refused(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(lease, "acquire", refused)
    with pytest.raises(UserError, match=r"cannot be looked after: Permission denied \(.*part-00000.lease\); ask"):
        command(kept, "verify", "--remove")
    assert made.missing() == []


def test_prune_prints_what_it_removed(kept: ActivationStore, capsys: pytest.CaptureFixture[str]) -> None:
    old = filled(kept, "old", used_s=time.time() - 3 * 86400)
    with filled(kept, "new").in_use():
        assert command(kept, "prune", "--unused_days", "2") == 0
        said = capsys.readouterr().out
        assert old.key[:12] in said and "removed 1 shelves, 0.0 MB; 1 are in use" in said and cuts(kept) == ["new"]
        assert command(kept, "prune", "--all") == 0 and cuts(kept) == ["new"]
    assert command(kept, "prune", "--limit_gb", "1") == 0 and cuts(kept) == ["new"]
    assert command(kept, "prune", "--limit_gb", "0") == 0 and cuts(kept) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prune"], "needs one of --limit_gb N, --unused_days N and --all"),
        (["prune", "--all", "--limit_gb", "1"], "needs one of"),
        (["prune", "--limit_gb", "-1"], "-1.0 is not a number of at least 0"),
        (["prune", "--limit_gb", "inf"], "inf is not a number of at least 0; give one, or --all"),
        (["prune", "--unused_days", "nan"], "nan is not a number"),
        (["prun"], "invalid choice: 'prun'"),
        (["prune", "--unused_days", "x"], "invalid float value: 'x'"),
    ],
    ids=str,
)
def test_a_command_that_makes_no_sense(kept: ActivationStore, arguments: list[str], sentence: str) -> None:
    kept.folder.mkdir()
    with pytest.raises(UserError, match=re.escape(sentence)):
        command(kept, *arguments)


@pytest.mark.parametrize("refused_call", ["iterdir", "is_dir"])
def test_a_folder_that_may_not_be_read_is_said(
    kept: ActivationStore, monkeypatch: pytest.MonkeyPatch, refused_call: str
) -> None:
    filled(kept, "a")

    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, refused_call, refused)
    with pytest.raises(UserError, match=r"cannot be looked after: Permission denied \(.*store\); ask the user"):
        command(kept, "list")


@pytest.mark.parametrize("arguments", [("verify",), ("prune", "--all")])
def test_a_reader_that_has_seen_enough_is_no_fault_of_the_folder(
    kept: ActivationStore, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    filled(kept, "a")

    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        command(kept, *arguments)


def test_a_folder_that_is_not_there(kept: ActivationStore) -> None:
    with pytest.raises(UserError, match="is not there; runs make it"):
        command(kept, "list")


@pytest.mark.parametrize(("places", "text"), [([1], "1"), ([1, 2, 3], "1-3"), ([0, 2, 3, 9], "0, 2-3, 9")])
def test_spans(places: list[int], text: str) -> None:
    assert spans(places) == text
