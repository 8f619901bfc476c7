"""Which of what is stored may be used, how the rest is computed, and how near that is to fp32."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import CUT, PLAIN, fill, opened, shelves
from torch import Tensor

from lit_transfer.activations import key as key_module
from lit_transfer.activations import prefix as prefix_module
from lit_transfer.activations.library import Library
from lit_transfer.activations.prefix import Recipe
from lit_transfer.data.streams import Samples
from lit_transfer.model.backbone import Backbone


def test_a_shelf_of_other_weights_or_types_is_not_used(
    library: Library, backbone: Backbone, streams: dict[str, Samples], tmp_path: Path
) -> None:
    fill(library)
    assert opened(backbone, streams, tmp_path).recipe([CUT]) == PLAIN
    assert opened(backbone, streams, tmp_path, prefix="fast").recipe([CUT]) == PLAIN, "it is better than it must be"
    assert opened(backbone, streams, tmp_path).recipe([1, 2]) is None
    assert opened(backbone, streams, tmp_path, dtype="bfloat16").recipe([CUT]) is None
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        other.stage_parameters(0)[0][1].view(-1)[0] += 1e-6
    changed = opened(other, streams, tmp_path)
    assert changed.recipe([CUT]) is None and changed.missing(CUT, PLAIN) == 72


@pytest.mark.parametrize("recipe", [replace(PLAIN, folded=True), replace(PLAIN, device="cpu of another kind")])
def test_plain_and_this_machine_are_what_they_say(
    library: Library, backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, recipe: Recipe
) -> None:
    fill(library, recipe=recipe)
    assert library.recipe([CUT]) is None
    fast = opened(backbone, streams, tmp_path, prefix="fast").recipe([CUT])
    assert fast == (recipe if recipe.folded else None)


def test_records_of_other_packages_are_not_used(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(library)
    real = key_module._version
    monkeypatch.setattr(key_module, "_version", lambda name: "0.0" if name == "simplejpeg" else real(name))
    assert library.recipe([CUT]) is None and library.missing(CUT, PLAIN) == 72


def test_the_most_complete_recipe_goes_on(library: Library, backbone: Backbone, streams: Any, tmp_path: Path) -> None:
    folded = replace(PLAIN, folded=True)
    fill(library)
    fill(library, recipe=folded)
    for shelf in shelves(library).values():
        (shelf.folder / "part-00000.safetensors").unlink()
    assert opened(backbone, streams, tmp_path, prefix="fast").recipe([CUT]) == folded


def test_a_recipe_that_is_not_near_at_a_deeper_cut_goes_no_further(
    backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bf16 keeps of the first stages says nothing of later ones."""
    library, half = opened(backbone, streams, tmp_path, prefix="fast"), replace(PLAIN, bf16_from="stem")
    fill(library, {2}, half)
    assert library.recipe([1, 2]) == library.recipe([1, 2, CUT]) == half, "near enough"
    monkeypatch.setattr(prefix_module, "MIN_COSINE", 1.1)
    assert library.recipe([1, 2]) == half and library.recipe([1, 2, CUT]) is None
    fill(library, {CUT})
    assert library.recipe([1, 2, CUT]) == PLAIN


def test_a_new_recipe_is_near_at_every_cut_on_the_way(
    backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision may take a shallower one than it was asked about."""
    compared: list[list[int]] = []

    def cosines(outputs: dict[int, Tensor], _: dict[int, Tensor]) -> dict[int, float]:
        compared.append([*outputs])
        return {cut: 0.0 for cut in outputs}

    monkeypatch.setattr(prefix_module, "cosines", cosines)
    assert opened(backbone, streams, tmp_path, prefix="fast").new_recipe([1, CUT]).bf16_from is None
    assert compared == CUT * [[1, 2, 3, 4]]


def test_a_prefix_is_folded_once(
    backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = prefix_module.folded, []

    def counted(*given: Any) -> Backbone:
        times.append(1)
        return real(*given)

    monkeypatch.setattr(prefix_module, "folded", counted)
    library, recipe = opened(backbone, streams, tmp_path), replace(PLAIN, folded=True)
    fill(library, {2, CUT}, recipe)
    library.check(CUT, recipe)
    assert len(times) == 1
    fill(library, {CUT + 1}, recipe)
    assert len(times) == 2
