"""``python -m launch.slurm.training_facts [--config C] [--section.key VALUE …]``: what launch/train.slurm must know.

Prints the number of lanes, the batch size (with auto the largest that it may be) and the run's folder, or one line
about a mistake in the config. It reads the config only, so it does not wait for PyTorch's import, which takes longer
than all the rest of a job's start.
"""

from __future__ import annotations

from fmrl_dist.base.errors import run_command
from fmrl_dist.config.command_line import command_parser
from fmrl_dist.config.credentials import refuse_credentials_in_config
from fmrl_dist.config.loading import load_config


def main(argv: list[str]) -> None:
    parser = command_parser("launch.slurm.training_facts", "What launch/train.slurm must know about a config.")
    parser.add_argument("--resume", help="as for fmrl_dist.train; ignored here")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    refuse_credentials_in_config(config)
    print(config.train.num_lanes, config.train.largest_batch_size, config.run.dir)


if __name__ == "__main__":
    run_command(main)
