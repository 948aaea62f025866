from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config import RunConfig, with_changes
from qz3_widgets.plan import Capabilities, Gpu

GIB = 2**30
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., Path]
WriteLines = Callable[..., Path]


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    """Write a JSON Lines file (values are dumped, text is taken as it stands) and return its path."""

    def write(*lines: Any, name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        file.write_text(text, encoding="utf-8")
        return file

    return write


def write_safetensors(file: Path, *, num_bytes: int = 16) -> None:
    """A real safetensors file with one tensor."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * num_bytes)


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A model folder that passes every check; ``config`` adds to its config.json."""

    def make(name: str = "model", *, template: str | None = TEMPLATE, **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf-8")
        write_safetensors(folder / "model.safetensors")
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return make


@pytest.fixture
def make_config(write_lines: WriteLines) -> MakeConfig:
    """A configuration without any issue on two GPUs; keyword arguments are ``section__field=value``."""
    data = write_lines(*[CHAT] * 40, name="good.jsonl")

    def make(**changes: Any) -> RunConfig:
        start = {"model.name_or_path": "random:tiny-llama", "data.source": str(data)}
        return with_changes(RunConfig(), start | {path.replace("__", "."): value for path, value in changes.items()})

    return make


@pytest.fixture
def gpus() -> Capabilities:
    """A machine with two GPUs and everything installed."""
    return machine(2)


@pytest.fixture
def cpu() -> Capabilities:
    """A machine with four cores, without a GPU, and everything installed."""
    return machine(0)


def machine(num_gpus: int, **changes: Any) -> Capabilities:
    """A machine that has everything, but for ``changes``."""
    capability = changes.pop("compute_capability", (9, 0))
    values: dict[str, Any] = {
        "host": "box",
        "num_cpus": 4,
        "host_memory_bytes": 64 * GIB,
        "gpus": tuple(Gpu(index, "H100", 80 * GIB, capability) for index in range(num_gpus)),
        "flash_attention": ("flash_attention_2", "flash_attention_3"),
        "torch_has_cuda": num_gpus > 0,
        "has_cpp_compiler": True,
        "has_ninja": True,
    }
    return Capabilities(**(values | changes))
