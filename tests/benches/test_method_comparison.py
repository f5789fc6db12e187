"""The row for PEFT's method comparison: PEFT's fields, of a run that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import method_comparison
import pytest
from kinds import Make

pytestmark = pytest.mark.slow

# What processing.py there reads of a row, beside what a row's own parts are named by.
READ = {
    "run_info": {"created_at", "total_time", "experiment_name", "train_config", "peft_config"},
    "train_info": {"status", "metrics", "train_time", "file_size", "num_trainable_params"},
    "meta_info": {"package_info", "system_info"},
}
MEASURED = {"test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}


def sentence(first: int) -> str:
    return " ".join(f"w{(first * 7 + index * index) % 60}" for index in range(20))


@pytest.fixture
def arguments(tiny_model: Make, save_tokenizer: Any, tmp_path: Path) -> list[str]:
    tiny_model("llama", initializer_range=0.1, max_position_embeddings=256).save_pretrained(
        tmp_path / "model"
    )
    save_tokenizer(tmp_path / "model")
    rows = [{"question": sentence(i), "answer": f"{sentence(i + 1)} #### {i}"} for i in range(12)]
    for name in ("train", "test"):
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"gsm8k_{name}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "prose.txt").write_text("\n\n".join([" ".join(map(sentence, range(40)))] * 3))
    options = {"max-steps": 20, "eval-steps": 10, "problems": 2, "prose": 2, "max-new-tokens": 4}
    options |= {"rank": 4, "samples": 8, "learning-rate": 1e-2, "text": tmp_path / "prose.txt"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [str(tmp_path / "model"), str(tmp_path), str(tmp_path / "row.json"), *flags]


@pytest.mark.parametrize("mode", ["ipm", "lora"])
def test_a_row_has_what_pefts_table_reads(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("sys.argv", ["method_comparison.py", *arguments, "--mode", mode])
    method_comparison.main()
    row = json.loads(Path(arguments[2]).read_text(encoding="utf-8"))
    for part, names in READ.items():
        assert names <= row[part].keys()
    config = row["run_info"]["peft_config"]
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    (metrics,) = row["train_info"]["metrics"]
    assert metrics.keys() >= MEASURED
    assert metrics["train samples"] == 80
    assert metrics["train loss"] < 4  # ln 63, of 63 words, is 4.1
    assert abs(metrics["forgetting"]) > 0.05  # the prose has the problems' words


def test_the_final_answer_is_read_as_peft_reads_it() -> None:
    said = ["so #### 12\nQuestion:", "The answer is: $1,000.", "The final answer is 5%.", "7"]
    assert [method_comparison.final(text) for text in said] == ["12", "1,000", "5", None]
