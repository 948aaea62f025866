"""What is executed: the argv, environment and files of a run, from its plan. Pure: no disk, no clock, no environment.

``launch.sh`` is the one way in which a run starts, by hand or by :mod:`.process`; it works in a moved run directory.

Ports: on one machine nobody has to choose one. torchrun's stand-alone rendezvous binds port 0 in the launcher and hands
the number that the system gave it to the ranks, so no other process can take the port in between, now or when the
same ``launch.sh`` runs a year later. ``accelerate launch`` has no option for it, but torchrun reads ``PET_STANDALONE``
from the environment. (``main_process_port: 0`` alone makes accelerate look for a free port, let it go, and bind it
seconds later.)
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..config.schema import RunConfig, ZeroSection
from ..runs.layout import RunLayout
from ..runs.secrets import redact

if TYPE_CHECKING:
    from ..plan.plan import Plan

_BNB_OPTIMIZERS = frozenset({"adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"})

# Left behind in a notebook's environment by whatever was run there before; the launcher sets its own.
_STALE = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT \\\n"
    "  PET_STANDALONE PET_LOCAL_ADDR TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE \\\n"
    "  ACCELERATE_USE_CPU ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_FSDP ACCELERATE_MIXED_PRECISION \\\n"
    "  ACCELERATE_CONFIG_DS_FIELDS ACCELERATE_DEEPSPEED_CONFIG_FILE ACCELERATE_DEEPSPEED_ZERO_STAGE"
)

_SCRIPT = """\
#!/usr/bin/env bash
# Starts the run that this directory describes (see run.yaml), with or without the workbench.
#   bash launch.sh            from the beginning
#   bash launch.sh --resume   from the newest checkpoint
# QZ3_PYTHON names another Python than the one that this file was made with.
set -euo pipefail

RUN_DIR=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${QZ3_PYTHON:-}
if [[ -z $PYTHON ]]; then PYTHON=@python@; fi
if ! command -v -- "$PYTHON" > /dev/null; then
  echo "launch.sh: there is no Python at $PYTHON; name one in QZ3_PYTHON" >&2
  exit 2
fi
TRAIN_SCRIPT=@train_script@
if [[ ! -f $TRAIN_SCRIPT ]]; then
  echo "launch.sh: $TRAIN_SCRIPT is gone; make this directory anew with: qz3 render CONFIG DIR" >&2
  exit 2
fi

# Relative paths in run.yaml start here.
CDPATH="" cd -- @working_dir@ || echo "launch.sh: relative paths in run.yaml start at $PWD now" >&2

unset @stale@
# What DeepSpeed compiles with (ninja) lies beside the Python of a virtual environment that nobody has activated.
PATH=$(dirname -- "$(command -v -- "$PYTHON")"):$PATH
export PATH
@exports@

exec @command@ "$@"
"""


@dataclass(frozen=True)
class Rendered:
    """Everything that is executed, as text."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]  # on top of what is inherited
    accelerate_yaml: str
    deepspeed_json: str | None  # None: no DeepSpeed (zero_stage 0)
    launch_sh: str


def render(
    plan: Plan,
    run_dir: Path,
    *,
    port: int,
    python: str,
    train_script: Path,
    working_dir: Path,
    package_root: Path | None = None,
) -> Rendered:
    """The argv, environment and files that start ``plan`` in ``run_dir``.

    Args:
        plan: what to run.
        run_dir: an absolute path; its ``launch.sh`` finds it by itself, so it may be moved.
        port: the main process's port; 0 leaves it to the system, which is free of races: right on one machine.
        python: the interpreter of the launcher and the ranks.
        train_script: what every rank executes.
        working_dir: where relative paths in the configuration start.
        package_root: the folder that holds ``qz3_widgets`` where ``python`` does not find it by itself.

    Raises:
        ValueError: several machines without a port, or a secret in ``launch.environment``.
    """
    config = plan.config
    if port == 0 and config.launch.num_machines > 1:
        raise ValueError("launch.main_process_port: several machines have to agree on a port; set one above 1023")
    layout = RunLayout(run_dir)
    options = ["-m", "accelerate.commands.launch", "--config_file", str(layout.accelerate_yaml)]
    if plan.deepspeed:
        # Also in accelerate.yaml, where it is an absolute path; here it follows a run directory that was moved.
        options += ["--deepspeed_config_file", str(layout.deepspeed_json)]
    argv = (python, *options, str(train_script), "--run-dir", str(run_dir))
    environment = environment_of(plan, port=port)
    return Rendered(
        argv=argv,
        environment=environment,
        accelerate_yaml=yaml.safe_dump(accelerate_config(plan, layout, port=port), sort_keys=False, allow_unicode=True),
        deepspeed_json=json.dumps(deepspeed_config(config), indent=2) + "\n" if plan.deepspeed else None,
        launch_sh=_script(argv, environment, run_dir, train_script, working_dir, package_root),
    )


def environment_of(plan: Plan, *, port: int) -> dict[str, str]:
    """What the ranks need in their environment, ``launch.environment`` last.

    Raises:
        ValueError: a value of ``launch.environment`` looks like a secret.
    """
    config = plan.config
    on_cpu = plan.device == "cpu"
    environment = {
        "DS_ACCELERATOR": plan.device,
        "OMP_NUM_THREADS": str(plan.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        # After a rank has died the others get this long, instead of 30 seconds, to end by themselves.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "8",
    }
    if port == 0:
        environment |= {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # or libraries place tensors on a GPU that is there
        if not plan.deepspeed:
            environment["ACCELERATE_USE_CPU"] = "true"
    if plan.rehearsal is not None:
        environment |= {
            "QZ3_REHEARSAL_RANK": str(plan.rehearsal.rank),
            "QZ3_REHEARSAL_WORLD_SIZE": str(plan.rehearsal.world_size),
            "QZ3_REHEARSAL_ARITHMETIC": str(int(plan.rehearsal.arithmetic)),
        }
    if config.launch.ranks_per_gpu > 1:
        environment["QZ3_RANKS_PER_GPU"] = str(config.launch.ranks_per_gpu)
    for name, value in config.launch.environment.items():
        if redact(value) != value:
            raise ValueError(
                f"launch.environment: the value of {name} looks like a secret, and it would be written to the run "
                "directory; export it before you start the run, the ranks inherit it"
            )
    return environment | config.launch.environment


def accelerate_config(plan: Plan, layout: RunLayout, *, port: int) -> dict[str, Any]:
    """The content of ``accelerate.yaml``.

    With DeepSpeed it holds nothing that ``deepspeed.json`` says too (precision among it): accelerate refuses that.
    ``use_cpu`` and DeepSpeed exclude each other; there the CPU is chosen by ``DS_ACCELERATOR``.
    """
    config = plan.config
    launch = config.launch
    content: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE"}
    if plan.deepspeed:
        content["distributed_type"] = "DEEPSPEED"
        content["deepspeed_config"] = {
            "deepspeed_config_file": str(layout.deepspeed_json),
            "zero3_init_flag": config.zero.zero_stage == 3,
        }
        if launch.num_machines > 1:
            # One launcher on each machine, as torchrun has it; the default would log in to the others.
            content["deepspeed_config"]["deepspeed_multinode_launcher"] = "standard"
    else:
        # MULTI_GPU stands for "start the ranks with torchrun", on the CPU too: MULTI_CPU would need MPI.
        content["distributed_type"] = "MULTI_GPU" if launch.num_processes > 1 else "NO"
        content["mixed_precision"] = "no" if config.training.precision == "fp32" else config.training.precision
    content |= {
        "num_machines": launch.num_machines,
        "num_processes": launch.num_processes,
        "machine_rank": launch.machine_rank,
        "main_process_ip": launch.main_process_ip,
        "main_process_port": port,
        "main_training_function": "main",
        "use_cpu": plan.device == "cpu" and not plan.deepspeed,
        "same_network": True,
        "rdzv_backend": "static",
    }
    return {key: value for key, value in content.items() if value is not None}


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The content of ``deepspeed.json``. The Trainer fills in what is ``auto``; leaf modules are set in the rank."""
    training = config.training
    content: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "zero_optimization": _zero_optimization(config.zero),
    }
    if training.optim in _BNB_OPTIMIZERS:
        content["zero_allow_untested_optimizer"] = True
    if config.zero.offload_optimizer_device != "none":
        # The chosen optimizer steps on the CPU; DeepSpeed would insist on compiling its own Adam.
        content["zero_force_ds_cpu_optimizer"] = False
    return content


def _zero_optimization(zero: ZeroSection) -> dict[str, Any]:
    content: dict[str, Any] = {
        "stage": zero.zero_stage,
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": zero.contiguous_gradients,
        "reduce_bucket_size": zero.reduce_bucket_size,
    }
    if zero.offload_optimizer_device != "none":
        content["offload_optimizer"] = {"device": zero.offload_optimizer_device, "pin_memory": zero.offload_pin_memory}
    if zero.zero_stage < 3:
        return content
    if zero.offload_param_device != "none":
        content["offload_param"] = {"device": zero.offload_param_device, "pin_memory": zero.offload_pin_memory}
    # The ranks compute what is "auto" from the model's sizes. For these two the Trainer has no "auto", and without a
    # word DeepSpeed takes its defaults.
    for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        if getattr(zero, name) != "auto":
            content[name] = getattr(zero, name)
    return content | {
        "stage3_prefetch_bucket_size": zero.stage3_prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.stage3_param_persistence_threshold,
        "stage3_gather_16bit_weights_on_model_save": zero.stage3_gather_16bit_weights_on_model_save,
        "sub_group_size": zero.sub_group_size,
    }


def _script(
    argv: tuple[str, ...],
    environment: Mapping[str, str],
    run_dir: Path,
    train_script: Path,
    working_dir: Path,
    package_root: Path | None,
) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    if package_root is not None:
        exports.append(f"export PYTHONPATH={shlex.quote(str(package_root))}${{PYTHONPATH:+:$PYTHONPATH}}")
    words = {argv[0]: '"$PYTHON"', str(train_script): '"$TRAIN_SCRIPT"', str(run_dir): '"$RUN_DIR"'}
    command = " ".join(words.get(word) or _under(word, run_dir) or shlex.quote(word) for word in argv)
    values = {
        "python": shlex.quote(argv[0]),
        "train_script": shlex.quote(str(train_script)),
        "working_dir": shlex.quote(str(working_dir)),
        "stale": _STALE,
        "exports": "\n".join(exports),
        "command": command.replace(" --", " \\\n  --").replace(' "$TRAIN_SCRIPT"', ' \\\n  "$TRAIN_SCRIPT"'),
    }
    return re.sub("@(" + "|".join(values) + ")@", lambda mark: values[mark.group(1)], _SCRIPT)


def _under(word: str, folder: Path) -> str | None:
    """A path inside the run directory, as the script writes it."""
    path = Path(word)
    return f'"$RUN_DIR/{path.name}"' if path.parent == folder else None
