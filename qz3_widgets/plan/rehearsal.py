"""One device plays one rank of many: the plan of a rehearsal.

The rank runs the training code of any run, in the model's real shape, with random weights and collectives that do
nothing (``torch.testing``'s fake process group). What it holds and when is real; its losses and its speed over the
wire are not.
"""

from __future__ import annotations

from dataclasses import replace

from ..config.changes import with_changes
from ..config.schema import RunConfig
from ..config.shapes import RANDOM_PREFIX, local_shape, shape_of_hub_id, split_depth
from .capabilities import Capabilities
from .plan import Plan, Rehearsal, make_plan


def make_rehearsal(
    config: RunConfig,
    world_size: int,
    *,
    rank: int = 0,
    steps: int = 3,
    num_layers: int | None = None,
    arithmetic: bool | None = None,
    capabilities: Capabilities | None = None,
) -> Plan:
    """The plan of being rank ``rank`` of ``world_size`` on one device of this machine.

    Args:
        config: the run to rehearse; its data are replaced by random tokens of full length.
        world_size: ranks to pretend.
        rank: the one to be.
        steps: optimizer steps to take.
        num_layers: only so many of the model's layers; all, if left out.
        arithmetic: whether products of matrices are computed, or only their memory is taken, which is what a rehearsal
            measures; left out, they are computed on a GPU, and not on a CPU, which would take hours for a large model.
        capabilities: this machine, if it is known already.

    Raises:
        ValueError: no such rank, ZeRO-3 is off, or the model's shape is not known here.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be 1 or more, not {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, not {rank}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    if config.zero.zero_stage != 3:
        raise ValueError(f"zero.zero_stage: only ZeRO-3 is rehearsed, not stage {config.zero.zero_stage}")
    if config.model.load_strategy not in ("auto", "sharded"):
        raise ValueError(
            f"model.load_strategy: {config.model.load_strategy} is not rehearsed: a rank that holds the whole model "
            "holds it on its own as well; use sharded"
        )
    name = random_name(config.model.name_or_path, num_layers)
    rehearsed = with_changes(
        config,
        {
            "name": f"rehearsal-{config.name}"[:64],
            "model.name_or_path": name,
            "model.tokenizer_name_or_path": None,
            "data.eval_fraction": 0.0,
            "data.eval_source": None,
            "training.max_steps": steps,
            "training.eval_steps": None,
            "training.eval_on_start": False,
            "training.early_stopping_patience": None,
            "training.save_steps": None,
            "training.save_total_limit": None,
            "training.warmup_steps": 0,
            "training.max_duration_seconds": None,
            "launch.num_processes": 1,
            "launch.num_machines": 1,
            "launch.machine_rank": 0,
            "launch.main_process_ip": None,
            "launch.main_process_port": None,
            "launch.ranks_per_gpu": 1,
        },
    )
    plan = make_plan(rehearsed, capabilities)
    # Its data are made up, and it is alone on purpose: what is said of these is about another run.
    issues = tuple(issue for issue in plan.issues if not issue.field.startswith("data.") and issue.rule != "one-rank")
    played = Rehearsal(rank, world_size, plan.device != "cpu" if arithmetic is None else arithmetic)
    return replace(plan, issues=issues, world_size=world_size, rehearsal=played)


def random_name(name_or_path: str, num_layers: int | None) -> str:
    """``random:`` and the shape of a model that is named by a shape, a hub id or a folder.

    Raises:
        ValueError: the shape is not known here.
    """
    if name_or_path.startswith(RANDOM_PREFIX):
        shape = name_or_path.removeprefix(RANDOM_PREFIX)
    else:
        found = local_shape(name_or_path) or shape_of_hub_id(name_or_path)
        if found is None:
            raise ValueError(
                f"model.name_or_path: the shape of {name_or_path} is not known here, and nothing is downloaded; name a "
                "folder with its config.json, or random:<path of a config.json>"
            )
        shape = found
    if num_layers is None:
        return f"{RANDOM_PREFIX}{shape}"
    return f"{RANDOM_PREFIX}{split_depth(shape)[0]}@{num_layers}"
