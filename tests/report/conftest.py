"""Reports to draw: of every kind, and one as large and as hostile as can be."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import one_stage
from torch import nn

from corda_kernels import CordaConfig, CovarianceSet
from corda_kernels.adapter import read_adapter, write_adapter
from corda_kernels.init import corda_adapter
from corda_kernels.init.measured import sampled_spectrum
from corda_kernels.planning import Selection, Stability
from corda_kernels.planning.scores import SCORING_DAMPING
from corda_kernels.planning.stability import LayerStability
from corda_kernels.report.content import (
    Input,
    Layer,
    Report,
    adapter_report,
    covariance_report,
    with_covariances,
)
from corda_kernels.report.measure import measure_inputs, measure_spectra
from corda_kernels.report.page import html_page
from corda_kernels.targets import target_linears

pytest.importorskip("matplotlib", reason="the report's figures need matplotlib")

HOSTILE = (
    '</script><script>alert("1")</script>',
    '"><img src=x onerror=alert(1)>',
    "model.layers.0.$\\frac{",
    "-->\x00\ud800&amp;" + 80 * "long",
)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def large(blocks: int = 32, kinds: tuple[str, ...] = KINDS) -> Report:
    """A report with all parts, of a model of the size of LLaMA-2-7B, with hostile names besides."""
    choose = random.Random(0)
    names = [f"model.layers.{block}.mlp.{kind}" for block in range(blocks) for kind in kinds]
    names += HOSTILE
    layers, inputs = {}, []
    for name in names:
        values = torch.logspace(3, -choose.uniform(2, 6), 4096, dtype=torch.float64)
        note = {"spectrum": sampled_spectrum(values, 0, 4096), "shape": (4096, 11008)}
        rank = choose.randrange(200)
        layers[name] = Layer(rank=rank, sigma=(2.0, 1.0)).seen(note)
        absmax = [choose.uniform(1, 9) for _ in range(63)] + [choose.uniform(1, 900)]
        spectrum = sampled_spectrum(values / values.mean(), 0, 4096)
        about = {"layers": [name], "tokens": 10**6, "channels": 11008, "absmax": absmax}
        about |= {"median": 1.5, "channel": 11007, "outliers": 12, "threshold": 6.0}
        about |= {"spectrum": spectrum, "largest": 900.0, "smallest": 1e-7}
        inputs.append(Input.from_json(about | {"effective_rank": 3.0}))
    scores = {name: [choose.uniform(900, 1000) for _ in range(5)] for name in names}
    groups = [[name] for name in names]
    agreement = {n: LayerStability(choose.random(), choose.random()) for n in names}
    return Report(
        name=HOSTILE[0],
        title=HOSTILE[1],
        summary=(("model", HOSTILE[1]), (HOSTILE[0], "word " * 40)),
        layers=layers,
        inputs=tuple(inputs),
        damping=0.01,
        mode="kpm",
        allocation={"ranks": {name: layer.rank for name, layer in layers.items()}},
        trainable=10**8,
        stability=Stability(32, 0.01, (10**6, 10**6), agreement),
        selection=Selection("argmin", 0.01, "ratio", [1] * 5, ["a"] * 5, scores, groups),
        seconds={"calibration": 1234.5, "stability": 12.0, "decomposition": 0.05},
        memory={"peak of the process": 1 << 36, "peak of cuda:0": 1 << 35, "covariances": 1 << 30},
        left_out={HOSTILE[1]: HOSTILE[0]},
    )


@pytest.fixture(scope="session")
def large_page() -> str:
    return html_page(large())


@pytest.fixture(scope="session")
def run(
    calibrated: Callable[..., tuple[nn.Module, CovarianceSet]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a model's covariances and adapters of several kinds. Nothing is written."""
    folder = tmp_path_factory.mktemp("run")
    model, _ = calibrated()
    batches = list(torch.randint(3, 64, (4, 3, 40), generator=torch.Generator().manual_seed(0)))
    covariances = one_stage(model, batches, rank=4, progress=False)
    covariances.save(folder / "covariances.safetensors")
    made: dict[str, dict[str, Any]] = {
        "ipm": {"mode": "ipm", "rank": 4},
        "kpm": {"mode": "kpm", "budget": "r=3", "candidates": 3},
        "pool": {"mode": "kpm", "rank": 4, "candidates": 2, "selection": "pool"},
        "published": {"mode": "kpm", "rank": 4, "residual": "weight"},
    }
    for name, options in made.items():
        config = CordaConfig(stability=True, progress=False, **options)
        write_adapter(corda_adapter(model, batches, config), folder / name)
    model.save_pretrained(folder / "model")
    old = read_adapter(folder / "ipm")
    old.record.measured.clear()
    old.record.stability.clear()
    write_adapter(old, folder / "old")
    return folder


@pytest.fixture(scope="session")
def reports(
    run: Path, calibrated: Callable[..., tuple[nn.Module, CovarianceSet]]
) -> dict[str, Report]:
    """One of every kind, by name."""
    covariances = CovarianceSet.load(run / "covariances.safetensors")
    inputs = measure_inputs(covariances)
    modules = target_linears(calibrated()[0])
    spectra = measure_spectra(modules, covariances, damping=SCORING_DAMPING)
    found = {
        name: adapter_report(name, read_adapter(run / name))
        for name in ("ipm", "kpm", "pool", "published", "old")
    }
    found["covariances"] = with_covariances(
        covariance_report("cov", covariances, inputs), inputs, spectra
    )
    return found


@pytest.fixture(scope="session")
def page_of(reports: dict[str, Report]) -> Callable[[str], str]:
    """The page of each report, drawn when it is first asked for."""
    return functools.cache(lambda name: html_page(reports[name]))
