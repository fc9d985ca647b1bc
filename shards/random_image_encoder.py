"""``python -m shards.random_image_encoder``: weights for an image encoder that has learned nothing.

Writes the weights that open_clip initialises a model with, drawn from a seed. They carry no knowledge: such an encoder
is a fixed random projection of the pixels. Where no pretrained weights are available, it serves to try a pipeline, or
as the lower bound of a comparison.

    python -m shards.random_image_encoder --config configs/clip-random-small.json --seed 0 --output FILE.safetensors
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from fmrl_dist import __version__
from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.base.files import write_atomically
from fmrl_dist.config.command_line import CommandParser


def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog="python -m shards.random_image_encoder",
        description="Write seeded random weights of an open_clip model. They carry no knowledge.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, help="JSON file of an open_clip model config, or a name that open_clip knows"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file that does not exist yet")
    parser.add_argument("--version", action="version", version=f"fmrl-dist {__version__}")
    arguments = parser.parse_args(argv)
    num_weights = write_random_encoder(arguments.config, arguments.seed, arguments.output)
    print(f"wrote {arguments.output}: {num_weights:,} random weights of {arguments.config}, seed {arguments.seed}")


def write_random_encoder(model: str, seed: int, output: Path) -> int:
    """Write the weights of ``model`` (a name or a JSON file) to ``output``; returns their number.

    Raises:
        UserError: no such model, ``output`` exists or is not a .safetensors file, or open_clip is not installed.
    """
    require(output.suffix == ".safetensors", f"output {output} ends in {output.suffix!r}; expected .safetensors")
    require(not output.exists(), f"output {output} exists; remove it, or choose another")
    try:
        from shards.encoders.open_clip_model import draw_weights, read_architecture  # an extra
    except ModuleNotFoundError as error:
        raise UserError(f"open_clip models need {error.name}; install it with pip install -e '.[images]'") from None
    weights = draw_weights(read_architecture(model), seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, save(weights, {"format": "pt"}))
    return sum(value.numel() for value in weights.values())


if __name__ == "__main__":
    run_command(main)
