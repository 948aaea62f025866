"""What ``accelerate launch`` starts for the benchmarks: a rehearsal that evaluates and saves when its steps are over.

Rehearsals do neither, as their losses and adapters would mean nothing; here it is the memory that is wanted. The
examples are those of the training, two batches of them for each rank. ``QZ3_BENCHMARK_CAP_BYTES`` in the environment
is the most that torch's allocator may reserve of a GPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

CAP = "QZ3_BENCHMARK_CAP_BYTES"


def evaluate_and_save_afterwards() -> None:
    """Have the trainer do both at the end of its training, in their phases."""
    from qz3_widgets.training.trainer import RecordedTrainer

    train = RecordedTrainer.train

    def train_then_evaluate(self: RecordedTrainer, *args: Any, **kwargs: Any) -> Any:
        _cap()
        result = train(self, *args, **kwargs)
        examples = self.train_dataset
        wanted = 2 * self.args.world_size * self.args.per_device_eval_batch_size
        self.eval_dataset = examples.select([number % len(examples) for number in range(wanted)])
        with self.around_step():
            self.evaluate()
            self._save_checkpoint(self.model, trial=None)
        return result

    RecordedTrainer.train = train_then_evaluate


def _cap() -> None:
    import torch

    if CAP in os.environ:
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(int(os.environ[CAP]) / total)


if __name__ == "__main__":
    from qz3_widgets.training.main import main

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args()
    evaluate_and_save_afterwards()
    main(arguments.run_dir, resume=False)
