"""docs/training.md's list of options gives the paper's model, loss and optimiser, and nothing of what was added."""

from __future__ import annotations

import shlex
from pathlib import Path

from fmrl_dist.config.loading import load_config
from tests.fixtures.processes import REPOSITORY

# What the paper and its authors' code have: section 3 of the paper, its section 5.3, and the code where it is silent.
PAPER = {
    "model": {
        **{"sizes": [8, 16, 32, 64, 128, 256, 512, 1024], "depth": 2, "mixer": "lru", "r_min": 0.0, "r_max": 0.1},
        **{"dropout": 0.5, "lru_dropout": 0.5, "dropout_power": 0, "feature_dropout": 0.0},
        **{"input_norm": False, "output_norm": False, "item_encoder": "projection", "feature_scale": "none"},
        **{"features": None, "id_table": False},
    },
    "loss": {
        **{"softmax": "full", "catalogue": "whole", "predict_first": True, "score_untrained": True},
        **{"size_weights": None, "temperatures": None, "temperature_power": 0, "normalize": False, "distillation": 0},
    },
    "train": {
        **{"epochs": 500, "patience": 10, "batch_size": 32, "lr": 1e-3, "warmup_steps": 100, "min_lr_ratio": 0.0},
        **{"weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-9, "clip_norm": 5.0, "precision": "fp32"},
    },
}
# What does nothing beside those, or changes no result that the paper describes.
ELSEWHERE = {
    "model": {"head_width", "positions", "window", "low_pass", "low_pass_share", "experts", "codes", "scan"}
    | {"id_width", "id_init", "id_dropout"},
    "loss": {"impl", "teacher_temperature", "negatives", "num_negatives", "popularity_power", "mask_rate", "scope"},
    "train": {"max_steps", "schedule_epochs", "lanes", "micro_batches", "shuffle_blocks", "init", "seed"}
    | {"id_lr_factor", "id_lr_power", "id_weight_decay", "threads", "workers", "worker_timeout_s", "hang_timeout_s"}
    | {"log_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints"},
}


def test_the_papers_settings_are_the_papers(tmp_path: Path) -> None:
    """Every key of the three sections is the paper's value or is known not to matter: a new key has to be placed."""
    page = (REPOSITORY / "docs" / "training.md").read_text()
    options = page.split("## The paper's own settings")[1].split("```text\n")[1].split("```")[0]
    (tmp_path / "empty.yaml").touch()
    config = load_config(tmp_path / "empty.yaml", shlex.split(options)).to_dict()
    assert (config["eval"]["size"], config["eval"]["metric"]) == (0, "ndcg@10")
    for section, expected in PAPER.items():
        assert config[section].keys() == expected.keys() | ELSEWHERE[section]
        assert {key: config[section][key] for key in expected} == expected
