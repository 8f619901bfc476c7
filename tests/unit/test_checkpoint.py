"""The files of a phase: whole or absent, and pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult

RESULT = PhaseResult("a", [], 1, 2, 3.0, 4.0, 0.1, 0.2, 5.0, "max_epochs 1 reached")


def network(value: float) -> nn.Linear:
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, value)
    return net


def names(files: PhaseFiles) -> set[str]:
    return {path.name for path in files.folder.iterdir()}


def test_a_write_that_is_interrupted_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = PhaseFiles(tmp_path / "a")
    assert files.read_last() is None
    files.write_last({"step": 1, "weight": torch.ones(3)}, None)

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        files.write_last({"step": 2}, None)
    state = files.read_last()
    assert state is not None and state["step"] == 1 and torch.equal(state["weight"], torch.ones(3))
    assert names(files) == {"last.ckpt"}


def test_best_weights_stay_until_the_checkpoint_names_others(tmp_path: Path) -> None:
    files = PhaseFiles(tmp_path / "a")
    files.write_best(network(1).state_dict(), 3)
    files.write_last({}, 3)
    files.write_best(network(2).state_dict(), 12)
    assert {"best-00000003.safetensors", "best-00000012.safetensors"} <= names(files), "last.ckpt still names step 3"
    files.write_last({}, 12)
    assert names(files) == {"last.ckpt", "best-00000012.safetensors"}
    assert torch.equal(files.read_best(12)["weight"], network(2).weight)


def test_a_finished_phase_leaves_its_final_and_best_weights_and_a_mark(tmp_path: Path) -> None:
    files = PhaseFiles(tmp_path / "a")
    assert files.result() is None
    files.write_best(network(1).state_dict(), 3)
    files.write_last({}, 3)
    files.finish(network(2), RESULT, 3)
    assert names(files) == {"last.ckpt", "best.safetensors", "final.safetensors", "done.json"}
    assert files.result() == RESULT
    assert torch.equal(files.read_final()["weight"], network(2).weight)
    modes = {path.stat().st_mode for path in files.folder.glob("[df]*")}
    assert len(modes) == 1, "who may read one may read the other"
    files.prune()
    assert names(files) == {"best.safetensors", "final.safetensors", "done.json"}


def test_the_mark_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = PhaseFiles(tmp_path / "a")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_transfer.phases.checkpoint.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        files.finish(network(2), RESULT, None)
    assert files.result() is None and names(files) == {"final.safetensors"}


def test_tidying_removes_what_was_left_half_written_and_nothing_else(tmp_path: Path) -> None:
    files = PhaseFiles(tmp_path / "a")
    files.tidy()
    files.write_last({}, None)
    (files.folder / ".last.0123abcd.ckpt").write_bytes(b"half")
    files.tidy()
    assert names(files) == {"last.ckpt"}
