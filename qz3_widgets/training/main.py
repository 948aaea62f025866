"""What each rank does, from its first line to its last."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path


from ..config.schema import RunConfig
from ..runs.layout import RunLayout
from ..trace.records import MemoryHeader, TraceWriter
from .session import RankIdentity, RankSession


def main(run_dir: Path, *, resume: bool = False) -> None:
    """Train as ``run_dir/run.yaml`` says, as one of the ranks that the launcher started. Ends the process."""
    layout = RunLayout(run_dir.resolve())
    identity = RankIdentity.from_environment()
    with RankSession(layout, identity) as session:
        config = _read_config(layout)
        _choose_device(config, identity)
        _train(config, layout, session, resume=resume)


def _read_config(layout: RunLayout) -> RunConfig:
    import yaml

    with open(layout.run_yaml, encoding="utf-8") as file:
        return RunConfig.model_validate_json(json.dumps(yaml.safe_load(file)["resolved"]))


def _choose_device(config: RunConfig, identity: RankIdentity) -> None:
    """Point LOCAL_RANK at this rank's GPU before torch is imported: ranks that share a GPU share its number."""
    os.environ["LOCAL_RANK"] = str(identity.local_rank // config.launch.ranks_per_gpu)


def _train(config: RunConfig, layout: RunLayout, session: RankSession, *, resume: bool) -> None:
    # What the libraries will rename one day is news for their authors; here it comes at every call of every rank.
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    from ..config.paths import default_cache_dir
    from .meters import make_meter
    from .recorder import MemoryRecorder

    identity = session.identity
    device = config.launch.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_gpu = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local_gpu)
    meter = make_meter(device, local_gpu, default_cache_dir())
    header: MemoryHeader = {
        **identity.header(),  # type: ignore[typeddict-item]
        "device": meter.device,
        "device_name": meter.device_name,
        "capacity_bytes": meter.capacity_bytes,
        "source": meter.source,
        "rehearsal": False,
    }
    writer = TraceWriter(layout.memory_trace(identity.rank), header, started=identity.pid_created)
    recorder = MemoryRecorder(writer, meter, sample_seconds=config.training.memory_sample_seconds)
    session.on_end = recorder.end
    session.on_signal = recorder.write_end
    recorder.mark("phase_begin")
    recorder.start_sampling()
    metrics = _metrics_writer(layout, identity)
    # The libraries take seconds to import: on the record, and an error among them too.
    from .run import Work

    Work(config, layout, recorder, metrics, device=device, resume=resume).run()


def _metrics_writer(layout: RunLayout, identity: RankIdentity) -> TraceWriter | None:
    if identity.rank != 0:
        return None
    header = {"rank": 0, "world_size": identity.world_size}
    return TraceWriter(layout.metrics, header, started=identity.pid_created)


