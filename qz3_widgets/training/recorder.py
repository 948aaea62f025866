"""Records one rank's memory from its start to its end, by phase and step, into its trace file."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from ..trace.records import MemoryRecord, Outcome, Phase, TraceWriter
from .meters import Meter, Reading


class MemoryRecorder:
    """Marks phases and events, and samples in between from a thread of its own.

    Every record carries the largest ``allocated_bytes`` since the record before it, so no peak falls between two.
    """

    def __init__(
        self,
        writer: TraceWriter,
        meter: Meter,
        *,
        sample_seconds: float,
        beside: Sequence[tuple[TraceWriter, Meter]] = (),
    ) -> None:
        """Begin in phase ``start``; sampling begins with :meth:`start_sampling`.

        Args:
            writer: the trace of the rank's device.
            meter: reads it.
            sample_seconds: time between two samples.
            beside: traces of further devices of the same process, which get the same records.
        """
        self._traces = ((writer, meter), *beside)
        self._sample_seconds = sample_seconds
        self._phase: Phase = "start"
        self._step = 0
        self._allocated_bytes = 0
        self._sample_event = "sample"
        self._process = psutil.Process()
        # Readings reset the peak: reading and writing are one act, or two threads would share out one peak.
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self._phase

    @property
    def step(self) -> int:
        """The optimizer step under way, or the last one; 0 before the first."""
        return self._step

    @property
    def allocated_bytes(self) -> int:
        """What the last record said."""
        return self._allocated_bytes

    def start_sampling(self) -> None:
        """Sample every ``sample_seconds`` from now on."""
        self._thread = threading.Thread(target=self._sample, name="qz3-memory", daemon=True)
        self._thread.start()

    def adopt(self, model: torch.nn.Module) -> None:
        """See that the tensors of a model just loaded are counted."""
        for _, meter in self._traces:
            meter.adopt(model)

    def enter(self, phase: Phase, *, step: int | None = None) -> None:
        """End the phase under way and begin ``phase``."""
        with self._lock:  # no sample falls between the two
            self.mark("phase_end")
            self._phase = phase
            if step is not None:
                self._step = step
            self.mark("phase_begin")

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Be in ``phase`` for the body, then go back to the phase before it."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def doing(self, event: str) -> Iterator[None]:
        """Mark ``event_begin`` and ``event_end`` around the body, and call every sample in between ``event``.

        So the newest record alone tells a reader what a silent minute is about.
        """
        self.mark(f"{event}_begin")
        self._sample_event = event
        try:
            yield
        finally:
            self._sample_event = "sample"
            self.mark(f"{event}_end")

    def begin_step(self, step: int) -> None:
        """Begin optimizer step ``step``."""
        if self._phase != "step":
            self.enter("step", step=step)
        self._step = step
        self.mark("step_begin")

    def mark(self, event: str) -> None:
        """Write one record now."""
        with self._lock:
            host = {
                "host_rss_bytes": self._process.memory_info().rss,
                "host_used_bytes": psutil.virtual_memory().used,
            }
            for place, (writer, meter) in enumerate(self._traces):
                reading = meter.read()
                if place == 0:
                    self._allocated_bytes = reading.allocated_bytes
                writer.append(self._record(event, reading) | host)

    def _record(self, event: str, reading: Reading) -> dict[str, Any]:
        record: MemoryRecord = {
            "kind": "memory",
            "phase": self._phase,
            "step": self._step,
            "event": event,
            "allocated_bytes": reading.allocated_bytes,
            "reserved_bytes": reading.reserved_bytes,
            "peak_allocated_bytes": reading.peak_allocated_bytes,
            "device_used_bytes": reading.device_used_bytes,
        }
        return dict(record)

    def end(self, outcome: Outcome, error: str | None = None) -> None:
        """Stop sampling and write the last record; later calls do nothing."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self.mark("end")
        self.write_end(outcome, error)

    def write_end(self, outcome: Outcome, error: str | None) -> None:
        """Write the end record alone: for a signal handler's thread, which must not wait for a reading."""
        self._stopped.set()
        for writer, _ in self._traces:
            writer.append({"kind": "end", "phase": self._phase, "step": self._step, "outcome": outcome, "error": error})

    def _sample(self) -> None:
        while not self._stopped.wait(self._sample_seconds):
            self.mark(self._sample_event)
