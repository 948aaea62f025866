"""How long a million trace records take to read, whole and with torn lines, and to thin out for a live view.

Run it from the checkout: ``PYTHONPATH=. python tests/benchmarks/trace_reading.py [records] [ranks]``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.trace.reader import MemoryTrace, read_memory
from qz3_widgets.trace.tail import TailReader


def write_traces(run_dir: Path, num_records: int, num_ranks: int) -> None:
    """Write ``num_records`` in all, as a run of thousands of steps has them."""
    layout = RunLayout(run_dir)
    layout.make_folders()
    each = num_records // num_ranks
    for rank in range(num_ranks):
        header = (
            f'{{"schema_version":1,"clock_origin":{1.79e9 + rank / 100},"rank":{rank},"local_rank":{rank},'
            f'"world_size":{num_ranks},"host":"box","pid":{rank},"pid_created":null,"device":"cuda:{rank}",'
            '"device_name":"GPU","capacity_bytes":85899345920,"source":"cuda","rehearsal":false,"kind":"header"}\n'
        )
        with open(layout.memory_trace(rank), "w") as file:
            file.write(header)
            for i in range(each):
                phase = "load" if i < each // 20 else "engine" if i < each // 18 else "step"
                size = 30_000_000_000 + (i * 7919) % 9_000_000_000
                file.write(
                    f'{{"time_seconds":{i * 0.05:.6f},"kind":"memory","phase":"{phase}","step":{i // 6},'
                    f'"event":"sample","allocated_bytes":{size},"reserved_bytes":{size + 99},'
                    f'"peak_allocated_bytes":{size + 7},"device_used_bytes":{size + 12345},'
                    f'"host_rss_bytes":{3_000_000_000 + i},"host_used_bytes":{5_000_000_000 + i}}}\n'
                )


def timed(what: str, act: Callable[[], Any]) -> Any:
    """Run ``act``, print how long it took, and return its result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = act()
    print(f"{what:52} {time.perf_counter() - wall:6.2f} s, processor {time.process_time() - processor:6.2f} s")
    return result


def main() -> None:
    """Measure and print."""
    num_records = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    num_ranks = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    load = os.getloadavg()[0]
    print(f"{num_records:,} records of {num_ranks} ranks, {os.cpu_count()} cores, load average before {load:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        write_traces(run_dir, num_records, num_ranks)
        trace: MemoryTrace = timed("read_memory", lambda: read_memory(run_dir))
        assert len(trace.frame) == num_records // num_ranks * num_ranks
        used = trace.frame.memory_usage(deep=True).sum() / 2**20
        print(f"{'the frame':52} {used:6.0f} MiB")
        timed("peaks", lambda: peaks(trace))
        path = RunLayout(run_dir).memory_trace(0)
        data = path.read_bytes()
        for torn in (1, 100):
            step = len(data) // (torn + 1)
            pieces = [data[i * step : (i + 1) * step - 150] for i in range(torn)]
            path.write_bytes(b"\n".join([*pieces, data[torn * step :]]))
            damaged = timed(f"read_memory, rank 0 with {torn} torn lines", lambda: read_memory(run_dir))
            print(f"{'lines counted as damaged':52} {damaged.num_torn[0]:6}")
        path.write_bytes(data)
        tail = TailReader(run_dir)
        timed("TailReader, first poll", tail.poll)
        timed("TailReader, poll with nothing new", tail.poll)
        print(f"{'records it keeps':52} {len(tail.memory().frame):6}")


if __name__ == "__main__":
    main()
