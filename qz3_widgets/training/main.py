"""What each rank does, from its first line to its last."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.paths import default_cache_dir
from ..config.schema import RunConfig
from ..config.strategy import resolve_load_strategy
from ..runs.layout import RunLayout
from ..trace.records import MemoryHeader, TraceWriter
from .session import RankIdentity, RankSession

if TYPE_CHECKING:
    from .meters import Meter


def main(run_dir: Path, *, resume: bool = False) -> None:
    """Train as ``run_dir/run.yaml`` says, as one of the ranks that the launcher started. Ends the process."""
    layout = RunLayout(run_dir.resolve())
    identity = RankIdentity.from_environment()
    with RankSession(layout, identity) as session:
        config = _read_config(layout)
        _choose_device(config, identity)
        _keep_operators_by_environment()
        _train(config, layout, session, resume=resume)


def _read_config(layout: RunLayout) -> RunConfig:
    from ..config.io import load_config

    return load_config(layout.run_yaml)


def _choose_device(config: RunConfig, identity: RankIdentity) -> None:
    """Point LOCAL_RANK at this rank's GPU before torch is imported: ranks that share a GPU share its number."""
    if "LOCAL_RANK" in os.environ:  # or a process on its own would take itself for one of several
        os.environ["LOCAL_RANK"] = str(identity.local_rank // config.launch.ranks_per_gpu)


def _keep_operators_by_environment() -> None:
    """Cache compiled operators apart for each Python environment, and find the ninja that is installed beside Python.

    torch's own cache has one place for all environments, and every change of environment compiles the operators anew.
    """
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join(filter(None, (beside, os.environ.get("PATH"))))
    identity = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default_cache_dir() / "native" / f"operators-{identity}"))


def _train(config: RunConfig, layout: RunLayout, session: RankSession, *, resume: bool) -> None:
    # What the libraries will rename one day is news for their authors; here it comes at every call of every rank.
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    from .recorder import MemoryRecorder

    identity = session.identity
    # The launch files have settled what "auto" means; without them torch knows what is there.
    device = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    local_gpu = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_gpu)
    (writer, meter), *beside = traces_of(
        layout, identity, meters_of(config, device, local_gpu, torch.cuda.device_count() if device == "cuda" else 0)
    )
    seconds = config.training.memory_sample_seconds
    recorder = MemoryRecorder(writer, meter, sample_seconds=seconds, beside=beside)
    session.on_end = recorder.end
    session.on_signal = recorder.write_end
    recorder.mark("phase_begin")
    recorder.start_sampling()
    metrics = _metrics_writer(layout, identity)
    # The libraries take seconds to import: on the record, and an error among them too.
    from .run import Work

    Work(config, layout, recorder, metrics, device=device, resume=resume, identity=identity).run()


def meters_of(config: RunConfig, device: str, local_gpu: int, num_gpus: int) -> list[Meter]:
    """What this process is measured by: its device, and for a model that is spread over all GPUs each of them."""
    from .meters import make_meter

    spread = device == "cuda" and resolve_load_strategy(config) == "device_map"
    gpus = range(max(1, num_gpus)) if spread else (local_gpu,)
    return [make_meter(device, gpu, default_cache_dir()) for gpu in gpus]


def traces_of(layout: RunLayout, identity: RankIdentity, meters: Sequence[Meter]) -> list[tuple[TraceWriter, Meter]]:
    """A memory trace for each meter. Where there are several, each device has the place that a rank has elsewhere."""
    traces = []
    for place, meter in enumerate(meters):
        header: MemoryHeader = {
            **identity.header(),  # type: ignore[typeddict-item]
            "device": meter.device,
            "device_name": meter.device_name,
            "capacity_bytes": meter.capacity_bytes,
            "source": meter.source,
        }
        if len(meters) > 1:
            header |= {"rank": place, "local_rank": place, "world_size": len(meters)}
        path = layout.memory_trace(header["rank"])
        traces.append((TraceWriter(path, header, started=identity.pid_created), meter))
    return traces


def _metrics_writer(layout: RunLayout, identity: RankIdentity) -> TraceWriter | None:
    if identity.rank != 0 and not identity.rehearsal:
        return None
    header = {"rank": identity.rank, "world_size": identity.world_size, "rehearsal": identity.rehearsal}
    return TraceWriter(layout.metrics, header, started=identity.pid_created)
