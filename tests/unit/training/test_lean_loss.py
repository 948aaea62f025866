"""The loss without all logits at once (TRL's chunks of tokens and vocabulary) is the plain one, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer import utils as trl_utils

from qz3_widgets.config.shapes import read_shape


def make_model(dtype: torch.dtype, **changes: Any) -> Any:
    values = {**read_shape("tiny-llama"), **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def gradients(model: Any, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 250, (2, 33), generator=generator)
    labels = tokens.clone()
    labels[0, :9] = -100  # a prompt that does not count
    loss = model(input_ids=tokens, labels=labels, use_cache=False, **options).loss
    loss.backward()
    return loss.item(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


# In fp32 sums differ in their last digits; in bf16 the plain loss rounds every logit, so it is the coarser one.
@pytest.mark.parametrize("dtype, noise", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk", [64, 32768])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, noise: float, chunk: int, tied: bool
) -> None:
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", chunk)
    plain_loss, plain = gradients(make_model(dtype, tie_word_embeddings=tied))
    model = make_model(dtype, tie_word_embeddings=tied)
    trl_utils.add_fused_lm_head(model, outputs=("log_probs",))
    lean_loss, lean = gradients(model, fused_lm_head=True)
    assert lean_loss == pytest.approx(plain_loss, rel=noise)
    assert lean.keys() == plain.keys()
    for name, expected in plain.items():
        difference = (lean[name].float() - expected.float()).norm() / expected.float().norm()
        assert difference < noise, name
