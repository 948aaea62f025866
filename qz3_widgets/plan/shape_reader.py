"""Reads a model's shape from its real class, on the meta device: no weights, no download.

A process of its own (``python -m qz3_widgets.plan.shape_reader``), so that a notebook stays free of torch. What will be
quantized is decided by the code that quantizes: transformers' quantizer for bitsandbytes, on the empty model.
Request and answer are JSON on standard input and output.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_FACTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_MORE_FACTS = ("intermediate_size", "vocab_size", "sliding_window", "num_experts_per_tok", "moe_intermediate_size")


def read_model(values: dict[str, Any], skip_modules: list[str] | None, *, quantize: bool) -> dict[str, Any]:
    """The shape of the causal language model that a ``config.json`` describes, as plain values.

    Args:
        values: the content of ``config.json``.
        skip_modules: what the configuration keeps in 16 bit; ``None`` leaves it to transformers.
        quantize: whether linear layers are quantized at all.

    Raises:
        ValueError: transformers has no causal language model of this type.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    plain = dict(values)
    config = AutoConfig.for_model(plain.pop("model_type"), **plain)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None:
        raise ValueError(f"transformers has no causal language model of type {values['model_type']}")
    with torch.device("meta"):
        model = kind(config)
    linear = {name for name, module in model.named_modules() if _is_linear(module)}
    if quantize:
        options = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip_modules)
        quantizer = AutoHfQuantizer.from_config(options, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=[])
    return _describe(model, config, linear)


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _describe(model: Any, config: Any, linear: set[str]) -> dict[str, Any]:
    from torch import nn

    text = config.get_text_config()
    facts: dict[str, Any] = {name: getattr(text, name, None) for name in (*_FACTS, *_MORE_FACTS)}
    facts["head_dim"] = facts["head_dim"] or facts["hidden_size"] // facts["num_attention_heads"]
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or facts["num_attention_heads"]
    facts["num_experts"] = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    outer, inner = model.get_output_embeddings(), model.get_input_embeddings()
    tied = outer is not None and (outer.weight is inner.weight or bool(getattr(text, "tie_word_embeddings", False)))
    roles = {} if outer is None else {id(outer.weight): "output"}
    roles[id(inner.weight)] = "tied" if tied else "input"
    stacks: dict[str, Any] = {}
    for name, holder in model.named_modules():
        # What a block is made of goes with it.
        if isinstance(holder, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in stacks):
            stacks[name] = holder
    blocks: list[dict[str, Any]] = []
    for name, holder in stacks.items():
        for place, block in enumerate(holder):
            weights = _weights(block, f"{name}.{place}", linear, roles)
            last = blocks[-1] if blocks and blocks[-1]["stack"] == name else None
            if last is not None and last["weights"] == weights:
                last["count"] += 1
            else:
                blocks.append({"stack": name, "class": type(block).__name__, "weights": weights, "count": 1})
    outside = [
        each
        for each in _weights(model, "", linear, roles)
        if not any(each["name"].startswith(f"{name}.") for name in stacks) and not (tied and each["role"] == "output")
    ]
    return {
        "model_type": text.model_type,
        "class": type(model).__name__,
        "facts": facts,
        "buffer_bytes": sum(each.numel() * each.element_size() for each in model.buffers()),
        "blocks": blocks,
        "outside": outside,
    }


def _weights(module: Any, path: str, linear: set[str], roles: dict[int, str]) -> list[dict[str, Any]]:
    """The parameters of ``module``, which is called ``path`` in the model, by their names in ``module``."""
    import bitsandbytes as bnb

    found = []
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        quantized = isinstance(holder, bnb.nn.Linear4bit) and leaf == "weight"
        entry = {
            "name": name,
            "shape": [holder.out_features, holder.in_features] if quantized else list(parameter.shape),
            "linear": leaf == "weight" and ".".join(filter(None, (path, owner))) in linear,
            "quantized": quantized,
            "role": roles.get(id(parameter)),
        }
        found.append(entry)
    return found


def main() -> None:
    """Answer one request, or several: a list gets a list."""
    request = json.load(sys.stdin)
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    many = request if isinstance(request, list) else [request]
    answers = []
    for each in many:
        try:
            answers.append(read_model(each["values"], each["skip_modules"], quantize=each["quantize"]))
        except Exception as error:  # noqa: BLE001 - the asker turns it into a message
            answers.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(answers if isinstance(request, list) else answers[0], out)


if __name__ == "__main__":
    main()
