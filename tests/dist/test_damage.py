"""Damaged samples on two ranks: replaced in training, left out of figures, listed once, and too many end the run."""

from __future__ import annotations

import json
from pathlib import Path

from digits import digits
from packing import damage
from ranks import Left, start, train, write_config

PHASES = [{"name": "head", "max_epochs": 2, "lr": 0.01, "global_batch": 7}]


def test_a_run_with_damaged_samples_ends_well_or_stops_on_all_ranks(tmp_path: Path) -> None:
    manifest = digits(tmp_path / "digits")
    broken = [int(manifest.rows("train")[5]), int(manifest.rows("val")[1])]
    for row in broken:
        damage(manifest, row)
    files = {
        name: write_config(tmp_path, name, manifest.path, 2, PHASES, data={"max_bad_fraction": limit})
        for name, limit in (("allowed", 0.1), ("refused", 0.0))
    }
    left: Left = train([files["allowed"]])["allowed"]
    for name, tensor in left.network(1, 0).items():
        assert tensor.equal(left.network(1, 1)[name])
    lines = (tmp_path / "runs" / "allowed" / "quarantine.jsonl").read_text().splitlines()
    keys = manifest.table["key"].to_pylist()
    assert {(e["stream"], e["key"]) for e in map(json.loads, lines)} == {
        ("train", keys[broken[0]]),
        ("val", keys[broken[1]]),
    }
    assert len(lines) == 2, "each is listed once, though every epoch meets it"

    done = start([files["refused"]])
    assert done.returncode != 0
    assert "1 of the 24 samples of data.train are damaged" in done.stdout + done.stderr
    assert not (tmp_path / "runs" / "refused" / "checkpoints" / "head" / "done.json").exists()
