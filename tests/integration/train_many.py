"""What ``accelerate launch`` starts on every rank for :meth:`.real_runs.Runs.together`: many runs, one after the other.

Each has the training code, the process group's ranks and the run directory of a run of its own. What is saved are the
imports, which take longer than the training of a tiny model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path

import pytest

from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.training import main as ranks
from qz3_widgets.training.session import RankIdentity, RankSession


def main(run_dir: Path) -> None:
    """Train the runs that QZ3_TEST_RUNS names: pairs of a run directory and the code of a change for this run alone."""
    with RankSession(RunLayout(run_dir), RankIdentity.from_environment()) as session:
        ranks._keep_operators_by_environment()
        work = json.loads(os.environ["QZ3_TEST_RUNS"])
        before = dict(os.environ)
        for number, (folder, change) in enumerate(work):
            print(f"== {Path(folder).name}")
            os.environ.clear()
            os.environ.update(before)
            train(RunLayout(Path(folder)), session, change=change, is_last=number == len(work) - 1)


def train(layout: RunLayout, session: RankSession, *, change: str, is_last: bool) -> None:
    """Train one run, and leave nothing of it for the next one."""
    import torch
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from qz3_widgets.training.sharding.sources import FileTensor

    layout.make_folders()
    config = ranks._read_config(layout)
    # The launcher has set these as the first run has them.
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(layout.deepspeed_json)
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(config.zero.zero_stage == 3).lower()
    FileTensor.bytes_read = 0
    with pytest.MonkeyPatch.context() as patch:
        if not is_last:
            patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        exec(change, {"patch": patch})
        ranks._train(config, layout, session, resume=False)
    if not is_last:
        session.on_end("succeeded", None)
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="the first run's, which holds the ranks' logs")
    main(parser.parse_args().run_dir)
