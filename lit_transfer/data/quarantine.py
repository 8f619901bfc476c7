"""Damaged samples: what is known of each, and the list of them that a run keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_transfer.errors import UserError

FILE_NAME = "quarantine.jsonl"


class DamagedSample(UserError):
    """The bytes of a sample are not those that were packed.

    Args:
        address: of its shard, fit to be shown.
        offset: of its image in the shard, in bytes.
        reason: what is wrong with it.
    """

    def __init__(self, address: str, offset: int, reason: str) -> None:
        super().__init__(f"{address}, byte {offset}: {reason}; run `lit-transfer prepare --verify` on the dataset.")
        self.address, self.offset, self.reason = address, offset, reason


class Quarantine:
    """The list of damaged samples, a JSON object a line, and the limit to their number.

    Args:
        path: of the file; several processes may append to it at once. None keeps no list.
        max_bad_fraction: share of a stream's samples that may be damaged.
    """

    def __init__(self, path: Path | None = None, max_bad_fraction: float = 0.0) -> None:
        self.path = path
        self.max_bad_fraction = max_bad_fraction
        self._counted: dict[str, tuple[int, int]] = {}  # of each stream the epoch, and how many in it

    def add(self, stream: str, damages: Sequence[dict[str, Any]]) -> None:
        """List this rank's damaged samples, where they are not yet: `key`, `address`, `offset` and `reason` of each."""
        if not damages or self.path is None:
            return
        known = {(entry["stream"], entry["address"], entry["offset"]) for entry in self.entries()}
        new = [d for d in damages if (stream, d["address"], d["offset"]) not in known]
        new = list({(d["address"], d["offset"]): d for d in new}.values())
        text = "".join(json.dumps({"stream": stream} | damage, ensure_ascii=False) + "\n" for damage in new)
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            text = "\n" + text  # a killed process has left half a line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, text.encode())  # one write: lines of two processes do not mix
        finally:
            os.close(file)

    def count(self, stream: str, epoch: int, damaged: int, samples: int) -> None:
        """Add what all ranks have met since the last call; each sample is met once an epoch, or as often as
        `data.order.balance` draws it. What is measured has an epoch of its own each time, such as the run's step.

        Raises:
            UserError: too many of the stream's `samples` are damaged; on all ranks at once.
        """
        last, before = self._counted.get(stream, (epoch, 0))
        total = damaged + (before if last == epoch else 0)
        self._counted[stream] = epoch, total
        if total > self.max_bad_fraction * samples:
            listed = f"{self.path} lists them" if self.path else "none may be here"
            raise UserError(
                f"{total} of the {samples} samples of data.{stream} are damaged, more than data.max_bad_fraction "
                f"{self.max_bad_fraction:g} allows ({listed}); mend the dataset (`lit-transfer prepare --verify` says "
                "where), or raise the fraction."
            )

    def state(self) -> dict[str, tuple[int, int]]:
        """What is counted so far, the same on every rank: a run that goes on in mid-epoch must not forget it."""
        return dict(self._counted)

    def go_on_from(self, state: Mapping[str, tuple[int, int]]) -> None:
        """Go on from the counts of a checkpoint."""
        self._counted = dict(state)

    def entries(self) -> list[dict[str, Any]]:
        """What is listed; lines that a killed process has cut short are not."""
        if self.path is None or not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").split("\n"):  # splitlines also cuts at U+2028
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found
