"""What runs the sections of the GPU's benchmark: whatever one of them does, its figures and the others are kept."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import driver, launches, results, smoke_groups
from benchmarks.gpu.driver import Section

FIGURE = "import sys; from benchmarks.gpu import results; from pathlib import Path\n"
FIGURE += "results.Results(Path(sys.argv[1]), 'ops/a').add('op', {'seconds': 1.5}, 'a line')\n"
ENDINGS = {
    "failed": "sys.stderr.write('CUDA_ERROR_ILLEGAL_ADDRESS'); sys.exit(3)",
    "killed": "import os; os.abort()",
    "hang": "import time; print('waits', flush=True); time.sleep(60)",
    "ok": "",
}


def _in_process(tmp_path: Path, code: str, limit_seconds: float = 30.0) -> tuple[str, float, str]:
    path = tmp_path / "results.jsonl"
    command = [sys.executable, "-c", code, str(path)]
    return driver.in_process(command, os.environ, limit_seconds, threading.Event())


@pytest.mark.parametrize("ending", ENDINGS)
def test_figures_survive_however_a_section_ends(ending, tmp_path):
    """Guards what was measured before an error of the device, a signal or a barrier that never completes."""
    how, seconds, said = _in_process(tmp_path, FIGURE + ENDINGS[ending], 2.5 if ending == "hang" else 30)
    assert how == {"killed": "failed"}.get(ending, ending)
    assert seconds < 20
    expected = {"failed": "CUDA_ERROR_ILLEGAL_ADDRESS", "killed": "killed by signal 6", "hang": "killed after "}
    assert expected.get(ending, "") in said
    [entry] = results.read(tmp_path / "results.jsonl")
    assert entry == {"section": "ops/a", "kind": "op", "seconds": 1.5}


def test_a_hang_takes_its_children_with_it(tmp_path):
    """Guards the card: a process that a killed section left behind would hold its memory."""
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    code += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    assert _in_process(tmp_path, code, 2)[0] == "hang"
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def test_ctrl_c_ends_what_runs(tmp_path):
    """Guards whoever stops a run: the sections' processes do not hear of it."""
    stopped = threading.Event()
    threading.Timer(0.5, stopped.set).start()
    how, seconds, _ = driver.in_process([sys.executable, "-c", ENDINGS["hang"]], os.environ, 50, stopped)
    assert (how, seconds < 20) == ("hang", True)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_without_time_a_section_is_left_out_and_said(tmp_path):
    """Guards the lease of a machine: nothing is begun that cannot end, and the results say what."""
    path = tmp_path / "results.jsonl"
    ended = driver.run_section(Section("decode/a", 100), [], path, time.monotonic() + 1, threading.Event())
    assert ended.how == "left out"
    [entry] = results.read(path)
    assert (entry["kind"], entry["what"], entry["why"]) == ("left_out", "decode/a", "no time is left")


def _options(**changed: Any) -> Any:
    given = {
        "only": ["smoke", "decode"],
        "models": ["a", "b"],
        "programs": None,
        "smoke_sizes": "true",
        "smoke_groups": [],
    }
    return SimpleNamespace(**given | changed)


def test_sections_that_time_run_alone_and_after_the_limits(monkeypatch):
    """Guards figures against neighbours on the same card, and shares of limits that nobody measured."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    smoke, *others = driver.batches(_options())
    assert [section.name for section in smoke] == [f"smoke/{name}" for name in smoke_groups.TRUE]
    assert all(section.environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false" for section in smoke)
    told = {section.name: section.environment["XLA_FLAGS"] for section in smoke if "XLA_FLAGS" in section.environment}
    graphs, launches = told.pop("smoke/model_graphs"), told.pop("smoke/model_launches")
    assert launches == f"{graphs} --xla_gpu_enable_command_buffer=" and not told
    assert [[section.name for section in batch] for batch in others] == [["limits"], ["decode/a"], ["decode/b"]]
    assert all(not section.environment for batch in others for section in batch)


def test_tokens_of_both_ways_are_compared(tmp_path, capsys):
    """Guards the only check of CUDA graphs: other tokens, or a run that is missing, are not the same."""
    path = tmp_path / "results.jsonl"
    for group, tokens in (("model", [[7, 8]]), ("model_graphs", [[1, 2]]), ("model_launches", [[1, 2]])):
        results.append(path, {"section": f"smoke/{group}", "kind": "drawn", "tokens": tokens})
    assert driver._same_tokens(path, 0)
    results.append(path, {"section": "smoke/model_launches", "kind": "drawn", "tokens": [[1, 3]]})
    assert not driver._same_tokens(path, 0)
    assert "BAD with and without command buffers" in capsys.readouterr().out


def test_a_line_that_was_cut_is_left_out(tmp_path):
    """Guards the results of a process that died while it wrote."""
    path = tmp_path / "results.jsonl"
    results.append(path, {"kind": "op"})
    with path.open("a") as file:
        file.write('{"kind": "dec')
    assert results.read(path) == [{"kind": "op"}]


def test_every_group_has_a_check_at_the_sizes_where_ops_change():
    """Guards the table: rows per tile of 8 to 128, short and long chunks, and both kinds of cache."""
    cases = [case for group in smoke_groups.TRUE.values() for case in group]
    exact = {case.sizes["rows"] for case in cases if case.check == "exact"}
    assert exact == {8, 16, 32, 64, 128}
    assert {8, 9} <= {case.sizes["tokens"] for case in cases if case.check == "experts"}  # the most that share tiles
    means = {
        max(1, case.sizes["tokens"] * 4 // case.sizes.get("num_experts", 32))
        for case in cases
        if case.check == "experts"
    }
    rows = {min(128, max(8, 1 << (mean - 1).bit_length())) for mean in means}
    assert rows == {8, 16, 32, 64, 128}
    assert {case.check for case in cases} == {"exact", "gated", "experts", "paged", "windowed", "placed", "model"}
    assert set(smoke_groups.TOY) <= set(smoke_groups.TRUE)
    json.dumps(smoke_groups.GROUPS)


def _plane(name: str, lines: dict[str, list[tuple[str, float]]]) -> Any:
    def line(name: str, events: list[tuple[str, float]]) -> Any:
        return SimpleNamespace(
            name=name, events=[SimpleNamespace(name=event, duration_ns=1e3 * us) for event, us in events]
        )

    return SimpleNamespace(name=name, lines=[line(*each) for each in lines.items()])


def test_launches_are_counted_on_streams_alone():
    """Guards the table of launches: a device's other lines say the same time again, the host's are no launches."""
    kernels = [("gate_up", 6.0), ("fusion", 1.0), ("gate_up", 8.0)]
    planes = [
        _plane("/device:GPU:0", {"Stream #13(Compute)": kernels, "XLA Ops": kernels, "Steps": [("0", 100.0)]}),
        _plane("/host:CPU", {"python": [("gate_up", 1000.0)]}),
    ]
    found = launches.launches(planes)
    assert [(launch.name, launch.times) for launch in found] == [("gate_up", 2), ("fusion", 1)]
    assert found[0].median_seconds == pytest.approx(7e-6)
    assert found[0].total_seconds == pytest.approx(14e-6)
    assert launches.launches(planes[1:]) == []
