"""The lean adapted layer against PEFT's own: the same bits out, and the same gradients."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qz3_widgets.training.sharding.adapter import LeanAdaptedLinear4bit, make_lean
from qz3_widgets.training.sharding.linear import let_go

WIDTH = 64


class Base(nn.Module):
    """Two 4-bit layers."""

    is_loaded_in_4bit = True  # what PEFT asks

    def __init__(self) -> None:
        super().__init__()
        for name in ("one", "two"):
            layer = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            self.add_module(name, layer)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(hidden).relu())  # type: ignore[no-any-return]


def adapted(*, lean: bool, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = Base().to("cpu")
    for layer in (base.one, base.two):
        let_go(layer)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["one", "two"], "init_lora_weights": False, **options}
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    if lean:
        assert make_lean(model) == 2
    return model


def run(model: PeftModel, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    torch.manual_seed(2)  # of the dropout
    output = model(hidden)
    output.float().square().sum().backward()
    trained = [each.grad for each in model.parameters() if each.requires_grad]
    return [output, hidden.grad, *trained]  # type: ignore[list-item]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"lora_alpha": 8},
    {"lora_dropout": 0.5},
    {"lora_bias": True},
    {"use_rslora": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_pefts_to_the_last_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    expected, found = (run(adapted(lean=lean, **options), dtype) for lean in (False, True))
    assert len(found) >= 6
    for one, other in zip(expected, found, strict=True):
        assert one is not None
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_what_is_not_plain_goes_pefts_way() -> None:
    model, plain = adapted(lean=True), adapted(lean=False)
    hidden = torch.randn(3, WIDTH).to(torch.bfloat16)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(hidden), plain(hidden))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(hidden.float()), plain(hidden.float()))
    assert isinstance(model.base_model.model.one, LeanAdaptedLinear4bit)


def test_other_layers_stay_as_they_are() -> None:
    """A stock 4-bit layer needs the copy that PEFT makes."""
    model = get_peft_model(Base().to("cpu"), LoraConfig(r=4, target_modules=["one"]))
    assert make_lean(model) == 0
