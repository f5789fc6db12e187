from __future__ import annotations

import json
from pathlib import Path

import batched_svd as bench
import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corda_kernels.bench.timing._BUDGET_S", {"cpu": 0.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_method_is_right_and_compared_with_the_gram_matrix(dtype: torch.dtype) -> None:
    first, *others = bench.bench_batched_svd(3, 12, dtype, CPU)
    assert (first.method, first.speedup) == ("gram", 1.0)
    assert [row.method for row in others] == ["linalg.svd"]
    for row in (first, *others):
        assert row.timing is not None
        assert row.speedup == pytest.approx(first.timing.p50 / row.timing.p50)
        assert row.error < bench._ALLOWED[dtype]


@pytest.mark.parametrize("wrong", ["U", "S", "order"])
def test_a_wrong_result_has_no_speed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = bench.reference.gram_svd

    def gram(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        U, S = exact(t)
        if wrong == "order":
            return U.flip(-1), S
        return (U * 1.001, S) if wrong == "U" else (U, S * 1.001)

    monkeypatch.setattr(bench.reference, "gram_svd", gram)
    first, second = bench.bench_batched_svd(2, 8, torch.float32, CPU)
    assert (first.timing, first.speedup) == (None, None)
    assert "wrong: no speed" in bench.line(first)
    assert second.timing is not None
    assert second.speedup is None


def test_the_kernel_is_timed_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "available_backends", lambda operation: {"cuda": None})
    monkeypatch.setattr(bench, "use_backend", lambda name: torch.no_grad())
    methods = [row.method for row in bench.bench_batched_svd(2, 8, torch.float64, CPU)]
    assert methods == ["gram", "linalg.svd", "cuda"]


def test_the_table_and_the_file_have_all_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    bench.main(["--sizes", "4,5", "--batch", "2", "--device", "cpu", "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["size"], row["dtype"]) for row in rows[::2]] == [
        (4, "float32"),
        (5, "float32"),
        (4, "float64"),
        (5, "float64"),
    ]
    assert len([line for line in lines if line.startswith(("gram", "linalg"))]) == len(rows) == 8


def test_sizes_that_are_no_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--sizes", "big"])
    assert "invalid literal" in capsys.readouterr().err
