"""Every way in which a run is not what it was meant to be, provoked for real on two ranks, and what is said of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qz3_widgets.analysis.proof import Proof, prove
from qz3_widgets.runs.store import Run
from tests.conftest import Qz3

from .real_runs import Runs

SHORT: dict[str, Any] = {
    "model__load_strategy": "sharded",
    # Otherwise what a tiny model has counts as small, and stays whole.
    "zero__stage3_param_persistence_threshold": 100,
    "training__max_steps": 2,
    "data__eval_source": None,
    "data__eval_fraction": 0.0,
}
MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
AS_RELEASED: dict[str, Any] = {
    "model__load_strategy": "stock",
    "zero__release_gathered": False,
    "zero__shard_statistics": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "proof-sharded": SHORT,
    # Nothing of the workbench's own in the load nor in the step.
    "proof-stock": {**SHORT, **AS_RELEASED},
    "proof-stage2": {
        **SHORT,
        "model__load_strategy": "auto",
        "zero__zero_stage": 2,
        "zero__stage3_param_persistence_threshold": "auto",
    },
    "proof-16bit": {**SHORT, "model__load_strategy": "auto", "quantization__load_in_4bit": False},
    "proof-unregistered": SHORT,
    "proof-cut": SHORT,
    "proof-embeddings": SHORT,
}
CHANGES = {
    # As where TrainingArguments are made after the model, or were let go of: the loader does not know of ZeRO-3.
    "proof-unregistered": """
        from qz3_widgets.training import loading
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        def load(config, base, mark):
            unset_hf_deepspeed_config()
            return loading.load_stock(config, base, mark)

        patch.setitem(loading.LOADERS, "sharded", load)
    """,
    # The output of the first layer is cut off from the graph: its adapter is never trained, and nothing complains.
    "proof-cut": """
        from qz3_widgets.training import model

        attach = model.attach_adapter

        def attach_and_cut(config, loaded):
            attached = attach(config, loaded)
            layer = attached.base_model.model.model.layers[0]
            layer.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
            return attached

        patch.setattr(model, "attach_adapter", attach_and_cut)
    """,
    # Says in the log which embeddings are gathered before the first layer, in the last one's backward, and at the end.
    "proof-embeddings": """
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from qz3_widgets.training.trainer import RecordedTrainer

        step = RecordedTrainer.training_step

        def watched(self, model, *args, **kwargs):
            base = self.model.get_base_model()
            head = dict(base.lm_head.named_parameters())["weight"]
            embeddings = {"input": base.get_input_embeddings().weight, "head": head}
            def tell(when):
                there = [name for name, each in embeddings.items() if each.ds_status != ZeroParamStatus.NOT_AVAILABLE]
                print("EMBEDDINGS", when, *there)
            hook = base.model.layers[-1].register_full_backward_pre_hook(lambda *_: tell("backward"))
            first = base.model.layers[0].register_forward_pre_hook(lambda *_: tell("forward"))
            loss = step(self, model, *args, **kwargs)
            tell("end")
            hook.remove(), first.remove()
            return loss

        patch.setattr(RecordedTrainer, "training_step", watched)
    """,
}


@pytest.fixture(scope="module")
def ran(runs: Runs) -> dict[str, Run]:
    """One run of each kind."""
    shape = runs.folder / "mixtral.json"
    shape.write_text(json.dumps(MIXTRAL), encoding="utf-8")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    moe = {**SHORT, "model__name_or_path": f"random:{shape}", "lora__target_modules": targets}
    configs = {**CONFIGS, "proof-moe": moe}
    runs.together(configs, changes=CHANGES)
    return {key: runs.finished(key) for key in configs}


def alarms(run: Run) -> list[str]:
    """What rank 0 has said in its log, in order."""
    lines = run.layout.rank_log(0).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("PROOF FAILED: ") for line in lines if line.startswith("PROOF FAILED: ")]


def failed(proof: Proof) -> list[str]:
    return [check.name for check in proof.checks if check.outcome == "failed"]


@pytest.fixture(scope="module")
def sharded(ran: dict[str, Run]) -> Run:
    return ran["proof-sharded"]


@pytest.fixture(scope="module")
def stock(ran: dict[str, Run]) -> Run:
    return ran["proof-stock"]


def test_a_sharded_run_is_ok(sharded: Run, qz3: Qz3) -> None:
    result = qz3("verify", sharded.layout.root, "--json", check=True)
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert document["reasons"] == []
    assert document["zero3"]["partitioned_fraction"] == 1.0
    assert document["quantization"]["layers_4bit"] == 14
    assert 0.5 < document["quantization"]["bytes_per_4bit_parameter"] < 0.52
    assert [entry["why"] for entry in document["quantization"]["layers_16bit"]] == ["embedding", "head"]
    assert document["quantization"]["statistics"]["whole_bytes"] == 0
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1]
    for rank in document["ranks"]:
        assert rank["held_share"] == pytest.approx(0.5, abs=0.01)
    assert {check["outcome"] for check in document["checks"]} == {"passed"}
    assert alarms(sharded) == []
    step = document["zero3"]["step"]
    assert step["leaked_bytes"] == 0
    # One layer of the two at work, and in the backward the other one ahead: never more, and nothing past its use.
    assert step["largest_unit_bytes"] < 0.6 * step["model_bytes"]
    for peak in step["peaks"]:
        assert peak["alive_bytes"] == peak["needed_bytes"] <= 2 * step["largest_unit_bytes"]
    assert document["gradients"] == {
        "tensors": 28, "missing": [], "num_missing": 0, "zero": [], "num_zero": 0, "a_checked": True, "steps": 2,
    }  # fmt: skip


def test_the_proof_costs_next_to_nothing(sharded: Run) -> None:
    """Of a run of ten seconds."""
    for rank in prove(sharded).to_json()["ranks"]:
        assert sum(rank["probe_seconds"].values()) < 0.5, rank["probe_seconds"]


def test_a_stock_run_is_not(stock: Run, qz3: Qz3) -> None:
    result = qz3("verify", stock.layout.root)
    assert result.returncode == 1
    reason = (
        "every rank held the whole model after loading: ZeRO-3 does not shard a 4-bit model while it loads "
        "(model.load_strategy is stock)"
    )
    assert f"✕ not ok: {reason}" in result.stdout
    proof = prove(stock)
    assert proof.reasons[0] == reason
    assert failed(proof) == ["partitioned_at_load", "released"]
    assert "where" in proof.reasons[1]
    assert alarms(stock) == list(proof.reasons)
    assert proof.probes[1]["loaded"]["held_bytes"] == proof.probes[1]["loaded"]["bytes"]


def test_stock_and_sharded_hold_the_same_bytes(stock: Run, sharded: Run) -> None:
    """The checksum does not depend on how a model is spread, nor on where its statistics are."""
    sums = {prove(run).to_json()["zero3"]["checksum"] for run in (stock, sharded)}
    assert len(sums) == 1
    assert None not in sums


def test_show_has_the_verdict(stock: Run, sharded: Run, qz3: Qz3) -> None:
    shown = json.loads(qz3("show", stock.layout.root, "--json", check=True).stdout)["proof"]
    assert shown["ok"] is False
    assert "held the whole model after loading" in shown["sentence"]
    assert "✓ proven: sharded by ZeRO-3" in qz3("show", sharded.layout.root, check=True).stdout


def test_stage_2(ran: dict[str, Run]) -> None:
    run = ran["proof-stage2"]
    proof = prove(run)
    reason = "gradients and optimizer state are sharded, the weights are not, and every rank held the whole model"
    assert proof.reasons == (f"zero.zero_stage is 2: {reason}",)
    assert alarms(run) == list(proof.reasons)


def test_not_quantized(ran: dict[str, Run]) -> None:
    run = ran["proof-16bit"]
    proof = prove(run)
    assert proof.reasons == ("no weight is in 4 bit: quantization.load_in_4bit is off",)
    assert proof.to_json()["zero3"]["partitioned_fraction"] == 1.0
    assert alarms(run) == list(proof.reasons)


def test_deepspeed_not_registered_before_the_load(ran: dict[str, Run]) -> None:
    run = ran["proof-unregistered"]
    proof = prove(run)
    assert failed(proof) == ["registered"]
    assert proof.reasons[0].startswith("DeepSpeed was not registered before the model was loaded")
    assert "every rank loaded the whole model" in proof.reasons[0]
    assert alarms(run) == list(proof.reasons)


def test_an_adapter_without_gradients(ran: dict[str, Run]) -> None:
    run = ran["proof-cut"]
    proof = prove(run)
    assert failed(proof) == ["gradients"]
    assert proof.reasons[0].startswith("14 of 28 trainable tensors got no gradient in the first step")
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in proof.reasons[0]
    assert "model.layers.1" not in proof.reasons[0]
    assert alarms(run) == list(proof.reasons)


def test_a_fused_moe_left_in_16_bit(ran: dict[str, Run]) -> None:
    run = ran["proof-moe"]
    proof = prove(run)
    assert failed(proof) == ["layers"]
    assert "of the model's weights stay in 16 bit and should be in 4" in proof.reasons[0]
    assert "model.layers.{0..1}.mlp.experts.gate_up_proj" in proof.reasons[0]
    assert "several experts in one 3-D tensor" in proof.reasons[0]
    [fused] = [entry for entry in proof.to_json()["quantization"]["layers_16bit"] if entry["why"] == "fused"]
    assert fused["weights"] == 2 * 4 * 3 * 64 * 96
    assert alarms(run) == list(proof.reasons)


def test_embeddings_are_gathered_only_while_they_are_used(ran: dict[str, Run]) -> None:
    """Neither is there in the layers' backward; the head is gathered once a micro-batch."""
    run = ran["proof-embeddings"]
    told = [line.split()[1:] for line in run.layout.rank_log(0).read_text().splitlines() if line.startswith("EMB")]
    assert {when for when, *_ in told} == {"forward", "backward", "end"}
    assert all(not there for _, *there in told), told
    assert prove(run).ok
