"""The pipelines that `loader.py` compares, each in a process of its own: batches of a folder that it has made.

    python benchmarks/loader_pipelines.py PIPELINE FOLDER

All give what a network takes: float32 [B, 3, 224, 224], normalised, in the training process. All do the same work:
shuffled, the short side resized to 256 (bilinear, antialiased), the middle cut out, nothing random. The rivals do it in
their workers with torchvision's v2 transforms on uint8 tensors, as its documentation advises; the workers of
lit_transfer hand over uint8 canvases, and the training process cuts and normalises. Prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

SIZE, CANVAS, BATCH, WORKERS, EPOCHS, WARM_UP = 224, 256, 64, 2, 2, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 0


def transform(*first: Any) -> Callable[[Any], Tensor]:
    """torchvision's transforms of a picture to network input, after those given."""
    from torchvision.transforms import v2

    resized = [v2.Resize(CANVAS, antialias=True), v2.CenterCrop(SIZE)]
    whole: Callable[[Any], Tensor] = v2.Compose(
        [*first, *resized, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    return whole


def from_pil() -> Callable[[Any], Tensor]:
    """`transform` of a Pillow image."""
    from torchvision.transforms import v2

    return transform(v2.PILToTensor())


def webdataset(folder: Path) -> Iterator[Tensor]:
    """WebDataset's fluid interface: shards and samples shuffled, decoded by Pillow, batched in the worker."""
    import webdataset as wds

    shards = sorted(str(path) for path in (folder / "packed").glob("*.tar"))
    samples = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    batches = samples.map_tuple(from_pil(), None).batched(BATCH)
    loader = wds.WebLoader(batches, batch_size=None, num_workers=WORKERS, persistent_workers=True)
    for _ in range(EPOCHS):
        yield from (images for images, _ in loader)


def image_folder(folder: Path) -> Iterator[Tensor]:
    """torchvision's ImageFolder with its default loader, Pillow, and PyTorch's DataLoader."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder / "pictures"), from_pil())
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    for _ in range(EPOCHS):
        yield from (images for images, _ in loader)


def litdata(folder: Path) -> Iterator[Tensor]:
    """litdata's optimised chunks of JPEG, which torchvision's decoder reads."""
    from litdata import StreamingDataLoader, StreamingDataset

    convert = transform()
    dataset = StreamingDataset(
        str(folder / "litdata"), shuffle=True, transform=lambda sample: (convert(sample["image"]), sample["label"])
    )
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
    for _ in range(EPOCHS):
        yield from (images for images, _ in loader)


def write_litdata(folder: Path) -> None:
    """The pictures as litdata's chunks, of its own recommended size, the files as they are."""
    import litdata

    classes = sorted(path.name for path in (folder / "pictures").iterdir())
    inputs = [(str(path), classes.index(path.parent.name)) for path in sorted((folder / "pictures").rglob("*.jpg"))]
    litdata.optimize(_litdata_sample, inputs, str(folder / "litdata"), chunk_bytes="64MB", num_workers=WORKERS)


def _litdata_sample(picture: tuple[str, int]) -> dict[str, Any]:
    import litdata

    return {"image": litdata.Jpeg(path=picture[0]), "label": picture[1]}


def canvases(folder: Path) -> Iterator[Tensor]:
    """The train loader of lit_transfer, as far as its workers go: uint8."""
    from lit_transfer.config import Data, Stream
    from lit_transfer.data.module import ImageData
    from lit_transfer.data.plan import steps_per_epoch
    from lit_transfer.data.streams import open_streams

    streams = open_streams(Data(train=Stream(manifest=str(folder / "packed"), split="train")), SEED)
    steps = range(EPOCHS * steps_per_epoch(len(streams["train"].rows), BATCH))
    data = ImageData(streams, preprocessing(), seed=SEED, global_batch=BATCH, workers=WORKERS, steps=steps)
    yield from (batch["image"] for batch in data.train_dataloader())


def ours(folder: Path) -> Iterator[Tensor]:
    """The train loader of lit_transfer, and its step from canvases to network input."""
    from lit_transfer.model.augment import eval_input

    how = preprocessing()
    yield from (eval_input(images, how) for images in canvases(folder))


def preprocessing() -> Any:
    """What `transform` does, as settings of lit_transfer."""
    from lit_transfer.data.decode import Preprocessing

    return Preprocessing(size=SIZE, canvas=CANVAS, fit="crop", interpolation="bilinear", mean=MEAN, std=STD)


PIPELINES: dict[str, Callable[[Path], Iterator[Tensor]]] = {
    "ours": ours,
    "ours, before normalising": canvases,
    "webdataset": webdataset,
    "ImageFolder": image_folder,
    "litdata": litdata,
}
IMPORTS = {
    "ours": ("lit_transfer.data.module", "lit_transfer.model.augment"),
    "ours, before normalising": ("lit_transfer.data.module",),
    "webdataset": ("torchvision.transforms.v2", "webdataset"),
    "ImageFolder": ("torchvision.transforms.v2",),
    "litdata": ("torchvision.transforms.v2", "litdata"),
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Seconds from opening the dataset to the first batch; images per second from the batch after the warm-up on."""
    torch.set_num_threads(1)  # as torchrun has it where ranks share the cores
    for module in IMPORTS[name]:
        importlib.import_module(module)
    start = time.perf_counter()
    batches = PIPELINES[name](folder)
    first = next(batches)
    first_batch_s = time.perf_counter() - start
    assert first.shape[:2] == (BATCH, 3), first.shape
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    images = sum(len(batch) for batch in batches)
    return {"images_per_s": images / (time.perf_counter() - start), "first_batch_s": first_batch_s}


def bare(folder: Path) -> dict[str, float]:
    """Images per second that simplejpeg decodes in as many processes as there are workers, from memory."""
    pictures = [path.read_bytes() for path in sorted((folder / "pictures").rglob("*.jpg"))]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(WORKERS + 1)
    workers = [context.Process(target=_decode, args=(pictures[number::WORKERS], barrier)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return {"images_per_s": EPOCHS * len(pictures) / (time.perf_counter() - start)}


def _decode(pictures: list[bytes], barrier: Any) -> None:
    import simplejpeg

    for epoch in range(EPOCHS + 1):
        if epoch == 1:  # the first is the warm-up
            barrier.wait()
        for data in pictures:
            simplejpeg.decode_jpeg(data)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "write litdata":
        write_litdata(folder)
    else:
        print(json.dumps(bare(folder) if name == "bare decoding" else measure(name, folder)))


if __name__ == "__main__":
    main()
