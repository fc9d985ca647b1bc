"""What the page shows of single items: histories, and pairs that an encoder takes for the same."""

from __future__ import annotations

from collections.abc import Sequence

from fmrl_dist.base.pages.markup import Markup, element, joined, paragraph, table
from fmrl_dist.data.store.manifest import SPLITS
from shards.store_page.figures import SPLIT_WORDS
from shards.store_page.near_duplicates import NEAR, NearDuplicates
from shards.store_page.survey import NUM_EXAMPLES, SHOWN_EVENTS, ExampleHistory, Survey
from shards.store_page.words import DAY_S, ShownItems, shown_time


def histories(found: Survey, items: ShownItems) -> Markup:
    """Some users' latest events; the last of a test history is what is to be predicted."""
    latest = found.times.high if found.times is not None else 0
    is_test = found.examples_of == "test"
    target = "the last one, marked, is the target of the test" if is_test else "no history is long enough for a test"
    about = (
        f"{len(found.examples)} users of {SPLIT_WORDS[found.examples_of]}, drawn at random, always the same; of each "
    )
    about += f"at most {SHOWN_EVENTS} events, oldest first; {target}. Users are numbered as in the store."
    listed = [_history(one, items, latest, is_test) for one in found.examples[:NUM_EXAMPLES]]
    return joined((paragraph(about, class_="note"), *listed))


def _history(one: ExampleHistory, items: ShownItems, latest: int, is_test: bool) -> Markup:
    events = []
    for place, item in enumerate(one.items.tolist()):
        when = None
        if one.times is not None:
            when = element("small", shown_time(int(one.times[place]), latest, 30 * DAY_S))
        is_target = is_test and place == len(one.items) - 1
        mark = element("span", "target", class_="mark") if is_target else None
        words = element("span", items.title(item), class_="title")
        events.append(element("li", items.picture(item), mark, words, when, class_="target" if is_target else None))
    earlier = one.num_events - len(one.items)
    more = f", {earlier:,} earlier ones not shown" if earlier else ""
    heading = element("h3", f"User {one.number:,}: {one.num_events:,} events{more}")
    return element("div", heading, element("ol", *events, class_="history"), class_="example")


def repeats(found: Survey) -> Markup:
    """Events that stand in a history again."""
    rows = []
    for split in SPLITS:
        counts = found.splits[split]
        at_once = f"{counts.repeated_at_once:,}" if found.times is not None else "no times"
        share = 100 * counts.users_with_repeats / max(counts.users, 1)
        rows.append(
            [SPLIT_WORDS[split], f"{counts.repeated:,}", at_once, f"{counts.users_with_repeats:,}", f"{share:.1f} %"]
        )
    head = ["split", "events of an item had before", "of these at the same time", "users with such", "share"]
    return table("Events that stand again in the same history", head, rows)


def near_pairs(found: Sequence[NearDuplicates], items: ShownItems) -> Markup:
    """How many pairs of items each feature can hardly tell apart, and some of them."""
    if not found:
        return paragraph("The store has no item features to compare.", class_="note")
    rows = [
        [
            one.feature,
            f"{one.num_compared:,}{' (a sample)' if one.is_sample else ''} of {one.num_present:,}",
            f"{one.num_pairs:,}",
            f"{one.num_items:,}",
            f"{100 * one.num_items / max(one.num_compared, 1):.1f} %",
        ]
        for one in found
    ]
    head = ["feature", "items compared", f"pairs with cosine > {NEAR:g}", "items in such pairs", "share"]
    about = paragraph(
        "Such a pair may be one product twice, two products with one picture or text by mistake, or a text that says "
        "nothing. A model that reads only this feature ranks both alike.",
        class_="note",
    )
    parts = [table("Items that a feature can hardly tell apart", head, rows), about]
    for one in found:
        if one.examples:
            pairs = [[_named(items, a), _named(items, b), f"{cosine:.5f}"] for a, b, cosine in one.examples]
            parts.append(table(f"Some pairs by {one.feature}", ["item", "its near-duplicate", "cosine"], pairs))
    return joined(parts)


def _named(items: ShownItems, item: int) -> Markup:
    words = element("span", items.title(item), class_="words")
    return element("span", items.picture(item), words, class_="named")
