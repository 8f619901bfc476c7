"""The canvas of a picture is a function of its bytes and the settings: not of the processor, nor of its threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DIGEST = """
import hashlib, io, sys
import numpy as np, torch
from PIL import Image
from lit_transfer.data.decode import Preprocessing, decode

torch.set_num_threads(int(sys.argv[1]))
found, rng = hashlib.sha256(), np.random.default_rng(0)
for size in ((300, 300), (375, 500), (9, 400), (640, 480)):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "JPEG")
    for fit in ("crop", "squash", "pad"):
        for kind in ("bilinear", "bicubic"):
            how = Preprocessing(size=96, canvas=96, fit=fit, interpolation=kind, mean=(0, 0, 0), std=(1, 1, 1))
            found.update(decode(file.getvalue(), how).tobytes())
print(torch.backends.cpu.get_cpu_capability(), found.hexdigest())
"""


def canvases(capability: str | None, threads: int) -> tuple[str, str]:
    """The instructions that torch used, and the digest of all canvases."""
    environment = {name: text for name, text in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
    environment |= {"JSIMD_FORCENONE": "1"} if capability == "default" else {}
    command = [sys.executable, "-c", DIGEST, str(threads)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    used, digest = done.stdout.split()
    return used, digest


@pytest.fixture(scope="module")
def here() -> tuple[str, str]:
    return canvases(None, 1)


def test_a_processor_without_vector_instructions_gives_the_same_canvas(here: tuple[str, str]) -> None:
    used, digest = canvases("default", 1)
    assert used == "DEFAULT" and digest == here[1]


def test_threads_do_not_change_the_canvas(here: tuple[str, str]) -> None:
    assert canvases(None, 2) == here
