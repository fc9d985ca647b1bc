"""Answers as JSON: strict, of one line where they are errors."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from fmrl_dist.base.errors import one_line
from fmrl_dist.base.json_text import without_repeats

MESSAGE_CHARACTERS = 500


def json_answer(value: Any, status: int = 200, **headers: str) -> Response:
    """``value`` as JSON. A number that JSON does not have raises, rather than becoming "NaN"."""
    body = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, whatever titles hold
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Response(body, status, {"cache-control": "no-store", **named}, "application/json")


def error_answer(status: int, error: str, **headers: str) -> Response:
    """``{"error": …}``, on one line."""
    return json_answer({"error": one_line(error).rstrip("\n")[:MESSAGE_CHARACTERS]}, status, **headers)


class StrictRequest(Request):
    """A request whose JSON is UTF-8, finite and not nested beyond reason."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            text = body.decode("utf-8")
            return json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=without_repeats)
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
        except UnicodeDecodeError:
            raise HTTPException(400, "the body is not UTF-8 text") from None
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None


class StrictRoute(APIRoute):
    """A route that reads a :class:`StrictRequest`."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            response: Response = await handle(StrictRequest(request.scope, request.receive))
            return response

        return handle_strictly


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        _no_number(text[:40])
    return number
