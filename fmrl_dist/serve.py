"""``python -m fmrl_dist.serve EXPORT``: answer over HTTP for an export, at any of its sizes.

docs/serving.md describes the addresses; the service itself answers GET /docs and /openapi.json. It listens on this
machine only, unless --host says otherwise; then it wants a token. TERM and INT end it after everything in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket

import torch
from threadpoolctl import threadpool_limits

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.checkpoint.export.reading import read_export, read_export_vocabulary
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.deploy.approximate.choice import METHODS, recall_of_command
from fmrl_dist.deploy.download import export_at
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.service.settings import MIB, ServiceSettings
from fmrl_dist.deploy.web.api_page import figures_beside

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MIN_TOKEN_CHARACTERS = 16
MAX_THREADS = 8
MAX_PORT = 65_535


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    _check_numbers(arguments)
    recall = recall_of_command(arguments.retrieval, arguments.recall)
    token = _token(arguments)
    try:
        from fmrl_dist.deploy.service.app import build_service_app
        from fmrl_dist.deploy.service.server import GracefulServer, listen
        from fmrl_dist.deploy.service.service import Service
    except ImportError as error:
        raise UserError(f"the service needs {error.name}, of the extra serve: pip install 'fmrl-dist[serve]'") from None

    settings = _settings(arguments, token)
    torch.set_num_threads(1)  # batches run beside each other
    threadpool_limits(1, user_api="blas")
    with listen(arguments.host, arguments.port, settings) as listener:  # before loading, which takes longer
        folder = export_at(arguments.export, arguments.revision)
        exported = read_export(folder)
        vocabulary = ItemVocabulary(read_export_vocabulary(folder), str(folder / VOCAB_FILE))
        sizes = arguments.sizes or exported.model.sizes
        figures = figures_beside(folder, exported)
        service = Service(exported, vocabulary, sizes, settings, arguments.retrieval, recall, figures)
        gate = build_service_app(service)
        address = _address(arguments.host, listener)

        def say_started() -> None:
            served = ", ".join(map(str, service.recommenders))
            print(f"{len(vocabulary.ids):,} items, sizes {served}; the API is described at {address}/docs")
            print(f"serving {address}", flush=True)

        try:
            asyncio.run(GracefulServer(gate, settings, say_started).serve([listener]))
        finally:
            service.close()
            print(f"{gate.num_answered:,} requests answered", flush=True)


def _parser() -> argparse.ArgumentParser:
    defaults = ServiceSettings()
    parser = CommandParser(prog="python -m fmrl_dist.serve", description=__doc__, allow_abbrev=False)
    parser.add_argument("export", help="folder of an export, or a repository on the Hugging Face Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="M", help="sizes to serve (default: all of the export)")
    parser.add_argument("--retrieval", choices=METHODS, default="exact", help="how lists are found (default: exact)")
    parser.add_argument("--recall", type=float, help="of the exact lists, by others (default: 0.99)")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with a token that requests must send")
    parser.add_argument("--no-token", action="store_true", help="serve others without a token")
    parser.add_argument(
        "--allow-host", nargs="+", default=[], metavar="NAME", help="further names that requests may call this host by"
    )
    parser.add_argument("--threads", type=int, default=_default_threads(), help="batches at a time (default: cores)")
    _add_limit(parser, "--max-k", "items of a list", defaults.max_k)
    _add_limit(parser, "--max-answer-items", "items of an answer, k times histories", defaults.max_answer_items)
    _add_limit(parser, "--max-history", "events of a history", defaults.max_history)
    _add_limit(parser, "--max-histories", "histories of a request", defaults.max_histories)
    _add_limit(parser, "--max-body", "bytes of a request", defaults.max_body_bytes)
    _add_limit(parser, "--max-batch", "histories that are answered together", defaults.max_batch)
    _add_limit(parser, "--max-delay-ms", "that a request waits for others, while there are some", 2, float)
    _add_limit(parser, "--max-in-flight", "requests; more are answered 503", defaults.max_in_flight)
    parser.add_argument(
        "--max-connections", type=int, metavar="N", help="more are answered 503 (default: 4096, or as ulimit -n allows)"
    )
    _add_limit(parser, "--max-sessions", "that the service keeps", defaults.max_sessions)
    _add_limit(parser, "--session-memory", "MiB of all sessions", defaults.max_session_bytes // MIB)
    _add_limit(parser, "--session-ttl", "seconds since its last use that a session is kept", 3600, float)
    _add_limit(parser, "--timeout", "seconds for a request's head, and for its body", 10, float)
    _add_limit(parser, "--grace", "seconds for requests in flight, at the end", defaults.grace_s)
    return parser


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, value in vars(arguments).items():
        least = 0 if name in ("port", "max_delay_ms", "recall") else 1
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        require(
            not is_number or least <= value < float("inf"),
            f"--{name.replace('_', '-')} is {value}; expected {least} or more",
        )
    require(arguments.port <= MAX_PORT, f"--port is {arguments.port}; expected at most {MAX_PORT}")


def _settings(arguments: argparse.Namespace, token: str | None) -> ServiceSettings:
    from fmrl_dist.deploy.service.server import allowed_connections

    return ServiceSettings(
        max_body_bytes=arguments.max_body,
        max_histories=arguments.max_histories,
        max_history=arguments.max_history,
        max_k=arguments.max_k,
        max_answer_items=arguments.max_answer_items,
        max_batch=arguments.max_batch,
        max_delay_s=arguments.max_delay_ms / 1000,
        threads=arguments.threads,
        max_in_flight=arguments.max_in_flight,
        max_connections=allowed_connections(arguments.max_connections),
        max_sessions=arguments.max_sessions,
        max_session_bytes=arguments.session_memory * MIB,
        session_ttl_s=arguments.session_ttl,
        head_timeout_s=arguments.timeout,
        body_timeout_s=arguments.timeout,
        grace_s=arguments.grace,
        token=token,
        hosts=_hosts(arguments, token),
    )


def _add_limit(
    parser: argparse.ArgumentParser, name: str, what: str, default: float, kind: type[int] | type[float] = int
) -> None:
    parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{what} (default: {default:g})")


def _default_threads() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def _token(arguments: argparse.Namespace) -> str | None:
    """What requests must send, from the environment; a command line can be read by every user of a machine."""
    name = arguments.token_env
    if name is None:
        require(
            arguments.host in LOOPBACK or arguments.no_token,
            f"--host {arguments.host} serves other machines: name an environment variable with a token, --token-env "
            "NAME, or choose --no-token",
        )
        return None
    require(not arguments.no_token, "--token-env and --no-token contradict each other; choose one")
    token = os.environ.get(name, "")
    is_sound = len(token) >= MIN_TOKEN_CHARACTERS and token.isascii() and token.isprintable() and " " not in token
    require(
        is_sound,
        f"the environment variable {name} of --token-env holds {len(token)} characters; expected a token of "
        f"{MIN_TOKEN_CHARACTERS} or more, printable ASCII without spaces",
    )
    return token


def _hosts(arguments: argparse.Namespace, token: str | None) -> frozenset[str] | None:
    """The names that requests may call this host by, where no token tells friends from strangers."""
    if token is not None or (arguments.host not in LOOPBACK and not arguments.allow_host):
        return None
    return frozenset(name.lower() for name in (*LOOPBACK, arguments.host, *arguments.allow_host))


def _address(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


if __name__ == "__main__":
    run_command(main)
