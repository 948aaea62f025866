from __future__ import annotations

import builtins
import json
import subprocess
import sys
import types
from typing import Any

import pytest

from qz3_widgets.plan import Gpu, capabilities, detect, imagine
from qz3_widgets.plan.capabilities import Card, visible_gpus
from qz3_widgets.units import GIB

CARDS = tuple(Card(f"GPU-{letter * 4}-1", f"card {letter}", 80 * GIB, (9, 0)) for letter in "abcd")


@pytest.mark.parametrize(
    "chosen,names",
    [
        (None, "abcd"),
        ("", ""),
        ("-1", ""),
        ("NoDevFiles", ""),
        ("0", "a"),
        ("2,0", "ca"),
        (" 1 , 3 ", "bd"),
        ("GPU-bbbb-1,GPU-aaaa", "ba"),
        ("0,7,1", "a"),
        ("1,-1,2", "b"),
        ("1,1", "b"),
        ("GPU-", ""),
    ],
)
def test_visible_gpus_are_chosen_as_cuda_does_it(chosen: str | None, names: str) -> None:
    found = visible_gpus(CARDS, chosen)
    assert [gpu.name for gpu in found] == [f"card {letter}" for letter in names]
    assert [gpu.index for gpu in found] == list(range(len(names)))


def fake_driver(*, working: bool) -> Any:
    class NVMLError(Exception):
        pass

    def init() -> None:
        if not working:
            raise NVMLError

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}".encode(),
        nvmlDeviceGetName=lambda handle: "NVIDIA H100",
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(total=80 * GIB),
    )


def test_gpus_come_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(working=True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect().gpus == (Gpu(0, "NVIDIA H100", 80 * GIB, (9, 0)),)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert len(detect().gpus) == 2


def test_no_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(working=False))
    assert detect().gpus == ()


def test_the_drivers_package_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert detect().gpus == ()


def test_this_machine() -> None:
    found = detect()
    assert found.num_cpus >= 1
    assert found.host_memory_bytes is not None
    assert found.host_memory_bytes > GIB / 4
    assert not found.imagined
    assert "pydantic" not in found.versions
    assert {"torch", "transformers"} <= found.versions.keys()
    json.dumps(found.to_json())


def test_compiler_and_ninja_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CXX", raising=False)
    assert (detect().has_cpp_compiler, detect().has_ninja) == (False, False)
    for name in ("c++", "ninja"):
        (tmp_path / name).write_text("", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert (detect().has_cpp_compiler, detect().has_ninja) == (True, True)
    monkeypatch.setenv("CXX", "some-other-compiler")
    assert detect().has_cpp_compiler is False


def test_a_torch_for_the_cpu_can_not_use_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(0, "H100", 80 * GIB)
    without = capabilities.Capabilities("box", 4, None, (gpu,), torch_has_cuda=False)
    assert without.usable_gpus == ()
    assert without.gpu_memory_bytes is None
    unknown = capabilities.Capabilities("box", 4, None, (gpu, Gpu(1, "A10", 24 * GIB)))
    assert unknown.usable_gpus == unknown.gpus
    assert unknown.gpu_memory_bytes == 24 * GIB


@pytest.mark.parametrize(
    "flags,expected",
    [
        (None, None),
        ({"avx2", "fma"}, False),
        ({"avx512f", "avx512_bf16"}, True),
        ({"amx_bf16", "amx_tile"}, True),
        ({"asimd", "bf16"}, True),
    ],
)
def test_a_cpu_with_bf16(flags: set[str] | None, expected: bool | None) -> None:
    assert capabilities.cpu_has_fast_bf16(None if flags is None else frozenset(flags)) is expected


def test_an_imagined_machine() -> None:
    found = imagine(8, 80 * GIB, num_cpus=64)
    assert found.imagined
    assert [gpu.index for gpu in found.gpus] == list(range(8))
    assert (found.num_cpus, found.gpu_memory_bytes) == (64, 80 * GIB)
    assert found.flash_attention is None
    assert imagine(0, 0).gpus == ()
    with pytest.raises(ValueError, match="num_gpus must be 0 or more, not -1"):
        imagine(-1, GIB)
    with pytest.raises(ValueError, match="gpu_memory_bytes must be more than 0"):
        imagine(1, 0)


def test_detecting_loads_no_heavy_library() -> None:
    code = """
import sys
from qz3_widgets.config import preset
from qz3_widgets.plan import detect, make_plan
detect(); make_plan(preset("llama-3.1-8b"))
heavy = "torch transformers trl deepspeed accelerate peft bitsandbytes datasets pandas pyarrow"
print(sorted(set(heavy.split()) & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
