"""Checkpoints: the same bits are restored, links point to the right folders, and nothing else is kept."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import (
    TrainState,
    find_checkpoint,
    load_checkpoint,
    point,
    restore_optimizer,
)
from tests.fixtures.checkpoints import (
    FACTS,
    assert_same_bits,
    make_training,
    names_in,
    save_step_3,
    save_training,
    train,
)
from tests.fixtures.item_encoders import projection_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of a run whose only checkpoint is of step 3."""
    return save_step_3(tmp_path / "run" / "checkpoints")


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = make_training()
    train(model, optimizer, 0, 3)
    state = TrainState(step=3, best_value=0.1 + 0.2, best_step=2, evaluations_without_gain=1)
    save_training(tmp_path / "checkpoints", state, model, optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    again, optimizer_again = make_training(seed=1)
    checkpoint = load_checkpoint(tmp_path, "latest")
    assert checkpoint.state == state
    assert_same_bits(checkpoint.model, before)
    again.load_state_dict(checkpoint.model)
    restore_optimizer(again, optimizer_again, checkpoint.optimizer)
    moments = dict(zip(model.parameters(), again.parameters(), strict=True))
    for parameter, other in moments.items():
        assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert_same_bits(optimizer_again.state[other], optimizer.state[parameter])

    train(model, optimizer, 3, 8)
    train(again, optimizer_again, 3, 8)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert not torch.equal(projection_of(again).weight, before["encoder.weight"])


def test_moments_and_step_are_on_their_parameters_device(saved: Path) -> None:
    """A fused optimiser on a GPU reads the step from the GPU."""
    model, optimizer = make_training()
    restore_optimizer(model.to("meta"), optimizer, load_checkpoint(saved).optimizer)
    for parameter, state in optimizer.state.items():
        assert {tensor.device for tensor in state.values()} == {parameter.device}


def test_facts_are_restored(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    facts = {name: getattr(checkpoint, name) for name in FACTS}
    assert facts == FACTS
    assert checkpoint.path == saved
    assert list(checkpoint.features) == ["text", "image"]  # the order of the feature matrix's columns


def test_files_are_safetensors_and_json(saved: Path) -> None:
    assert names_in(saved) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    checkpoint = load_checkpoint(saved)
    assert_same_bits(checkpoint.model, load_file(saved / "model.safetensors"))
    assert_same_bits(checkpoint.optimizer, load_file(saved / "optimizer.safetensors"))
    record = json.loads((saved / "state.json").read_text())
    assert record["checkpoint_version"] == 3
    assert record["state"] == {
        "step": 3,
        "best_value": 0.25,
        "best_step": 3,
        "evaluations_without_gain": 0,
        "validation_is_due": False,
        "skipped_blocks": [],
    }


def test_a_parameter_that_has_taken_no_step_has_no_moments(tmp_path: Path) -> None:
    model, optimizer = make_training()
    save_training(tmp_path, TrainState(1), model, optimizer)
    assert load_checkpoint(tmp_path / "latest").optimizer == {}
    model.encoder.bias.grad = torch.ones(8)
    optimizer.step()
    save_training(tmp_path, TrainState(2), model, optimizer)
    checkpoint = load_checkpoint(tmp_path / "latest")
    assert {name.split("/")[1] for name in checkpoint.optimizer} == {"encoder.bias"}
    again, optimizer_again = make_training()
    restore_optimizer(again, optimizer_again, checkpoint.optimizer)
    assert list(optimizer_again.state) == [again.encoder.bias]


def test_a_parameter_whose_name_ends_like_anothers_keeps_its_own_moments() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"bias": nn.Linear(1, 1)}), "bias": nn.Linear(1, 1)})
    optimizer = torch.optim.AdamW(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    restore_optimizer(
        model,
        optimizer,
        {f"exp_avg/{name}": torch.full((1,), float(i)) for i, name in reversed(list(enumerate(names)))},
    )
    for i, parameter in enumerate(model.parameters()):
        assert optimizer.state[parameter]["exp_avg"].item() == i


def save_steps(folder: Path, states: list[TrainState]) -> list[Path]:
    model, optimizer = make_training()
    return [save_training(folder, state, model, optimizer) for state in states]


def leads_to(folder: Path, link: str) -> str:
    assert (folder / link).is_symlink()
    assert not os.path.isabs(os.readlink(folder / link))  # a run's folder may be moved
    return (folder / link).resolve().name


def test_links_follow_and_unlinked_checkpoints_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_steps(folder, [TrainState(10, 0.1, 10)])
    assert names_in(folder) == ["best", "latest", "step-00000010"]
    save_steps(folder, [TrainState(20, 0.2, 20)])
    assert names_in(folder) == ["best", "latest", "step-00000020"]
    save_steps(folder, [TrainState(30, 0.2, 20, 1), TrainState(40, 0.2, 20, 2)])
    assert names_in(folder) == ["best", "latest", "step-00000020", "step-00000040"]
    assert (leads_to(folder, "best"), leads_to(folder, "latest")) == ("step-00000020", "step-00000040")
    assert load_checkpoint(tmp_path).state.step == 20
    assert load_checkpoint(tmp_path, "latest").state.step == 40


def test_a_link_is_swapped(tmp_path: Path) -> None:
    first = save_steps(tmp_path, [TrainState(1, 0.5, 1)])[0]
    second = save_steps(tmp_path, [TrainState(2, 0.5, 1)])[0]
    point(tmp_path, "best", second)
    assert leads_to(tmp_path, "best") == leads_to(tmp_path, "latest") == second.name
    assert not first.exists()


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    save_steps(tmp_path / "run" / "checkpoints", [TrainState(1, 0.5, 1), TrainState(2, 0.5, 1)])
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert load_checkpoint(tmp_path / "elsewhere").state.step == 1
    assert load_checkpoint(tmp_path / "elsewhere", "latest").state.step == 2


def test_the_same_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    """As after resuming from an earlier checkpoint, or when an evaluation follows."""
    save_steps(tmp_path, [TrainState(7, 0.1, 3), TrainState(7, 0.2, 7), TrainState(7, 0.2, 7, 1)])
    checkpoints = [name for name in names_in(tmp_path) if name.startswith("step-")]
    assert len(checkpoints) == 1
    assert load_checkpoint(tmp_path / "latest").state.evaluations_without_gain == 1
    assert leads_to(tmp_path, "best") == leads_to(tmp_path, "latest")


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    save_steps(tmp_path, [TrainState(1, 0.5, 1)])
    (tmp_path / ".step-00000002").mkdir()
    (tmp_path / ".step-00000002" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".latest").symlink_to("step-00000002")
    save_steps(tmp_path, [TrainState(3, 0.5, 1)])
    assert names_in(tmp_path) == ["best", "latest", "step-00000001", "step-00000003"]


def test_a_loaded_checkpoint_does_not_map_its_files(saved: Path) -> None:
    """A run prunes the checkpoint that it resumed from; network file systems keep the folder of a mapped file busy."""
    checkpoint = load_checkpoint(saved)
    assert str(saved) not in Path("/proc/self/maps").read_text()
    (saved / "model.safetensors").write_bytes(b"")
    assert checkpoint.model["encoder.weight"].isfinite().all()


@pytest.mark.parametrize("where", ["run", "run/checkpoints/latest", "run/checkpoints/best", "run/checkpoints/STEP"])
def test_a_run_or_a_checkpoint_is_found(saved: Path, tmp_path: Path, where: str) -> None:
    assert find_checkpoint(tmp_path / where.replace("STEP", saved.name), "latest") == saved


@pytest.mark.parametrize("where", ["", "run/checkpoints", "nothing", "run/checkpoints/latest/state.json"])
def test_a_path_without_a_checkpoint(saved: Path, tmp_path: Path, where: str) -> None:
    assert saved.is_dir()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / where)) + " holds no checkpoint; expected a run"):
        load_checkpoint(tmp_path / where)
