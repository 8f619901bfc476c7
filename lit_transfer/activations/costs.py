"""What computing frozen stages and storing what they give would cost, measured on the run's own data and machine."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of one sample, by how many stages stand before the cut.

    Args:
        load_s: read and decode its picture, as far as that is not hidden behind computing.
        compute_s: run the frozen stages as training does.
        store_s: run them as the store does, all views apart.
        bytes: of its record.
        write_bytes_per_s: to the store.
        read_bytes_per_s: from the store.
    """

    load_s: float
    compute_s: Mapping[int, float]
    store_s: Mapping[int, float]
    bytes: Mapping[int, int]
    write_bytes_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True)
class Use:
    """A phase that could read what is stored.

    Args:
        name: of the phase.
        frozen: its stages that are frozen, from the front.
        samples: that it would read in all, validation included.
    """

    name: str
    frozen: int
    samples: int


@dataclass(frozen=True)
class Decision:
    """What is stored, and why.

    Args:
        cuts: of each phase that reads what is stored, by its name.
        build_s: once.
        saved_s: by all phases, the building not taken off.
    """

    cuts: Mapping[str, int]
    build_s: float
    saved_s: float

    @property
    def pays(self) -> bool:
        """Whether more time is saved than it takes to build."""
        return self.saved_s > self.build_s


def epoch_s(costs: Costs, use: Use, cut: int | None) -> float:
    """Seconds that a sample's frozen part takes in training: computed for None, else read and run on from the cut."""
    if cut is None:
        return costs.load_s + costs.compute_s[use.frozen]
    return costs.bytes[cut] / costs.read_bytes_per_s + costs.compute_s[use.frozen] - costs.compute_s.get(cut, 0.0)


def decide(costs: Costs, uses: Sequence[Use], missing: Mapping[int, int], samples: int, free_bytes: float) -> Decision:
    """The cut that each phase reads, for the least time in all; phases that rather compute are left out.

    Args:
        costs: measured.
        uses: this phase and the later ones that could share one pass over the pictures.
        missing: records not stored yet, by cut.
        samples: pictures that a pass over them has to load.
        free_bytes: that records may take.
    """
    cuts: dict[str, int] = {}
    saved_s = 0.0
    for use in uses:
        chosen = set(cuts.values())
        taken = sum(missing[cut] * costs.bytes[cut] for cut in chosen)
        new = {cut: 0 if cut in chosen else missing[cut] for cut in missing if cut <= use.frozen}
        fits = [cut for cut in new if not new[cut] or taken + new[cut] * costs.bytes[cut] <= free_bytes]
        times = {cut: use.samples * epoch_s(costs, use, cut) + _write_s(costs, new[cut], cut) for cut in fits}
        best = min(fits, key=lambda cut: (times[cut], -cut), default=None)
        if best is not None and times[best] < use.samples * epoch_s(costs, use, None):
            cuts[use.name] = best
            saved_s += use.samples * epoch_s(costs, use, None) - times[best]
    return Decision(cuts, pass_s(costs, set(cuts.values()), missing, samples), saved_s)


def pass_s(costs: Costs, cuts: Collection[int], missing: Mapping[int, int], samples: int) -> float:
    """Seconds of one pass over the pictures that computes what is missing at some cuts."""
    new = [cut for cut in cuts if missing[cut]]
    if not new:
        return 0.0
    return samples * costs.load_s + max(missing[cut] for cut in new) * costs.store_s[max(new)]


def _write_s(costs: Costs, records: int, cut: int) -> float:
    return records * costs.bytes[cut] / costs.write_bytes_per_s


def disk_speed(folder: Path, bytes: int = 32 << 20) -> tuple[float, float]:
    """Bytes per second written to (until they are safe) and read from a folder, by one file of random bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".speed.{secrets.token_hex(4)}"
    content = secrets.token_bytes(bytes)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        path.read_bytes()
        return bytes / (written - start), bytes / (time.perf_counter() - written)
    finally:
        path.unlink(missing_ok=True)
