"""The count of a model's weights, held against sums made by hand."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qz3_widgets.training.probes.census import Weight, base_weights, explain_16_bit, take_census
from qz3_widgets.training.sharding.linear import let_go, take_off_statistics
from qz3_widgets.training.sharding.partition import padded, part_of

SMALL = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
QUANTIZATION = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
)  # fmt: skip
# q, k, v, o, gate, up, down
LINEAR = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96)
EMBEDDING = 160 * 64
NORMS = 5 * 64


def make(config: Any, *, quantize: bool = True, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if quantize:
        replace_with_bnb_linear(model, modules_to_not_convert=list(skip), quantization_config=QUANTIZATION)
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
                value = torch.randn(module.out_features, module.in_features, dtype=torch.bfloat16)
                settings = {"compress_statistics": True, "quant_storage": torch.bfloat16}
                module.weight = bnb.nn.Params4bit(value, requires_grad=False, module=module, **settings).to("cpu")
            else:
                value = torch.zeros(parameter.shape, dtype=torch.bfloat16)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model


def partition(parameter: Any, num_ranks: int, rank: int) -> None:
    """Do to a parameter what DeepSpeed does."""
    data = parameter.data.reshape(-1)
    part = part_of(data.numel(), num_ranks, rank)
    parameter.ds_id, parameter.ds_numel, parameter.ds_shape = 0, data.numel(), parameter.shape
    parameter.ds_tensor = padded(data[part.begin : part.end], part.size).clone()
    parameter.data = torch.empty(0, dtype=data.dtype)


def census(model: nn.Module, *, quantized: bool = True, num_ranks: int = 1, **options: Any) -> dict[str, Any]:
    weights = list(base_weights(model))
    why = explain_16_bit(model, quantized=quantized, listed=options.pop("listed", ()))
    return take_census(weights, weights, why, num_ranks=num_ranks)


def reasons(found: dict[str, Any]) -> dict[str, list[str]]:
    return {entry["why"]: entry["names"] for entry in found["layers_16bit"]}


def test_a_whole_model() -> None:
    found = census(make(LlamaConfig(**SMALL)))
    assert found["weights"] == LINEAR + 2 * EMBEDDING + NORMS
    assert (found["layers_4bit"], found["weights_4bit"]) == (14, LINEAR)
    assert found["matrix_weights"] == LINEAR + 2 * EMBEDDING
    assert found["partitioned_fraction"] == 0.0
    assert found["held_bytes"] == found["bytes"]
    scales = sum(-(-count // 64) for count in 2 * [4096, 2048, 2048, 4096, 6144, 6144, 6144])
    nested = 4 * 14  # each layer's scales fit one block of 256
    assert found["statistics"] == {"sharded_bytes": 0, "whole_bytes": scales, "nested_bytes": nested}
    assert found["bytes"] == LINEAR // 2 + scales + nested + 2 * (2 * EMBEDDING + NORMS)
    assert found["bytes_per_4bit_parameter"] == pytest.approx((LINEAR // 2 + scales + nested) / LINEAR)
    assert reasons(found) == {"embedding": ["model.embed_tokens.weight"], "head": ["lm_head.weight"]}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_partitioned_model(num_ranks: int) -> None:
    model = make(LlamaConfig(**SMALL))
    for module in list(model.modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            take_off_statistics(let_go(module))
    whole = census(model)
    for parameter in model.parameters():
        partition(parameter, num_ranks, rank=num_ranks - 1)
    found = census(model, num_ranks=num_ranks)
    same = ("weights", "bytes", "layers_4bit", "weights_4bit", "bytes_per_parameter", "layers_16bit")
    assert {name: found[name] for name in same} == {name: whole[name] for name in same}
    assert found["partitioned_fraction"] == 1.0
    assert found["held_bytes"] == found["expected_bytes"]
    assert found["held_bytes"] == pytest.approx(found["bytes"] / num_ranks, rel=0.02)
    assert found["statistics"]["whole_bytes"] == 0
    assert found["whole"] == []


def test_what_is_gathered_counts_beside_the_part() -> None:
    model = make(LlamaConfig(**SMALL))
    head = model.lm_head.weight
    partition(head, 2, 0)
    head.data = torch.zeros(160, 64, dtype=torch.bfloat16)
    found = census(model, num_ranks=2)
    assert found["held_bytes"] == found["bytes"] + EMBEDDING
    assert found["partitioned_fraction"] == pytest.approx(EMBEDDING / found["weights"])
    assert "model.layers.{0..1}.mlp.up_proj.weight" in found["whole"]


def test_fused_experts_are_told_apart_from_the_router() -> None:
    experts = census(make(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)))
    found = reasons(experts)
    assert found["fused"] == [
        "model.layers.{0..1}.mlp.experts.gate_up_proj",
        "model.layers.{0..1}.mlp.experts.down_proj",
    ]
    assert found["not_linear"] == ["model.layers.{0..1}.mlp.gate.weight"]
    assert set(found) == {"embedding", "head", "fused", "not_linear"}
    [fused] = [entry for entry in experts["layers_16bit"] if entry["why"] == "fused"]
    assert fused["weights"] == 2 * 4 * 3 * 64 * 96
    assert fused["bytes"] == 2 * fused["weights"]


def test_a_list_of_the_users_own_and_what_nobody_asked_to_leave_out() -> None:
    model = make(LlamaConfig(**SMALL), skip=("lm_head", "q_proj", "down_proj"))
    found = reasons(census(model, listed=("q_proj",)))
    assert found["listed"] == ["model.layers.{0..1}.self_attn.q_proj.weight"]
    assert found["unexplained"] == ["model.layers.{0..1}.mlp.down_proj.weight"]


def test_without_quantization_there_is_one_reason() -> None:
    found = census(make(LlamaConfig(**SMALL), quantize=False), quantized=False)
    assert set(reasons(found)) == {"embedding", "quantization_off"}
    assert (found["layers_4bit"], found["bytes_per_4bit_parameter"]) == (0, None)
    assert found["bytes_per_parameter"] == 2.0


def test_a_tied_head_is_one_weight() -> None:
    model = make(LlamaConfig(**SMALL, tie_word_embeddings=True))
    model.lm_head.weight = model.model.embed_tokens.weight
    found = census(model)
    assert reasons(found) == {"embedding": ["model.embed_tokens.weight"]}
    assert found["weights"] == LINEAR + EMBEDDING + NORMS


def test_known_names_leave_the_adapter_out() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(4, 4), "lora_A": nn.Linear(4, 2, bias=False)})
    wrapped = nn.ModuleDict({"model": nn.ModuleDict({"q": model})})
    names = [weight.name for weight in base_weights(wrapped, known={"model.q.weight", "model.q.bias"})]
    assert names == ["model.q.weight", "model.q.bias"]


def test_a_weight_on_the_meta_device_is_missing() -> None:
    weight = Weight("w", nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False), nn.Linear(1, 1))
    found = take_census([weight], [weight], {}, num_ranks=1)
    assert (found["missing_weights"], found["held_bytes"]) == (16, 0)
