from __future__ import annotations

import socket
from typing import Any

import pytest

from qz3_widgets.config import RunConfig
from qz3_widgets.plan import Capabilities, Issue, imagine
from qz3_widgets.plan.rules import check
from qz3_widgets.units import GIB

from .conftest import MakeConfig, machine


def found(config: RunConfig, capabilities: Capabilities) -> dict[str, Issue]:
    issues = check(config, capabilities)
    assert len({issue.rule for issue in issues}) == len(issues)
    return {issue.rule: issue for issue in issues}


def test_nothing_to_say(make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities) -> None:
    assert check(make_config(), gpus) == ()
    assert check(make_config(), cpu) == ()
    assert check(make_config(), imagine(2, 80 * GIB)) == ()


def test_a_gpu_that_is_not_there(make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities) -> None:
    issue = found(make_config(launch__device="cuda"), cpu)["no-gpu"]
    assert (issue.severity, issue.field, issue.fix) == ("error", "launch.device", {"launch.device": "cpu"})
    assert "no GPU is visible on box" in issue.message
    assert found(make_config(launch__device="cuda"), gpus) == {}
    wrong_torch = machine(2, torch_has_cuda=False)
    assert "torch is built for the CPU" in found(make_config(launch__device="cuda"), wrong_torch)["no-gpu"].message
    unused = found(make_config(), wrong_torch)["gpu-unused"]
    assert (unused.severity, unused.field) == ("warning", "launch.device")
    assert found(make_config(launch__device="cpu"), wrong_torch) == {}


@pytest.mark.parametrize(
    "ranks,per_gpu,machines,fix",
    [(3, 1, 1, 2), (5, 2, 1, 4), (6, 1, 2, 4)],
)
def test_more_ranks_than_gpus(
    make_config: MakeConfig, gpus: Capabilities, ranks: int, per_gpu: int, machines: int, fix: int
) -> None:
    several = {"launch__main_process_ip": "10.0.0.1", "launch__main_process_port": 29500} if machines > 1 else {}
    config = make_config(
        launch__num_processes=ranks, launch__ranks_per_gpu=per_gpu, launch__num_machines=machines, **several
    )
    issue = found(config, gpus)["more-ranks-than-gpus"]
    assert (issue.severity, issue.field) == ("error", "launch.num_processes")
    assert issue.fix == {"launch.num_processes": fix}


def test_as_many_ranks_as_fit(make_config: MakeConfig, gpus: Capabilities) -> None:
    assert found(make_config(launch__num_processes=4, launch__ranks_per_gpu=2), gpus) == {}
    assert found(make_config(), machine(1))["more-ranks-than-gpus"].message.endswith(
        "2 ranks on this machine, but 1 GPU takes 1 (ranks_per_gpu is 1)"
    )


def test_idle_gpus(make_config: MakeConfig) -> None:
    issue = found(make_config(), machine(8))["idle-gpus"]
    assert (issue.severity, issue.message) == ("info", "6 of 8 GPUs stay idle")


def test_ranks_per_gpu_on_the_cpu(make_config: MakeConfig, cpu: Capabilities) -> None:
    issue = found(make_config(launch__ranks_per_gpu=2), cpu)["ranks-per-gpu-without-gpu"]
    assert (issue.severity, issue.fix) == ("warning", {"launch.ranks_per_gpu": 1})


def test_cores(make_config: MakeConfig, cpu: Capabilities, gpus: Capabilities) -> None:
    assert found(make_config(launch__num_processes=5), cpu)["more-ranks-than-cores"].severity == "warning"
    assert found(make_config(launch__threads_per_rank=3), cpu)["too-many-threads"].severity == "warning"
    assert found(make_config(launch__threads_per_rank=2, launch__num_processes=2), cpu) == {}
    assert found(make_config(launch__threads_per_rank=3), gpus) == {}


@pytest.mark.parametrize("name,package", [("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash-attn-3")])
def test_flash_attention(
    make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities, name: str, package: str
) -> None:
    config = make_config(model__attn_implementation=name)
    fix = {"model.attn_implementation": "sdpa"}
    assert found(config, gpus) == {}
    assert found(config, imagine(2, 80 * GIB)) == {}
    missing = found(config, machine(2, flash_attention=()))["flash-attention-missing"]
    assert (missing.severity, missing.fix) == ("error", fix)
    assert missing.message.endswith(package)
    assert found(config, cpu)["flash-attention-on-cpu"].fix == fix
    assert "Ampere" in found(config, machine(2, compute_capability=(7, 5)))["flash-attention-gpu"].message
    wide = make_config(model__attn_implementation=name, model__dtype="float32")
    assert found(wide, gpus)["flash-attention-dtype"].severity == "error"


def test_offloaded_activations(make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities) -> None:
    config = make_config(training__activation_offload=True)
    assert found(config, gpus) == {}
    issue = found(config, cpu)["activation-offload-on-cpu"]
    assert (issue.severity, issue.fix) == ("warning", {"training.activation_offload": False})
    kept = make_config(training__activation_offload=True, training__activation_checkpointing="none")
    issue = found(kept, gpus)["activation-offload-without-checkpointing"]
    assert (issue.severity, issue.fix) == ("warning", {"training.activation_checkpointing": "non_reentrant"})
    assert found(make_config(), cpu) == {}  # auto has nothing to say


def test_types_that_the_device_lacks(make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities) -> None:
    half = make_config(
        training__precision="fp16",
        model__dtype="float16",
        quantization__bnb_4bit_compute_dtype="float16",
        quantization__bnb_4bit_quant_storage="float16",
    )
    assert found(half, gpus) == {}
    issue = found(half, cpu)["fp16-on-cpu"]
    assert (issue.severity, issue.fix) == ("error", {"training.precision": "bf16"})
    old = found(make_config(), machine(2, compute_capability=(7, 5)))["bf16-on-old-gpu"]
    assert old.severity == "warning"
    assert found(half, machine(2, compute_capability=(7, 5))) == {}
    assert found(make_config(), machine(2, compute_capability=None)) == {}


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_for_gpus(make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities, optim: str) -> None:
    assert found(make_config(training__optim=optim), cpu)["optimizer-on-cpu"].fix == {"training.optim": "adamw_torch"}
    assert found(make_config(training__optim=optim), gpus) == {}
    assert found(make_config(training__optim="adamw_torch_fused"), cpu) == {}


def test_offload_on_the_cpu(make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities) -> None:
    config = make_config(zero__offload_optimizer_device="cpu")
    assert found(config, cpu)["offload-on-cpu"].fix == {"zero.offload_optimizer_device": "none"}
    assert found(config, gpus) == {}


def test_a_compiler_for_deepspeeds_operator(make_config: MakeConfig) -> None:
    bare = machine(0, has_cpp_compiler=False, has_ninja=False)
    issues = found(make_config(), bare)
    assert {"compiler-missing", "ninja-missing"} == issues.keys()
    assert "g++" in issues["compiler-missing"].message
    assert "compiler-missing" not in found(make_config(zero__zero_stage=0), bare)
    assert found(make_config(), machine(2, has_cpp_compiler=False, has_ninja=False)) == {}
    assert found(make_config(), machine(0, has_cpp_compiler=None, has_ninja=None)) == {}


def test_a_port_in_use(make_config: MakeConfig, gpus: Capabilities) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = make_config(launch__main_process_port=port)
        issue = found(config, gpus)["port-in-use"]
        assert (issue.severity, issue.fix) == ("error", {"launch.main_process_port": None})
        assert str(port) in issue.message
        assert found(config, imagine(2, GIB)) == {}
        several = make_config(
            launch__main_process_port=port,
            launch__main_process_ip="10.0.0.1",
            launch__num_machines=2,
            launch__num_processes=4,
        )
        assert found(several, gpus) == {}
    assert found(config, gpus) == {}


@pytest.mark.parametrize(
    "name,words",
    [
        ("RANK", "is set by the run itself"),
        ("LOCAL_RANK", "is set by the run itself"),
        ("MASTER_PORT", "set launch.main_process_port"),
        ("DS_ACCELERATOR", "set launch.device"),
        ("OMP_NUM_THREADS", "set launch.threads_per_rank"),
        ("CUDA_VISIBLE_DEVICES", "export it before"),
        ("ACCELERATE_USE_CPU", "is set by the run itself"),
        ("QZ3_RANKS_PER_GPU", "is set by the run itself"),
    ],
)
def test_variables_of_the_run_itself(make_config: MakeConfig, gpus: Capabilities, name: str, words: str) -> None:
    issue = found(make_config(launch__environment={name: "1", "NCCL_DEBUG": "INFO"}), gpus)["reserved-variable"]
    assert (issue.severity, issue.field) == ("error", "launch.environment")
    assert words in issue.message
    assert issue.fix == {"launch.environment": {"NCCL_DEBUG": "INFO"}}


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "MY_RANK", "RANKS", "HF_HOME"])
def test_other_variables_are_free(make_config: MakeConfig, gpus: Capabilities, name: str) -> None:
    assert found(make_config(launch__environment={name: "1"}), gpus) == {}


def test_a_secret_in_a_harmless_name(make_config: MakeConfig, gpus: Capabilities) -> None:
    issue = found(make_config(launch__environment={"MINE": "hf_" + "a" * 30}), gpus)["secret-in-environment"]
    assert issue.severity == "error"
    assert "a" * 30 not in issue.message
    assert issue.fix == {"launch.environment": {}}


def test_every_machine_rule_was_met(make_config: MakeConfig) -> None:
    # A rule that yields nothing here yields at least the issues above: this only guards the registry.
    from qz3_widgets.plan import field_rules, machine_rules, rules

    functions: list[Any] = [
        value
        for module in (field_rules, machine_rules)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    ]
    assert set(functions) == set(rules.RULES)
    assert len(rules.RULES) == len(functions)
