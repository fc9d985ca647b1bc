"""The service's addresses: FastAPI around :class:`~fmrl_dist.deploy.service.service.Service`.

No page loads anything from elsewhere: FastAPI's own documentation pages, which do, are off; ``/docs`` is written here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from fmrl_dist import __version__
from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.item_vocabulary import Recommendation
from fmrl_dist.deploy.service.answers import StrictRoute, error_answer, json_answer
from fmrl_dist.deploy.service.bodies import (
    ErrorAnswer,
    Item,
    ItemsAnswer,
    K,
    ModelAnswer,
    ObserveBody,
    RecommendAnswer,
    RecommendBody,
    SessionAnswer,
    SessionBody,
    SessionListAnswer,
    SessionStateAnswer,
    StateAnswer,
    StateBody,
    StatusAnswer,
)
from fmrl_dist.deploy.service.docs_page import CONTENT_SECURITY_POLICY, docs_page
from fmrl_dist.deploy.service.gate import Gate
from fmrl_dist.deploy.service.metrics import CONTENT_TYPE
from fmrl_dist.deploy.service.service import NotFoundError, Service, encode_state, in_thread_if
from fmrl_dist.deploy.service.session_store import KeptSession
from fmrl_dist.deploy.web.api_page import MEDIA_TYPES, api_page, can_show

DEFAULT_FOUND = 20  # items of a search
ITEMS_INLINE = 1000  # of an answer, written by the event loop itself
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "Not HTTP, not JSON, or another host's name"},
    401: {"model": ErrorAnswer, "description": "The token is missing or wrong"},
    404: {"model": ErrorAnswer, "description": "There is no such address, session or item"},
    405: {"model": ErrorAnswer, "description": "The address does not take this method; Allow"},
    408: {"model": ErrorAnswer, "description": "The request did not come in time"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
    422: {"model": ErrorAnswer, "description": "A value is missing, wrong or beyond a limit, or an item is unknown"},
    431: {"model": ErrorAnswer, "description": "The request's first lines are too long"},
    503: {"model": ErrorAnswer, "description": "Too many requests are in flight, or the service ends; Retry-After"},
}


def build_service_app(service: Service) -> Gate:
    """The service as an ASGI app."""
    app = FastAPI(
        title="fmrl-dist",
        version=__version__,
        description="Recommendations of one exported model, at any of its sizes.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses=ERRORS,
        redirect_slashes=False,
    )
    app.router.route_class = StrictRoute
    gate = Gate(app, service.settings, service.metrics)
    service.num_in_flight = lambda: gate.in_flight
    _add_error_answers(app)
    _add_recommend(app, service)
    _add_sessions(app, service)
    _add_items(app, service)
    _add_operation(app, service, gate)
    _add_page(app, service)
    _state_limits(app, service)
    _add_root(app)
    return gate


def _add_error_answers(app: FastAPI) -> None:
    @app.exception_handler(NotFoundError)
    async def not_found(_: Request, error: Exception) -> Response:
        return error_answer(404, str(error))

    @app.exception_handler(UserError)
    async def refused(_: Request, error: Exception) -> Response:
        return error_answer(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def wrong_value(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_answer(422, _first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def no_address(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {
            404: f"there is no {request.url.path!r:.80}; /docs lists what there is",
            405: f"{request.url.path!r:.80} does not take {request.method!r:.20}; /docs lists what there is",
        }.get(error.status_code, str(error.detail))
        return error_answer(error.status_code, what, **(dict(error.headers) if error.headers else {}))

    @app.exception_handler(Exception)
    async def crashed(_: Request, __: Exception) -> Response:
        return error_answer(500, "the service failed; its log says why")


def _first_problem(errors: Sequence[Any]) -> str:
    problem = errors[0]
    where = ".".join(str(part) for part in problem["loc"])
    found = problem.get("input")
    is_shown = problem["type"] != "missing" and isinstance(found, str | int | float | bool)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}: {problem['msg']}{f', found {_shown(found)}' if is_shown else ''}{more}"


def _shown(found: object) -> str:
    is_long = isinstance(found, int) and abs(found) >= 10**40  # Python refuses to write very long ones
    return "a long number" if is_long else f"{found!r:.60}"


def _listed(found: Sequence[Recommendation]) -> list[dict[str, Any]]:
    return [item._asdict() for item in found]


def _add_recommend(app: FastAPI, service: Service) -> None:
    @app.post("/v1/recommend", response_model=RecommendAnswer, tags=["recommend"])
    async def recommend(body: RecommendBody) -> Response:
        """The k best next items after each history, the best first."""
        size, lists = await service.recommend(body)

        def make_answer() -> Response:
            return json_answer({"size": size, "recommendations": [_listed(found) for found in lists]})

        return await in_thread_if(sum(map(len, lists)) > ITEMS_INLINE, make_answer)

    @app.post("/v1/state", response_model=StateAnswer, tags=["sessions"])
    async def step(body: StateBody) -> Response:
        """A session that the client keeps: its state and the next events in, its new state and a list out."""
        size, session, found = await service.step(body)
        return json_answer(
            {
                "size": size,
                "num_events": session.num_events,
                "recommendations": _listed(found),
                "state": encode_state(session),
            }
        )


def _add_sessions(app: FastAPI, service: Service) -> None:
    def described(session_id: str, kept: KeptSession) -> dict[str, Any]:
        return {"session_id": session_id, "size": kept.size, "num_events": kept.session.num_events}

    @app.post("/v1/sessions", response_model=SessionAnswer, status_code=201, tags=["sessions"])
    async def open_session(body: SessionBody) -> Response:
        """A session that the service keeps."""
        session_id, kept = await service.open_session(body)
        return json_answer(described(session_id, kept), 201)

    @app.get("/v1/sessions/{session_id}", response_model=SessionStateAnswer, tags=["sessions"])
    async def show_session(session_id: str) -> Response:
        """What a session is, and its state."""
        kept = service.kept(session_id)
        state = await service.state_of(kept)
        return json_answer({**described(session_id, kept), "state": state})

    @app.post("/v1/sessions/{session_id}/observe", response_model=SessionAnswer, tags=["sessions"])
    async def observe(session_id: str, body: ObserveBody) -> Response:
        """The next events of a session: all of them, or none if an item is unknown."""
        return json_answer(described(session_id, await service.observe(session_id, body)))

    @app.get("/v1/sessions/{session_id}/recommend", response_model=SessionListAnswer, tags=["sessions"])
    async def recommend_session(
        session_id: str,
        k: Annotated[int, Query(ge=1)] = K,
        exclude_seen: bool = True,
        allow: Annotated[list[str] | None, Query(description="may be repeated")] = None,
        deny: Annotated[list[str] | None, Query(description="may be repeated")] = None,
    ) -> Response:
        """The k best next items of a session."""
        kept = service.kept(session_id)
        found = await service.recommend_session(kept, k, exclude_seen, allow, deny)
        answer = {"size": kept.size, "num_events": kept.session.num_events, "recommendations": _listed(found)}
        return json_answer(answer)

    @app.delete("/v1/sessions/{session_id}", status_code=204, tags=["sessions"])
    async def delete_session(session_id: str) -> Response:
        """Forget a session."""
        service.kept(session_id)
        service.sessions.delete(session_id)
        return Response(status_code=204)


def _add_items(app: FastAPI, service: Service) -> None:
    def item_of(row: int) -> dict[str, Any]:
        return {"item_id": service.item_id(row), "title": service.items.title(row)}

    @app.get("/v1/items", response_model=ItemsAnswer, tags=["items"])
    async def find_items(query: str = "", limit: Annotated[int, Query(ge=1)] = DEFAULT_FOUND) -> Response:
        """Items whose titles or ids contain every word of the query, the most popular first."""
        if limit > service.settings.max_k:
            raise UserError(f"limit is {limit}; at most {service.settings.max_k} items are answered")
        rows = await asyncio.to_thread(service.find_items, query, limit)
        return json_answer({"items": [item_of(row) for row in rows]})

    @app.get("/v1/items/{item_id:path}", response_model=Item, tags=["items"])
    async def show_item(item_id: str) -> Response:
        """An item."""
        return json_answer(item_of(service.row_of(item_id)))


def _add_operation(app: FastAPI, service: Service, gate: Gate) -> None:
    largest = service.recommenders[service.default_size]

    @app.get("/v1/model", response_model=ModelAnswer, tags=["operation"])
    async def show_model() -> Response:
        """What is served, and what a request may ask for."""
        limits = service.settings
        return json_answer(
            {
                "sizes": list(service.recommenders),
                "default_size": service.default_size,
                "max_length": largest.max_length,
                "num_items": largest.num_items,
                "answers_empty": largest.answers_empty,
                "has_titles": largest.titles is not None,
                "retrieval": service.retrieval,
                "max_k": limits.max_k,
                "max_answer_items": limits.max_answer_items,
                "max_histories": limits.max_histories,
                "max_history": limits.max_history,
                "max_body_bytes": limits.max_body_bytes,
            }
        )

    @app.get("/health", response_model=StatusAnswer, tags=["operation"])
    async def health() -> Response:
        """Whether the process lives."""
        return json_answer({"status": "ok"})

    @app.get("/ready", response_model=StatusAnswer, tags=["operation"])
    async def ready() -> Response:
        """Whether to send requests here: not any more once it was told to end."""
        if gate.is_draining:
            return error_answer(503, "the service ends", retry_after="1")
        return json_answer({"status": "ready"})

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        headers = {"content-security-policy": CONTENT_SECURITY_POLICY}
        return Response(docs_page(app.openapi()), headers=headers, media_type="text/html")


def _add_page(app: FastAPI, service: Service) -> None:
    """A page for people, which asks the addresses above; of a service without a token: browsers send none."""
    largest = service.recommenders[service.default_size]
    if service.settings.token is not None or not can_show(largest.item_ids):
        return
    sizes = list(service.recommenders)
    files = api_page("fmrl-dist", sizes, largest.num_items, largest.max_length, "../", service.figures)

    @app.get("/page", include_in_schema=False)
    async def to_page() -> Response:
        return Response(status_code=307, headers={"location": "page/"})

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in files:
            raise NotFoundError(f"the page has no {name!r:.80}")
        headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
        return Response(files[name], headers=headers, media_type=MEDIA_TYPES[name.rpartition(".")[2]])

    @app.get("/page/", include_in_schema=False)
    async def page() -> Response:
        return await page_file("index.html")


def _state_limits(app: FastAPI, service: Service) -> None:
    """Write the limits of this service into its schema."""
    limits, sizes = service.settings, list(service.recommenders)
    schema = app.openapi()
    for name in ("RecommendBody", "SessionBody", "StateBody"):
        properties = schema["components"]["schemas"][name]["properties"]
        properties["size"] = {"anyOf": [{"type": "integer", "enum": sizes}, {"type": "null"}]}
        if "k" in properties:
            properties["k"]["maximum"] = limits.max_k
    histories = schema["components"]["schemas"]["RecommendBody"]["properties"]["histories"]
    histories["maxItems"] = limits.max_histories
    histories["items"]["maxItems"] = limits.max_history
    text = {"schema": {"type": "string"}}
    schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {CONTENT_TYPE.partition(";")[0]: text}
    if limits.token is not None:
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"token": []}]


def _add_root(app: FastAPI) -> None:
    """The address that people type: to the page, where there is one, or to the API's description."""
    has_page = any(getattr(route, "path", "") == "/page/" for route in app.routes)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return Response(status_code=307, headers={"location": "page/" if has_page else "docs"})
