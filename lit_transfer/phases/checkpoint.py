"""The files of a phase: `last.ckpt` to go on from, the best weights, the final ones, and the mark that it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lit_transfer.files import replacing, write_json


@dataclass(frozen=True)
class PhaseResult:
    """What became of a phase: also the content of its `done.json`.

    Args:
        name: of the phase.
        after: names of the phases before it, in order.
        epochs: epochs begun.
        steps: optimizer steps.
        seconds: wall clock, validation and checkpoints included, over all its restarts.
        images_per_s: while training.
        data_wait_share: share of the training time spent waiting for data.
        checkpoint_share: share of `seconds` spent writing checkpoints.
        peak_memory_mib: of this rank in its last start: allocated on a GPU, resident of the process on a CPU.
        reason: why it ended.
    """

    name: str
    after: list[str]
    epochs: int
    steps: int
    seconds: float
    images_per_s: float
    data_wait_share: float
    checkpoint_share: float
    peak_memory_mib: float
    reason: str


class PhaseFiles:
    """The folder of one phase's checkpoints. Only rank 0 writes; all ranks read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last = folder / "last.ckpt"

    def read_last(self) -> dict[str, Any] | None:
        """What the last checkpoint holds, on the CPU; None if there is none."""
        if not self.last.is_file():
            return None
        state: dict[str, Any] = torch.load(self.last, map_location="cpu", weights_only=True)
        return state

    def write_last(self, state: dict[str, Any], best_step: int | None) -> None:
        """Replace the last checkpoint; then best weights that it does not name are removed."""
        with replacing(self.last) as temporary:
            torch.save(state, temporary)
        for path in self.folder.glob("best-*.safetensors"):
            if best_step is None or path != self._best(best_step):
                path.unlink()

    def write_best(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Keep the weights of a step beside earlier ones, for the last checkpoint may still name those."""
        _write_weights(self._best(step), weights)

    def read_best(self, step: int) -> dict[str, Tensor]:
        """The best weights; rank 0 may have finished the phase already, and given them their last name."""
        try:
            weights: dict[str, Tensor] = load_file(self._best(step))
        except FileNotFoundError:
            weights = load_file(self.folder / "best.safetensors")
        return weights

    def finish(self, network: nn.Module, result: PhaseResult, best_step: int | None) -> None:
        """Write the final weights, give the best ones their lasting name, and leave the mark that the phase is done."""
        _write_weights(self.folder / "final.safetensors", network.state_dict())
        if best_step is not None and self._best(best_step).is_file():  # else a killed process has renamed it
            self._best(best_step).replace(self.folder / "best.safetensors")
        write_json(self.folder / "done.json", asdict(result))

    def result(self) -> PhaseResult | None:
        """What became of the phase; None if it is not done."""
        path = self.folder / "done.json"
        return PhaseResult(**json.loads(path.read_text())) if path.is_file() else None

    def read_final(self) -> dict[str, Tensor]:
        """The weights that a finished phase ended with."""
        weights: dict[str, Tensor] = load_file(self.folder / "final.safetensors")
        return weights

    def prune(self) -> None:
        """Remove what only a phase that still runs needs."""
        self.last.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what a process that was killed left half-written."""
        for path in self.folder.glob(".*"):
            path.unlink()

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}.safetensors"


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(state))  # save_file would make it unreadable for the rest of the group
