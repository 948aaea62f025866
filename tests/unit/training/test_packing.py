"""Packed examples don't see each other: TRL's packed batches through transformers' attention, against one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qz3_widgets.config.shapes import read_shape

LENGTHS = (5, 9, 3, 7)


@pytest.fixture(scope="module")
def examples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def batch(examples: list[list[int]]) -> dict[str, Any]:
    """All of them in one sequence, as the trainer's packing and collator make it."""
    packed = pack_dataset(Dataset.from_dict({"input_ids": examples}), seq_length=sum(LENGTHS), strategy="bfd")
    assert len(packed) == 1
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return dict(collator([packed[0]]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", ["tiny-llama"])
def test_an_example_is_as_alone(examples: list[list[int]], batch: dict[str, Any], attention: str, shape: str) -> None:
    values = dict(read_shape(shape))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    assert "attention_mask" not in batch
    together = model(**inputs, use_cache=False).logits[0]
    position = 0
    tokens = batch["input_ids"][0].tolist()
    seen = []
    while position < len(tokens):
        example = next(each for each in examples if tokens[position : position + len(each)] == each)
        alone = model(input_ids=torch.tensor([example]), use_cache=False).logits[0]
        torch.testing.assert_close(together[position : position + len(example)], alone, rtol=1e-5, atol=1e-5)
        position += len(example)
        seen.append(len(example))
    assert sorted(seen) == sorted(LENGTHS)


def test_the_first_token_of_an_example_is_no_target(examples: list[list[int]], batch: dict[str, Any]) -> None:
    """Or each example would be asked to foretell the next one's beginning."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(examples)
    assert all(batch["labels"][0, start] == -100 for start in starts)
