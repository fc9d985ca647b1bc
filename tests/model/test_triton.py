"""Triton kernels against their plain twins, in a process that turns the interpreter on before it imports triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmrl_dist import train
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.training import make_shop, refusal

if not os.environ.get("CI"):  # where it is missing by mistake, so tests fail there
    pytest.importorskip("triton", reason="the triton extra is not installed")


def run(code: list[str]) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )


def test_kernels_equal_their_plain_twins() -> None:
    result = run(["-m", "tests.fixtures.triton_cases"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ok ") == 32, result.stdout


def test_second_gradients_of_the_scan_are_refused_rather_than_wrong() -> None:
    code = """if True:
        import torch
        from fmrl_dist.model.scan import packed_scan
        decay, x = torch.full((2, 4), 0.1, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
        states = packed_scan(decay, x, torch.tensor([0, 3]), "triton")
        torch.autograd.grad(states.square().sum(), x, create_graph=True)
    """
    result = run(["-c", code])
    assert result.returncode != 0
    assert "the Triton scan has no second gradients" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, so nothing is to be refused")
def test_training_refuses_triton_without_a_gpu(tmp_path: Path) -> None:
    shop = make_shop(tmp_path)
    for key, other in (("loss.impl", "tiled or auto"), ("model.scan", "doubling or auto")):
        line = refusal(train.main, "--config", shop, f"--{key}", "triton")
        assert f"{key} is triton, which needs a CUDA device" in line
        assert line.endswith(f"choose {other}")
