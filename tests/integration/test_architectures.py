"""Architectures on two ranks: each loads sharded, trains, saves, and its adapter reloads; and, where a checkpoint has
to be converted, the sharded load ends with the bytes of the stock one.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qz3_widgets.analysis.proof import prove
from qz3_widgets.runs.store import Run
from qz3_widgets.training.tokenizers import byte_tokenizer

from .real_runs import Runs, losses

_LLAMA: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "model_type": "llama"},
    "llama-tied": {**_LLAMA, "model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 16},
    "mistral": {**_LLAMA, "model_type": "mistral", "head_dim": 16},
    "gemma3": {
        **_LLAMA, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
    },
    "phi3": {**_LLAMA, "model_type": "phi3"},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "mixtral": {**_LLAMA, **_EXPERTS, "model_type": "mixtral"},
    "qwen3-moe": {
        **_LLAMA, "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip
MOE = ("mixtral", "qwen3-moe")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CHECKPOINTS = ("llama", "llama-tied", "gpt2", "mixtral", "qwen3-moe", "prequantized")


def random_model(name: str, *, seed: int = 0) -> Any:
    """A model with transformers' own random weights, in bf16."""
    torch.manual_seed(seed)
    values = copy.deepcopy(SHAPES[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def write_checkpoint(name: str, folder: Path) -> Path:
    """A folder as from a hub: weights as the architecture's checkpoints have them, and a tokenizer."""
    if name == "prequantized":
        plain = write_checkpoint("llama", folder.with_name("to quantize"))
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
        )
    else:
        model = random_model(name)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def fields(architecture: str, **more: Any) -> dict[str, Any]:
    """Of a short run."""
    return {
        "lora__target_modules": ATTENTION if architecture in MOE else "all-linear",
        # Otherwise what a tiny model has counts as small, and stays whole.
        "zero__stage3_param_persistence_threshold": 100,
        "training__max_steps": 2,
        "data__eval_source": None,
        "data__eval_fraction": 0.0,
        **more,
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the models to be loaded from one."""
    root = tmp_path_factory.mktemp("many architectures")
    return {name: write_checkpoint(name, root / f"checkpoint {name}") for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def trained(runs: Runs, checkpoints: dict[str, Path]) -> dict[str, Run]:
    """Random models, and each checkpoint both ways."""
    configs = {}
    for name, shape in SHAPES.items():
        file = runs.folder / f"{name}.json"
        file.write_text(json.dumps(shape), encoding="utf-8")
        configs[f"random-{name}"] = fields(name, model__name_or_path=f"random:{file}", model__load_strategy="sharded")
    for name, folder in checkpoints.items():
        for strategy in ("sharded", "stock"):
            changes = {"model__name_or_path": str(folder), "model__load_strategy": strategy}
            configs[f"{strategy}-{name}"] = fields(name, **changes)
    runs.together(configs)
    return {key: runs.finished(key) for key in configs}


@pytest.mark.parametrize("name", SHAPES)
def test_loads_sharded_trains_saves_and_reloads(trained: dict[str, Run], name: str) -> None:
    run = trained[f"random-{name}"]
    assert run.state == "succeeded"
    assert sorted(losses(run)) == [1, 2]
    document = prove(run).to_json()
    assert document["zero3"]["partitioned_fraction"] == 1.0
    assert [rank["held_share"] for rank in document["ranks"]] == pytest.approx([0.5, 0.5], abs=0.01)
    assert document["gradients"]["missing"] == []
    reasons = [reason for reason in document["reasons"] if not (name in MOE and "stay in 16 bit" in reason)]
    assert reasons == []
    assert bool(document["reasons"]) is (name in MOE)

    assert run.adapter_dir is not None
    saved = load_file(run.adapter_dir / "adapter_model.safetensors")
    adapted = PeftModel.from_pretrained(random_model(name), run.adapter_dir)
    state = {key.replace(".default.", "."): value for key, value in adapted.state_dict().items() if "lora_" in key}
    assert state.keys() == saved.keys()
    for key, value in saved.items():
        assert torch.equal(state[key].to(value.dtype), value), key
        assert value.any(), key
    logits = adapted(torch.arange(8)[None]).logits
    assert torch.isfinite(logits.float()).all()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_ends_as_with_the_stock_load(trained: dict[str, Run], name: str) -> None:
    sharded, stock = trained[f"sharded-{name}"], trained[f"stock-{name}"]
    assert (sharded.state, stock.state) == ("succeeded", "succeeded")
    assert losses(sharded) == losses(stock)
    norms = [run.metrics()["grad_norm"].round(12).tolist() for run in (sharded, stock)]  # fp64, in another order
    assert norms[0] == norms[1]
    checksums = {prove(run).to_json()["zero3"]["checksum"] for run in (sharded, stock)}
    assert len(checksums) == 1
    assert None not in checksums
    assert sharded.adapter_dir is not None
    assert stock.adapter_dir is not None
    own, other = (
        (folder / "adapter_model.safetensors").read_bytes() for folder in (sharded.adapter_dir, stock.adapter_dir)
    )
    assert own == other


_READ = re.compile(r"^read ([\d.,]+) (\w+) of the checkpoint's ([\d.,]+) (\w+)", re.MULTILINE)
_UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_share_of_the_checkpoint(
    trained: dict[str, Run], checkpoints: dict[str, Path], name: str, rank: int
) -> None:
    log = trained[f"sharded-{name}"].layout.rank_log(rank).read_text(encoding="utf-8")
    found = _READ.search(log)
    assert found is not None, log
    num_read, num_all = (float(found[n].replace(",", "")) * _UNITS[found[n + 1]] for n in (1, 3))
    # A quantized checkpoint's statistics are read whole; in a model so small their tables are an eighth of it all.
    statistics = statistics_bytes(checkpoints[name])
    assert (num_read - statistics) / (num_all - statistics) <= 1.1 / 2, found[0]
    assert bool(statistics) is (name == "prequantized")


def statistics_bytes(folder: Path) -> int:
    """Bytes of what bitsandbytes has stored beside its packed weights."""
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".weight." in name)


def test_no_rank_complains(trained: dict[str, Run]) -> None:
    for key, run in trained.items():
        for rank in range(2):
            assert "Traceback" not in run.layout.rank_log(rank).read_text(encoding="utf-8"), key
