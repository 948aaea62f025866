"""A tape of what is taken and given back, in the order in which a program does it; it knows its fullest moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Tape:
    """Bytes by name. Sizes are rounded as the allocator rounds a single tensor."""

    def __init__(self, rounded: Callable[[float], int]) -> None:
        """``rounded`` gives what an allocation of so many bytes takes."""
        self._rounded = rounded
        self._held: dict[str, int] = {}
        self._total = 0
        self.peak_bytes = 0
        self.at_peak: dict[str, int] = {}

    @property
    def total_bytes(self) -> int:
        """What is held now."""
        return self._total

    @property
    def held(self) -> dict[str, int]:
        """By name, what is held now."""
        return {name: size for name, size in self._held.items() if size}

    def take(self, name: str, num_bytes: float) -> None:
        """Allocate; what has the same name adds up."""
        size = self._rounded(num_bytes)
        self._held[name] = self._held.get(name, 0) + size
        self._total += size
        if self._total > self.peak_bytes:
            self.peak_bytes, self.at_peak = self._total, self.held

    def give(self, *names: str) -> None:
        """Free all of these names; what is not held is passed over."""
        for name in names:
            self._total -= self._held.pop(name, 0)

    @contextmanager
    def during(self, **sizes: float) -> Iterator[None]:
        """Take for as long as the body runs."""
        for name, num_bytes in sizes.items():
            self.take(name, num_bytes)
        yield
        self.give(*sizes)
