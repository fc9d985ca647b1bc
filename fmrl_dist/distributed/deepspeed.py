"""Which DeepSpeed configurations are allowed: ZeRO 1, 2 or 3 in float32. All others are refused in one line.

Clipping, optimiser, learning rate and batch size come from our own configuration, so that a run is the same with every
engine. DeepSpeed's bf16 and fp16 would cast every parameter, Λ's angle θ among them, which in bf16 is off by up to
0.025 rad per event; ``train.precision: bf16`` casts the inputs of products instead.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import DeepSpeedPlugin

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.json_text import read_object
from fmrl_dist.base.yaml_text import shown

DEEPSPEED_MEND = "use one such as launch/deepspeed/zero2.json"
STAGES = (1, 2, 3)
CASTS = ("fp16", "bf16", "amp", "torch_autocast")  # sections with a key ``enabled``
OURS = {  # DeepSpeed's key → our setting that decides it
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.lr, train.weight_decay and related keys",
    "scheduler": "train.warmup_steps and train.min_lr_ratio",
}


def asks_for_deepspeed(environment: Mapping[str, str]) -> bool:
    """Whether the launcher requests DeepSpeed."""
    return environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def checked_plugin(environment: Mapping[str, str]) -> DeepSpeedPlugin:
    """DeepSpeed's configuration, from the launcher's file or options.

    Raises:
        UserError: DeepSpeed is not installed; this process would silently train without it; its configuration is
            missing, damaged or not supported.
    """
    refuse_silent_fallback(environment)
    require_installed()
    source = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    require(
        source is None or Path(source).is_file(),
        f"DeepSpeed config {source} does not exist in {Path.cwd()}; start in the repository's root, "
        "or pass the file with accelerate launch --deepspeed_config_file PATH",
    )
    if source is not None:
        check_kinds(read_object(Path(source), "DeepSpeed config", DEEPSPEED_MEND), source)
    try:
        plugin = DeepSpeedPlugin()
    except (ValueError, TypeError, AttributeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"DeepSpeed config {source or 'of the launcher'} is not valid: {problem}") from None
    check_zero_config(plugin.deepspeed_config, source or "of the launcher")
    return plugin


def check_kinds(config: dict[str, Any], source: str) -> None:
    """Refuse a section that is no object, which DeepSpeed and Accelerate take it for."""
    for section in ("zero_optimization", *CASTS):
        found = config.get(section, {})
        require(
            isinstance(found, dict),
            f"DeepSpeed config {source} has {section} {shown(found)}; expected an object: {DEEPSPEED_MEND}",
        )


def check_zero_config(config: dict[str, Any], source: str) -> None:
    """Refuse what would make a run differ from one without DeepSpeed, or could not run.

    Args:
        config: DeepSpeed's own keys.
        source: where it was read from, for the message.
    """
    stage = config["zero_optimization"].get("stage", 0)
    require(
        stage in STAGES,
        f"DeepSpeed config {source} asks for ZeRO {stage}; expected 1, 2 or 3 (0 is accelerate launch --multi_gpu)",
    )
    for section in CASTS:
        enabled = str(config.get(section, {}).get("enabled", False)).lower()
        require(
            enabled in ("false", "auto"),
            f"DeepSpeed config {source} turns on {section}, which casts parameters (in bf16, θ is off by up to "
            f"0.025 rad per event); remove it and use --train.precision bf16",
        )
    steps = config.get("gradient_accumulation_steps", 1)
    require(
        steps in (1, "auto"),
        f"DeepSpeed config {source} has gradient_accumulation_steps {steps}; expected 1: train.micro_batches "
        "splits a rank's share of the batch",
    )
    for key, decides in OURS.items():
        require(
            config.get(key, "auto") == "auto",
            f"DeepSpeed config {source} has {key} {config.get(key)!r}; remove it: {decides} decides",
        )


def refuse_silent_fallback(environment: Mapping[str, str]) -> None:
    """Refuse the two cases in which a process that should use DeepSpeed would silently train without it."""
    require(
        environment.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true", "yes", "on", "t", "y"),
        "DeepSpeed was requested together with ACCELERATE_USE_CPU or --cpu, which silently turns it off; remove that: "
        "without a GPU, the CPU is used anyway",
    )
    require(
        "LOCAL_RANK" in environment,
        "DeepSpeed was requested, but this process has no LOCAL_RANK; "
        "start it with accelerate launch --use_deepspeed --num_processes N …",
    )


def require_installed() -> None:
    """Refuse to start if the extra with DeepSpeed is not installed."""
    require(
        importlib.util.find_spec("deepspeed") is not None,
        "DeepSpeed was requested but is not installed; pip install -e '.[deepspeed]'",
    )


def leave_out_unused_build() -> None:
    """Prevent DeepSpeed on the CPU from compiling its own all-reduce before it starts.

    Only its inference uses that all-reduce; training reduces through torch. The build needs g++ and ninja and takes
    minutes and 3 GB on two cores. A killed build leaves a lock that blocks every later start forever.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
