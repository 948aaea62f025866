from __future__ import annotations

from pathlib import Path

import pytest

from qz3_widgets.runs import logs
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.logs import read_log
from qz3_widgets.runs.store import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    layout = RunLayout(tmp_path / "a-1")
    layout.make_folders()
    layout.launcher_log.write_text(
        "starting\n[rank 0] step 1 of 6: loss 2.1\n[rank 1] UserWarning: slow\n"
        "[rank 0] Traceback (most recent call last):\n"
        '[rank 1] step 1\n[rank 0]   File "x.py", line 3\n[rank 0] ValueError: no\n[rank 0] after\n'
    )
    layout.rank_log(1).write_text("\n10%|#\r 50%|###\r100%|#####\r\nFailed to load a kernel\nlast line without an end")
    return Run(layout)


def test_all_ranks_are_read_in_the_order_in_which_their_lines_came(run: Run) -> None:
    lines = read_log(run)
    assert [(line.rank, line.text) for line in lines[:3]] == [
        (None, "starting"),
        (0, "step 1 of 6: loss 2.1"),
        (1, "UserWarning: slow"),
    ]
    assert [line.number for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {line.file for line in lines} == {"launcher.log"}


def test_a_traceback_is_an_error_to_its_end_also_among_other_ranks_lines(run: Run) -> None:
    assert [(line.rank, line.text) for line in read_log(run, level="error")] == [
        (0, "Traceback (most recent call last):"),
        (0, '  File "x.py", line 3'),
        (0, "ValueError: no"),
    ]
    assert read_log(run, level="warning")[0].text == "UserWarning: slow"


def test_one_rank_has_its_own_log_and_bars_their_last_state(run: Run) -> None:
    assert [(line.text, line.level) for line in read_log(run, rank=1)] == [
        ("100%|#####", "info"),
        ("Failed to load a kernel", "warning"),
        ("last line without an end", "info"),
    ]


def test_lines_are_found_by_text_and_bounded(run: Run) -> None:
    assert [line.text for line in read_log(run, text="STEP 1")] == ["step 1 of 6: loss 2.1", "step 1"]
    assert [line.text for line in read_log(run, num_lines=1)] == ["after"]
    assert read_log(run, num_lines=0) == []


def test_of_a_long_log_only_the_end_is_read(run: Run) -> None:
    run.layout.launcher_log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    lines = read_log(run, most_bytes=1000, num_lines=500)
    assert lines[-1].text == "line 99999"
    assert len(lines) < 100
    assert all(line.text.startswith("line ") and line.number is None for line in lines)


def test_secrets_are_redacted_and_what_is_not_text_is_shown_somehow(run: Run) -> None:
    run.layout.launcher_log.write_bytes(b"token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH\n\xff\xfe binary\n")
    lines = read_log(run)
    assert "hf_abcdefghijklmnop" not in lines[0].text
    assert "binary" in lines[1].text


def test_only_what_is_given_is_redacted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(logs, "redact", lambda text: seen.append(text) or text)
    assert len(read_log(run, num_lines=2)) == len(seen) == 2


def test_without_a_log_there_are_no_lines(tmp_path: Path) -> None:
    assert read_log(Run(RunLayout(tmp_path / "none"))) == []
