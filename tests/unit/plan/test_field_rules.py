from __future__ import annotations

from typing import Any

import pytest

from qz3_widgets.config import with_changes
from qz3_widgets.plan import Capabilities, Issue
from qz3_widgets.plan.rules import check

from .conftest import CHAT, MakeConfig, WriteLines

# rule, severity, field, what triggers it
TRIGGERS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("not-sharded", "info", "zero.zero_stage", {"zero__zero_stage": 2}),
    ("not-sharded", "info", "zero.zero_stage", {"zero__zero_stage": 0}),
    ("not-quantized", "info", "quantization.load_in_4bit", {"quantization__load_in_4bit": False}),
    (
        "storage-dtype",
        "warning",
        "quantization.bnb_4bit_quant_storage",
        {"quantization__bnb_4bit_quant_storage": "uint8"},
    ),
    (
        "precision-mismatch",
        "warning",
        "quantization.bnb_4bit_compute_dtype",
        {"quantization__bnb_4bit_compute_dtype": "float16"},
    ),
    (
        "precision-mismatch",
        "warning",
        "model.dtype",
        {"model__dtype": "float32", "quantization__bnb_4bit_quant_storage": "float32"},
    ),
    ("offload-with-4bit", "warning", "zero.offload_param_device", {"zero__offload_param_device": "cpu"}),
    (
        "offload-with-bnb-optimizer",
        "error",
        "training.optim",
        {"zero__offload_optimizer_device": "cpu", "training__optim": "paged_adamw_32bit"},
    ),
    ("modules-to-save", "warning", "lora.modules_to_save", {"lora__modules_to_save": ["lm_head"]}),
    ("load-strategy", "error", "zero.zero_stage", {"model__load_strategy": "replicated"}),
    ("load-strategy", "error", "model.load_strategy", {"model__load_strategy": "sharded", "zero__zero_stage": 2}),
    ("statistics-stay-whole", "warning", "zero.shard_statistics", {"zero__release_gathered": False}),
    ("dora-with-zero3-4bit", "error", "lora.use_dora", {"lora__use_dora": True}),
    (
        "packing-with-eager",
        "warning",
        "model.attn_implementation",
        {"data__packing": True, "model__attn_implementation": "eager"},
    ),
    ("eval-without-data", "error", "training.eval_steps", {"data__eval_fraction": 0.0, "training__eval_steps": 5}),
    (
        "eval-without-data",
        "error",
        "training.eval_on_start",
        {"data__eval_fraction": 0.0, "training__eval_on_start": True},
    ),
    ("eval-fraction", "warning", "data.eval_fraction", {"data__max_examples": 1}),
    ("eval-fraction", "error", "data.eval_fraction", {"data__max_examples": 1, "training__eval_steps": 5}),
    ("interval-beyond-end", "warning", "training.eval_steps", {"training__max_steps": 5, "training__eval_steps": 6}),
    ("interval-beyond-end", "warning", "training.save_steps", {"training__max_steps": 5, "training__save_steps": 6}),
    ("warmup-beyond-end", "warning", "training.warmup_steps", {"training__max_steps": 5, "training__warmup_steps": 5}),
    ("remote-code", "warning", "model.trust_remote_code", {"model__trust_remote_code": True}),
    (
        "no-effect",
        "warning",
        "training.num_train_epochs",
        {"training__max_steps": 5, "training__num_train_epochs": 2.0},
    ),
    (
        "no-effect",
        "warning",
        "training.warmup_steps",
        {"training__lr_scheduler_type": "constant", "training__warmup_steps": 5},
    ),
    ("no-effect", "warning", "data.split", {"data__split": "validation"}),
    ("no-effect", "warning", "data.hub_config", {"data__hub_config": "default"}),
    ("no-effect", "warning", "training.save_total_limit", {"training__save_total_limit": 2}),
]

# What is close to a trigger and is fine.
FINE: list[dict[str, Any]] = [
    {"zero__offload_optimizer_device": "cpu"},
    {"training__optim": "paged_adamw_32bit"},
    {"data__packing": True},
    {"model__attn_implementation": "eager"},
    {"data__eval_fraction": 0.0},
    {"data__max_examples": 2},
    {"training__max_steps": 5, "training__eval_steps": 5, "training__save_steps": 5, "training__warmup_steps": 4},
    {"training__num_train_epochs": 2.0},
    {"training__lr_scheduler_type": "constant_with_warmup", "training__warmup_steps": 5},
    {"training__save_steps": 5, "training__save_total_limit": 2},
    {"data__loss_on": "assistant"},
    {"data__loss_on": "completion"},
    {
        "training__precision": "fp32",
        "model__dtype": "float32",
        "quantization__bnb_4bit_compute_dtype": "float32",
        "quantization__bnb_4bit_quant_storage": "float32",
    },
]


def found(issues: tuple[Issue, ...]) -> list[tuple[str, str, str]]:
    return [(issue.rule, issue.severity, issue.field) for issue in issues]


@pytest.mark.parametrize("rule,severity,field,changes", TRIGGERS)
def test_rules_that_are_met(
    make_config: MakeConfig, gpus: Capabilities, rule: str, severity: str, field: str, changes: dict[str, Any]
) -> None:
    config = make_config(**changes)
    issues = check(config, gpus)
    assert (rule, severity, field) in found(issues)
    for issue in issues:
        assert issue.message
        if issue.fix is not None:
            # A fix can be applied, and then the issue is gone.
            after = check(with_changes(config, issue.fix), gpus)
            assert (issue.rule, issue.field) not in [(other.rule, other.field) for other in after]


@pytest.mark.parametrize("changes", FINE)
def test_what_is_fine(make_config: MakeConfig, gpus: Capabilities, changes: dict[str, Any]) -> None:
    assert found(check(make_config(**changes), gpus)) == []


def test_one_rank_has_nothing_to_shard(make_config: MakeConfig, cpu: Capabilities) -> None:
    assert found(check(make_config(launch__num_processes=1), cpu)) == [("one-rank", "info", "launch.num_processes")]


def test_storage_matters_only_where_parameters_are_gathered(make_config: MakeConfig, gpus: Capabilities) -> None:
    config = make_config(quantization__bnb_4bit_quant_storage="uint8", zero__zero_stage=2)
    assert found(check(config, gpus)) == [("not-sharded", "info", "zero.zero_stage")]


def test_dead_zero_3_fields_without_stage_3(make_config: MakeConfig, gpus: Capabilities) -> None:
    config = make_config(zero__zero_stage=1, zero__stage3_max_live_parameters=5)
    assert ("no-effect", "warning", "zero.stage3_max_live_parameters") in found(check(config, gpus))


def test_the_part_that_the_loss_counts(make_config: MakeConfig, gpus: Capabilities, write_lines: WriteLines) -> None:
    text = str(write_lines(*[{"text": "a"}] * 4, name="text.jsonl"))
    pairs = str(write_lines(*[{"prompt": "a", "completion": "b"}] * 4, name="pairs.jsonl"))
    for source, loss_on, expected in (
        (text, "all", []),
        (text, "completion", [("loss-on-completion", "error", "data.loss_on")]),
        (text, "assistant", [("loss-on-assistant", "error", "data.loss_on")]),
        (pairs, "completion", []),
        (pairs, "assistant", [("loss-on-assistant", "error", "data.loss_on")]),
    ):
        issues = check(make_config(data__source=source, data__loss_on=loss_on), gpus)
        assert found(issues) == expected
        for issue in issues:
            assert issue.fix is not None
            assert check(with_changes(make_config(data__source=source), issue.fix), gpus) == ()


def test_a_chat_template_for_data_without_chats(
    make_config: MakeConfig, gpus: Capabilities, write_lines: WriteLines
) -> None:
    text, template = str(write_lines({"text": "a"}, {"text": "b"})), str(write_lines("{{ messages }}", name="t.jinja"))
    issues = check(make_config(data__source=text, data__chat_template=template), gpus)
    assert found(issues) == [("no-effect", "warning", "data.chat_template")]


def test_a_source_of_its_own_for_evaluation(
    make_config: MakeConfig, gpus: Capabilities, write_lines: WriteLines
) -> None:
    held_out = str(write_lines(CHAT, name="eval.jsonl"))
    assert check(make_config(data__eval_source=held_out, training__eval_steps=5), gpus) == ()
    issues = check(make_config(data__eval_source=held_out, data__eval_fraction=0.2), gpus)
    assert found(issues) == [("no-effect", "warning", "data.eval_fraction")]
    other = str(write_lines({"text": "a"}, name="other.jsonl"))
    assert found(check(make_config(data__eval_source=other), gpus)) == [("eval-layout", "error", "data.eval_source")]
    issues = check(make_config(data__eval_source="./nowhere.jsonl"), gpus)
    assert found(issues) == [("data-not-found", "error", "data.eval_source")]


def test_errors_come_first_and_all_are_told(make_config: MakeConfig, cpu: Capabilities) -> None:
    config = make_config(
        model__name_or_path="./nowhere",
        zero__zero_stage=0,
        training__precision="fp16",
        lora__modules_to_save=["lm_head"],
        data__source="./nothing.jsonl",
        launch__environment={"RANK": "0"},
    )
    issues = check(config, cpu)
    assert {issue.rule for issue in issues} == {
        "model-not-found",
        "data-not-found",
        "fp16-on-cpu",
        "reserved-variable",
        "modules-to-save",
        "not-sharded",
    }
    order = [issue.severity for issue in issues]
    assert order == sorted(order, key=["error", "warning", "info"].index)
