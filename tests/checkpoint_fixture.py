"""A tiny model in training, its checkpoints, and what they must give back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fmrl_dist.checkpoint import TENSOR_FILES, TrainState, optimizer_tensors, save_checkpoint
from fmrl_dist.files import file_sha256, json_sha256
from fmrl_dist.model import FMRLRec
from fmrl_dist.optim import build_optimizer

FACTS: dict[str, Any] = {
    "config": {"train": {"lr": 0.1}},
    "features": {"text": 3, "image": 2},
    "num_items": 6,
    "manifest_sha256": "abc",
}


def make_training(seed: int = 0) -> tuple[FMRLRec, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = FMRLRec((4, 8), depth=2, feature_dims=FACTS["features"], num_items=FACTS["num_items"])
    return model, build_optimizer(model, lr=0.01, betas=(0.9, 0.999), eps=1e-9, weight_decay=0.1)


def train(model: FMRLRec, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps ``first`` … ``last - 1`` on data that depend on the step alone; the features of one of them are absent."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        features, present = torch.randn(6, 5, generator=generator), torch.ones(6, 2, dtype=torch.bool)
        present[step % 6] = False
        items = model.encoder(features, present)
        z = model(items[[0, 1, 2, 3, 4]], torch.tensor([0, 3, 5]), torch.tensor([True, False]))
        (z @ items.T).logsumexp(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_training(folder: Path, state: TrainState, model: FMRLRec, optimizer: torch.optim.Optimizer) -> Path:
    """A checkpoint of a training, with :data:`FACTS`."""
    return save_checkpoint(folder, state, model.state_dict(), optimizer_tensors(model, optimizer), FACTS)


def reseal(checkpoint: Path) -> None:
    """Record the hashes of what the files hold now, so that only what they mean can be refused."""
    record = json.loads((checkpoint / "state.json").read_text())
    if isinstance(record, dict):
        record.pop("sha256", None)
        record["sha256_of"] = {name: file_sha256(checkpoint / f"{name}.safetensors") for name in TENSOR_FILES}
        record["sha256"] = json_sha256(record)
    (checkpoint / "state.json").write_text(json.dumps(record))


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_step_3(folder: Path) -> Path:
    """Three steps of training and a checkpoint, the best so far, in ``folder``; returns the checkpoint."""
    model, optimizer = make_training()
    train(model, optimizer, 0, 3)
    return save_training(folder, TrainState(3, 0.25, 3, 0), model, optimizer)
