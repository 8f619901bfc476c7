"""The store as one network and its streams see it: what is there for them, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_transfer.activations.build import Source, Wanted, build, check_records, record_shape
from lit_transfer.activations.contents import Contents
from lit_transfer.activations.data import StoredStream
from lit_transfer.activations.key import content, description, hash_stages, versions
from lit_transfer.activations.part import CorruptRecord, open_part
from lit_transfer.activations.prefix import Prefix, Recipe, fast_recipe, is_near, plain_recipe
from lit_transfer.activations.shelf import Shelf
from lit_transfer.activations.store import ActivationStore, default_folder
from lit_transfer.activations.views import View, Views
from lit_transfer.config import Activations
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.plan import Batch
from lit_transfer.data.streams import Samples
from lit_transfer.model.augment import eval_input
from lit_transfer.model.backbone import Backbone, device_of

CHECKED_RECORDS = 64
"""Random records of a stream that are computed again whenever it is opened."""


class Library:
    """What is stored, or could be, of some streams as a backbone sees them.

    Args:
        backbone: with its weights as they are, on the device where it is to be run.
        preprocessing: of the pictures.
        settings: of the store.
        inputs: each stream with its views.
        workers: processes that decode.
    """

    def __init__(
        self,
        backbone: Backbone,
        preprocessing: Preprocessing,
        settings: Activations,
        inputs: Mapping[str, tuple[Samples, Views]],
        workers: int,
    ) -> None:
        self.backbone, self.preprocessing, self.settings, self.inputs = backbone, preprocessing, settings, inputs
        self.workers = workers
        self.device = device_of(backbone)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        folder = default_folder() if settings.folder is None else Path(settings.folder)
        self.store = ActivationStore(folder, int(settings.limit_gb * 1e9), settings.group_writable)
        self._hashes = hash_stages(backbone)
        self._plain = plain_recipe(self.device)
        self._prefixes: list[Prefix] = []
        images = self.images("train" if "train" in inputs else next(iter(inputs)), 1)
        cuts = range(1, len(backbone.stages) + 1)
        outputs = Prefix(backbone, cuts, self._plain, preprocessing.size)(images)
        self.shapes = {cut: record_shape(output) for cut, output in outputs.items()}

    def images(self, stream: str, count: int) -> Tensor:
        """The first pictures of a stream as validation sees them, [count, 3, S, S], on the device."""
        samples = self.inputs[stream][0]
        rows = np.resize(samples.rows, count)
        item = SampleDataset(samples, self.preprocessing, None)[Batch(0, rows)]
        return eval_input(item["image"].to(self.device), self.preprocessing)

    def record_bytes(self, cut: int) -> int:
        """Of one record."""
        return int(np.prod(self.shapes[cut])) * self.dtype.itemsize

    def recipe(self, cuts: Collection[int]) -> Recipe | None:
        """How what is there of some cuts was computed, the most complete first; None if nothing is that may be used.

        A recipe keeps its nearness to fp32 as deep as it was measured; for deeper cuts it is measured again.
        """
        found = [(cut, shelf) for cut in cuts for shelf in self._known(cut)]
        found.sort(key=lambda each: len(each[1].missing()) / max(1, each[1].parts))
        deepest: dict[Recipe, int] = {}
        for cut, shelf in found:
            recipe = Recipe.from_plain(shelf.description["recipe"])
            deepest[recipe] = max(cut, deepest.get(recipe, 0))
        return next((r for r, cut in deepest.items() if cut >= max(cuts) or self._is_near(r, max(cuts))), None)

    def new_recipe(self, cuts: Collection[int]) -> Recipe:
        """How to compute what is not there yet; measures, unless the settings ask for the plain prefix."""
        if self.settings.prefix == "plain":
            return self._plain
        images = self.images(next(iter(self.inputs)), self._plain.batch)
        return fast_recipe(self.backbone, max(cuts), images, compiled=self.settings.prefix == "compiled")

    def here(self, recipe: Recipe) -> Recipe:
        """The recipe as this machine computes it: on another one the bits are others."""
        return replace(recipe, device=self._plain.device)

    def prefix(self, cuts: Collection[int], recipe: Recipe) -> Prefix:
        """The frozen stages before some cuts, at least; made once, for to fold and to compile them takes its time."""
        made = next((p for p in self._prefixes if p.recipe == recipe and {*cuts} <= {*p.cuts}), None)
        if made is None:
            made = Prefix(self.backbone, sorted(cuts), recipe, self.preprocessing.size)
            self._prefixes.append(made)
        return made

    def missing(self, cut: int, recipe: Recipe | None) -> int:
        """Records of a cut, over all streams and views, that are not there under a recipe."""
        if recipe is None:
            return sum(len(samples.rows) * len(views.views) for samples, views in self.inputs.values())
        return sum(shelf.missing_records() for shelf in self._shelves([cut], recipe))

    def room_bytes(self, cuts: Collection[int], recipe: Recipe) -> int:
        """Bytes that could be added to some cuts if all else was evicted that nobody uses."""
        return self.store.room_bytes(self._shelves(cuts, recipe))

    def make_room(self, cuts: Collection[int], recipe: Recipe) -> bool:
        """Evict what was used longest ago until the rest of some cuts fits; False if it never does."""
        needed = sum(self.missing(cut, recipe) * self.record_bytes(cut) for cut in cuts)
        return not needed or self.store.make_room(needed, self._shelves(cuts, recipe))

    def fill(self, cuts: Collection[int], recipe: Recipe, *, share: tuple[int, int], progress: bool) -> None:
        """Compute what is missing of some cuts, in one pass over each stream; see `build`."""
        if not any(shelf.missing() for shelf in self._shelves(cuts, recipe)):
            return
        prefix = self.prefix(cuts, recipe)
        for name, wanted in self._wanted(cuts, recipe).items():
            build(wanted, self._source(name), prefix, share=share, progress=progress)

    def mend(self, cut: int, recipe: Recipe, share: tuple[int, int]) -> int:
        """Look at the checksum of every record of a cut, and again at the pictures of those without values; parts that
        are wrong, or lack a picture that can be read now, are removed. Returns how many records that is.

        `share`: this process, and how many there are that each look at their part.
        """
        wrong = 0
        open_part.cache_clear()  # another process may have built anew what this one holds open
        for name, wanted in self._wanted([cut], recipe).items():
            for shelf in (want.shelf for want in wanted):
                for part in range(share[0], shelf.parts, share[1]):
                    sound = self._sound_again(self.inputs[name][0], shelf, part)
                    if found := shelf.verify(part, sound):
                        shelf.discard(part, sound)
                        wrong += len(found)
        return wrong

    def _sound_again(self, samples: Samples, shelf: Shelf, part: int) -> list[int]:
        """Places of a part that hold no values, for their pictures could not be read, and whose pictures can be now."""
        places: list[int] = []
        with suppress(CorruptRecord, OSError):  # which `verify` tells apart
            places = [*shelf.damaged([part])]
        if not places:
            return []
        item = SampleDataset(samples, self.preprocessing, None)[Batch(0, samples.rows[places])]
        return [place for place, is_sound in zip(places, item["valid"].tolist(), strict=True) if is_sound]

    def check(self, cut: int, recipe: Recipe) -> None:
        """Compute random records again, and compare.

        Raises:
            UserError: a record is not what its picture gives.
        """
        prefix = self.prefix([cut], recipe)
        for name, wanted in self._wanted([cut], recipe).items():
            check_records(wanted, self._source(name), prefix, CHECKED_RECORDS)

    def opening_steps(
        self,
        cut: int,
        recipe: Recipe,
        tapped: Collection[int] = (),
        *,
        uses: ExitStack,
        share: tuple[int, int],
        progress: bool,
    ) -> list[Callable[[], int | None]]:
        """What makes a cut safe to read, to be called one after the other, each by all processes before the next.

        Nobody evicts the cut until `uses` is closed; it is filled, and those tapped on the way; it is mended, which
        gives the number of records that were wrong; what was removed is filled again; some records are compared.

        Args:
            cut: to read.
            recipe: of its records.
            tapped: cuts that are stored in the same pass for later phases; not held.
            uses: holds the cut.
            share: this process, and how many there are.
            progress: show a bar.

        Raises:
            OSError: by a step; the disk is full, or a value is too large for the stored type.
            UserError: by the last step; a record is not what its picture gives.
        """
        return [
            partial(self._hold, cut, recipe, uses),
            partial(self.fill, {cut, *tapped}, recipe, share=share, progress=progress),
            partial(self.mend, cut, recipe, share),
            partial(self.fill, {cut}, recipe, share=share, progress=progress),
            partial(self.check, cut, recipe),
        ]

    def streams(self, cut: int, recipe: Recipe) -> dict[str, StoredStream]:
        """All streams at a cut that is there as a whole."""
        return {
            name: StoredStream(*self.inputs[name], tuple(want.shelf for want in wanted))
            for name, wanted in self._wanted([cut], recipe).items()
        }

    def _hold(self, cut: int, recipe: Recipe, uses: ExitStack) -> None:
        for shelf in self._shelves([cut], recipe):
            uses.enter_context(shelf.in_use())

    def _source(self, name: str) -> Source:
        return Source(self.inputs[name][0], self.preprocessing, self.device, self.workers)

    def _wanted(self, cuts: Collection[int], recipe: Recipe) -> dict[str, list[Wanted]]:
        return {
            name: [Wanted(self._shelf(samples, view, cut, recipe), view, cut) for cut in cuts for view in views.views]
            for name, (samples, views) in self.inputs.items()
        }

    def _shelves(self, cuts: Collection[int], recipe: Recipe) -> list[Shelf]:
        """Of some cuts, whether anything is on them or not."""
        return [want.shelf for wanted in self._wanted(cuts, recipe).values() for want in wanted]

    def _shelf(self, samples: Samples, view: View, cut: int, recipe: Recipe) -> Shelf:
        about = description(self._content(samples, view, cut), recipe)
        return self.store.shelf(Contents(about, len(samples.rows), self.shapes[cut], self.dtype))

    def _content(self, samples: Samples, view: View, cut: int) -> dict[str, Any]:
        return content(self.backbone, cut, self._hashes, samples, self.preprocessing, view)

    def _is_near(self, recipe: Recipe, deepest: int) -> bool:
        images = self.images(next(iter(self.inputs)), self._plain.batch)
        return is_near(self.backbone, deepest, recipe, images)

    def _known(self, cut: int) -> list[Shelf]:
        """Shelves of a cut that the settings allow to be read."""
        contents = [
            self._content(samples, view, cut) for samples, views in self.inputs.values() for view in views.views
        ]
        return [
            shelf
            for shelf in self._readable()
            if shelf.description["content"] in contents
            and (self.settings.prefix != "plain" or shelf.description["recipe"] == self._plain.to_plain())
        ]

    def _readable(self) -> Iterator[Shelf]:
        """Those of the type asked for, computed on a machine of this kind with the packages that are here."""
        here = versions()
        for shelf in self.store.shelves():
            about = shelf.description
            is_ours = (shelf.dtype, about["versions"]) == (self.dtype, here)
            if is_ours and about["recipe"]["device"] == self._plain.device:
                yield shelf
