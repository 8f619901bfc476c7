"""Imports run one way, so that any room can be read and tested without those behind it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = [
    "errors",
    "schedule",
    "recipe",
    "config",
    "blocks",
    "reading",
    "files",
    "data",
    "objectives",
    "model",
    "activations",
    "tracking",
    "features",
    "phases",
    "search",
    "report",
    "evaluation",
    "comparison",
    "launch",
]
SOURCES = [*(ROOT / "lit_transfer").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]


def imported(source: str) -> Iterator[str]:
    """Absolute names of all modules that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    place = path.relative_to(ROOT)
    return place.parts[0] if place.parts[0] == "launch" else place.parts[1].removesuffix(".py")


def backward(room: str, source: str) -> list[str]:
    """The imports of a module of a room that lead into a room behind it."""
    inside = [name.split(".")[1] for name in imported(source) if name.startswith("lit_transfer.")]
    unknown = set(inside) - set(ROOMS)
    assert not unknown, f"{sorted(unknown)} is in no room; give it a place in ROOMS"
    return [target for target in inside if ROOMS.index(target) > ROOMS.index(room)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if path == ROOT / "lit_transfer" / "__init__.py":  # names everything, and imports it when asked
        return
    assert backward(room_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_and_the_lightning_package_are_not_imported(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path.read_text())}
    assert not tops & ({"lightning"} if room_of(path) == "search" else {"lightning", "ray"})


def test_the_check_sees_an_import_backward() -> None:
    assert backward("data", "from lit_transfer.model.network import Network") == ["model"]
    assert backward("data", "def f():\n    import lit_transfer.launch.train") == ["launch"]
    assert backward("data", "from lit_transfer import report") == ["report"]
    assert backward("phases", "from lit_transfer.model import network\nimport torch") == []


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, lit_transfer; print([m for m in ('torch', 'timm', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_workers_import_nothing_slow_that_they_do_without() -> None:
    modules = ("lit_transfer.activations.data", "lit_transfer.data.loading")
    slow = ("pytorch_lightning", "torchvision", "timm", "botocore", "google.auth")
    code = f"import sys, {', '.join(modules)}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_where_it_is_said_to_be() -> None:
    import lit_transfer

    for name in dir(lit_transfer):
        assert getattr(lit_transfer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lit_transfer.nothing  # noqa: B018
