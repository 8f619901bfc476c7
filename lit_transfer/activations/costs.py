"""What computing frozen stages and storing what they give would cost, measured on the run's own data and machine."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        compile_s: until a compiled prefix takes its first sample; 0 for others.
    """

    load_s: float
    compute_s: Mapping[int, float]
    store_s: Mapping[int, float]
    bytes: Mapping[int, int]
    write_bytes_per_s: float
    read_bytes_per_s: float
    compile_s: float = 0.0


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


@dataclass(frozen=True)
class CutCost:
    """What a phase would take if it read from one cut alone, and no other phase shared its records.

    Args:
        stage: behind the cut, or `head`.
        build_s: compute and write the records that are missing, once.
        read_s: read records, in all of the phase.
        run_on_s: run the frozen stages behind the cut, in all of the phase.
        bytes: of all records.
        missing_bytes: of those that are missing.
        chosen: whether the phase reads from it.
    """

    stage: str
    build_s: float
    read_s: float
    run_on_s: float
    bytes: int
    missing_bytes: int
    chosen: bool

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.build_s + self.read_s + self.run_on_s


@dataclass(frozen=True)
class Weighing:
    """What was measured for a decision, as far as it concerns one phase.

    Args:
        samples: that the phase is given in all, validation included.
        compute_s: compute its frozen stages for all of them, pictures loaded.
        room_bytes: that records may take.
        cuts: that it could read from, in the order of the stages.
    """

    samples: int
    compute_s: float
    room_bytes: float
    cuts: tuple[CutCost, ...]

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Weighing:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        return cls(**plain | {"cuts": tuple(CutCost(**cut) for cut in plain["cuts"])})


def sample_s(costs: Costs, use: Use, cut: int | None) -> float:
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
    found = (_decide_up_to(deepest, costs, uses, missing, samples, free_bytes) for deepest in (0, *sorted(missing)))
    return min(found, key=lambda decision: decision.build_s - decision.saved_s)


def _decide_up_to(
    deepest: int, costs: Costs, uses: Sequence[Use], missing: Mapping[int, int], samples: int, free_bytes: float
) -> Decision:
    """The same where a pass goes no deeper than some cut: its time is not one phase's, but that of all which read."""
    cuts: dict[str, int] = {}
    saved_s = 0.0
    for use in uses:
        chosen = set(cuts.values())
        taken = sum(missing[cut] * costs.bytes[cut] for cut in chosen)
        known = (cut for cut in missing if cut <= use.frozen and (cut <= deepest or not missing[cut]))
        new = {cut: 0 if cut in chosen else missing[cut] for cut in known}
        fits = [cut for cut in new if not new[cut] or taken + new[cut] * costs.bytes[cut] <= free_bytes]
        times = {cut: use.samples * sample_s(costs, use, cut) + _write_s(costs, new[cut], cut) for cut in fits}
        best = min(fits, key=lambda cut: (times[cut], -cut), default=None)
        if best is not None and times[best] < use.samples * sample_s(costs, use, None):
            cuts[use.name] = best
            saved_s += use.samples * sample_s(costs, use, None) - times[best]
    return Decision(cuts, pass_s(costs, set(cuts.values()), missing, samples), saved_s)


def pass_s(costs: Costs, cuts: Collection[int], missing: Mapping[int, int], samples: int) -> float:
    """Seconds of one pass over the pictures that computes what is missing at some cuts."""
    new = [cut for cut in cuts if missing[cut]]
    if not new:
        return 0.0
    return costs.compile_s + samples * costs.load_s + max(missing[cut] for cut in new) * costs.store_s[max(new)]


def weigh(
    costs: Costs,
    use: Use,
    stages: Sequence[str],
    records: int,
    missing: Mapping[int, int],
    samples: int,
    free_bytes: float,
    chosen: int | None,
) -> Weighing:
    """What `decide` compared, for one phase and each cut alone.

    Args:
        costs: measured.
        use: the phase.
        stages: the names of all, and `head`: by how many stand before.
        records: of a cut in all.
        missing: as for `decide`.
        samples: as for `decide`.
        free_bytes: as for `decide`.
        chosen: the cut that the phase reads from, if any.
    """
    cuts = []
    for cut in sorted(cut for cut in missing if cut <= use.frozen):
        read_s = costs.bytes[cut] / costs.read_bytes_per_s
        row = CutCost(
            stage=stages[cut],
            build_s=pass_s(costs, [cut], missing, samples) + _write_s(costs, missing[cut], cut),
            read_s=use.samples * read_s,
            run_on_s=use.samples * (sample_s(costs, use, cut) - read_s),
            bytes=records * costs.bytes[cut],
            missing_bytes=missing[cut] * costs.bytes[cut],
            chosen=cut == chosen,
        )
        cuts.append(row)
    return Weighing(use.samples, use.samples * sample_s(costs, use, None), free_bytes, tuple(cuts))


def _write_s(costs: Costs, records: int, cut: int) -> float:
    return records * costs.bytes[cut] / costs.write_bytes_per_s


def disk_speed(folder: Path, bytes: int = 32 << 20) -> tuple[float, float]:
    """Bytes per second written to (until they are safe) and read from a folder, by one file of random bytes.

    A folder that is not there yet is not made, for it would lack what `group_writable` grants: that above is measured.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    path = there / f".speed.{secrets.token_hex(4)}"
    content = secrets.token_bytes(bytes)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # else it is memory that is read
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        path.read_bytes()
        return bytes / (written - start), bytes / (time.perf_counter() - written)
    finally:
        path.unlink(missing_ok=True)
