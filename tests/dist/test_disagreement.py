"""A rank that goes its own way: what is decided stays common, and weights that differ stop the run by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digits import digits
from faults import DRIFTING
from ranks import Left, differing, start, train, write_config


def phase(name: str, train: object, **settings: Any) -> dict[str, Any]:
    rates = {"lr": 0.01} | ({} if train == "head" else {"backbone_lr": 0.01})
    return {"name": name, "train": train, "max_epochs": 1, "global_batch": 6} | rates | settings


def test_a_weight_that_drifts_stops_the_run_by_its_name_on_every_rank_each_time_it_is_started(tmp_path: Path) -> None:
    thaw = phase("thaw", {"from": "blocks.3"}, ema_decay=0.5, restore_best=True)  # the best of rank 0 would hide it
    manifest = digits(tmp_path / "digits").path
    file = write_config(tmp_path, "drift", manifest, 2, [phase("head", "head"), thaw, phase("all", "all")])
    checkpoints = tmp_path / "runs" / "drift" / "checkpoints"
    left = Left(file.with_suffix(""))
    errors = [left.folder / f"error-{rank}.txt" for rank in (0, 1)]
    for _ in range(2):
        done = start([file], fault="drift", timeout_s=200)
        assert done.returncode != 0
        tensors = len(left.network(0)) + len(left.plans[1]["trained"])
        said = f"phase 'thaw': 2 of {tensors} tensors differ between ranks ({DRIFTING}, ema.{DRIFTING})"
        assert [path.read_text().partition(", so ")[0] for path in errors] == [said, said]
        assert (checkpoints / "head" / "done.json").is_file()
        assert not any((checkpoints / "thaw" / name).exists() for name in ("done.json", "final.safetensors"))
        assert not (checkpoints / "all").exists()
        for path in errors:
            path.unlink()


def test_ranks_with_other_metrics_and_slower_ones_still_decide_as_one(tmp_path: Path) -> None:
    # Rank 1 has 2.0 and -1.0 in turns (`faults.disagree`): alone it would end, keep its rate and choose other weights.
    every = {"validate_every_steps": 1, "restore_best": True}
    plateau = {"metric": "val/accuracy", "patience": 1, "gamma": 0.5, "min_delta": 0.9}
    phases = [
        phase("until", "head", until={"metric": "val/accuracy", "above": 1.5}, **every),
        phase("plateau", {"from": "blocks.3"}, schedule="plateau", schedule_args=plateau, **every),
    ]
    file = write_config(tmp_path, "disagree", digits(tmp_path / "digits").path, 2, phases, monitor="val/accuracy")
    left = train([file], fault="disagree", timeout_s=120)["disagree"]
    for number in range(len(phases)):
        ends = [left.end(number, rank) for rank in (0, 1)]
        assert ends[0] == ends[1]
        assert ends[0]["step"] == 4
        assert differing(left.network(number + 1, rank=0), left.network(number + 1, rank=1)) == []
    assert ends[0]["drops"] == 3
