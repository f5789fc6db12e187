from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import svd
import svd_cases
import torch
from svd_cases import ENDS, Case, check_case, make_case, realistic_covariance

from corda_kernels.bench.timing import measure
from corda_kernels.errors import ConfigError
from corda_kernels.linalg import End

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corda_kernels.bench.timing._BUDGET_S", {"cpu": 0.0})
    shapes = [[(24, 24), (8, 24)], [(40, 24)], [(24, 40)]]
    blocks = {"smollm2-block": (1, shapes), "llama2-7b": (2, shapes)}
    monkeypatch.setattr("svd_cases._BLOCKS", blocks)


def small() -> Case:
    return make_case("smollm2-block", CPU, 4)


def test_every_method_is_compared_with_the_published_procedure() -> None:
    rows = list(svd.bench_case(small(), svd.methods(CPU)))
    assert [(row.method, row.which) for row in rows] == [
        ("published", "largest"),
        ("published", "smallest"),
        ("ours", "largest"),
        ("ours", "smallest"),
        ("svd_lowrank", "largest"),
    ]
    base = rows[0].timing
    assert base is not None
    assert rows[0].timing == rows[1].timing
    for row in rows[2:4]:
        assert row.passed
        assert row.timing is not None
        assert row.speedup == pytest.approx(base.p50 / row.timing.p50)
        assert row.error is not None
        assert row.error < (1e-5 if row.which == "largest" else 1.001)


def test_a_wrong_result_has_no_speed_but_for_the_baseline() -> None:
    def wrong(case: Case, ends: Iterable[End]) -> svd.Parts:
        # The other end.
        flipped = ENDS[::-1]
        parts = exact(case, flipped)
        turned = dict(zip(ENDS, (parts[end] for end in flipped), strict=True))
        return {which: turned[which] for which in ends}

    exact = svd.ours
    found = svd.methods(CPU)
    replaced = {name: dataclasses.replace(found[name], run=wrong) for name in ("published", "ours")}
    for row in svd.bench_case(small(), replaced):
        assert not row.passed
        assert (row.timing is None) == ("no speed" in row.line()) == (row.method == "ours")


def test_without_attrs_the_published_procedure_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.corda", None)
    assert list(svd.methods(CPU)) == ["ours", "svd_lowrank"]
    options = "--cases smollm2-block --rank 4 --device cpu"
    run(monkeypatch, *options.split())
    assert "without published: import of peft.tuners.lora.corda halted" in capsys.readouterr().out


def test_large_layers_are_checked_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd_cases, "_QUICK", 8)
    methods = svd.methods(CPU, ["ours"])
    (unchecked, _) = svd.bench_case(small(), methods)
    (checked, _) = svd.bench_case(small(), methods, exact=True)
    assert unchecked.error is None
    assert unchecked.timing is not None
    assert unchecked.speedup is None
    assert checked.error is not None


def test_made_up_covariances_are_positive_with_outliers_and_many_scales() -> None:
    C = realistic_covariance(96, torch.Generator().manual_seed(0)).double()
    values = torch.linalg.eigvalsh(C)
    assert torch.equal(C, C.mT)
    assert values[0] > -1e-7 * values[-1]
    assert values[-1] / values[0].clamp_min(0) > 1e6
    assert C.diagonal().max() > 50 * C.diagonal().median()


def test_layers_share_covariances_and_blocks_share_tensors() -> None:
    case = make_case("llama2-7b", CPU, 4)
    assert len(case.weights) == 8
    assert case.covariances["0.0.0"] is case.covariances["1.0.1"]
    assert case.covariances["0.0.0"] is not case.covariances["0.1.0"]
    assert case.sampled == ["0.0.0", "0.0.1", "0.1.0", "0.2.0"]


@pytest.mark.parametrize(
    ("name", "said"), [("huge", "no case 'huge'"), ("model", "needs --model and --cov")]
)
def test_cases_that_cannot_be_made_are_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_case(name, None, None)


def test_a_single_call_is_its_own_quantiles() -> None:
    seen: list[int] = []
    timing = measure(seen.append, [1], CPU, repeats=1, warm_up=0)
    assert seen == [1]
    assert timing.p20 == timing.p50 == timing.p80


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["svd.py", *arguments])
    svd.main()


def test_command_prints_a_table_and_writes_all_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    options = "--cases smollm2-block --rank 4 --device cpu"
    run(monkeypatch, *options.split(), "--json", str(out))
    lines = capsys.readouterr().out.splitlines()
    assert "versions" in lines[0]
    assert len(lines) == 2 + 5
    results: dict[str, Any] = json.loads(out.read_text())
    assert [row["method"] for row in results["rows"]] == [line.split()[4] for line in lines[2:]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--methods ours,magic", "there is no method 'magic'"),
        ("--cases smollm2-block,huge", "there is no case 'huge'"),
        ("--cases smollm2-block,model", "the case model needs --model and --cov"),
        ("--rank 0", "the rank must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--cases", "smollm2-block", "--device", "cpu", *options.split())
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: {said}" in err


def test_a_rank_above_that_of_a_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank 9 is not possible for layer 0.0.1 of .* \(8 × 24"):
        next(svd.bench_case(make_case("smollm2-block", CPU, 9), {}))


def test_who_stops_it_keeps_the_rows_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **options: Any) -> Iterator[svd.Row]:
        yield from bench_case(*arguments, **options)
        raise KeyboardInterrupt

    bench_case = svd.bench_case
    monkeypatch.setattr(svd, "bench_case", stopped)
    out = tmp_path / "results.json"
    options = f"--cases smollm2-block --rank 4 --methods ours --device cpu --json {out}"
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *options.split())
    assert [row["which"] for row in json.loads(out.read_text())["rows"]] == ["largest", "smallest"]
