from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from qz3_widgets.config import PRESET_GPUS, PRESETS, field_paths, preset
from qz3_widgets.plan import Capabilities, Issue, PlanError, imagine, make_plan
from qz3_widgets.plan.rules import RULES
from qz3_widgets.units import GIB

from .conftest import MakeConfig, machine


def test_a_plan_settles_what_depends_on_the_machine(
    make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities
) -> None:
    plan = make_plan(make_config(launch__num_processes=4, launch__ranks_per_gpu=2), gpus)
    assert (plan.device, plan.world_size, plan.local_ranks, plan.deepspeed) == ("cuda", 4, 4, True)
    assert (plan.threads_per_rank, plan.device_capacity_bytes, plan.strategy) == (1, 80 * GIB, "zero3")
    plan = make_plan(make_config(zero__zero_stage=0, launch__threads_per_rank=3), cpu)
    assert (plan.device, plan.deepspeed, plan.threads_per_rank) == ("cpu", False, 3)
    assert (plan.strategy, plan.device_capacity_bytes) == ("data_parallel", 64 * GIB)
    assert make_plan(make_config(), cpu).threads_per_rank == 2
    assert make_plan(make_config(launch__device="cpu"), gpus).device == "cpu"
    assert make_plan(make_config(launch__device="cuda"), cpu).device == "cuda"


def test_ranks_of_several_machines(make_config: MakeConfig, gpus: Capabilities) -> None:
    config = make_config(
        launch__num_processes=4,
        launch__num_machines=2,
        launch__main_process_ip="10.0.0.1",
        launch__main_process_port=29500,
    )
    plan = make_plan(config, gpus)
    assert (plan.world_size, plan.local_ranks, plan.ok) == (4, 2, True)


def test_a_plan_for_this_machine(make_config: MakeConfig) -> None:
    plan = make_plan(make_config(launch__device="cpu", launch__num_processes=1))
    assert not plan.capabilities.imagined
    assert plan.created.endswith("+00:00")


def test_a_good_plan_can_be_started(make_config: MakeConfig, gpus: Capabilities) -> None:
    plan = make_plan(make_config(lora__modules_to_save=["lm_head"]), gpus)
    assert plan.ok
    assert plan.errors == ()
    assert len(plan.issues) == 1  # a warning never blocks
    plan.raise_if_blocked()


def test_a_bad_plan_says_everything(make_config: MakeConfig, gpus: Capabilities) -> None:
    plan = make_plan(make_config(launch__num_processes=4, data__source="./nothing.jsonl"), gpus)
    assert not plan.ok
    with pytest.raises(PlanError) as error:
        plan.raise_if_blocked()
    assert isinstance(error.value, ValueError)
    assert error.value.issues == plan.errors
    first, second = str(error.value).splitlines()
    assert first == "data.source: ./nothing.jsonl does not exist"
    assert second.startswith("launch.num_processes: 4 ranks on this machine, but 2 GPUs take 2")
    assert second.endswith("(fix: launch.num_processes=2)")


def test_imagined_gpus_can_be_planned_for_and_not_started(make_config: MakeConfig) -> None:
    plan = make_plan(make_config(), imagine(2, 80 * GIB))
    assert plan.ok
    with pytest.raises(PlanError, match="imagined GPUs; plan again on the machine that runs it"):
        plan.raise_if_blocked()
    make_plan(make_config(), imagine(0, 0)).raise_if_blocked()


def test_fixes_can_be_applied(make_config: MakeConfig, cpu: Capabilities) -> None:
    config = make_config(
        model__attn_implementation="flash_attention_2",
        training__precision="fp16",
        training__optim="paged_adamw_8bit",
        zero__offload_optimizer_device="cpu",
        launch__ranks_per_gpu=2,
        launch__environment={"RANK": "0", "A": "b"},
        launch__device="cuda",
    )
    config = make_plan(config, cpu).fixed()
    assert make_plan(config, cpu).issues == ()
    assert config.launch.environment == {"A": "b"}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_presets_fit_the_machines_that_they_are_meant_for(name: str) -> None:
    meant = PRESET_GPUS[name]
    assert make_plan(preset(name), imagine(meant.num_gpus, meant.gpu_memory_gib * GIB)).issues == ()


def test_json(make_config: MakeConfig) -> None:
    plan = make_plan(make_config(launch__num_processes=4), machine(2))
    found = json.loads(json.dumps(plan.to_json()))
    assert found["world_size"] == 4
    assert found["device_capacity_bytes"] == 80 * GIB
    assert found["strategy"] == "zero3"
    assert not {"ranks", "fits", "advice"} & found.keys()
    assert found["issues"] == [
        {
            "rule": "more-ranks-than-gpus",
            "severity": "error",
            "field": "launch.num_processes",
            "message": "4 ranks on this machine, but 2 GPUs take 2 (ranks_per_gpu is 1)",
            "fix": {"launch.num_processes": 2},
        }
    ]


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_plan_shows_itself(make_config: MakeConfig, gpus: Capabilities, cpu: Capabilities) -> None:
    page = _Balance()
    page.feed(make_plan(make_config(data__source="./<b>.jsonl", launch__num_processes=4), gpus)._repr_html_())
    assert page.open == []
    assert "Can't start: 2 problems." in page.text
    assert "./<b>.jsonl does not exist" in page.text
    assert "4 ranks on 2 x 80.0 GiB GPU" in page.text
    good = make_plan(make_config(launch__num_processes=1), cpu)._repr_html_()
    assert "Ready to start." in good
    assert "1 rank on the CPU (4 cores, 64.0 GiB)" in good
    assert "GPUs that are not there" in make_plan(make_config(launch__device="cuda"), cpu)._repr_html_()


def test_issues_as_text() -> None:
    assert str(Issue("r", "info", "a.b", "message")) == "a.b: message"
    issue = Issue("r", "error", "a.b", "message", {"a.b": None, "a.c": True, "a.d": "x"})
    assert str(issue) == "a.b: message (fix: a.b=null, a.c=true, a.d=x)"


def test_rules_name_fields_that_exist(make_config: MakeConfig, cpu: Capabilities) -> None:
    config = make_config(
        model__name_or_path="./nowhere", data__source="./nothing.csv", launch__device="cuda", launch__num_processes=9
    )
    for issue in make_plan(config, cpu).issues:
        assert issue.field in field_paths()
        assert set(issue.fix or {}) <= set(field_paths())
    assert len(RULES) == len(set(RULES))
