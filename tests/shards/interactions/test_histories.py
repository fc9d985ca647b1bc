"""From raw events to histories, against plain Python."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import file_sha256
from fmrl_dist.config.parsing import build
from fmrl_dist.config.sections import Config
from fmrl_dist.config.tables import InteractionsConfig, SplitConfig
from shards.interactions.history_file import read_prepared
from shards.interactions.prepare import Prepared, needs_engine, prepare
from tests.fixtures.plain_interactions import Event, PlainHistory, plain_histories

DAY = 86_400
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CUTS = {"by": "time", "valid_from": str(20 * DAY), "test_from": "1970-02-01"}  # days 20 and 31
FAST = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

EVENTS = st.lists(
    st.builds(
        Event,
        user=st.sampled_from(["u1", "u10", "u2", "007", "é"]),
        item=st.sampled_from(["a", "B", "c", "0x1A", "1E5", "26"]),
        time=st.integers(0, 12).map(lambda step: step * 4 * DAY),
        rating=st.sampled_from([1.0, 3.5, 5.0]),
        event=st.sampled_from(["view", "buy"]),
        split=st.sampled_from(["train", "train", "train", "valid", "test"]),
    ),
    min_size=1,
    max_size=60,
)


def config_of(folder: Path, parts: list[str], **data: Any) -> Config:
    sequences = {"path": parts, "layout": "interactions", "user": "user", "items": "item", "times": "time"}
    is_given = data.get("split", {}).get("by") == "given"
    sequences |= {"rating": "rating", "event": "event", "split": "split" if is_given else ""}
    sequences |= data.pop("sequences", {})
    raw = {"root": str(folder), "sequences": sequences, "items": {"path": ""}} | data
    return build(Config, {"data": raw}, "")


def write_parts(folder: Path, rows: list[Event], num_parts: int = 1) -> list[str]:
    names = []
    for part in range(num_parts):
        names.append(f"part-{part}.parquet")
        columns = {name: [getattr(row, name) for row in rows[part::num_parts]] for name in Event._fields}
        kinds = {"time": pa.int64(), "rating": pa.float64()}
        table = pa.table({name: pa.array(column, kinds.get(name, pa.string())) for name, column in columns.items()})
        pq.write_table(table, folder / names[-1])
    return names


def prepared(folder: Path, rows: list[Event], num_parts: int = 1, **data: Any) -> Prepared:
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(folder, write_parts(folder, rows, num_parts), **data)
    assert needs_engine(config.data)
    return prepare(config.data, folder / "build" / "interactions", None, None, {})


def histories_of(result: Prepared) -> dict[str, PlainHistory]:
    found, ids = {}, result.item_ids.to_pylist()
    for batch in read_prepared(result.histories).batches:
        for number, user in enumerate(batch.users.to_pylist()):
            rows = slice(batch.starts[number], batch.starts[number + 1])
            assert batch.times is not None
            found[user] = PlainHistory(
                items=[ids[item] for item in batch.items[rows]],
                times=batch.times[rows].tolist(),
                train=len(batch.items[rows]) if batch.train is None else int(batch.train[number]),
                valid=0 if batch.valid is None else int(batch.valid[number]),
            )
    return found


def in_order(row: Event, cut: int) -> Event:
    """What is before a moment trains, what is at it trains or validates, and what is after it is for the test."""
    if row.time == cut:
        return row._replace(split="train" if row.split == "train" else "valid")
    return row._replace(split="train" if row.time < cut else "test")


@FAST
@given(
    rows=EVENTS,
    interactions=st.fixed_dictionaries(
        {
            "min_rating": st.sampled_from([None, 3.5]),
            "events": st.sampled_from([[], ["buy"]]),
            "duplicates": st.sampled_from(["none", "event", "first", "last"]),
            "min_user_events": st.integers(0, 3),
            "min_item_events": st.integers(0, 3),
            "ties": st.sampled_from(["hash", "table"]),
            "max_events": st.sampled_from([0, 3]),
        }
    ),
    split=st.sampled_from([{}, {"by": "given"}, CUTS]),
    cut=st.none() | st.integers(0, 12),
)
def test_histories_equal_their_plain_twin(
    rows: list[Event],
    interactions: dict[str, Any],
    split: dict[str, str],
    cut: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if cut is not None:
        rows = [in_order(row, cut * 4 * DAY) for row in rows]
    expected = plain_histories(rows, build(InteractionsConfig, interactions, ""), build(SplitConfig, split, ""))
    folder = tmp_path_factory.mktemp("raw")
    try:
        result = prepared(folder, rows, interactions=interactions, split=split)
    except UserError as error:
        if "holds out events that are older" in str(error):
            assert split.get("by") == "given" and not all(history.is_in_order for history in expected.values())
            return
        assert "no event is" in str(error)
        periods = [
            sum(history.train for history in expected.values()),
            sum(history.valid for history in expected.values()),
            sum(len(history.items) - history.train - history.valid for history in expected.values()),
        ]
        assert not periods[0] or (split.get("by") == "time" and not all(periods)) or interactions["events"]
        return
    assert histories_of(result) == expected
    assert all(history.is_in_order for history in expected.values())
    funnel = result.funnel
    assert funnel.events == sum(len(history.items) for history in expected.values())
    assert funnel.rows == len(rows) == funnel.events + sum(step.removed for step in funnel.steps)
    assert funnel.users == len(expected)


@FAST
@given(rows=EVENTS, seed=st.integers(0, 99), num_parts=st.integers(1, 4))
def test_neither_order_nor_parts_of_the_rows_matter(
    rows: list[Event], seed: int, num_parts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("raw")
    shuffled = random.Random(seed).sample(rows, len(rows))
    one, other = prepared(folder / "one", rows), prepared(folder / "other", shuffled, num_parts)
    assert file_sha256(one.histories) == file_sha256(other.histories)
    assert one.item_ids.equals(other.item_ids) and one.funnel == other.funnel


@FAST
@given(
    rows=EVENTS, later=EVENTS, duplicates=st.sampled_from(["none", "event", "first", "last"]), core=st.integers(0, 3)
)
def test_nothing_that_trains_depends_on_what_comes_after_the_cut(
    rows: list[Event], later: list[Event], duplicates: str, core: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("raw")
    held_out = [Event("u1", "a", 25 * DAY), Event("u1", "a", 40 * DAY)]  # so that no period is empty
    before = [*(row for row in rows if row.time < 20 * DAY), *(Event("u1", "a", DAY * day) for day in range(4))]
    interactions = {"duplicates": duplicates, "min_user_events": core, "min_item_events": core}
    if duplicates in ("first", "last"):
        before += [Event("u1", item, DAY) for item in "xyz"] + [Event("u9", "a", 1), Event("u8", "a", 1)]
    results: list[Prepared | str] = []
    for name, after in (("one", held_out), ("other", held_out + [row for row in later if row.time >= 20 * DAY])):
        try:
            results.append(prepared(folder / name, before + after, interactions=interactions, split=CUTS))
        except UserError as error:
            results.append(str(error))
    one, other = results
    if isinstance(one, str) or isinstance(other, str):
        assert isinstance(one, str) and isinstance(other, str)
        return
    num_trained = int(one.trained.sum())
    trains = [
        {user: (h.items[: h.train], h.times[: h.train]) for user, h in histories_of(result).items() if h.train}
        for result in (one, other)
    ]
    assert trains[0] == trains[1]
    ids = [result.item_ids.to_pylist() for result in (one, other)]
    assert all(result.trained[:num_trained].all() and not result.trained[num_trained:].any() for result in (one, other))
    assert ids[0][:num_trained] == ids[1][:num_trained]


def given_split(*rows: tuple[str, int, str]) -> list[Event]:
    return [Event("u", item, time, split=split) for item, time, split in rows]


def test_what_a_given_split_holds_out_is_later_than_what_it_is_predicted_from(tmp_path: Path) -> None:
    split = {"by": "given"}
    rows = given_split(("x", 1, "train"), ("y", 5, "train"), ("z", 5, "valid"), ("w", 7, "test"))
    found = histories_of(prepared(tmp_path / "sound", rows, split=split))
    assert found == {"u": PlainHistory(list("xyzw"), [1, 5, 5, 7], 2, 1)}
    late = [*rows, *given_split(("v", 6, "valid"), ("s", 8, "train")), Event("v", "x", 1)]
    with pytest.raises(UserError, match=r"older than events which train.* of 1 of 2 users, the first is 'u'.*by: time"):
        prepared(tmp_path / "late", late, split=split)
    assert not list((tmp_path / "late" / "build" / "interactions").glob("*/histories.parquet"))


def test_an_event_of_two_periods_is_of_the_earlier_one(tmp_path: Path) -> None:
    rows = given_split(("x", 1, "train"), ("y", 5, "train"), ("y", 5, "test"), ("x", 5, "valid"), ("x", 9, "test"))
    split = {"by": "given"}
    kept = prepared(tmp_path / "kept", rows, split=split)
    assert "1 events stand twice" in "\n".join(kept.funnel.lines())
    left = histories_of(prepared(tmp_path / "left", rows, split=split, interactions={"duplicates": "event"}))
    assert left == {"u": PlainHistory(list("xyxx"), [1, 5, 5, 9], 2, 1)}


def test_a_core_that_takes_rounds(tmp_path: Path) -> None:
    """By hand: d has 1 user and goes, so u3 has 1 event and goes, so c has 1 user and goes."""
    rows = [
        Event(user, item, time)
        for time, (user, item) in enumerate(
            [("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b"), ("u2", "c"), ("u3", "c"), ("u3", "d")]
        )
    ]
    result = prepared(tmp_path, rows, interactions={"min_user_events": 2, "min_item_events": 2})
    assert {user: history.items for user, history in histories_of(result).items()} == {
        "u1": ["a", "b"],
        "u2": ["a", "b"],
    }
    assert result.item_ids.to_pylist() == ["a", "b"]
    assert [(step.removed, step.events) for step in result.funnel.steps] == [(3, 4)]


def test_a_result_is_used_again_and_made_anew_when_a_setting_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Event(f"u{user}", item, time) for user in range(3) for time, item in enumerate("abcde")]
    first = prepared(tmp_path, rows)
    changed = first.histories.stat().st_mtime_ns
    assert prepared(tmp_path, rows).histories.stat().st_mtime_ns == changed
    prepared(tmp_path, rows, interactions={"memory_gb": 1.0})
    assert first.histories.stat().st_mtime_ns == changed, "more memory gives the same"
    assert "anew" not in capsys.readouterr().out
    assert prepared(tmp_path, rows, interactions={"max_events": 4}).funnel.events == 12
    assert "data.interactions.max_events was 0, is 4" in capsys.readouterr().out
    assert first.histories.exists(), "another build may be reading it"
    damaged = first.histories.read_bytes()
    first.histories.write_bytes(damaged[:-1])
    assert prepared(tmp_path, rows).histories.read_bytes() == damaged
    for number in range(5, 8):
        prepared(tmp_path, rows, interactions={"max_events": number})
    assert len(list((tmp_path / "build" / "interactions").iterdir())) == 3
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["interactions"]


def test_a_kept_result_does_not_pass_the_limit_of_bad_rows(tmp_path: Path) -> None:
    rows = [Event(f"u{user}", item, time) for user in range(3) for time, item in enumerate("abc")]
    rows += [Event("", "a", 1)] * 3
    assert prepared(tmp_path, rows, dirt={"max_bad_rows": 0.5}).funnel.bad == {"no user": 3}
    for _ in range(2):
        with pytest.raises(UserError, match="3 of 12 rows cannot be used"):
            prepared(tmp_path, rows)


@pytest.mark.parametrize("number", range(0, 100, 7))
def test_a_cut_is_exact_to_the_microsecond(number: int, tmp_path: Path) -> None:
    first = 1_700_000_000_123_400 + number
    rows = [Event("u", item, first + step) for step, item in enumerate("abcd")]
    for text in (str(first + 2), str((EPOCH + timedelta(microseconds=first + 2)).isoformat())):
        split = {"by": "time", "valid_from": text, "test_from": str(first + 3)}
        (history,) = histories_of(prepared(tmp_path / text, rows, split=split, sequences={"time_unit": "us"})).values()
        assert (history.train, history.valid, history.items) == (2, 1, list("abcd"))


@pytest.mark.parametrize("form", ["numbers", "timestamps", "ISO"])
@pytest.mark.parametrize("by", ["leave_one_out", "time", "duplicates"])
def test_events_of_one_microsecond_are_sorted_to_the_nanosecond(by: str, form: str, tmp_path: Path) -> None:
    """However the ids' hashes would order them; cuts, ties and duplicates are as fine."""
    first, items = 1_700_000_000_123_456_100, [f"i{number}" for number in range(9)]
    stamps = pa.array([first + 100 * number for number in range(9)], pa.timestamp("ns"))
    times = {"numbers": stamps.cast(pa.int64()), "timestamps": stamps, "ISO": stamps.cast(pa.string())}[form]
    table = pa.table({"user": ["u"] * 9, "item": items, "time": times})
    pq.write_table(table.take(np.random.default_rng(1).permutation(9)), tmp_path / "e.parquet")
    sequences = {"rating": "", "event": "", "split": ""}
    cuts = {"by": "time", "valid_from": "2023-11-14T22:13:20.123456550", "test_from": "2023-11-14T22:13:20.1234568Z"}
    data = {
        "leave_one_out": {},
        "time": {"split": cuts},
        "duplicates": {"interactions": {"duplicates": "event"}},
    }[by]
    config = config_of(tmp_path, ["e.parquet"], sequences=sequences, **data)
    result = prepare(config.data, tmp_path / "interactions", None, None, {})
    history = histories_of(result)["u"]
    assert history.items == items and history.times == [1_700_000_000] * 9
    assert (result.funnel.tied_events, result.funnel.repeated_events) == (0, 0)
    if by == "time":
        assert (history.train, history.valid) == (5, 2)
        assert "from 2023-11-14T22:13:20.123456+00:00 and 550 ns" in result.split_rule


def test_one_clock_that_was_never_set_does_not_change_the_unit(tmp_path: Path) -> None:
    rows = [Event(f"u{user}", item, 10**9 + time) for user in range(60) for time, item in enumerate("abc")]
    result = prepared(tmp_path, [*rows, Event("u1", "d", 2**62)])
    assert result.funnel.bad == {"time": 1} and result.funnel.tied_events == 0
    assert histories_of(result)["u1"].times == [10**9, 10**9 + 1, 10**9 + 2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a kind that is not there": ({"interactions": {"events": ["sell"]}}, "the table has: buy"),
    "nothing left": ({"interactions": {"min_user_events": 9}}, "no event is left to train on, of 6 rows"),
    "a cut before all": (
        {"split": {"by": "time", "valid_from": "1969-01-01", "test_from": "1970-01-01"}},
        "no event is for training: validation is from 1969-01-01T00:00:00+00:00",
    ),
    "a cut that is none": (
        {"split": {"by": "time", "valid_from": "soon", "test_from": "1970-01-01"}},
        "data.split.valid_from is 'soon'; expected a date",
    ),
    "cuts in the wrong order": (
        {"split": {"by": "time", "valid_from": "9", "test_from": "3"}},
        "expected them in order",
    ),
    "quantiles that meet": (
        {"split": {"by": "time", "valid_quantile": 0.5, "test_quantile": 0.51}},
        "are the same moment, 1970-01-01T00:00:0",
    ),
    "a cut beyond the calendar": (
        {"split": {"by": "time", "valid_from": "1e30", "test_from": "inf"}},
        "data.split.valid_from is 1e+30; expected a number of s since 1970",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    data, message = REFUSED[name]
    rows = [Event(user, item, time) for user in ("u1", "u2") for time, item in enumerate("abc")]
    with pytest.raises(UserError) as refused:
        prepared(tmp_path, rows, **data)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "build").exists()
