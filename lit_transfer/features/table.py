"""The features of streams: what each block gives, from the activation store, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lit_transfer.activations.library import Library
from lit_transfer.activations.prefix import Prefix, plain_recipe
from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.views import plain_views
from lit_transfer.config import Activations
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import SampleDataset, loader
from lit_transfer.data.plan import Rows
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.data.samplers import EvalSampler
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import Samples
from lit_transfer.errors import UserError, require
from lit_transfer.model.augment import eval_input
from lit_transfer.model.backbone import Backbone, device_of

Vectors = tuple[Tensor, dict[int, str]]
"""fp32 [N, F] of all rows of a stream, and why some have no values, by their place."""


@dataclass(frozen=True)
class FeatureTable:
    """The features of a stream, without its damaged samples.

    Args:
        samples: the stream.
        rows: of the manifest, [N].
        values: of these rows, fp32 [N, F].
    """

    samples: Samples
    rows: Rows
    values: Tensor


def block_vectors(
    backbone: Backbone,
    preprocessing: Preprocessing,
    settings: Activations,
    streams: Mapping[str, Samples],
    *,
    workers: int,
    progress: bool,
) -> dict[str, Vectors]:
    """What a backbone gives for each stream: read from the store, which is filled if need be, or computed.

    Args:
        backbone: on the device where it is run.
        preprocessing: of its pictures.
        settings: of the store; `auto` computes where there is no room or the folder cannot be written.
        streams: by name.
        workers: processes that decode.
        progress: show bars.

    Raises:
        UserError: a stored record is not what its picture gives, or `require` cannot be kept.
    """
    if settings.store != "off":
        inputs = {name: (samples, plain_views(preprocessing)) for name, samples in streams.items()}
        library = Library(backbone, preprocessing, settings, inputs, workers)
        try:
            return _stored(library, progress)
        except OSError as error:
            told = f"features cannot be stored in {library.store.folder} ({error.strerror or error})"
            if settings.store == "require":
                raise UserError(f"{told}; make room, name another activations.folder, or use auto.") from error
            print(f"{told}; they are computed", flush=True)
    return {name: _computed(backbone, preprocessing, one, workers, progress) for name, one in streams.items()}


def _stored(library: Library, progress: bool) -> dict[str, Vectors]:
    """Fill what is missing of the last cut, mend what is damaged, compare some records, and load all."""
    cut = len(library.backbone.stages)
    recipe = library.recipe([cut]) or library.new_recipe([cut])
    if not library.make_room([cut], recipe):
        raise OSError(f"activations.limit_gb {library.settings.limit_gb:g} or the disk has no room")
    with ExitStack() as uses:
        for work in library.opening_steps(cut, recipe, uses=uses, share=(0, 1), progress=progress):
            if wrong := work():
                print(f"{wrong} stored records are damaged; they are computed again", flush=True)
        return {name: _loaded(stream.shelves[0]) for name, stream in library.streams(cut, recipe).items()}


def _loaded(shelf: Shelf) -> Vectors:
    return shelf.load().float(), shelf.damaged()


def _computed(
    backbone: Backbone, preprocessing: Preprocessing, samples: Samples, workers: int, progress: bool
) -> Vectors:
    device, cut = device_of(backbone), len(backbone.stages)
    prefix = Prefix(backbone, [cut], plain_recipe(device), preprocessing.size)
    batches = loader(
        SampleDataset(samples, preprocessing, None),
        EvalSampler(samples, global_batch=prefix.recipe.batch),
        workers,
    )
    found: list[Tensor] = []
    damaged: dict[int, str] = {}
    for step, item in enumerate(tqdm(batches, unit="batch", desc="computing features", disable=not progress)):
        found.append(prefix(eval_input(item["image"].to(device), preprocessing))[cut].float().cpu())
        bad = step * prefix.recipe.batch + np.flatnonzero(~item["valid"].numpy())
        damaged |= {int(place): one["reason"] for place, one in zip(bad, item["damaged"], strict=True)}
    return torch.cat(found), damaged


def mean_norms(blocks: Sequence[Vectors]) -> Tensor:
    """The mean norm of the vectors of each block over the sound samples of a stream, fp32 [blocks]; 1 for zeros."""
    norms = torch.stack([values[sound_places(len(values), damaged)].norm(dim=1).mean() for values, damaged in blocks])
    return torch.where(norms > 0, norms, 1.0)


def combine(
    name: str, samples: Samples, blocks: Sequence[Vectors], norms: Tensor, quarantine: Quarantine
) -> FeatureTable:
    """The vectors of all blocks one after the other, each over its norm; damaged samples are listed and left out.

    Raises:
        UserError: too many samples of the stream are damaged.
    """
    damaged = {place: reason for _, own in blocks for place, reason in own.items()}
    reader, table = ShardReader(samples.manifest), samples.manifest.table
    for place, reason in damaged.items():
        row = int(samples.rows[place])
        address, offset = reader.place(row)
        quarantine.add(
            name, [{"key": table["key"][row].as_py(), "address": address, "offset": offset, "reason": reason}]
        )
    quarantine.count(name, 0, len(damaged), len(samples.rows))
    sound = sound_places(len(samples.rows), damaged)
    require(len(sound) > 0, f"no picture of data.{name} can be decoded; see {quarantine.path}.")
    values = torch.cat([values[sound] / norm for (values, _), norm in zip(blocks, norms, strict=True)], dim=1)
    return FeatureTable(samples, samples.rows[sound.numpy()], values)


def groups_of(samples: Samples, rows: Rows) -> NDArray[np.int64] | None:
    """Numbers of the groups of manifest rows [N], of a row without one a number of its own; None if no two share one.

    What stands for one thing, such as the views of one sign, must not be fitted to and held out at once.
    """
    known = samples.manifest.table["group"].take(rows).combine_chunks().dictionary_encode()
    numbers = np.arange(len(rows), dtype=np.int64) + len(known.dictionary)
    named = known.is_valid().to_numpy(zero_copy_only=False)
    numbers[named] = known.indices.drop_null().to_numpy()
    return numbers if len(np.unique(numbers)) < len(numbers) else None


def sound_places(count: int, damaged: Mapping[int, str]) -> Tensor:
    """The places of samples that are not damaged."""
    return torch.tensor([place for place in range(count) if place not in damaged], dtype=torch.int64)
