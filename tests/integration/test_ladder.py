"""The ladder with real rehearsals: two rungs of a small model, and its full depth beside the prediction."""

from __future__ import annotations

import json
from pathlib import Path

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.io import save_config
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.config.shapes import read_shape
from tests.conftest import Qz3

from .real_runs import RUN_SECONDS

SHAPE = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24}


def test_two_rungs_and_the_top(qz3: Qz3, tmp_path: Path) -> None:
    shape, config = tmp_path / "config.json", tmp_path / "my ladder.yaml"
    shape.write_text(json.dumps(read_shape("tiny-llama") | SHAPE))
    fields = {"model.name_or_path": f"random:{shape}", "data.max_length": 256, "launch.device": "cpu"}
    save_config(with_changes(RunConfig(), fields), config)
    options = ["--world-size", "4", "--rungs", "2,4", "--runs-dir", tmp_path / "my runs", "--json"]
    done = qz3("ladder", config, *options, timeout=2 * RUN_SECONDS)
    document = json.loads(done.stdout)
    assert document["ok"], done.stdout
    assert done.returncode == 0, done.stderr
    assert [(rung["num_layers"], rung["extrapolated"]) for rung in document["rungs"]] == [
        (2, False),
        (4, False),
        (24, True),
    ]
    for rung in document["rungs"]:
        for each in rung["figures"]:
            limit = 0.01 if each["figure"] == "settled_bytes" else 0.03 if each["phase"] == "step" else 0.08
            assert abs(each["relative"]) < limit, (rung["num_layers"], each)
