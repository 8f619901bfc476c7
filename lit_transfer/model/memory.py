"""The memory of a process: what a phase will need on one rank, estimated without values; what is free, taken, kept."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lit_transfer.model.network import Network

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""The limit of a container and what of it is used, by cgroup v2 and v1."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, at the largest batch of a phase.

    Args:
        weights: all parameters and buffers, in fp32.
        gradients: of what trains, in fp32; twice with several ranks, for DDP copies them into its buckets.
        optimizer: state of the optimizer.
        saved: activations that the trained part keeps for its backward pass.
        frozen: input and output of the largest layer of the frozen prefix, which keeps nothing.
        batch: the pictures of a step, as decoded (uint8) and as the network's input (fp32).
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int
    frozen: int
    batch: int

    @property
    def total(self) -> int:
        """The sum, with the larger of `saved` and `frozen`, which are not needed at the same time."""
        return self.weights + self.gradients + self.optimizer + self.batch + max(self.saved, self.frozen)


def phase_memory(
    network: Network,
    optimizer: torch.optim.Optimizer,
    *,
    rows: int,
    image_size: int,
    canvas: int,
    mixed: bool,
    ranks: int,
) -> Memory:
    """Estimate the memory of one rank by running a step on the meta device, where tensors have only shapes.

    Not counted: gradients of activations, workspaces of convolutions, what the allocator holds in reserve.

    Args:
        network: on `meta`, its cut set; left in training mode.
        optimizer: of its trained parameters; a step is taken, so that it has its state.
        rows: of the batch on this rank.
        image_size: side of the network's input, in pixels.
        canvas: side of a decoded picture, in pixels.
        mixed: 16-bit autocast. It does not exist on `meta`: floating activations then count half, and what
            trains once more in 16 bits, for the copy that the backward pass reads.
        ranks: over all nodes.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    images = torch.empty(rows, 3, image_size, image_size, device="meta").to(memory_format=torch.channels_last)
    gradients = sum(map(_bytes, trained))
    copies = gradients // 2 if mixed else 0
    return Memory(
        weights=sum(map(_bytes, [*network.parameters(), *network.buffers()])),
        gradients=gradients * (2 if ranks > 1 else 1),
        optimizer=_state_bytes(optimizer, trained),
        saved=saved_bytes(network.train(), images, mixed) + copies,
        frozen=frozen_bytes(network, images, mixed),
        batch=_bytes(images) + rows * 3 * canvas * canvas,
    )


def saved_bytes(network: nn.Module, images: Tensor, mixed: bool = False) -> int:
    """What autograd keeps of a forward pass, each storage once, without parameters, buffers and images."""
    known = {_identity(tensor) for tensor in (*network.parameters(), *network.buffers(), images)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in known:
            kept[_identity(tensor)] = tensor  # held, so that no later storage takes its address
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(images)
    return sum(_activation_bytes(tensor, mixed) for tensor in kept.values())


def frozen_bytes(network: Network, images: Tensor, mixed: bool = False) -> int:
    """Input and output of the largest layer before the cut, each storage once; 0 where nothing is frozen."""
    largest = 0

    def measure(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        tensors = {_identity(t): t for t in (*inputs, output) if isinstance(t, Tensor)}
        largest = max(largest, sum(_activation_bytes(t, mixed) for t in tensors.values()))

    parts = [part for i in range(network.first_trained) for part in network.backbone.stage_modules(i)]
    layers = [layer for part in parts for layer in part.modules() if not list(layer.children())]
    with torch.no_grad(), _hooked([layer.register_forward_hook(measure) for layer in layers]):
        network.backbone.run(images, 0, network.first_trained)
    return largest


class _FusedAttention(TorchFunctionMode):
    """Attention keeps what the fused kernels of real devices keep; on meta it would keep its whole matrix."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention and args[0].is_meta and args[0].ndim == 4:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Shapes of Dao et al. 2022 (algorithm 1): queries, keys, values, output and log-sum-exp are kept."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch, heads, length, _ = queries.shape  # laid out as kernels do: joining the heads copies nothing
        output = queries.new_empty(batch, length, heads, values.shape[-1]).transpose(1, 2)
        sums = queries.new_empty(queries.shape[:-1])
        ctx.save_for_backward(queries, keys, values, output, sums)
        return output


def _state_bytes(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> int:
    """Take a step, to have the optimizer make its state, and count it; the gradients are cleared again."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(_bytes(value) for value in values if isinstance(value, Tensor))


@contextmanager
def _hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # its address; data_ptr() is 0 for everything on meta


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _activation_bytes(tensor: Tensor, mixed: bool) -> int:
    """Of the whole storage; half where mixed precision holds it in 16 bits."""
    size = tensor.untyped_storage().nbytes()
    return size // 2 if mixed and tensor.dtype == torch.float32 else size


def keep_freed_memory() -> None:
    """Let this process use freed memory again, where glibc would give it back to the system; elsewhere nothing.

    On a CPU most layers ask for tens of megabytes. glibc maps what is over 32 MiB anew each time, and the kernel fills
    every page with zeros, which can take as long as the convolutions (`eager_keeping` of benchmarks/store.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def reset_peak_memory() -> None:
    """Forget the peak so far, where it can be forgotten: on GPUs, and on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take: of a GPU, or of this machine, all of it where the kernel does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if told.is_file():
        kib = re.search(r"MemAvailable: +(\d+) kB", told.read_text())
        assert kib, "Linux tells it"
        return min([int(kib[1]) * 1024, *_left_in_container()])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_container() -> list[int]:
    """What the limit of a container, if there is one, leaves; the kernel drops cached files before it enforces it."""
    left = []
    for limit, used in ((_CGROUPS / limit, _CGROUPS / used) for limit, used in _CGROUP_FILES):
        if limit.is_file() and (told := limit.read_text().strip()) != "max":
            cached = re.search(r"^inactive_file (\d+)", limit.with_name("memory.stat").read_text(), re.MULTILINE)
            left.append(max(0, int(told) - int(used.read_text()) + int(cached[1] if cached else 0)))
    return left


def peak_memory_mib() -> float:
    """The most memory since `reset_peak_memory`: allocated on the GPU, or resident of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        kib = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert kib, "Linux tells it"
        return int(kib[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes
