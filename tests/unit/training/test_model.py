from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.training import model as models


def small() -> torch.nn.Sequential:
    return torch.nn.Sequential(bnb.nn.Linear4bit(64, 64), torch.nn.ReLU(), bnb.nn.Linear4bit(64, 8))


def test_no_layer_may_repack_its_weight_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AVX512-BF16, which this test pretends to have, every layer starts with the trap open."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = small()
    layers = [model[0], model[2]]
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    assert models.keep_weights_trainable_on_cpu(model) == 2
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_forward_in_eval_mode_leaves_weight_and_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    repacked: list[int] = []

    def repack(data: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        repacked.append(1)
        return data, state

    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repack)
    model = small().to("cpu")  # quantizes
    models.keep_weights_trainable_on_cpu(model)
    before = model[0].weight.data.view(torch.uint8).clone()
    with torch.no_grad():
        model.eval()(torch.randn(2, 64))
    assert not repacked
    assert torch.equal(before, model[0].weight.data.view(torch.uint8))
    x = torch.randn(2, 64, requires_grad=True)
    model.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_an_adapter_has_the_precision_of_the_run(precision: str, dtype: torch.dtype) -> None:
    """As ``SFTTrainer`` leaves it: the adapter in bf16, whatever was asked for."""
    model = torch.nn.ModuleDict(
        {"base": torch.nn.Linear(4, 4), "lora_A": torch.nn.Linear(4, 2), "lora_magnitude_vector": torch.nn.Linear(4, 1)}
    )
    model["base"].requires_grad_(False)
    model["lora_A"].to(torch.bfloat16)
    config = with_changes(RunConfig(), {"training.precision": precision})
    models.cast_adapter(config, model)
    assert {parameter.dtype for parameter in model["lora_A"].parameters()} == {dtype}
    assert {parameter.dtype for parameter in model["base"].parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model["lora_magnitude_vector"].parameters()} == {torch.float32}
    assert models.cast_adapter(config, model) == 0


def test_an_adapter_without_a_quantized_base_is_left_alone() -> None:
    config = with_changes(RunConfig(), {"quantization.load_in_4bit": False, "training.precision": "bf16"})
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 2)})
    assert models.cast_adapter(config, model) == 0
    assert model["lora_A"].weight.dtype == torch.float32
