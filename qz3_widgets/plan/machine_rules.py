"""Rules that hold a configuration against a machine."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

from ..runs.secrets import redact
from .context import BNB_OPTIMIZERS, Context
from .issue import Issue

# What the launcher, torchrun and accelerate set for each rank, and what this package sets.
_OWN_VARIABLES = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_RANK|ROLE_NAME|ROLE_WORLD_SIZE|"
    r"MASTER_ADDR|MASTER_PORT|DS_ACCELERATOR|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|"
    r"(ACCELERATE|TORCHELASTIC|PET|QZ3)_\w+)$"
)
_INSTEAD = {
    "OMP_NUM_THREADS": "set launch.threads_per_rank",
    "DS_ACCELERATOR": "set launch.device",
    "CUDA_VISIBLE_DEVICES": "export it before you plan and start, so that the plan sees the same GPUs",
    "WORLD_SIZE": "set launch.num_processes",
    "MASTER_ADDR": "set launch.main_process_ip",
    "MASTER_PORT": "set launch.main_process_port",
}


def no_gpu(context: Context) -> Iterator[Issue]:
    """The GPU is asked for, or there is one that can't be used."""
    machine = context.machine
    cpu_build = machine.gpus and not machine.usable_gpus
    built = "the installed torch is built for the CPU; install a CUDA build"
    if context.config.launch.device == "cuda" and not machine.usable_gpus:
        why = f"a GPU is here, but {built}" if cpu_build else f"no GPU is visible on {machine.host}"
        yield Issue("no-gpu", "error", "launch.device", f"is cuda, and {why}", {"launch.device": "cpu"})
    elif context.config.launch.device == "auto" and cpu_build:
        yield Issue("gpu-unused", "warning", "launch.device", f"{machine.gpus[0].name} stays idle: {built}")


def ranks_and_gpus(context: Context) -> Iterator[Issue]:
    """As many ranks as the GPUs take."""
    launch, num_gpus = context.config.launch, len(context.machine.usable_gpus)
    if context.device == "cpu":
        if launch.ranks_per_gpu > 1:
            yield Issue(
                "ranks-per-gpu-without-gpu",
                "warning",
                "launch.ranks_per_gpu",
                "has no effect on the CPU",
                {"launch.ranks_per_gpu": 1},
            )
        return
    if num_gpus == 0:
        return
    room = num_gpus * launch.ranks_per_gpu
    if context.local_ranks > room:
        gpus = "1 GPU takes" if num_gpus == 1 else f"{num_gpus} GPUs take"
        yield Issue(
            "more-ranks-than-gpus",
            "error",
            "launch.num_processes",
            f"{context.local_ranks} ranks on this machine, but {gpus} {room} (ranks_per_gpu is {launch.ranks_per_gpu})",
            {"launch.num_processes": room * launch.num_machines},
        )
    idle = num_gpus - -(-context.local_ranks // launch.ranks_per_gpu)
    if idle > 0:
        yield Issue(
            "idle-gpus",
            "info",
            "launch.num_processes",
            f"{idle} of {num_gpus} GPUs stay idle",
            {"launch.num_processes": room * launch.num_machines},
        )


def threads(context: Context) -> Iterator[Issue]:
    """Ranks on the CPU that take each other's cores."""
    if context.device != "cpu":
        return
    cores, ranks = context.machine.num_cpus, context.local_ranks
    if ranks > cores:
        yield Issue(
            "more-ranks-than-cores", "warning", "launch.num_processes", f"{ranks} ranks share {cores} cores: slow"
        )
    elif context.threads_per_rank * ranks > cores:
        yield Issue(
            "too-many-threads",
            "warning",
            "launch.threads_per_rank",
            f"{ranks} ranks of {context.threads_per_rank} threads share {cores} cores: slow",
            {"launch.threads_per_rank": None},
        )


def activation_offload(context: Context) -> Iterator[Issue]:
    """On a CPU all activations are in host memory."""
    path = "training.activation_offload"
    if context.config.training.activation_offload is True and context.device == "cpu":
        yield Issue("activation-offload-on-cpu", "warning", path, "has no effect: the run is on the CPU", {path: False})
    if (
        context.config.training.activation_offload is True
        and context.config.training.activation_checkpointing == "none"
    ):
        fix = {"training.activation_checkpointing": "non_reentrant"}
        message = "has no effect without training.activation_checkpointing: what it keeps is what that saves"
        yield Issue("activation-offload-without-checkpointing", "warning", path, message, fix)


def flash_attention(context: Context) -> Iterator[Issue]:
    """Flash attention needs its package, a recent GPU and a 16-bit type."""
    path, name = "model.attn_implementation", context.config.model.attn_implementation
    if not name.startswith("flash"):
        return
    fix = {path: "sdpa"}
    if context.device == "cpu":
        yield Issue("flash-attention-on-cpu", "error", path, f"{name} needs a GPU", fix)
    installed = context.machine.flash_attention
    if installed is not None and name not in installed:
        package = "flash-attn" if name.endswith("2") else "flash-attn-3"
        yield Issue("flash-attention-missing", "error", path, f"{name} needs the package {package}", fix)
    for gpu in context.machine.usable_gpus:
        if gpu.compute_capability is not None and gpu.compute_capability < (8, 0):
            yield Issue(
                "flash-attention-gpu",
                "error",
                path,
                f"{name} needs a GPU of the Ampere generation or later, not {gpu.name}",
                fix,
            )
            break
    if context.config.model.dtype == "float32":
        yield Issue("flash-attention-dtype", "error", path, f"{name} needs a model.dtype of 16 bit, not float32", fix)


def precision_on_device(context: Context) -> Iterator[Issue]:
    """Types that the device computes in."""
    training = context.config.training
    if context.device == "cpu" and training.precision == "fp16":
        yield Issue(
            "fp16-on-cpu",
            "error",
            "training.precision",
            "fp16 needs a GPU; the CPU trains in bf16",
            {"training.precision": "bf16"},
        )
    old = [gpu for gpu in context.machine.usable_gpus if gpu.compute_capability and gpu.compute_capability < (8, 0)]
    if context.device == "cuda" and training.precision == "bf16" and old:
        yield Issue(
            "bf16-on-old-gpu",
            "warning",
            "training.precision",
            f"{old[0].name} has no bf16 arithmetic and emulates it: slow",
            {
                "training.precision": "fp16",
                "model.dtype": "float16",
                "quantization.bnb_4bit_compute_dtype": "float16",
                "quantization.bnb_4bit_quant_storage": "float16",
            },
        )


def optimizer_on_cpu(context: Context) -> Iterator[Issue]:
    """The optimizers of bitsandbytes are made for GPUs."""
    optim = context.config.training.optim
    if context.device == "cpu" and optim in BNB_OPTIMIZERS:
        why = "there is nothing to page" if optim.startswith("paged") else "its state is a small part of the memory"
        yield Issue(
            "optimizer-on-cpu",
            "warning",
            "training.optim",
            f"{optim} is made for GPUs; on the CPU {why}",
            {"training.optim": "adamw_torch"},
        )


def offload_on_cpu(context: Context) -> Iterator[Issue]:
    """There is nothing to offload to where everything is on the CPU."""
    for field in ("offload_param_device", "offload_optimizer_device"):
        if context.device == "cpu" and getattr(context.config.zero, field) == "cpu":
            yield Issue(
                "offload-on-cpu",
                "warning",
                f"zero.{field}",
                "the ranks run on the CPU already",
                {f"zero.{field}": "none"},
            )


def compiler(context: Context) -> Iterator[Issue]:
    """DeepSpeed on the CPU compiles an operator at first use."""
    if context.device != "cpu" or not context.deepspeed:
        return
    what = "DeepSpeed builds its shared-memory operator at first use"
    if context.machine.has_cpp_compiler is False:
        yield Issue("compiler-missing", "error", "launch.device", f"{what}: install a C++ compiler (g++)")
    if context.machine.has_ninja is False:
        yield Issue("ninja-missing", "error", "launch.device", f"{what}: install ninja (pip install ninja)")


def port_in_use(context: Context) -> Iterator[Issue]:
    """The port of the main process is free here."""
    launch = context.config.launch
    port = launch.main_process_port
    if port is None or context.machine.imagined or launch.machine_rank != 0:
        return
    if launch.num_machines == 1 and not _is_free(port):
        yield Issue(
            "port-in-use",
            "error",
            "launch.main_process_port",
            f"port {port} is in use on this machine; choose another, or leave it empty for a free one",
            {"launch.main_process_port": None},
        )


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the launcher's own store does it: connections that are merely closing don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def environment(context: Context) -> Iterator[Issue]:
    """Variables that the run sets itself, or that hold a secret."""
    given = context.config.launch.environment
    own = [name for name in given if _OWN_VARIABLES.match(name)]
    secret = [name for name, value in given.items() if redact(value) != value]
    kept = {name: value for name, value in given.items() if name not in {*own, *secret}}
    for name in own:
        instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
        yield Issue(
            "reserved-variable",
            "error",
            "launch.environment",
            f"{name} is set by the run itself{instead}",
            {"launch.environment": kept},
        )
    for name in secret:
        yield Issue(
            "secret-in-environment",
            "error",
            "launch.environment",
            f"the value of {name} looks like a secret, and it would be written to the run directory; "
            "export it before you start the run, the ranks inherit it",
            {"launch.environment": kept},
        )


RULES = (
    no_gpu,
    ranks_and_gpus,
    threads,
    activation_offload,
    flash_attention,
    precision_on_device,
    optimizer_on_cpu,
    offload_on_cpu,
    compiler,
    port_in_use,
    environment,
)
