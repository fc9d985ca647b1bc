"""``python -m fmrl_dist.report RUN``: one HTML page about a run, with what each size is worth and costs.

The page is one file: it needs no script and no other file, in light and in dark, on paper and on a phone. Everything
in it comes from the run's files, or is measured here and now in at most ten seconds; what is missing is named.
"""

from __future__ import annotations

from pathlib import Path

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.checkpoint.run_folder import REPORT_FILE
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.credentials import warn_of_credentials
from fmrl_dist.deploy.report_page.page import write_page

TIMING_S = 6.0  # of the measurement, besides reading the model and the items


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"file to write (default: {REPORT_FILE} in the run)"
    )
    parser.add_argument("--store", help="shard store of the catalogue, a folder or URL (default: the recorded one)")
    parser.add_argument("--no-timing", action="store_true", help="do not measure latency and throughput")
    arguments = parser.parse_args(argv)
    warn_of_credentials(argv)
    output: Path | None = arguments.output
    require(output is None or not output.is_dir(), f"--output {output} is a folder; expected a file to write")
    written = write_page(arguments.run, output, 0.0 if arguments.no_timing else TIMING_S, arguments.store)
    for line in written.missing:
        print(f"missing: {line}", flush=True)
    print(f"run: {written.state}\nwritten: {written.path}", flush=True)


if __name__ == "__main__":
    run_command(main)
