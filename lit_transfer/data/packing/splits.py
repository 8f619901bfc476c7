"""Which sample belongs to which split: stratified, group-safe, from a seed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

Tag = Hashable


def assign_splits(
    sources: Sequence[str],
    tags: Sequence[Sequence[Tag]],
    groups: Sequence[str | None],
    fractions: Mapping[str, float],
    seed: int,
) -> list[str]:
    """The split of every sample; the order of the samples does not matter.

    Whole groups are placed one after another, large and rare ones first, in the split where most of their
    samples still fit: first within the rounded-down share of each tag, then within the rounded-up share, then
    where the total lags most behind its fraction. For ungrouped samples with one tag each, every tag and the
    total come within about one sample of their fractions.

    Args:
        sources: unique name per sample.
        tags: what to balance, per sample: its class, its positive labels, or any other hashable strata.
        groups: samples of one group stay together; None is a group of its own.
        fractions: share per split; sums to 1.
        seed: another seed gives another, equally balanced assignment.
    """
    units: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for i, (source, group) in enumerate(zip(sources, groups, strict=True)):
        units[(group is not None, source if group is None else group)].append(i)
    totals = Counter(tag for sample in tags for tag in sample)
    placed = _Placed(fractions, totals)
    result = [""] * len(sources)
    for unit in sorted(units, key=lambda unit: _order(units[unit], tags, totals, seed, unit)):
        counts = Counter(tag for i in units[unit] for tag in tags[i])
        split = placed.best(counts, len(units[unit]))
        placed.add(split, counts, len(units[unit]))
        for i in units[unit]:
            result[i] = split
    return result


def seeded_hash(seed: int, text: str) -> bytes:
    """A value to sort by that depends on the seed and the text alone."""
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def quantile_bins(values: Sequence[float | None], bins: int = 10) -> list[int | None]:
    """The quantile bin of every value; equal values share a bin, None stays None."""
    present = sorted(value for value in values if value is not None)
    first: dict[float, int] = {}
    for rank, value in enumerate(present):
        first.setdefault(value, rank * bins // len(present))
    return [None if value is None else first[value] for value in values]


def _order(
    unit: Sequence[int],
    tags: Sequence[Sequence[Tag]],
    totals: Mapping[Tag, int],
    seed: int,
    name: tuple[bool, str],
) -> tuple[int, int, str, bytes]:
    """Large units first; equal ones by their rarest tag, so that one stratum is placed in one go."""
    rarest = min(((totals[tag], repr(tag)) for i in unit for tag in tags[i]), default=(0, ""))
    return -len(unit), rarest[0], rarest[1], seeded_hash(seed, f"{name[0]:d}{name[1]}")


class _Placed:
    """How many samples each split holds so far, in all and per tag."""

    def __init__(self, fractions: Mapping[str, float], totals: Mapping[Tag, int]) -> None:
        self.fractions = fractions
        self.totals = totals
        self.samples = dict.fromkeys(fractions, 0)
        self.tagged: dict[str, Counter[Tag]] = {split: Counter() for split in fractions}

    def best(self, counts: Mapping[Tag, int], samples: int) -> str:
        after = sum(self.samples.values()) + samples

        def merit(split: str) -> tuple[int, int, float]:
            fits = fits_rounded_up = 0
            for tag, count in counts.items():
                share = self.fractions[split] * self.totals[tag]
                held = self.tagged[split][tag] + count
                fits += count * (held <= math.floor(share + 1e-9))
                fits_rounded_up += count * (held <= math.ceil(share - 1e-9))
            lag = self.fractions[split] * after - self.samples[split]
            return fits, fits_rounded_up, round(lag, 9)

        return max(self.fractions, key=merit)

    def add(self, split: str, counts: Mapping[Tag, int], samples: int) -> None:
        self.samples[split] += samples
        self.tagged[split].update(counts)
