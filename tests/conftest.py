"""Large matrices are sampled by a seed that is printed; `--full` runs all of them."""

from __future__ import annotations

import os
import random

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
    if config.getoption("--full"):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    kept = set(random.Random(os.environ[SEED]).sample([item.nodeid for item in full], round(SHARE * len(full))))
    left_out = [item for item in full if item.nodeid not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
