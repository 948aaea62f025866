"""What a plot is handed, be it a run or its traces, in one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from ..analysis.failure import Failure, find_failure
from ..analysis.memory import peaks, typical_ranks
from ..analysis.truth import expected_sizes
from ..runs.store import Run
from ..trace.reader import MemoryTrace

MAX_RANKS = 8
"""Up to here every rank is drawn; of more, the fullest, the median and the emptiest."""


@dataclass(frozen=True)
class MemorySource:
    """A run's memory, and what is known of how it goes."""

    trace: MemoryTrace
    frame: pd.DataFrame
    """Records of the last attempt."""
    table: pd.DataFrame
    """Peaks per rank and phase."""
    state: str | None
    failure: Failure | None
    ranks: tuple[int, ...]
    """To draw, ascending."""
    fullest: int
    """Of the ranks to draw; -1 without any."""
    index: int = 0
    """The run's place among those shown: its colour."""
    expected: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Bytes that the run's plan expects, by phase and figure; empty where it says nothing."""

    @property
    def num_left_out(self) -> int:
        """Ranks with records that are not drawn."""
        return int(self.frame["rank"].nunique()) - len(self.ranks)

    def of_rank(self, rank: int) -> pd.DataFrame:
        """The records of one rank that say how much was allocated, in the order of time."""
        part = self.frame[(self.frame["rank"] == rank) & self.frame["allocated_bytes"].notna()]
        time = part["time_seconds"]
        return part if time.is_monotonic_increasing else part.sort_values("time_seconds", kind="stable")


MemoryData = Run | MemoryTrace | MemorySource
"""What the plots of memory take; a :class:`MemorySource` spares reading a run again for each of several plots."""


def memory_source(data: MemoryData, ranks: Iterable[int] | None = None, *, index: int = 0) -> MemorySource:
    """Read ``data``.

    Raises:
        ValueError: one of ``ranks`` has no records.
    """
    expected: Mapping[str, Mapping[str, int]] = {}
    if isinstance(data, MemorySource):
        if ranks is None:
            return replace(data, index=index)
        trace, state, failure, expected = data.trace, data.state, data.failure, data.expected
    elif isinstance(data, MemoryTrace):
        trace, state, failure = data, None, None
    else:
        status, trace = data.status, data.memory()
        state, failure = status.state, find_failure(status, trace)
        expected = expected_sizes(data)
    frame, table = trace.last_attempt(), peaks(trace)
    there = sorted(int(rank) for rank in frame[frame["allocated_bytes"].notna()]["rank"].unique())
    if ranks is not None:
        chosen = sorted(set(ranks))
        if unknown := [rank for rank in chosen if rank not in there]:
            raise ValueError(f"ranks: no records of rank {', '.join(map(str, unknown))}; there are {there}")
    elif len(there) <= MAX_RANKS:
        chosen = there
    else:
        chosen = sorted(typical_ranks(table))
    order = [rank for rank in typical_ranks(table[table["rank"].isin(chosen)]) if rank in chosen]
    return MemorySource(
        trace=trace,
        frame=frame,
        table=table,
        state=state,
        failure=failure,
        ranks=tuple(chosen),
        fullest=order[0] if order else (chosen[0] if chosen else -1),
        index=index,
        expected=expected,
    )
