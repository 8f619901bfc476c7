"""How soon pictures come: the train loader against WebDataset, ImageFolder, litdata and bare decoding; its other costs.

    .venv/bin/python benchmarks/loader.py [--repetitions 5] [--pictures 2000]

- pipelines: images per second and seconds to the first batch of each pipeline of `loader_pipelines.py`, 2 workers each,
  on the same JPEGs of 500 x 375 pixels and quality 90: cut, turned and noisy parts of two photographs. Medians of
  interleaved repetitions, each in a fresh process; a ratio is ours over the other's, of medians.
- reading: microseconds a sample of the shard reader, which checks each picture's sha256, against `tarfile` over the
  same shards; no decoding, one process, files in memory.
- steps: microseconds a picture of what a worker does, and of the training process' part, in one process: why the ratio
  to bare decoding is what it is.
- memory: peak of a rank's processes (`loader_memory.py`) with datasets of 10^4, 10^6 and 10^7 samples.
- nodes: share of a dataset's bytes that a node reads in an epoch of 4 partitions, from the plan.

litdata lives in an environment of its own that borrows torch from this one. The result goes to benchmarks/loader.json.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import loader_memory
import numpy as np
import simplejpeg
import torch
from loader_pipelines import BATCH, EPOCHS, PIPELINES, SEED, WORKERS, preprocessing
from PIL import Image

from lit_transfer.config import Stream
from lit_transfer.data.decode import decode, to_canvas
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import pack
from lit_transfer.data.plan import Batch
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import open_stream
from lit_transfer.files import write_json
from lit_transfer.model.augment import eval_input

HERE = Path(__file__).parent
LITDATA = "litdata==0.2.76"
WIDTH, HEIGHT, QUALITY, CLASSES = 500, 375, 90, 10
SHARD_BYTES = 16 * 2**20
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "webdataset")


@functools.cache
def photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def make_picture(number: int, folder: Path) -> None:
    """Write one JPEG: a part of a photograph, turned by up to 5 degrees, with noise."""
    rng, photo = np.random.default_rng(number), photographs()[number % 2]
    share = rng.uniform(0.6, 0.95)
    width, height = round(photo.width * share), round(photo.height * share)
    left, top = int(rng.integers(photo.width - width)), int(rng.integers(photo.height - height))
    part = photo.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    pixels = np.asarray(part.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
    path = folder / f"class{number % CLASSES}" / f"{number:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def make(folder: Path, pictures: int) -> Manifest:
    """The pictures as a folder and packed, in shards of 16 MB and in one."""
    with Pool(WORKERS) as pool:
        pool.starmap(make_picture, [(number, folder / "pictures") for number in range(pictures)], chunksize=50)
    for name, shard_bytes in (("packed", SHARD_BYTES), ("whole", 2**40)):
        settings: dict[str, Any] = {"splits": {"train": 1.0}, "shard_bytes": shard_bytes, "workers": WORKERS}
        pack(Pack(source=str(folder / "pictures"), out=str(folder / name), **settings))
    return Manifest.open(folder / "packed")


def litdata_python(folder: Path) -> str:
    """The interpreter of a new environment with litdata, and its chunks of the pictures."""
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (inside / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-qq", LITDATA], check=True)
    run(python, "write litdata", folder)
    return python


def run(python: str, pipeline: str, folder: Path) -> str:
    """What a process of one pipeline prints.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    command = [python, str(HERE / "loader_pipelines.py"), pipeline, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{pipeline} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def compare_pipelines(folder: Path, litdata: str, repetitions: int) -> dict[str, dict[str, Any]]:
    """Figures of every pipeline and of bare decoding, medians over interleaved repetitions."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("bare decoding", *PIPELINES)}
    for repetition in range(repetitions):
        for name, figures in found.items():
            lines = run(litdata if name == "litdata" else sys.executable, name, folder).splitlines()
            figures.append(json.loads(lines[-1]))
            print(f"{repetition} {name}: {figures[-1]}", flush=True)
    medians: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for name, figures in found.items()
    }
    mine = medians["ours"]["images_per_s"]
    for name, median in medians.items():
        median["ours_over_it"] = mine / median["images_per_s"]
        median["all_images_per_s"] = [round(one["images_per_s"]) for one in found[name]]
    return medians


def compare_reading(manifest: Manifest, repetitions: int) -> dict[str, float]:
    """Microseconds a sample of the shard reader, of its checking alone, and of `tarfile`; medians, interleaved."""
    reader, rows = ShardReader(manifest), range(manifest.table.num_rows)
    pictures = [reader.read(row) for row in rows]
    ways: dict[str, Callable[[], Any]] = {
        "reader": lambda: sum(len(reader.read(row)) for row in rows),
        "sha256": lambda: [hashlib.sha256(data).digest() for data in pictures],
        "tarfile": lambda: [_read_tar(manifest.path / shard.name) for shard in manifest.shards],
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            found[name].append((time.perf_counter() - start) / len(rows) * 1e6)
    medians = {f"{name}_us": statistics.median(times) for name, times in found.items()}
    unchecked_us = medians["reader_us"] - medians["sha256_us"]
    return medians | {
        "reader_over_tarfile": medians["tarfile_us"] / medians["reader_us"],
        "reader_over_tarfile_without_checking": medians["tarfile_us"] / unchecked_us,
    }


def profile(manifest: Manifest, repetitions: int) -> dict[str, float]:
    """Microseconds a picture of each step from shard to network input, medians, in this process on one thread."""
    torch.set_num_threads(1)
    how = preprocessing()
    dataset = SampleDataset(open_stream(Stream(manifest=str(manifest.path), split="train"), None, SEED), how, SEED)
    rows = range(BATCH)
    pictures = [dataset.reader.read(row) for row in rows]
    pixels = [simplejpeg.decode_jpeg(data) for data in pictures]
    batch = Batch(0, np.arange(BATCH))
    canvases = dataset[batch]["image"]
    steps: dict[str, Callable[[], Any]] = {
        "read_and_check": lambda: [dataset.reader.read(row) for row in rows],
        "decode_alone": lambda: [simplejpeg.decode_jpeg(data) is None for data in pictures],
        "resize_alone": lambda: [to_canvas(one, how) is None for one in pixels],
        "decode_and_resize": lambda: [decode(data, how) is None for data in pictures],
        "whole_batch": lambda: dataset[batch],
        "hand_over": lambda: canvases.clone().share_memory_(),
        "normalise": lambda: eval_input(canvases, how),
    }
    return {name: _median_us(step, repetitions * 4) / BATCH for name, step in steps.items()}


def _median_us(step: Callable[[], Any], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _read_tar(path: Path) -> int:
    with tarfile.open(path) as tar:
        return sum(len(file.read()) for member in tar if (file := tar.extractfile(member)))


def hardware() -> dict[str, Any]:
    """The processor, its cores and their memory."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": model.partition(":")[2].strip(), "cores": os.cpu_count(), "memory_gb": round(memory / 1e9)}


def table(pipelines: dict[str, dict[str, Any]]) -> str:
    """The pipelines in Markdown."""
    lines = ["| | images/s | ours is faster by | first batch, s |", "| --- | ---: | ---: | ---: |"]
    for name, figures in pipelines.items():
        first = f"{figures['first_batch_s']:.2f}" if "first_batch_s" in figures else ""
        lines.append(f"| {name} | {figures['images_per_s']:.0f} | {figures['ours_over_it']:.2f} | {first} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, print tables and write benchmarks/loader.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**4, 10**6, 10**7], help="of the memory figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = make(folder, options.pictures)
        litdata = litdata_python(folder)
        print("pictures, shards and environments are made; timing starts", flush=True)
        results: dict[str, Any] = {
            "pipelines": compare_pipelines(folder, litdata, options.repetitions),
            "steps_us": profile(manifest, options.repetitions),
            "reading": compare_reading(manifest, options.repetitions),
            "memory": [loader_memory.measured(folder, samples) for samples in options.samples],
            "nodes": loader_memory.node_shares(),
        }
    settings = {"pictures": options.pictures, "repetitions": options.repetitions, "batch": BATCH, "epochs": EPOCHS}
    versions = {package: version(package) for package in PACKAGES} | {"litdata": LITDATA.partition("==")[2]}
    write_json(
        Path(__file__).with_suffix(".json"),
        settings | {"workers": WORKERS, "hardware": hardware(), "versions": versions} | results,
    )
    print(table(results["pipelines"]))
    print(json.dumps({name: results[name] for name in ("steps_us", "reading", "memory", "nodes")}, indent=1))


if __name__ == "__main__":
    main()
