from __future__ import annotations

import pytest
import torch
from finetuning.forms import attach, changes, components, share_outside
from finetuning.methods import METHODS, start
from finetuning.table import forms
from kinds import Calibrated
from torch import nn

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def stepped(model: nn.Module, rate: float, count: int = 1) -> nn.Module:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    for _ in range(count):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_pair_and_plain_form_take_one_first_step(calibrated: Calibrated, mode: str) -> None:
    base, covariances = calibrated()
    parts = components(base, covariances, mode, 4)
    found = []
    for form in ("pair", "plain"):
        model = stepped(attach(calibrated()[0], parts, form), 1e-5)
        found.append(changes(model, parts))
    for name, change in found[0].items():
        assert change.norm() > 0
        assert (found[1][name] - change).norm() < 0.01 * change.norm()


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_the_published_form_and_what_is_held_stay_inside(calibrated: Calibrated, mode: str) -> None:
    base, covariances = calibrated()
    parts = components(base, covariances, mode, 2)
    shares = {}
    for name in ("published", "hold1", "hold16"):
        model = start(
            METHODS[f"{mode}-{name}"],
            calibrated()[0],
            rank=2,
            seed=0,
            covariances=lambda *_: covariances,
        )
        stepped(model, 1e-4 if name == "published" else 3e-2, 8)
        shares[name] = share_outside(parts, changes(model, parts))
    assert shares["published"] < 1e-2
    assert 0 < 10 * shares["hold16"] < shares["hold1"] < 1


def test_the_table_of_forms_has_a_row_for_each_run() -> None:
    of_measure = {"mean": 1.0, "se": 0.1, "change": 0.25, "change_se": 0.1}
    run = {
        "learning_rate": 1e-3,
        "trainable": 12345,
        "checkpoints": [dict.fromkeys(("task", "knowledge", "text"), of_measure)],
    }
    settings = {"model": "tiny", "rank": 2, "steps": 3, "batch_size": 4}
    results = {
        "settings": settings | {"questions": 5, "texts": 6},
        "base": {"task": {"mean": 2.0}},
        "runs": [
            run | {"method": "lora", "outside": None},
            run | {"method": "kpm", "outside": 0.5},
        ],
    }
    *_, first, second = forms(results).split("\n")
    assert first == "| lora | 1e-3 | 12,345 | 1.000 | +0.250 | +0.250 | – |"
    assert second == "| kpm | 1e-3 | 12,345 | 1.000 | +0.250 | +0.250 | 0.5 |"
