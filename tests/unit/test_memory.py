"""The memory estimate, made without values, against the same step on the CPU."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_transfer.model import memory as memory_module
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.memory import Memory, free_bytes, frozen_bytes, phase_memory, saved_bytes
from lit_transfer.model.network import Network, batch_norms
from lit_transfer.recipe import Head, Model

ROWS, SIZE = 2, 64
CUTS = [
    ("torchvision/resnet18", SIZE, "layer3"),
    ("torchvision/resnet18", SIZE, "all"),
    ("timm/tf_efficientnet_lite0", SIZE, "blocks.4"),
    ("timm/vit_tiny_patch16_224", 224, "blocks.8"),
    ("timm/convnext_atto", SIZE, "head"),
]


def network_on(device: str, name: str, size: int = SIZE, head: Head | None = None) -> Network:
    model = Model(backbone=name, weights="none")
    backbone = build_backbone(model, image_size=size, device=device, load_weights=False)
    return Network(backbone, build_head(head or Head(), backbone.features, 3, seed=0).to(device))


def kept_on_cpu(network: nn.Module, size: int, autocast: bool = False) -> int:
    """What autograd really keeps, by the addresses of memory."""
    images = torch.rand(ROWS, 3, size, size).to(memory_format=torch.channels_last)
    known = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers(), images)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        network.train()(images)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)


def images_on_meta(size: int = SIZE) -> Tensor:
    return torch.empty(ROWS, 3, size, size, device="meta").to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "size", "cut"), CUTS)
def test_saved_activations_are_those_of_a_real_step(name: str, size: int, cut: str) -> None:
    head = Head(hidden=[5], dropout=0.5)
    shapes, real = network_on("meta", name, size, head), network_on("cpu", name, size, head)
    for network in (shapes, real):
        network.set_cut(cut, "batch")
    estimate = saved_bytes(shapes.train(), images_on_meta(size))
    assert estimate == kept_on_cpu(real, size) > 0


def test_batch_norm_on_its_pretrained_statistics_counts_two_values_a_channel_too_many() -> None:
    shapes, real = (network_on(device, "torchvision/resnet18") for device in ("meta", "cpu"))
    for network in (shapes, real):
        network.set_cut("all")
    channels = sum(norm.num_features for norm in batch_norms(real))
    too_many = saved_bytes(shapes.train(), images_on_meta()) - kept_on_cpu(real, SIZE)
    assert too_many == 2 * 4 * channels


@pytest.mark.parametrize(("name", "size", "cut"), CUTS[:-1])
def test_mixed_precision_is_estimated_within_an_eighth(name: str, size: int, cut: str) -> None:
    shapes, real = network_on("meta", name, size), network_on("cpu", name, size)
    for network in (shapes, real):
        network.set_cut(cut, "batch")
    optimizer = torch.optim.SGD([p for p in shapes.parameters() if p.requires_grad])
    memory = phase_memory(shapes, optimizer, rows=ROWS, image_size=size, canvas=size, mixed=True, ranks=1)
    assert memory.saved == pytest.approx(kept_on_cpu(real, size, autocast=True), rel=0.125)


@pytest.mark.parametrize("cut", ["layer3", "all"])
def test_gradient_checkpointing_saves_what_it_saves_on_the_cpu(cut: str) -> None:
    """The inputs of trained stages: far less than all that is in them."""
    shapes, real = (network_on(device, "torchvision/resnet18") for device in ("meta", "cpu"))
    for network in (shapes, real):
        first = network.backbone.cut_index(cut)
        stages = {"head", *network.backbone.stage_names[first:]}
        names = [p.name for p in network.layout().parameters if p.stage in stages]
        network.set_trained(names, grad_checkpointing=True)
    estimate = saved_bytes(shapes.train(), images_on_meta())
    assert estimate == pytest.approx(kept_on_cpu(real, SIZE), rel=0.01)
    shapes.set_cut(cut)
    assert estimate < 0.5 * saved_bytes(shapes.train(), images_on_meta())


def test_the_frozen_prefix_needs_its_largest_layer() -> None:
    network = network_on("meta", "torchvision/resnet18")
    network.set_cut("layer3")
    # The first BatchNorm reads and writes [2, 64, 32, 32].
    assert frozen_bytes(network, images_on_meta()) == 2 * (2 * 64 * 32 * 32 * 4)
    network.set_cut("all")
    assert frozen_bytes(network, images_on_meta()) == 0


def memory_of(optimizer: type[torch.optim.Optimizer], ranks: int = 1, **settings: float) -> tuple[Memory, int]:
    network = network_on("meta", "torchvision/resnet18")
    network.set_cut("layer4")
    trained = [p for p in network.parameters() if p.requires_grad]
    made = optimizer(trained, **settings)
    memory = phase_memory(network, made, rows=ROWS, image_size=SIZE, canvas=72, mixed=False, ranks=ranks)
    assert all(p.grad is None for p in trained)
    return memory, sum(p.numel() for p in trained)


def test_weights_gradients_and_the_state_of_the_optimizer() -> None:
    memory, trained = memory_of(torch.optim.AdamW)
    real = network_on("cpu", "torchvision/resnet18")
    assert trained == 8_393_728 + 512 * 3 + 3
    assert memory.weights == sum(t.numel() * t.element_size() for t in real.state_dict().values())
    assert memory.gradients == 4 * trained
    tensors = 2 + sum(1 for _ in real.backbone.stage_parameters(4))  # AdamW counts the steps of each
    assert memory.optimizer == 2 * 4 * trained + 4 * tensors
    assert memory.batch == ROWS * 3 * (SIZE * SIZE * 4 + 72 * 72)
    assert memory_of(torch.optim.SGD, momentum=0.9)[0].optimizer == 4 * trained
    assert memory_of(torch.optim.SGD)[0].optimizer == 0
    assert memory_of(torch.optim.SGD, ranks=2)[0].gradients == 2 * 4 * trained


def test_the_total_takes_the_larger_of_what_is_not_needed_at_once() -> None:
    sizes = {"weights": 1, "gradients": 10, "optimizer": 100, "batch": 1000}
    assert Memory(**sizes, saved=20_000, frozen=50_000).total == 51_111
    assert Memory(**sizes, saved=50_000, frozen=20_000).total == 51_111


@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
@pytest.mark.skipif(platform.system() != "Linux", reason="others have no control groups")
def test_what_is_free_in_a_container_is_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str
) -> None:
    host, cpu = free_bytes(torch.device("cpu")), torch.device("cpu")
    monkeypatch.setattr(memory_module, "_CGROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / used).write_text("6000\n")
    (tmp_path / limit).with_name("memory.stat").write_text("anon 5000\ninactive_file 700\nactive_file 300\n")
    for told, left in (("10000\n", 4700), ("5000\n", 0)):
        (tmp_path / limit).write_text(told)
        assert free_bytes(cpu) == left, "cached files can be dropped"
    for told in ("max\n", "9223372036854771712\n"):
        (tmp_path / limit).write_text(told)
        assert free_bytes(cpu) > host / 2


FAULTS = """
import resource, statistics, torch
{before}
def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a = torch.ones(2**24)  # 64 MiB
    b = a + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(statistics.median([faults() for _ in range(15)]))  # the heap may grow now and then
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have no mallopt")
def test_freed_memory_is_used_again() -> None:
    """The kernel hands out no new pages for tensors as large as those that were freed."""
    kept = "from lit_transfer.model.memory import keep_freed_memory as keep; keep()"
    faults = {
        before: float(subprocess.check_output([sys.executable, "-c", FAULTS.format(before=before)], text=True))
        for before in ("", kept)
    }
    assert faults[""] > 2**14, "each tensor has new pages"
    assert faults[kept] < 100
