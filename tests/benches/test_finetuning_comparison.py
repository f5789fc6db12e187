from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from finetuning.comparison import at, best, most_of_the_fall, trajectory, when_reached
from finetuning.table import grid, table

BASE = {
    name: {"mean": mean, "se": 0.1}
    for name, mean in {
        "task": 2.0,
        "knowledge": 4.0,
        "text": 3.0,
        "first": 0.25,
        "rank": 4.0,
    }.items()
}


def run(
    method: str,
    rate: float,
    seed: int,
    task: list[float],
    forgotten: float = 0.0,
    last: float = 1.0,
) -> dict[str, Any]:
    """A run measured after 3 and after 15 steps; it forgets evenly along its fall in loss."""
    checkpoints = []
    for step, loss in zip((3, 15), task, strict=True):
        change = forgotten * (BASE["task"]["mean"] - loss)
        entry: dict[str, Any] = {"step": step}
        for name, moved in {"task": loss - 2.0, "knowledge": change, "text": 2 * change}.items():
            mean = BASE[name]["mean"] + moved
            entry[name] = {"mean": mean, "se": 0.1, "change": moved, "change_se": 0.01}
        checkpoints.append(entry)
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "training_loss": [2.0] * 12 + [last] * 4,
        "checkpoints": checkpoints,
        "rank": {"mean": 3.0, "se": 0.1, "change": -1.0, "change_se": 0.2},
    }


def results(*runs: dict[str, Any]) -> dict[str, Any]:
    settings = {"profile": "cpu", "model": "tiny", "rank": 4, "steps": 16, "batch_size": 2}
    settings |= {"questions": 10, "texts": 3, "ranked": 5}
    return {"settings": settings, "base": BASE, "planned": 9, "runs": list(runs)}


def test_a_loss_between_two_measurements_is_interpolated() -> None:
    points = trajectory(run("lora", 1e-3, 0, [1.5, 1.0], forgotten=0.1), BASE)
    assert [point.step for point in points] == [0, 3, 15]
    # Half way from 3 to 15 by the logarithm of 1 + step: 4, 8, 16.
    found = when_reached(points, 1.25)
    assert found is not None
    assert found.step == pytest.approx(7)
    assert found.changes == pytest.approx({"task": -0.75, "knowledge": 0.075, "text": 0.15})


def test_what_is_never_reached_is_none_and_a_rebound_does_not_count() -> None:
    points = trajectory(run("lora", 1e-3, 0, [1.2, 1.4]), BASE)
    assert when_reached(points, 1.1) is None
    found = when_reached(points, 1.4)
    assert found is not None
    assert found.step < 3
    start = when_reached(points, 2.5)
    assert start is not None
    assert start.step == 0


def test_the_best_rate_has_the_lowest_last_training_loss_over_shared_seeds() -> None:
    runs = [
        run("lora", 1e-3, 0, [1.5, 1.0], last=0.9),
        run("lora", 3e-3, 0, [1.5, 1.3], last=0.8),
        # Of the one seed that only this rate was run with nothing can be concluded.
        run("lora", 1e-3, 1, [1.5, 1.0], last=0.1),
    ]
    assert [each["learning_rate"] for each in best(results(*runs))["lora"]] == [3e-3]


def test_tied_rates_are_compared_over_all_seeds() -> None:
    runs = [
        run("lora", rate, seed, [1.5, 1.0], last=last)
        for rate, lasts in ((1e-3, (0.82, 0.7)), (3e-3, (0.8, 0.9)), (1e-2, (0.9,)))
        for seed, last in enumerate(lasts)
    ]
    found = results(*runs)
    assert best(found)["lora"][0]["learning_rate"] == 3e-3
    found["settings"]["tie"] = 0.03
    assert best(found)["lora"][0]["learning_rate"] == 1e-3


def test_a_run_that_broke_off_is_named_and_not_compared() -> None:
    broken = run("lora", 3e-3, 0, [1.5, 1.0], last=0.1) | {
        "training_loss": [0.1],
        "checkpoints": [],
    }
    found = results(broken, run("lora", 1e-3, 0, [1.5, 1.0]))
    assert best(found)["lora"][0]["learning_rate"] == 1e-3
    head, _, rows = table(found).partition("\n\n")
    assert head.startswith("2 of 9 runs")
    assert head.endswith("Runs whose loss ceased to be finite: lora 3e-3.")
    assert len(rows.split("\n")) == 3


def test_equal_task_is_nine_tenths_of_the_fall_seed_by_seed() -> None:
    targets = most_of_the_fall({0: 1.2, 1: 1.0}, BASE)
    assert targets == pytest.approx({0: 1.28, 1: 1.1})
    runs = [run("pissa", 1e-3, 0, [1.5, 1.2]), run("pissa", 1e-3, 1, [1.5, 1.2])]
    assert at(runs[:1], BASE, targets) is not None
    assert at(runs, BASE, targets) is None
    assert at(runs[:1], BASE, {1: 1.5}) is None


def test_the_table_says_what_was_run_and_what_came_out() -> None:
    made = table(
        results(
            run("lora", 1e-3, 0, [1.5, 1.0], 0.10),
            run("lora", 1e-3, 1, [1.5, 1.2], 0.10),
            run("lora", 3e-3, 0, [1.5, 1.1], 0.10, last=1.5),
            run("kpm-even", 1e-3, 0, [1.0, 0.8], 0.02),
        )
    )
    head, _, rows = made.partition("\n\n")
    assert head.startswith("4 of 9 runs (profile cpu)")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows.split("\n")]
    assert len({len(line) for line in lines}) == 1
    lora, kpm = lines[2:]
    spread = f"{0.2 / math.sqrt(2):.3f}"
    assert lora[:5] == ["lora", "1e-3", "2", f"1.100 ± {spread}", "15 ± 0"]
    assert kpm[:6] == ["kpm-even", "1e-3", "1", "0.800", "3", "2"]
    # At its end, and where the loss is 1.1.
    assert kpm[6:8] == ["+0.024", "+0.018"]
    assert kpm[10] == "-1.00"


def test_the_grid_has_all_learning_rates() -> None:
    made = grid(
        results(
            run("lora", 1e-3, 0, [1.5, 1.0]),
            run("pissa", 1e-3, 0, [1.5, 1.0]),
            run("lora", 3e-4, 0, [1.5, 1.3], last=2.0),
        )
    )
    rows = [[cell.strip() for cell in line.split("|")] for line in made.split("\n")[2:]]
    assert [row[1:3] for row in rows] == [["lora", "3e-4"], ["lora", "1e-3"], ["pissa", "1e-3"]]
    assert rows[0][5] == "–"


def test_without_lora_nothing_is_compared_with_it() -> None:
    made = table(results(run("pissa", 1e-3, 0, [1.5, 1.0])))
    assert made.split("\n")[-1].split("|")[5].strip() == "–"


@pytest.mark.slow
def test_equal_results_make_equal_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from finetuning.plots import draw

    found = results(
        run("lora", 1e-3, 0, [1.5, 1.0]),
        run("lora", 1e-3, 1, [1.5, 1.0]),
        run("kpm++-even-lora", 3e-3, 0, [1.2, 0.9], 0.1),
    )
    for name in ("one", "two"):
        draw(found, tmp_path / name)
    for name in ("convergence.svg", "forgetting.svg"):
        picture = (tmp_path / "one" / name).read_bytes()
        assert picture == (tmp_path / "two" / name).read_bytes()
        assert len(picture) < 100_000
