"""Counted operations, held against those that torch counts while a model of the same shape runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from qz3_widgets.training.flops import count_flops

TOKENS = 32
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model_of(config: Any, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **lora))


def counted_by_torch(model: Any) -> dict[str, int]:
    """Operations of one step by kind of product: with weights (``mm``), of attention (``bmm``)."""
    tokens = torch.arange(TOKENS).view(1, -1)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    found = {"mm": 0, "bmm": 0}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        found["bmm" if "bmm" in str(operator) else "mm"] += flops
    return found


@pytest.mark.parametrize("trains_head", [False, True])
def test_a_steps_products_are_counted(trains_head: bool) -> None:
    options = {"modules_to_save": ["lm_head"]} if trains_head else {}
    model = model_of(LlamaConfig(**SIZES), target_modules="all-linear", **options)
    assert count_flops(model, TOKENS).products * TOKENS == counted_by_torch(model)["mm"]


def test_attention_is_half_of_what_is_computed_without_a_causal_kernel() -> None:
    model = model_of(LlamaConfig(**SIZES), target_modules=["q_proj"])
    mine = count_flops(model, TOKENS).attention * TOKENS
    # Eager attention computes the other half too; the diagonal is in both. Rotary embeddings have a small bmm each.
    whole = 3 * 2 * 2 * TOKENS * TOKENS * SIZES["hidden_size"] * SIZES["num_hidden_layers"]
    assert mine == whole * (TOKENS + 1) / (2 * TOKENS)
    assert counted_by_torch(model)["bmm"] == pytest.approx(whole, rel=0.02)


def test_a_window_is_seen_and_no_more() -> None:
    sliding = LlamaConfig(**SIZES)
    sliding.layer_types, sliding.sliding_window = ["sliding_attention", "full_attention"], 8
    model = model_of(LlamaConfig(**SIZES), target_modules=["q_proj"])
    full = count_flops(model, TOKENS).attention
    model.config.layer_types, model.config.sliding_window = sliding.layer_types, sliding.sliding_window
    width = SIZES["hidden_size"]
    mean = sum(min(place, 8) for place in range(1, TOKENS + 1)) / TOKENS
    assert count_flops(model, TOKENS).attention == round(full / 2 + 3 * 2 * 2 * width * mean)


def test_of_experts_as_many_count_as_a_token_is_sent_to() -> None:
    model = model_of(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), target_modules=["q_proj"])
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64  # q, k and v, o
    router = 64 * 4
    experts = 2 * 3 * 64 * 96  # two experts of gate, up and down
    adapter = 64 * 4 + 4 * 64
    frozen = SIZES["num_hidden_layers"] * (layer + router + experts) + 64 * 128
    expected = 4 * frozen + 6 * SIZES["num_hidden_layers"] * adapter
    # A router may be a parameter of its own without a linear layer: two dimensions, and not counted.
    assert abs(count_flops(model, TOKENS).products - expected) <= 4 * 2 * router
