"""Validation during training is what ``fmrl_dist.evaluate --split valid`` finds at the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmrl_dist import evaluate
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.evaluation.metrics import METRICS
from tests.fixtures.training import evaluation, make_shop, records, run_here, train_here


@pytest.mark.parametrize("words", [[], ["--model.id_table", "true"]], ids=["features", "features and ids"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_is_what_evaluate_finds(precision: str, words: list[str], tmp_path: Path) -> None:
    """To the last digit, also where training multiplies in bfloat16: ranking is float32 in both."""
    shop = make_shop(tmp_path / "shop")
    run = train_here(shop, tmp_path / "run", "--train.precision", precision, *words)
    best = load_checkpoint(run, with_optimizer=False).state.step
    (noted,) = (line for line in records(run, "valid") if line["step"] == best)
    run_here(evaluate.main, ["--checkpoint", run, "--split", "valid", "--threads", 1])
    found = evaluation(run, "evaluation-valid")
    assert found["users"] > 50
    for size in ("4", "8"):
        assert found["sizes"][size] == {metric: noted[f"{metric}@{size}"] for metric in METRICS}
