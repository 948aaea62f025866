"""The ``qz3`` command: what it says to bad input, what it leaves behind, and what it prints where."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets import cli
from qz3_widgets.config.io import load_config, save_config
from qz3_widgets.config.presets import PRESETS
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.plan import plan as planning
from qz3_widgets.plan.capabilities import Capabilities, Gpu
from tests.conftest import REPOSITORY, Qz3
from tests.fake_runs import make_run

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
COMMANDS = tuple(command.name or str(command.callback.__name__) for command in cli.app.registered_commands)  # type: ignore[union-attr]
CPU = Capabilities(host="box", num_cpus=4, host_memory_bytes=2**35, has_cpp_compiler=True, has_ninja=True)
TWO_GPUS = Capabilities(
    host="box",
    num_cpus=4,
    host_memory_bytes=2**35,
    gpus=tuple(Gpu(index, "H100", 80 * 2**30, (9, 0)) for index in range(2)),
    torch_has_cuda=True,
    has_cpp_compiler=True,
    has_ninja=True,
)


@dataclass(frozen=True)
class Done:
    """What one call did."""

    code: int
    out: str
    err: str

    def document(self) -> Any:
        """Standard output as the one JSON document that it has to be."""
        return json.loads(self.out)


Call = Callable[..., Done]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Call the command in this process, in an empty folder, on a machine without a GPU."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(planning, "detect", lambda: CPU)

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["qz3", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, told.out, told.err)

    return run


@pytest.fixture
def refused(call: Call, tmp_path: Path) -> Callable[..., str]:
    """Call the command with bad input: exit code 2, one message, no run left behind. Returns the message."""

    def run(*arguments: str | Path) -> str:
        before = _files(tmp_path)
        done = call(*arguments)
        assert done.code == 2, done
        assert done.out == ""
        assert "Traceback" not in done.err
        assert _files(tmp_path) == before
        messages = [line for line in done.err.splitlines() if line.startswith("error:")]
        assert len(messages) == 1, done.err
        return done.err

    return run


def _files(folder: Path) -> set[Path]:
    # An empty runs folder does not look like a run.
    return {path for path in folder.rglob("*") if not (path.is_dir() and path.name == "runs")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "good.jsonl"
    file.write_text((json.dumps(CHAT) + "\n") * 40)
    return file


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    """A configuration that nothing is wrong with."""
    file = tmp_path / "my config.yaml"
    values = {"model": {"name_or_path": "random:tiny-llama"}, "data": {"source": str(data)}}
    save_config(RunConfig.model_validate(values), file)
    return file


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder with two good runs, one that failed, and one under way elsewhere."""
    folder = tmp_path / "runs with a space"
    make_run(folder, run_id="a-20260101-000000", config={"lora": {"r": 8}})
    make_run(folder, run_id="b-20260101-000001", loss=(5.5, 1.9))
    make_run(folder, run_id="bad-20260101-000002", state="failed", failed_rank=1)
    make_run(folder, run_id="now-20260101-000003", state="running", num_steps=5, max_steps=12)
    return folder


def test_the_commands_of_the_contract_are_there() -> None:
    assert set(COMMANDS) >= {
        "demo", "lab", "presets", "init", "render", "run", "runs", "show", "compare", "stop", "resume", "export",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps(call: Call, command: str) -> None:
    done = call(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"qz3 {command}" in done.out
    reports = command in ("presets", "runs", "show", "compare", "run", "resume")
    assert not reports or "--json" in done.out


def test_without_arguments_it_helps(call: Call) -> None:
    done = call()
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\b", done.out + done.err, re.MULTILINE), command


@pytest.mark.parametrize("arguments", [("nonsense",), ("show",), ("runs", "--jsn"), ("init", "demo", "--set")])
def test_usage_errors(call: Call, arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Error" in done.err
    assert "Traceback" not in done.err


def test_presets(call: Call) -> None:
    found = call("presets", "--json").document()
    assert [row["name"] for row in found] == list(PRESETS)
    assert all(row["description"] and row["meant_for"] for row in found)
    text = call("presets").out
    assert all(re.search(rf"^{re.escape(name)} ", text, re.MULTILINE) for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_init_writes_what_run_reads(call: Call, tmp_path: Path, name: str) -> None:
    file = tmp_path / "new.yaml"
    done = call("init", name, "-o", file, "--set", "lora.r=7")
    assert (done.code, done.out) == (0, "")
    assert str(file) in done.err
    assert load_config(file).lora.r == 7
    printed = call("init", name, "--set", "lora.r=7")
    assert (printed.out, printed.err) == (file.read_text(), "")


def test_init_leaves_files_alone(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "there.yaml"
    file.write_text("mine")
    assert "exists; name another file or remove it" in refused("init", "demo", "-o", file)
    assert file.read_text() == "mine"
    assert "can't be written" in refused("init", "demo", "-o", file / "below.yaml")
    assert "did you mean demo?" in refused("init", "demmo")


def _yaml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text, told",
    [
        ("lora: {rank: 8}", ["lora.rank", "lora.r"]),
        ("lorra: {r: 8}", ["lorra", "lora"]),
        ("lora: {r: eight}", ["lora.r", "eight"]),
        ("lora: {r: 8.5}", ["lora.r", "8.5"]),
        ("training: {learning_rate: -1}", ["training.learning_rate", "-1"]),
        ("zero: {zero_stage: 2, offload_param_device: cpu}", ["zero.offload_param_device", "needs zero_stage 3"]),
        ("launch: {num_processes: 3, num_machines: 2}", ["launch.num_machines", "does not divide"]),
        ("training: {early_stopping_patience: 2}", ["training.eval_steps", "early_stopping_patience needs it"]),
        ("- a list", ["mapping of sections"]),
        ("lora: {r: 8", ["line 1"]),
        ("", ["is empty"]),
    ],
)
def test_a_configuration_that_does_not_fit(
    refused: Callable[..., str], tmp_path: Path, text: str, told: list[str]
) -> None:
    file = _yaml(tmp_path / "bad.yaml", text)
    for command in (("run", file), ("render", file, tmp_path / "out")):
        message = refused(*command)
        assert "bad.yaml" in message
        assert [word for word in told if word not in message] == [], message


def test_all_problems_at_once(refused: Callable[..., str], tmp_path: Path) -> None:
    file = _yaml(tmp_path / "bad.yaml", "lora: {rank: 8, lora_alpha: 0}\ndata: {max_length: 2}\n")
    message = refused("run", file)
    assert [word for word in ("lora.rank", "lora.lora_alpha", "data.max_length") if word not in message] == []


def test_no_configuration(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "none.yaml" in refused("run", tmp_path / "none.yaml")
    assert str(tmp_path) in refused("run", tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    assert "bytes.yaml" in refused("run", tmp_path / "bytes.yaml")
    assert "lama-3.1-8b: no such file, and no preset is called 'lama-3.1-8b'; did you mean llama-3.1-8b?" in " ".join(
        refused("run", "lama-3.1-8b").split()
    )


def test_a_plan_in_numbers_and_on_a_terminal(call: Call) -> None:
    fits = call("plan", "llama-3.1-405b", "--gpus", "8", "--gpu-memory", "80", "--json")
    assert (fits.code, fits.err) == (0, "")
    document = fits.document()
    assert document["fits"] is True
    assert len(document["ranks"]) == document["world_size"] == 8
    narrow = call("plan", "llama-3.1-405b", "--gpus", "2", "--gpu-memory", "80")
    assert narrow.code == 1
    assert "Does not fit: loading needs 100.5 GiB on every rank, of 80.0 GiB." in narrow.out
    assert "--set zero.offload_param_device=cpu" in narrow.out


def test_a_run_that_can_not_fit_is_not_started(refused: Callable[..., str], config: Path) -> None:
    sets = ("--set", "model.name_or_path=random:llama-3.1-405b", "--set", "launch.num_processes=1")
    message = refused("run", config, *sets)
    assert "Does not fit" in message
    assert "32.0 GiB" in message


def test_a_ladder_wants_numbers(refused: Callable[..., str]) -> None:
    assert "--rungs must be numbers of layers such as 2,4, not two" in refused(
        "ladder", "llama-3.1-8b", "--rungs", "two"
    )
    assert "two numbers of layers or more" in refused("ladder", "llama-3.1-8b", "--rungs", "4")


def test_an_override_that_does_not_fit(refused: Callable[..., str], config: Path) -> None:
    assert "did you mean lora.r" in refused("run", config, "--set", "lora.rr=4")
    assert "section.field=value" in refused("run", config, "--set", "lora.r")
    assert "lora.r" in refused("run", config, "--set", "lora.r=many")


def _spoil(data: Path, how: str) -> None:
    lines = data.read_bytes().splitlines()
    if how == "missing":
        data.unlink()
    elif how == "empty":
        data.write_bytes(b"")
    elif how == "line 17":
        lines[16] = lines[16][:-2]
    elif how == "not UTF-8":
        lines[16] = lines[16].replace(b"Hello", b"H\xe9llo")
    elif how == "another layout":
        lines[16] = b'{"text": "hello"}'
    if lines and how not in ("missing", "empty"):
        data.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    "how, told",
    [
        ("missing", ["data.source", "good.jsonl"]),
        ("empty", ["data.source", "good.jsonl", "empty"]),
        ("line 17", ["data.source", "good.jsonl, line 17", "not valid JSON"]),
        ("not UTF-8", ["data.source", "good.jsonl, line 17", "UTF-8"]),
        ("another layout", ["data.source", "good.jsonl, line 17", "messages"]),
    ],
)
def test_bad_data(refused: Callable[..., str], config: Path, data: Path, how: str, told: list[str]) -> None:
    _spoil(data, how)
    message = refused("run", config)
    assert [word for word in told if word not in message] == [], message


def _model(folder: Path, *, weights: bool, template: bool) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    if weights:
        header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    if template:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_model_without_weights(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    folder = _model(tmp_path / "no weights", weights=False, template=True)
    message = refused("run", config, "--set", f"model.name_or_path={folder}")
    assert "model.name_or_path" in message
    assert str(folder) in message
    assert "weights" in message
    message = refused("run", config, "--set", f"model.name_or_path={tmp_path / 'nowhere'}")
    assert "model.name_or_path" in message


def test_a_tokenizer_without_a_template(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    folder = _model(tmp_path / "no template", weights=True, template=False)
    message = refused("run", config, "--set", f"model.name_or_path={folder}")
    assert "data.chat_template" in message


def test_more_ranks_than_gpus(
    refused: Callable[..., str], config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planning, "detect", lambda: TWO_GPUS)
    for command in (("run", config), ("render", config, tmp_path / "out")):
        message = refused(*command, "--set", "launch.num_processes=4")
        assert "launch.num_processes" in message
        assert "2 GPUs take 2" in message


def test_a_gpu_that_is_not_there(refused: Callable[..., str], config: Path) -> None:
    message = refused("run", config, "--set", "launch.device=cuda")
    assert "launch.device" in message
    assert "no GPU" in message


def test_a_port_in_use(refused: Callable[..., str], config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused("run", config, "--set", f"launch.main_process_port={port}")
    assert "launch.main_process_port" in message
    assert str(port) in message
    assert "in use" in message


def test_a_runs_folder_that_cannot_be_written(refused: Callable[..., str], config: Path, data: Path) -> None:
    message = refused("run", config, "--runs-dir", data / "runs")
    assert str(data / "runs") in message
    assert "--runs-dir" in message
    # Root may write where permissions forbid it, but nobody can make a folder here.
    assert "can't be written" in refused("run", config, "--runs-dir", "/proc/runs")


def test_a_secret_in_the_configuration(refused: Callable[..., str], config: Path) -> None:
    token = "hf_" + "a" * 34
    message = refused("run", config, "--set", f"launch.environment.MINE={token}")
    assert "launch.environment" in message
    assert token not in message


def test_render(call: Call, refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a rendered run"
    done = call("render", config, folder)
    assert (done.code, done.out) == (0, "")
    assert str(folder / "launch.sh") in done.err
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names >= {"run.yaml", "plan.json", "accelerate.yaml", "deepspeed.json", "launch.sh", "status.json"}
    subprocess.run(["bash", "-n", str(folder / "launch.sh")], check=True)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    assert "is not empty and holds no run" in refused("render", config, other)
    assert "can't be written" in refused("render", config, config / "below")


def test_the_next_command_can_be_pasted(call: Call, config: Path, tmp_path: Path) -> None:
    """Where a path has a space, the command that is shown has quotes."""
    rendered = call("render", config, tmp_path / "with space").err
    assert f"bash '{tmp_path / 'with space' / 'launch.sh'}'" in rendered
    written = call("init", "demo", "-o", tmp_path / "my new.yaml").err
    assert f"qz3 run '{tmp_path / 'my new.yaml'}'" in written


def test_runs(call: Call, fakes: Path) -> None:
    done = call("runs", "--json", "--runs-dir", fakes)
    assert (done.code, done.err) == (0, "")
    rows = done.document()
    assert {row["run_id"]: row["state"] for row in rows} == {
        "a-20260101-000000": "succeeded",
        "b-20260101-000001": "succeeded",
        "bad-20260101-000002": "failed",
        "now-20260101-000003": "running",
    }
    text = call("runs", "--runs-dir", fakes)
    assert (text.code, text.err) == (0, "")
    assert all(any(row["run_id"] in line for line in text.out.splitlines()) for row in rows)
    assert "…" not in text.out


def test_no_runs(call: Call) -> None:
    done = call("runs")
    assert (done.code, done.err) == (0, "")
    assert "no runs in runs yet" in done.out
    assert call("runs", "--json").document() == []


def test_the_runs_folder_from_the_environment(call: Call, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ3_RUNS_DIR", str(fakes))
    assert len(call("runs", "--json").document()) == 4


def test_a_damaged_run_hides_no_other(call: Call, fakes: Path) -> None:
    (fakes / "b-20260101-000001" / "status.json").write_text("{")
    trace = fakes / "a-20260101-000000" / "trace" / "memory.rank-00000.jsonl"
    trace.write_text(trace.read_text().replace('"schema_version":1', '"schema_version":99', 1))
    done = call("runs", "--json", "--runs-dir", fakes)
    rows = {row["run_id"]: row["state"] for row in done.document()}
    assert len(rows) == 4
    assert rows["a-20260101-000000"] == "damaged"
    text = call("runs", "--runs-dir", fakes)
    assert text.code == 0
    assert "a-20260101-000000 can't be read" in text.err
    assert "bad-20260101-000002" in text.out


def test_show(call: Call, fakes: Path) -> None:
    shown = call("show", "a-2026", "--json", "--runs-dir", fakes)
    assert (shown.code, shown.err) == (0, "")
    document = shown.document()
    assert document["state"] == "succeeded"
    assert document["ranks"][1]["phases"]["step"]["peak_bytes"] > 0
    sizes = [key for key in _keys(document) if key.endswith("_bytes")]
    assert {"settled_bytes", "peak_bytes", "capacity_bytes"} <= set(sizes)
    text = call("show", "bad", "--runs-dir", fakes).out
    assert "Rank 1 failed in step 12" in text
    assert "killed by SIGKILL" in text
    assert "…" not in text


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in _keys(item)}
    return {key for item in value for key in _keys(item)} if isinstance(value, list) else set()


def test_show_by_path_and_latest(call: Call, fakes: Path) -> None:
    path = fakes / "a-20260101-000000"
    assert call("show", path, "--json").document()["run_id"] == path.name
    assert call("show", "latest", "--json", "--runs-dir", fakes).code == 0


def test_compare(call: Call, fakes: Path) -> None:
    done = call("compare", "a-2026", "b-2026", "--json", "--runs-dir", fakes)
    assert (done.code, done.err) == (0, "")
    document = done.document()
    assert set(document) >= {"config_diff", "metrics", "directions"}
    assert document["config_diff"]["lora.r"] == {"a-20260101-000000": 8, "b-20260101-000001": 16}
    text = call("compare", "a-2026", "b-2026", "bad", "--runs-dir", fakes)
    assert text.code == 0
    assert "lora.r" in text.out
    assert "…" not in text.out


def test_export(call: Call, fakes: Path, tmp_path: Path) -> None:
    file = tmp_path / "a report.html"
    done = call("export", "a-2026", "b-2026", file, "--runs-dir", fakes)
    assert (done.code, done.out) == (0, "")
    assert str(file) in done.err
    assert file.read_text().lstrip().lower().startswith("<!doctype html>")


@pytest.mark.parametrize("command", ["show", "stop", "resume", "export", "compare"])
def test_an_unknown_run(refused: Callable[..., str], fakes: Path, tmp_path: Path, command: str) -> None:
    rest = {"export": [tmp_path / "r.html"], "compare": ["a-2026"]}.get(command, [])
    message = refused(command, "b-20260101-0000", *rest, "--runs-dir", fakes / "nothing")
    assert "holds none" in message
    message = refused(command, "bb-20260101-000001", *rest, "--runs-dir", fakes)
    assert "b-20260101-000001" in message
    assert "begin with 'b'" in refused(command, "b", *rest, "--runs-dir", fakes)


def test_comparing_needs_two(refused: Callable[..., str], fakes: Path) -> None:
    assert "two" in refused("compare", "a-2026", "--runs-dir", fakes)
    assert "more than once" in refused("compare", "a-2026", "a-2026", "--runs-dir", fakes)


def test_exporting_needs_a_run_and_a_file(refused: Callable[..., str], fakes: Path, tmp_path: Path) -> None:
    where = ("--runs-dir", fakes)
    assert "ends in .html" in refused("export", "a-2026", "b-2026", *where)
    assert "at least one run" in refused("export", tmp_path / "r.html", *where)
    assert "ends in .html" in refused("export", "a-2026", tmp_path / "r.pdf", *where)
    assert "does not exist" in refused("export", "a-2026", tmp_path / "no" / "r.html", *where)


def test_a_runs_folder_that_is_none(refused: Callable[..., str], data: Path) -> None:
    assert str(data) in refused("runs", "--runs-dir", data)
    assert str(data) in refused("show", "x", "--runs-dir", data)


def test_stop_and_resume_what_has_ended(call: Call, refused: Callable[..., str], fakes: Path) -> None:
    where = ("--runs-dir", fakes)
    done = call("stop", "a-2026", *where)
    assert (done.code, done.out) == (0, "a-20260101-000000 has already ended: succeeded\n")
    assert "training.save_steps" in refused("resume", "bad", *where)
    assert "still running; stop it first" in refused("resume", "now", *where)


def test_lab_needs_its_notebook(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in refused("lab", tmp_path / "none.ipynb")


def test_errors_are_one_message_however_long(call: Call, tmp_path: Path) -> None:
    """A pipe gets no line breaks where a terminal would have ended."""
    done = call("run", tmp_path / ("long" * 40))
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


# In a process of its own.


def test_the_command_is_installed_as_it_is_called_here(qz3: Qz3, fakes: Path) -> None:
    done = qz3("show", "nothing", "--runs-dir", fakes)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no run 'nothing'")


def test_a_reader_that_goes_away(fakes: Path) -> None:
    """``qz3 init demo | head -1`` leaves no traceback."""
    code = "from qz3_widgets.cli import main; main()"
    for arguments in (["init", "demo"], ["presets"], ["runs", "--json", "--runs-dir", str(fakes)]):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY
        )
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=60)
        assert err == b"", arguments
        assert process.returncode != 2, arguments


@pytest.mark.parametrize("width, last", [(120, "time"), (80, "time"), (60, "held out"), (40, "held out")])
def test_a_terminal_of_any_width_cuts_no_figure(
    qz3: Qz3, fakes: Path, monkeypatch: pytest.MonkeyPatch, width: int, last: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    done = qz3("runs", "--runs-dir", fakes)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in done.stdout.splitlines()]
    assert lines[0].endswith(last)
    assert all("…" not in line for line in lines)
    assert width < 60 or max(map(len, lines)) <= width
    assert any("bad-20260101-000002" in line and "✕ failed" in line for line in lines)
