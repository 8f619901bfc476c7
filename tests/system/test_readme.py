"""The README is true: its tree is the tree, and its commands run, in order, on a dataset of the same form."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (lit-transfer .*)$", README, flags=re.MULTILINE)


def test_the_tree_names_every_file_and_no_other() -> None:
    tree = README.split("## Where everything is")[1].split("```")[1]
    named = set(re.findall(r"(\w+\.py|^\s*\w+/)", tree, flags=re.MULTILINE))
    named = {name.strip() for name in named}
    real = {path.name for room in ("lit_transfer", "launch") for path in (ROOT / room).rglob("*.py")} - {"__init__.py"}
    rooms = {f"{path.name}/" for path in (ROOT / "lit_transfer").iterdir() if path.is_dir() and path.name[0] != "_"}
    tops = {"lit_transfer/", "launch/", "configs/", "tests/", "benchmarks/"}
    assert {name for name in named if name.endswith(".py")} == real
    assert rooms | tops <= named


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder as a newcomer has it, with the runs made short, and pictures of their own."""
    folder = tmp_path / "newcomer"
    for file in (ROOT / "configs").rglob("*.yaml"):
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    for name, train in (("quickstart", 0.01), ("features/elpv_lite0", 0.03)):
        config = folder / "configs" / f"{name}.yaml"
        plain = yaml.safe_load(config.read_text())
        for split, stream in plain["data"].items():
            if isinstance(stream, dict):
                stream["fraction"] = {"train": train, "val": 0.05, "test": 0.05}[split]
        if "phases" in plain:
            plain["phases"] |= {"head_epochs": 1, "thaw_epochs": 1, "global_batch": 8, "warmup_steps": 0}
        for place in (plain["image"], *plain.get("backbones", [])):
            place["size"] = 64
        config.write_text(yaml.safe_dump(plain))
    for name in ("sound", "cracked"):
        for i in range(12):
            picture = folder / "pictures" / name / f"{i}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 30), 20 + i).save(picture)
    return folder


def test_every_command_runs_and_then_the_python(workplace: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    environment["XDG_CACHE_HOME"] = str(workplace / "cache")

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    assert len(COMMANDS) >= 10
    program = str(Path(sys.executable).parent / "lit-transfer")
    for line in COMMANDS:
        run(program, *shlex.split(line.split("   #")[0])[1:])
    for name in ("quickstart", "elpv_lite0"):
        assert (workplace / "runs" / name / "summary.json").is_file()
    assert (workplace / "predictions.csv").read_text().count("\n") == 25

    Image.effect_noise((300, 300), 30).save(workplace / "cell.png")
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code and "Prediction" in run(sys.executable, "-c", "\n".join(code))
