"""The service: requests per second and latency with 1, 16 and 200 clients, at each size.

``python -m benchmarks.serve EXPORT``. The clients are another process of the same machine, on connections that they
keep, and each asks again as soon as it is answered. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import REPOSITORY
from benchmarks.clients.http_load import LoadReport, load_report, start_load
from fmrl_dist.deploy.recommender import Recommender

EVENTS = 20  # of a history


def measure(address: str, size: int, clients: int, count: int, item_ids: list[Any]) -> LoadReport:
    """``count`` requests of one history each, all of them answered."""
    draw = random.Random(size)
    histories = [draw.choices(item_ids, k=EVENTS) for _ in range(100)]
    requests = [("POST", "/v1/recommend", {"histories": [ids], "size": size, "k": 10}) for ids in histories]
    report = load_report(start_load(address, requests, clients, count))
    if report.statuses != {"200": count}:
        raise RuntimeError(f"{report.statuses}, {report.refused} refused, {report.lost} lost; expected {count} answers")
    return report


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("export", type=Path, help="an export of the whole model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 200])
    parser.add_argument("--requests", type=int, default=2000, help="of each round, at each size and number of clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    recommender = Recommender.from_pretrained(arguments.export)
    sizes, item_ids = recommender.sizes, recommender.item_ids
    command = [sys.executable, "-m", "fmrl_dist.serve", str(arguments.export.resolve()), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", str(arguments.threads)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = next(line.split()[1] for line in process.stdout if line.startswith("serving "))
        found: dict[tuple[int, int], list[LoadReport]] = {}
        for _ in range(arguments.rounds):
            for size in sizes:
                for clients in arguments.clients:
                    report = measure(address, size, clients, arguments.requests, item_ids)
                    found.setdefault((size, clients), []).append(report)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    setting = f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, {len(item_ids):,} items"
    print(f"{setting}, histories of {EVENTS} events, k = 10")
    print(f"{'size':>5} {'clients':>8} {'requests/s':>11} {'p50 ms':>8} {'p99 ms':>8}   median of the rounds")
    for (size, clients), reports in found.items():
        rate = statistics.median(report.answered / report.seconds for report in reports)
        p50, p99 = (statistics.median(report.percentile(share) for report in reports) for share in (0.5, 0.99))
        print(f"{size:>5} {clients:>8} {rate:>11.0f} {p50:>8.2f} {p99:>8.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
