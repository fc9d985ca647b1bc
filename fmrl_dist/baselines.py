"""``python -m fmrl_dist.baselines --store STORE``: what can be had without training, on a store's users.

Popularity, the cosine of the last item's features (of several features also each alone), and item-kNN. The folder
``--output`` gets what an evaluation of a run has, so that ``fmrl_dist.compare`` takes it beside runs.
"""

from __future__ import annotations

from pathlib import Path

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.base.files import json_sha256
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.train_section import EvalConfig
from fmrl_dist.data.store.reader import Store, require_users
from fmrl_dist.distributed.processes import start_runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.baselines import VERSION, count_baseline, possible_baselines
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.rank_counts import join_sizes
from fmrl_dist.evaluation.results.figures import EvaluatedModel
from fmrl_dist.evaluation.results.report import report


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.baselines", description=__doc__, allow_abbrev=False)
    parser.add_argument("--store", required=True, help="shard store, a folder or URL")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument(
        "--output", type=Path, help="folder to write (default: baselines, beside the store's own files)"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads per process (default: cores / processes)")
    arguments = parser.parse_args(argv)
    require(arguments.threads >= 0, f"--threads is {arguments.threads}; expected at least 1, or 0 to share the cores")

    store = Store.open(arguments.store)
    require_users(store, arguments.split)
    output = arguments.output or store.derived_folder / "baselines"
    runtime = start_runtime(arguments.threads or "auto", lanes=None)
    protocol = EvaluationProtocol.of_report(store, arguments.split, False, EvalConfig(cut_vectors=False))
    names = possible_baselines(store, each_feature=True)
    counts = [count_baseline(name, protocol, runtime, StopRequest()) for name in names]
    if runtime.is_main:
        output.mkdir(parents=True, exist_ok=True)
        model = EvaluatedModel(0, json_sha256([VERSION, store.manifest.sha256, names]), store.manifest.sha256)
        report(join_sizes(counts), {}, names, protocol, model, output)
    runtime.leave()


if __name__ == "__main__":
    run_command(main)
