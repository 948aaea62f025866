"""Architectures on two ranks: each loads sharded, trains, saves, and its adapter reloads; and, where a checkpoint has
to be converted, the sharded load ends with the bytes of the stock one.

A run spends most of its time on imports. So one launch trains them all, one after the other, each with the training
code and the run directory of a run of its own.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qz3_widgets.analysis.proof import prove
from qz3_widgets.launch.directory import render_into
from qz3_widgets.plan.plan import make_plan
from qz3_widgets.runs.store import Run
from qz3_widgets.training.tokenizers import byte_tokenizer

from .real_runs import Runs, losses, processes_of

ALL_SECONDS = 400.0
"""Sixty on idle cores."""

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

SCRIPT = """
import argparse
import gc
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--run-dir", type=Path, required=True)
run_dir = parser.parse_args().run_dir

from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.training import main as ranks
from qz3_widgets.training.session import RankIdentity, RankSession

layout, identity = RunLayout(run_dir), RankIdentity.from_environment()
folders = sorted(path for path in run_dir.parent.iterdir() if path.is_dir())
with RankSession(layout, identity) as session:
    ranks._keep_operators_by_environment()
    import torch
    from accelerate.state import AcceleratorState
    from qz3_widgets.training.sharding.sources import FileTensor
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    end = torch.distributed.destroy_process_group
    for folder in folders:
        if folder != folders[-1]:
            torch.distributed.destroy_process_group = lambda: None
        else:
            torch.distributed.destroy_process_group = end
        print(f"== {folder.name}")
        FileTensor.bytes_read = 0
        own = RunLayout(folder)
        own.make_folders()
        ranks._train(ranks._read_config(own), own, session, resume=False)
        if folder != folders[-1]:
            session.on_end("succeeded", None)
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
        gc.collect()
"""


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


class Trained:
    """All runs of the one launch, and what the ranks have said."""

    def __init__(self, runs: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, self.folder = runs, folder
        self.checkpoints: dict[str, Path] = {}
        script = folder.parent / "many.py"
        script.write_text(SCRIPT, encoding="utf-8")
        monkeypatch.setattr("qz3_widgets.launch.directory.find_train_script", lambda: script)

    def add(self, key: str, architecture: str, **changes: Any) -> None:
        moe = architecture in MOE
        config = self.runs.config(
            name=key,
            lora__target_modules=ATTENTION if moe else "all-linear",
            # Otherwise what a tiny model has counts as small, and stays whole.
            zero__stage3_param_persistence_threshold=100,
            training__max_steps=2,
            data__eval_source=None,
            data__eval_fraction=0.0,
            **changes,
        )
        plan = make_plan(config)
        plan.raise_if_blocked()
        render_into(plan, self.folder / key)

    def launch(self) -> None:
        first = min(path for path in self.folder.iterdir())
        done = subprocess.run(["bash", str(first / "launch.sh")], capture_output=True, text=True, timeout=ALL_SECONDS)
        assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
        assert not processes_of(self.folder)
        text = [(first / "logs" / f"rank-{rank:05d}.log").read_text(encoding="utf-8") for rank in range(2)]
        self.logs = [dict(re.findall(r"^== (\S+)\n(.*?)(?=^== |\Z)", each, re.MULTILINE | re.DOTALL)) for each in text]

    def run(self, key: str) -> Run:
        return Run(self.folder / key)


@pytest.fixture(scope="module")
def trained(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("many architectures")
    (root / "runs").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = Trained(runs, root / "runs", monkeypatch)
        for name, shape in SHAPES.items():
            file = root / f"{name}.json"
            file.write_text(json.dumps(shape), encoding="utf-8")
            made.add(f"random-{name}", name, model__name_or_path=f"random:{file}", model__load_strategy="sharded")
        for name in CHECKPOINTS:
            folder = made.checkpoints[name] = write_checkpoint(name, root / f"checkpoint {name}")
            for strategy in ("sharded", "stock"):
                made.add(f"{strategy}-{name}", name, model__name_or_path=str(folder), model__load_strategy=strategy)
        made.launch()
    return made


@pytest.mark.parametrize("name", SHAPES)
def test_loads_sharded_trains_saves_and_reloads(trained: Trained, name: str) -> None:
    run = trained.run(f"random-{name}")
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
def test_a_checkpoint_ends_as_with_the_stock_load(trained: Trained, name: str) -> None:
    sharded, stock = trained.run(f"sharded-{name}"), trained.run(f"stock-{name}")
    assert (sharded.state, stock.state) == ("succeeded", "succeeded")
    assert losses(sharded) == losses(stock)
    assert sharded.metrics()["grad_norm"].tolist() == stock.metrics()["grad_norm"].tolist()
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
def test_a_rank_reads_its_share_of_the_checkpoint(trained: Trained, name: str, rank: int) -> None:
    found = _READ.search(trained.logs[rank][f"sharded-{name}"])
    assert found is not None, trained.logs[rank][f"sharded-{name}"]
    num_read, num_all = (float(found[n].replace(",", "")) * _UNITS[found[n + 1]] for n in (1, 3))
    # A quantized checkpoint's statistics are read whole; in a model so small their tables are an eighth of it all.
    statistics = statistics_bytes(trained.checkpoints[name])
    assert (num_read - statistics) / (num_all - statistics) <= 1.1 / 2, found[0]
    assert bool(statistics) is (name == "prequantized")


def statistics_bytes(folder: Path) -> int:
    """Bytes of what bitsandbytes has stored beside its packed weights."""
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".weight." in name)


def test_no_rank_complains(trained: Trained) -> None:
    for log in trained.logs:
        for key, text in log.items():
            assert "Traceback" not in text, (key, text)
