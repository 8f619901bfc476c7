"""How conftest.py samples the large matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

STARTS = ("test_large", "test_in_groups[a", "test_in_groups[b", "test_alone", "test_plain")
CONFTEST = Path(__file__).parents[1] / "conftest.py"
MATRICES = """
    import pytest

    @pytest.mark.full
    @pytest.mark.parametrize("i", range(40))
    def test_large(i): ...

    @pytest.mark.parametrize("name, i", [
        pytest.param(name, i, marks=pytest.mark.full(name)) for name in "ab" for i in range(5)
    ])
    def test_in_groups(name, i): ...

    @pytest.mark.full
    def test_alone(): ...

    @pytest.mark.parametrize("i", range(3))
    def test_plain(i): ...
"""


@pytest.fixture
def kept(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Names of the cases that pytest collects under a seed."""
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nmarkers = full")
    pytester.makepyfile(test_matrices=MATRICES)

    def collect(seed: int, *arguments: str) -> list[str]:
        monkeypatch.setenv("LIT_TRANSFER_TEST_SEED", str(seed))
        lines = pytester.runpytest_inprocess("--collect-only", "-q", *arguments).outlines
        return [line.partition("::")[2] for line in lines if "::" in line]

    return collect


def test_each_group_keeps_a_share_and_at_least_one(kept: Callable[..., list[str]]) -> None:
    for seed in range(5):
        names = kept(seed)
        counts = [sum(name.startswith(start) for name in names) for start in STARTS]
        assert counts == [10, 2, 2, 1, 3], names
    assert len(kept(0, "--full")) == 40 + 10 + 1 + 3


def test_the_seed_alone_draws_the_sample(kept: Callable[..., list[str]]) -> None:
    assert kept(1) == kept(1) != kept(2)
    large = [name for name in kept(1) if name.startswith("test_large")]
    assert kept(1, "-k", "large") == large
