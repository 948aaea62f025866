"""The demo: its configurations on every kind of machine, what it unpacks, and what it shows of its runs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qz3_widgets import demo, terminal_demo
from qz3_widgets.config.changes import diff
from qz3_widgets.config.shapes import read_shape
from qz3_widgets.config.strategy import resolve_load_strategy
from qz3_widgets.plan.capabilities import Capabilities, Gpu
from qz3_widgets.plan.plan import PlanError, make_plan
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.store import Run
from qz3_widgets.training import demo_assets
from tests.fake_runs import make_run


def machine(num_gpus: int = 0, **changes: Any) -> Capabilities:
    values: dict[str, Any] = {
        "host": "box",
        "num_cpus": 2,
        "host_memory_bytes": 2**34,
        "gpus": tuple(Gpu(index, "H100", 80 * 2**30, (9, 0)) for index in range(num_gpus)),
        "torch_has_cuda": num_gpus > 0,
        "has_cpp_compiler": True,
        "has_ninja": True,
    }
    return Capabilities(**(values | changes))


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """What :func:`prepare_demo` leaves, without the weight."""
    folder = tmp_path / "cache"
    model = folder / demo_assets.MODEL_FOLDER
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    for name in (demo_assets.TRAIN_FILE, demo_assets.HELD_OUT_FILE):
        (folder / name).write_text(line * 40)
    return folder


@pytest.fixture(autouse=True)
def shape(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The real function that reads the model's shape; tests of the rest do without: it takes ten seconds."""
    real = demo._read_the_shape
    monkeypatch.setattr(demo, "_read_the_shape", lambda folder, say: None)
    return real


def test_the_models_shape_is_read_once(
    assets: Path, shape: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path / "a cache"))
    values = read_shape("tiny-llama")
    (assets / demo_assets.MODEL_FOLDER / "config.json").write_text(json.dumps(values))
    said: list[str] = []
    for _ in range(2):
        shape(assets, said.append)
    assert said == ["reading the model's shape, about 10 s"]
    # One that can't be read is no obstacle.
    (assets / demo_assets.MODEL_FOLDER / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    shape(assets, said.append)
    assert len(said) == 2


def test_the_names_of_the_assets_agree() -> None:
    """The command knows them without torch, which the module that writes them imports."""
    assert demo.HELD_OUT == demo_assets.HELD_OUT_FILE
    assert set(demo._ASSETS) == {
        f"{demo_assets.MODEL_FOLDER}/config.json", demo_assets.TRAIN_FILE, demo_assets.HELD_OUT_FILE,
    }  # fmt: skip


@pytest.mark.parametrize(
    "here",
    [
        machine(),
        machine(cpu_has_fast_bf16=True),
        machine(1),
        machine(2),
        machine(8),
    ],
    ids=["slow CPU", "fast CPU", "1 GPU", "2 GPUs", "8 GPUs"],
)
def test_it_fits_the_machine(here: Capabilities, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(assets))
    released, sharded = demo.demo_configs(here, folder=assets)
    for config in (released, sharded):
        plan = make_plan(config, here)
        assert plan.errors == ()
        assert [issue for issue in plan.issues if issue.severity == "warning"] == []
        assert plan.world_size == 2
        assert config.zero.zero_stage == 3
        assert config.quantization.load_in_4bit
        assert config.training.eval_on_start
    assert released.name != sharded.name
    # Only how the weights are handled differs: their losses must be equal, their memory is what is compared.
    changed = set(diff(released, sharded)) - {"name"}
    assert changed == {"model.load_strategy", "zero.release_gathered", "zero.shard_statistics"}
    assert [resolve_load_strategy(config) for config in (released, sharded)] == ["stock", "sharded"]
    if not here.gpus:
        assert sharded.training.precision == ("bf16" if here.cpu_has_fast_bf16 else "fp32")
    assert sharded.launch.ranks_per_gpu == (2 if len(here.gpus) == 1 else 1)


def test_ranks_of_one_gpu_share_it(assets: Path) -> None:
    with pytest.raises(PlanError, match="ranks"):
        make_plan(demo.demo(), machine(1)).raise_if_blocked()
    assert make_plan(demo.demo_configs(machine(1), folder=assets)[0], machine(1)).ok


def test_what_is_there_is_not_unpacked_again(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_launcher", None)
    assert demo.prepare_demo(assets) == assets


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program of the test's own in the place of the one that unpacks."""

    def put(text: str) -> None:
        file = tmp_path / "prepare.py"
        file.write_text(text)
        monkeypatch.setattr(demo, "find_launcher", lambda name: file)

    return put


def test_unpacking_says_what_it_does(script: Callable[[str], None], tmp_path: Path) -> None:
    """A child that writes much to its standard error must not be stopped by it."""
    script("import sys\nprint('unpacking')\nsys.stderr.write('x' * 2**20)\nprint(sys.argv[1])")
    said: list[str] = []
    folder = tmp_path / "a cache"
    assert demo.prepare_demo(folder, say=said.append) == folder
    assert said == ["unpacking", str(folder)]


def test_unpacking_finds_the_package(script: Callable[[str], None], tmp_path: Path) -> None:
    script("import qz3_widgets; print('found')")
    said: list[str] = []
    demo.prepare_demo(tmp_path, say=said.append)
    assert said == ["found"]


@pytest.mark.parametrize(
    "text, told",
    [
        ("import sys; sys.exit('error: install the package')", "could not be prepared: install the package$"),
        ("raise RuntimeError('the disk is full')", "could not be prepared: RuntimeError: the disk is full$"),
        ("import os; os._exit(9)", "it ended without a word$"),
    ],
)
def test_unpacking_fails_with_one_message(script: Callable[[str], None], tmp_path: Path, text: str, told: str) -> None:
    script(text)
    with pytest.raises(ValueError, match=told):
        demo.prepare_demo(tmp_path)


def test_a_half_unpacked_model_is_none(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise RuntimeError("cut short")

    with pytest.raises(RuntimeError, match="cut short"):
        demo_assets._write_whole(target, write)
    assert not target.exists()


def test_dialogues_are_held_out_evenly(tmp_path: Path) -> None:
    demo_assets._write_dialogues(tmp_path)
    train, held_out = (
        (tmp_path / name).read_text(encoding="utf-8").splitlines()
        for name in (demo_assets.TRAIN_FILE, demo_assets.HELD_OUT_FILE)
    )
    assert len(held_out) == -(-(len(train) + len(held_out)) // demo_assets.HELD_OUT_EVERY)
    assert len(train) > 900


class _Stage:
    """Fake runs behind ``qz3 demo``, and what it printed."""

    def __init__(self, folder: Path) -> None:
        self.runs_dir = folder / "my runs"
        self.states = ["succeeded", "succeeded"]
        self.text = io.StringIO()
        self.console = Console(file=self.text, width=80, highlight=False)
        self.stopped: list[Path] = []

    def start(self, plan: Any, *, runs_dir: Path, **_: Any) -> Run:
        state = self.states.pop(0)
        name = plan.config.name
        return Run(RunLayout(make_run(runs_dir, run_id=f"{name}-20260101-000000", state=state)))

    def play(self, *arguments: Any, **options: Any) -> bool:
        return terminal_demo.run_demo(self.runs_dir, [], self.console, *arguments, **options)

    @property
    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()


@pytest.fixture
def stage(tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Stage]:
    stage = _Stage(tmp_path)
    monkeypatch.setenv("QZ3_CACHE_DIR", str(assets))
    monkeypatch.setattr(terminal_demo, "detect", machine)
    monkeypatch.setattr(terminal_demo, "start", stage.start)
    monkeypatch.setattr(terminal_demo, "stop", lambda root: stage.stopped.append(root))
    yield stage
    assert "Traceback" not in stage.text.getvalue()


def test_it_shows_what_came_of_the_runs(stage: _Stage) -> None:
    assert stage.play() is False
    text = stage.text.getvalue()
    report = stage.runs_dir / terminal_demo.REPORT
    assert report.is_file()
    assert str(report) in text
    assert "00_start_here.ipynb" in text
    for word in (
        "held-out dialogues 5.550 → 2.242",
        "rank 0",
        "rank 1",
        "2 ranks on the CPU",
        "run 1 of 2, as the libraries are released",
        "run 2 of 2, sharded",
    ):
        assert word in text, word
    assert "…" not in text


def test_a_failed_run_ends_it(stage: _Stage) -> None:
    stage.states = ["failed"]
    assert stage.play() is True
    assert any("killed by SIGKILL" in line for line in stage.lines)
    assert any("logs" in line for line in stage.lines)
    assert not (stage.runs_dir / terminal_demo.REPORT).exists()


def test_preparing_only(stage: _Stage, assets: Path) -> None:
    assert stage.play(prepare_only=True) is False
    assert str(assets) in stage.text.getvalue()
    assert not stage.runs_dir.exists()


def test_control_c_stops_the_run(stage: _Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal_demo, "follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stage.play()
    assert len(stage.stopped) == 1


def test_an_override_reaches_both_runs(stage: _Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def start(plan: Any, **options: Any) -> Run:
        steps.append(plan.config.training.max_steps)
        return stage.start(plan, **options)

    monkeypatch.setattr(terminal_demo, "start", start)
    terminal_demo.run_demo(stage.runs_dir, ["training.max_steps=3"], stage.console)
    assert steps == [3, 3]
