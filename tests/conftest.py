"""Large matrices are sampled by a seed that is printed; `--full` runs all of them."""

from __future__ import annotations

import math
import os
import random
from collections import defaultdict

import pytest

SEED = "LIT_TRANSFER_TEST_SEED"
SHARE = 0.25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the whole of the large matrices")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(10**6)))  # xdist's workers inherit it


def pytest_report_header(config: pytest.Config) -> str:
    return (
        "large matrices: all" if config.getoption("--full") else f"large matrices: sampled by {SEED}={os.environ[SEED]}"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a share, and at least one, of each matrix: a test's cases marked `full`, apart by the mark's arguments."""
    if config.getoption("--full"):
        return
    matrices: defaultdict[str, list[str]] = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("full"):
            matrices[f"{item.nodeid.partition('[')[0]} {mark.args}"].append(item.nodeid)
    left_out = set()
    for matrix, cases in matrices.items():
        draw = random.Random(f"{os.environ[SEED]} {matrix}")  # so a part of the tests has the sample of all
        left_out |= {*cases} - {*draw.sample(cases, max(1, math.ceil(SHARE * len(cases))))}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]
