"""``shards.random_image_encoder``: weights from a seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.optional import skip_module_without

skip_module_without("open_clip", "make images")

from shards.random_image_encoder import main
from tests.fixtures.image_model import MODEL
from tests.fixtures.training import refusal


def test_random_weights_are_a_function_of_the_seed(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again, other = tmp_path / "again.safetensors", tmp_path / "new folder" / "other.safetensors"
    for seed, output in (("0", again), ("1", other)):
        main(["--config", str(MODEL), "--seed", seed, "--output", str(output)])
        assert capsys.readouterr().out.startswith(f"wrote {output}: ")
    assert again.read_bytes() == weights.read_bytes()
    assert other.read_bytes() != weights.read_bytes()


def test_outputs_that_are_refused(weights: Path, tmp_path: Path) -> None:
    assert "exists; remove it" in refusal(main, "--config", MODEL, "--output", weights)
    assert "ends in '.bin'; expected .safetensors" in refusal(main, "--config", MODEL, "--output", tmp_path / "w.bin")
    assert list(tmp_path.iterdir()) == []
