"""What requests and answers hold. These classes are the OpenAPI schema, too; an unknown key is an error."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

BodyId = StrictInt | StrictStr
Ids = list[BodyId]
Unknown = Literal["error", "skip"]
K = 10


class RequestBody(BaseModel):
    """What all requests' bodies have in common."""

    model_config = ConfigDict(extra="forbid")
    size: StrictInt | None = Field(None, description="one of the served sizes; null for the largest")
    unknown: Unknown = Field("error", description="what to do about ids of no item: refuse the request, or skip them")


class RecommendBody(RequestBody):
    """``POST /v1/recommend``."""

    histories: list[Ids] = Field(description="item ids of each user, oldest first; may be empty")
    k: StrictInt = Field(K, ge=1, description="items of each list")
    exclude_seen: StrictBool = Field(True, description="leave out all items of the history")
    allow: list[Ids | None] | Ids | None = Field(
        None, description="ids that may be recommended: one list for all histories, or a list (or null) for each"
    )
    deny: list[Ids | None] | Ids | None = Field(None, description="ids that may not, likewise")


class SessionBody(RequestBody):
    """``POST /v1/sessions``."""

    history: Ids = Field([], description="events so far, oldest first")
    state: StrictStr | None = Field(None, description="of another session, to go on from; then the history follows it")


class ObserveBody(BaseModel):
    """``POST /v1/sessions/{session_id}/observe``."""

    model_config = ConfigDict(extra="forbid")
    items: Ids = Field(description="the next events, in order")
    unknown: Unknown = "error"


class StateBody(RequestBody):
    """``POST /v1/state``."""

    state: StrictStr | None = Field(None, description="as the last answer had it; null for a new session")
    observe: Ids = Field([], description="the next events, in order")
    k: StrictInt = Field(K, ge=0, description="items of the list; 0 for none")
    exclude_seen: StrictBool = Field(True, description="leave out all items that the session has seen")
    allow: Ids | None = Field(None, description="ids that may be recommended")
    deny: Ids | None = Field(None, description="ids that may not")


class Item(BaseModel):
    """An item of the catalogue."""

    item_id: BodyId
    title: str | None


class RecommendedItem(Item):
    """An item of a list."""

    score: float


class RecommendAnswer(BaseModel):
    """A list for each history."""

    size: int
    recommendations: list[list[RecommendedItem]]


class SessionAnswer(BaseModel):
    """A session that the service keeps."""

    session_id: str
    size: int
    num_events: int


class SessionStateAnswer(SessionAnswer):
    """The same, with all that is needed to go on elsewhere."""

    state: str = Field(description="base64 of Session.state(), little-endian float32")


class SessionListAnswer(BaseModel):
    """What a session may want next."""

    size: int
    num_events: int
    recommendations: list[RecommendedItem]


class StateAnswer(SessionListAnswer):
    """A session that the client keeps."""

    state: str = Field(description="base64 of Session.state(), little-endian float32")


class ItemsAnswer(BaseModel):
    """Items found, the most popular first."""

    items: list[Item]


class ModelAnswer(BaseModel):
    """What is served, and what a request may ask for."""

    sizes: list[int]
    default_size: int
    max_length: int = Field(description="last events of a history that the model reads")
    num_items: int
    answers_empty: str = Field(description="what answers an empty history: start position, or popularity")
    has_titles: bool
    retrieval: str = Field(description="exact, or a faster search with a measured recall of the exact lists")
    max_k: int
    max_answer_items: int = Field(description="of all lists of an answer together: k times histories")
    max_histories: int
    max_history: int
    max_body_bytes: int


class StatusAnswer(BaseModel):
    """Whether the service lives, and takes requests."""

    status: str


class ErrorAnswer(BaseModel):
    """What was wrong, on one line."""

    error: str
