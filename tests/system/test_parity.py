"""The trainer against a plain PyTorch loop: the same weights, to the bit."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from digits import digits
from safetensors.torch import load_file
from torch import nn

from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.plan import Batch, shuffled, step_rows
from lit_transfer.launch.train import prepare_job
from lit_transfer.phases.job import Job
from lit_transfer.phases.run import run_phases
from lit_transfer.reading import load

YAML = """
name: parity
runs_dir: {runs}
data: {{train: {{manifest: {data}, split: train}}, val: {{manifest: {data}, split: val}}, workers: 0}}
image: {{size: 32, crop: 1.0}}
model: {{backbone: timm/test_efficientnet, weights: none}}
phases:
  - {{name: head, max_epochs: 2, lr: 0.01, global_batch: 10, optimizer: sgd}}
  - {{name: thaw, train: {{from: blocks.3}}, max_epochs: 2, lr: 0.003, backbone_lr: 0.001, global_batch: 7}}
trainer: {{accelerator: cpu, devices: 1, deterministic: true, progress: false}}
tracking: {{wandb: "off"}}
"""


def plain_loop(job: Job, net: nn.Module, head: nn.Linear) -> None:
    """Freeze-thaw as one would write it by hand; mutates the network and the head."""
    data = SampleDataset(job.streams["train"], job.preprocessing, None)
    digest, mean, std = job.streams["train"].manifest.digest, job.preprocessing.mean, job.preprocessing.std
    net.requires_grad_(False).eval()
    epoch = 0
    for train, epochs, size in (("head", 2, 10), ("thaw", 2, 7)):
        if train == "head":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
        else:
            thawed = [
                p
                for name, p in net.named_parameters()
                if not name.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2"))
            ]
            for parameter in thawed:
                parameter.requires_grad_(True)
            groups = [{"params": list(head.parameters()), "lr": 0.003}, {"params": thawed, "lr": 0.001}]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        for _ in range(epochs):
            order = shuffled(job.streams["train"].rows, digest, 0, epoch)
            for step in range(-(-len(order) // size)):
                batch = data[Batch(epoch, step_rows(order, step, size))]
                images = (batch["image"].float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
                    3, 1, 1
                )
                logits = head(net(images.contiguous(memory_format=torch.channels_last)))
                loss = F.cross_entropy(logits, batch["target"], reduction="none").sum() / len(batch["target"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            epoch += 1


def test_a_plain_loop_gives_the_trainers_weights_to_the_bit(tmp_path: Path) -> None:
    manifest = digits(tmp_path / "digits")
    file = tmp_path / "parity.yaml"
    file.write_text(YAML.format(runs=tmp_path / "runs", data=manifest.path))
    job, plans = prepare_job(load(file))

    net = timm.create_model("test_efficientnet", num_classes=0)
    net.load_state_dict(job.network.backbone.net.state_dict())
    net.to(memory_format=torch.channels_last)
    head = nn.Linear(job.network.backbone.features, 2)
    head.load_state_dict({name.split(".")[-1]: tensor for name, tensor in job.network.head.state_dict().items()})

    run_phases(job, plans)
    plain_loop(job, net, head)

    trained = load_file(job.run.checkpoints("thaw") / "final.safetensors")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, trained[f"backbone.net.{name}"]), name
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, trained[f"head.logits.{name}"]), name
