"""The counting allocator counts to the byte. It is installed in a process of its own: it can't be taken out again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, torch
from pathlib import Path
before = torch.zeros(1000)  # allocated before the installation: never counted
from qz3_widgets.training.cpu_allocator import install
allocator = install(Path(sys.argv[1]))
out = {"installed": allocator is not None}
if allocator is not None:
    out["empty"] = allocator.allocated_bytes()
    x = torch.empty(1000, 1000)
    out["one"] = allocator.allocated_bytes()
    allocator.take_peak_bytes()
    y = x @ x
    del y
    out["after_product"], out["peak"] = allocator.allocated_bytes(), allocator.take_peak_bytes()
    out["view_costs"] = (lambda v: allocator.allocated_bytes())(x[10:20])
    out["owns_own"] = allocator.owns(x)
    del before
    out["after_foreign_free"] = allocator.allocated_bytes()
    file = Path(sys.argv[1]) / "weights.bin"
    file.write_bytes(bytes(range(256)) * 64)
    mapped = torch.from_file(str(file), size=4096, dtype=torch.float32, shared=False)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(mapped, requires_grad=False)
    out["owns_mapped"] = allocator.owns(mapped)
    wanted = mapped.clone()
    base = allocator.allocated_bytes()
    out["adopted"] = allocator.adopt(layer)
    out["counted"] = allocator.allocated_bytes() - base
    out["same_bytes"] = bool(torch.equal(wanted.view(torch.uint8), layer.weight.data.view(torch.uint8)))
    out["adopt_again"] = allocator.adopt(layer)
    x.resize_(2000, 1000)
    out["resized"] = allocator.allocated_bytes() - out["counted"] - wanted.numel() * 4
    del x
    numbers = [torch.randn(n) for n in range(0, 300)]
    del numbers
    out["end"] = allocator.allocated_bytes() - out["counted"] - wanted.numel() * 4
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("allocator with space")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_counts_to_the_byte(measured: dict[str, object]) -> None:
    assert measured["installed"]
    assert measured["empty"] == 0
    assert measured["one"] == 4_000_000
    assert measured["view_costs"] == 4_000_000
    assert measured["resized"] == 8_000_000
    assert measured["end"] == 0


def test_peak_is_kept_between_two_readings(measured: dict[str, object]) -> None:
    assert measured["after_product"] == 4_000_000
    assert measured["peak"] == 8_000_000


def test_memory_from_before_the_installation_is_not_counted(measured: dict[str, object]) -> None:
    assert measured["after_foreign_free"] == 4_000_000


def test_mapped_weights_are_adopted_once_with_the_same_bytes(measured: dict[str, object]) -> None:
    assert measured["owns_own"]
    assert not measured["owns_mapped"]
    assert measured["adopted"] == measured["counted"] == 16_384
    assert measured["same_bytes"]
    assert measured["adopt_again"] == 0


def test_without_a_compiler_the_meter_walks(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from qz3_widgets.training.meters import make_meter;"
        "m = make_meter('cpu', 0, Path(sys.argv[1])); x = torch.empty(1000, 1000);"
        "r = m.read(); print(m.source, r.allocated_bytes)"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    source, allocated = done.stdout.split()
    assert source == "cpu-walk"
    assert int(allocated) >= 4_000_000
