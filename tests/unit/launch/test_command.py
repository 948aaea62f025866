from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig, ZeroSection
from qz3_widgets.launch.command import Rendered, deepspeed_config, render

from .conftest import plan_of

RUN_DIR = Path("/some where/runs/demo-1")
SCRIPT = Path("/check out/launchers/train_qlora.py")


def _render(port: int = 0, package_root: Path | None = None, **changes: object) -> Rendered:
    return render(
        plan_of(**changes), RUN_DIR, port=port, python="/a venv/bin/python", train_script=SCRIPT,
        working_dir=Path("/home/me & you"), package_root=package_root,
    )  # fmt: skip


def test_argv_names_everything_in_full() -> None:
    assert _render().argv == (
        "/a venv/bin/python", "-m", "accelerate.commands.launch", "--config_file", f"{RUN_DIR}/accelerate.yaml",
        "--deepspeed_config_file", f"{RUN_DIR}/deepspeed.json", str(SCRIPT), "--run-dir", str(RUN_DIR),
    )  # fmt: skip


def test_accelerate_yaml_for_zero3_on_the_cpu() -> None:
    content = yaml.safe_load(_render().accelerate_yaml)
    assert content == {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": f"{RUN_DIR}/deepspeed.json", "zero3_init_flag": True},
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "main_process_port": 0,
        "main_training_function": "main",
        "use_cpu": False,  # excludes DeepSpeed; DS_ACCELERATOR chooses the CPU
        "same_network": True,
        "rdzv_backend": "static",
    }


def test_accelerate_yaml_says_nothing_that_deepspeed_json_says() -> None:
    for stage in (1, 2, 3):
        content = yaml.safe_load(_render(zero__zero_stage=stage).accelerate_yaml)
        assert "mixed_precision" not in content
        assert set(content["deepspeed_config"]) == {"deepspeed_config_file", "zero3_init_flag"}
        assert content["deepspeed_config"]["zero3_init_flag"] is (stage == 3)


@pytest.mark.parametrize(
    "num_processes, precision, kind, mixed",
    [(2, "bf16", "MULTI_GPU", "bf16"), (1, "fp32", "NO", "no"), (1, "fp16", "NO", "fp16")],
)
def test_without_deepspeed(num_processes: int, precision: str, kind: str, mixed: str) -> None:
    rendered = _render(zero__zero_stage=0, launch__num_processes=num_processes, training__precision=precision)
    content = yaml.safe_load(rendered.accelerate_yaml)
    assert (content["distributed_type"], content["mixed_precision"]) == (kind, mixed)
    assert content["use_cpu"] is True
    assert rendered.deepspeed_json is None
    assert "deepspeed" not in " ".join(rendered.argv)
    assert rendered.environment["ACCELERATE_USE_CPU"] == "true"


def test_environment_on_the_cpu_and_on_gpus() -> None:
    on_cpu = _render(launch__threads_per_rank=3).environment
    assert on_cpu["DS_ACCELERATOR"] == "cpu"
    assert on_cpu["OMP_NUM_THREADS"] == "3"
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert on_cpu["TOKENIZERS_PARALLELISM"] == "false"
    assert "ACCELERATE_USE_CPU" not in on_cpu
    on_gpu = _render(launch__device="cuda", launch__ranks_per_gpu=2).environment
    assert on_gpu["DS_ACCELERATOR"] == "cuda"
    assert on_gpu["QZ3_RANKS_PER_GPU"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in on_gpu


def test_the_users_environment_wins_and_holds_no_secrets() -> None:
    rendered = _render(launch__environment={"OMP_NUM_THREADS": "7", "NOTE": "it's $HOME"})
    assert rendered.environment["OMP_NUM_THREADS"] == "7"
    assert """export NOTE='it'"'"'s $HOME'""" in rendered.launch_sh
    with pytest.raises(ValueError, match=r"launch\.environment: the value of PROXY looks like a secret"):
        _render(launch__environment={"PROXY": "http://me:pass@proxy:80"})


def test_the_port_is_left_to_the_system_unless_one_is_given() -> None:
    free = _render()
    assert (free.environment["PET_STANDALONE"], free.environment["PET_LOCAL_ADDR"]) == ("1", "127.0.0.1")
    given = _render(port=29511, launch__main_process_port=29511)
    assert not given.environment.keys() & {"PET_STANDALONE", "PET_LOCAL_ADDR"}
    assert yaml.safe_load(given.accelerate_yaml)["main_process_port"] == 29511


def test_several_machines() -> None:
    launch: dict[str, Any] = {
        "launch__num_machines": 2, "launch__machine_rank": 1, "launch__num_processes": 8,
        "launch__main_process_ip": "10.0.0.1", "launch__main_process_port": 29500,
    }  # fmt: skip
    content = yaml.safe_load(_render(port=29500, **launch).accelerate_yaml)
    assert content["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    assert (content["machine_rank"], content["num_machines"], content["num_processes"]) == (1, 2, 8)
    assert (content["main_process_ip"], content["main_process_port"]) == ("10.0.0.1", 29500)
    with pytest.raises(ValueError, match="main_process_port: several machines have to agree"):
        _render(port=0, **launch)


def test_deepspeed_json_of_stage_3() -> None:
    content = json.loads(_render().deepspeed_json or "")
    assert content["train_batch_size"] == content["gradient_accumulation_steps"] == "auto"
    assert content["train_micro_batch_size_per_gpu"] == "auto"
    assert (content["bf16"], content["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert content["gradient_clipping"] == 1.0
    zero = content["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_prefetch_bucket_size"] == zero["reduce_bucket_size"] == "auto"
    assert not {"offload_param", "offload_optimizer"} & zero.keys()
    assert not {"zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"} & content.keys()


def test_lower_stages_have_no_stage_3_fields() -> None:
    for stage in (1, 2):
        zero = deepspeed_config(with_changes(RunConfig(), {"zero.zero_stage": stage}))["zero_optimization"]
        assert not [name for name in zero if name.startswith(("stage3", "sub_group", "offload_param"))]


OTHER_VALUES: dict[str, Any] = {
    "zero_stage": 2, "offload_param_device": "cpu", "offload_optimizer_device": "cpu", "overlap_comm": False,
    "contiguous_gradients": False, "reduce_bucket_size": 7, "stage3_prefetch_bucket_size": 7,
    "stage3_param_persistence_threshold": 7, "stage3_max_live_parameters": 7, "stage3_max_reuse_distance": 7,
    "sub_group_size": 7, "stage3_gather_16bit_weights_on_model_save": False, "offload_pin_memory": False,
}  # fmt: skip


IN_THE_RANK = {"fused_gather", "leaf_modules", "release_gathered", "shard_statistics"}


@pytest.mark.parametrize("field", sorted(set(ZeroSection.model_fields) - IN_THE_RANK))
def test_every_field_of_zero_reaches_deepspeed(field: str) -> None:
    base = with_changes(RunConfig(), {"zero.offload_optimizer_device": "cpu"} if field == "offload_pin_memory" else {})
    changed = with_changes(base, {f"zero.{field}": OTHER_VALUES[field]})
    assert deepspeed_config(base) != deepspeed_config(changed)


def test_optimizers_that_deepspeed_has_to_be_told_about() -> None:
    bnb = deepspeed_config(with_changes(RunConfig(), {"training.optim": "paged_adamw_8bit"}))
    assert bnb["zero_allow_untested_optimizer"] is True
    offloaded = deepspeed_config(with_changes(RunConfig(), {"zero.offload_optimizer_device": "cpu"}))
    assert offloaded["zero_force_ds_cpu_optimizer"] is False
    assert offloaded["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("precision, on", [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", None)])
def test_precision(precision: str, on: str | None) -> None:
    content = deepspeed_config(with_changes(RunConfig(), {"training.precision": precision}))
    assert [name for name in ("bf16", "fp16") if content[name]["enabled"]] == ([on] if on else [])


def test_rendering_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _render()
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert _render() == first
    assert not RUN_DIR.exists()


def _execute(tmp_path: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a rendered launch.sh with a Python that prints what it was given."""
    run_dir = tmp_path / "run $1 dir"
    run_dir.mkdir(parents=True)
    script = tmp_path / "train it.py"
    script.touch()
    python = tmp_path / "my python"
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "arg:$word"; done\nenv; echo "cwd:$PWD"\n')
    python.chmod(0o755)
    plan = plan_of(launch__environment={"NOTE": "two  words; $(no) `no`"})
    rendered = render(
        plan, Path("/old place/run"), port=0, python=str(python), train_script=script, working_dir=tmp_path,
        package_root=Path("/my root"),
    )  # fmt: skip
    (run_dir / "launch.sh").write_text(rendered.launch_sh)
    command = ["bash", "launch.sh", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "QZ3_PYTHON"}
    return subprocess.run(command, cwd=run_dir, env={**inherited, **environment}, capture_output=True, text=True)


def test_launch_sh_in_a_moved_directory_with_odd_names(tmp_path: Path) -> None:
    done = _execute(tmp_path, {"RANK": "3", "MASTER_PORT": "1", "ACCELERATE_MIXED_PRECISION": "fp8"}, "--resume")
    run_dir = tmp_path / "run $1 dir"
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.removeprefix("arg:") for line in lines if line.startswith("arg:")] == [
        "-m", "accelerate.commands.launch", "--config_file", f"{run_dir}/accelerate.yaml", "--deepspeed_config_file",
        f"{run_dir}/deepspeed.json", str(tmp_path / "train it.py"), "--run-dir", str(run_dir), "--resume",
    ]  # fmt: skip
    assert "NOTE=two  words; $(no) `no`" in lines
    assert f"cwd:{tmp_path}" in lines
    assert [line for line in lines if line.startswith(f"PATH={tmp_path}:")]
    assert not [line for line in lines if line.startswith(("RANK=", "MASTER_PORT=", "ACCELERATE_MIXED"))]
    (path,) = [line for line in lines if line.startswith("PYTHONPATH=")]
    assert path.split("=")[1].split(":")[0] == "/my root"


def test_launch_sh_says_what_is_missing(tmp_path: Path) -> None:
    done = _execute(tmp_path, {"QZ3_PYTHON": "/nowhere/python"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "launch.sh: there is no Python at /nowhere/python; name one in QZ3_PYTHON\n"
    (tmp_path / "train it.py").unlink()
    again = subprocess.run(["bash", str(tmp_path / "run $1 dir" / "launch.sh")], capture_output=True, text=True)
    assert again.returncode == 2
    assert "train it.py is gone; make this directory anew with: qz3 render CONFIG DIR" in again.stderr


def test_launch_sh_where_the_working_directory_is_gone(tmp_path: Path) -> None:
    text = _render().launch_sh
    assert f"cd -- {shlex.quote('/home/me & you')} || echo" in text
