"""Whether all ranks hold the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lit_transfer.errors import UserError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RanksDiffer(UserError):
    """Ranks hold different weights: the run cannot be trusted, and stops with a sentence."""


def check_ranks_equal(tensors: Mapping[str, Tensor], device: torch.device, where: str) -> None:
    """Compare a checksum of every tensor over all ranks; every rank must call it, with the same names.

    Raises:
        RanksDiffer: on every rank, with the names of the tensors that differ.
    """
    ranks = dist.get_world_size()
    own = torch.stack([checksum(tensor) for tensor in tensors.values()]).to(device)
    everyones = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(everyones, own)
    differs = (torch.stack(everyones) != everyones[0]).any(dim=0).tolist()
    names = [name for name, differ in zip(tensors, differs, strict=True) if differ]
    if names:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise RanksDiffer(
            f"{where}: {len(names)} of {len(tensors)} tensors differ between ranks ({shown}), so each has trained a "
            "network of its own; do not use this phase, and look for what changes weights outside the optimizer."
        )


def checksum(tensor: Tensor) -> Tensor:
    """An int64 of the bits of a tensor and their places; equal tensors have equal ones."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()]).long()
    # Odd, so that no bit is lost in the product, and large, so that small values reach the bits that are folded in.
    places = (torch.arange(len(bits), device=bits.device) * 2 + 1) * -7046029254386353131
    mixed = bits * places
    return (mixed ^ (mixed >> 29)).sum()
