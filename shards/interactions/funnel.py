"""How many events, users and items each step leaves, and why the others went."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Removal:
    """What one step took away."""

    name: str  # such as "below 5 events of a user or item"
    removed: int  # events
    events: int  # that are left


@dataclass
class Funnel:
    """Counts from the rows of the raw tables to the events of the histories."""

    rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # cause → rows that could not be used
    steps: list[Removal] = field(default_factory=list)
    users: int = 0
    items: int = 0  # with an event
    events: int = 0
    tied_events: int = 0  # next to an event of the same user and time: only data.interactions.ties orders them
    sorted_users: int = 0  # of a table of sequences: whose list was not in order of its own times
    repeated_events: int = 0  # that an earlier one of the user equals in item and time
    users_tied_at_split: int = 0  # whose held-out event has the time of the one before it
    notes: list[str] = field(default_factory=list)  # such as which unit the times were taken for

    def add(self, name: str, events: int) -> None:
        """Note that a step left so many ``events``; one that removed nothing is not noted."""
        before = self.steps[-1].events if self.steps else self.rows - sum(self.bad.values())
        if events != before:
            self.steps.append(Removal(name, before - events, events))

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        rows = [("rows read", self.rows, "")]
        left = self.rows
        for cause, removed in self.bad.items():
            left -= removed
            rows.append((f"bad: {cause}", left, f"-{removed:,}"))
        rows += [(step.name, step.events, f"-{step.removed:,}") for step in self.steps]
        lines = [f"{name:<44}{removed:>16}{events:>16,}" for name, events, removed in rows]
        lines = [f"{'events':<44}{'removed':>16}{'left':>16}", *lines]
        lines.append(f"{self.users:,} users, {self.items:,} items, {self.events:,} events")
        if self.tied_events:
            lines.append(
                f"{100 * self.tied_events / self.events:.1f} % of the events have the time of a neighbour "
                f"(data.interactions.ties); for {self.users_tied_at_split:,} users that may decide the target"
            )
        if self.repeated_events:
            lines.append(
                f"{self.repeated_events:,} events stand twice (same user, item and time): kept as they are; "
                "data.interactions.duplicates: event keeps one of each"
            )
        return lines + self.notes
