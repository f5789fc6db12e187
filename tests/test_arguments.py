"""Wrong arguments of every public function are typed errors, of one line; right ones are taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from planning_cases import PLANNING
from torch import nn
from wrong_arguments import (
    CHOICES,
    COUNTS,
    COVARIANCES,
    DAMPINGS,
    DEVICES,
    DTYPES,
    FINITE,
    FLAGS,
    IDS,
    INF,
    LONG,
    MASKS,
    NAMES,
    NAN,
    OTHERS,
    PATHS,
    REAL,
    SEEDS,
    SQUARES,
    TENSORS,
    WEIGHTS,
    WHOLE,
    C,
    Case,
    W,
    World,
    adapted,
    batch,
    config,
    covariance,
    covariance_set,
    in_backend,
    odd_tensors,
    patched,
    preprocess,
    scheduled,
)

import corda_kernels as ck
from corda_kernels import kernels
from corda_kernels.adapter import AdapterFactors, published_factors
from corda_kernels.adapter.published import residual
from corda_kernels.arguments import shown
from corda_kernels.calibration import CalibrationCheckpoint
from corda_kernels.errors import CordaError
from corda_kernels.integrations import statistics
from corda_kernels.linalg import extreme_eigenvalues, singular_values
from corda_kernels.planning import compactness
from corda_kernels.planning.scores import log_condition


@pytest.fixture(scope="module")
def world(calibrated: Any, save_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    model, covariances = calibrated()
    folder = tmp_path_factory.mktemp("world")
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    covariances.save(folder / "cov")
    (folder / "text.txt").write_text("w1 w2 w3 w4 " * 40)
    adapted = ck.init_corda(copy.deepcopy(model), covariances, config())
    ck.save_adapter(adapted, folder / "adapter")
    return World(model, covariances, folder, ck.load_tokenizer(folder / "base"))


FOUND = ck.co_svd(W, C, rank=2)
FACTORS = published_factors(W, FOUND)
CALIBRATION: dict[str, list[Any]] = {
    "model": OTHERS,
    "batches": [None, 5, [None], ["text"], {"input_ids": 1}, [[1, 2]], []],
    "targets": [*NAMES, [], "(", "a{99999999999}", "nonsuch"],
    "experts": CHOICES,
    "outlier_threshold": REAL,
    "normalize": CHOICES,
    "on_unseen": CHOICES,
    "checkpoint": ["file", 5, Path("file")],
    "distributed": ["no", 0, 1, None, True],
    "progress": FLAGS,
}
CASES: dict[str, Case] = (
    PLANNING
    | {
        "co_svd": Case(
            ck.co_svd,
            lambda w: {"weight": W, "covariance": C, "rank": 2},
            {
                "weight": [*WEIGHTS, W.double() * 1e200, W.double() * 1e-200],
                "covariance": [*COVARIANCES, C.double() * 1e200, C.double() * 1e-200],
                "rank": [*COUNTS, None, 6, 10**30, LONG],
                "which": CHOICES,
                "method": [*CHOICES, None],
                "damping": DAMPINGS,
                "seed": SEEDS,
                "output_covariance": [*odd_tensors(torch.eye(6))[1:], C, torch.eye(6) * NAN],
                "power": [*FINITE, 2, None],
            },
        ),
        "co_svd_layers": Case(
            lambda **options: list(ck.co_svd_layers(**options)),
            lambda w: {"weights": {"a": W}, "covariances": {"a": C}, "rank": {"a": 2}},
            {
                "weights": [*OTHERS, *({"a": each} for each in WEIGHTS)],
                "covariances": [*OTHERS, {}, *({"a": each} for each in COVARIANCES)],
                "rank": [*COUNTS, None, {}, {"a": 1.5}, {"a": True}, 10**30],
                "which": CHOICES,
                "damping": DAMPINGS,
                "seed": SEEDS,
            },
        ),
        "singular_values": Case(
            singular_values,
            lambda w: {"weight": W, "covariance": C},
            {"weight": WEIGHTS, "covariance": COVARIANCES, "damping": DAMPINGS, "tail": FLAGS},
        ),
        "regularized_inverse": Case(
            ck.regularized_inverse,
            lambda w: {"matrix": C},
            {"matrix": SQUARES, "damping": DAMPINGS, "max_condition": [*REAL, 0.5]},
        ),
        "extreme_eigenvalues": Case(
            extreme_eigenvalues, lambda w: {"matrix": C}, {"matrix": [*SQUARES, C * NAN]}
        ),
        "compactness": Case(
            compactness,
            lambda w: {"weight": W, "covariance": C},
            {
                "weight": WEIGHTS,
                "covariance": COVARIANCES,
                "damping": [*DAMPINGS, None],
                "condition": [*CHOICES, None],
            },
        ),
        "log_condition": Case(
            log_condition,
            lambda w: {"covariance": C, "outputs": 6},
            {"covariance": [*COVARIANCES[:-2], C[:4]], "outputs": COUNTS, "condition": CHOICES},
        ),
        "adapter_factors": Case(
            ck.adapter_factors,
            lambda w: {"weight": W, "co_svd": FOUND},
            {
                "weight": [*odd_tensors(W), W[:5], W[0]],
                "co_svd": OTHERS,
                "hold": [*FINITE, 0, 1e308],
            },
        ),
        "published_factors": Case(
            published_factors,
            lambda w: {"weight": W, "co_svd": FOUND},
            {"weight": [*odd_tensors(W), W[:5]], "co_svd": OTHERS},
        ),
        "residual": Case(
            residual,
            lambda w: {"weight": W, "factors": FACTORS},
            {
                "weight": [*odd_tensors(W), W[:5], W[0]],
                "factors": [*OTHERS, AdapterFactors(FACTORS.A, FACTORS.B[:5])],
            },
        ),
        "CordaLinear": Case(
            ck.CordaLinear,
            lambda w: {"base": nn.Linear(5, 6), "factors": FACTORS},
            {
                "base": [*OTHERS, nn.ReLU(), nn.Linear(6, 5)],
                "factors": [
                    *OTHERS,
                    AdapterFactors("A", "B"),  # type: ignore[arg-type]
                    AdapterFactors(FACTORS.A.to(torch.complex64), FACTORS.B),
                    AdapterFactors(FACTORS.A[0], FACTORS.B),
                ],
            },
        ),
        "Covariance": Case(
            covariance,
            lambda w: {},
            {
                "matrix": [*odd_tensors(C), C[:4], C[0]],
                "tokens": [*WHOLE, -1],
                "calls": [*WHOLE, -1],
                "absmax": [*TENSORS, torch.ones(4)],
                "outlier_count": [*TENSORS, torch.ones(4)],
                "outlier_threshold": REAL,
            },
        ),
        "Covariance.merge": Case(
            lambda **options: covariance().merge(**options),
            lambda w: {"other": covariance()},
            {"other": [*OTHERS, covariance(outlier_threshold=1.0)], "normalize": [*CHOICES, None]},
        ),
        "CovarianceSet": Case(
            covariance_set,
            lambda w: {},
            {
                "covariances": [*OTHERS, {"a": C}, {5: covariance()}],
                "normalize": [*CHOICES, None],
                "left_out": [5, "text", ["a"]],
                "provenance": [5, "text", ["a"]],
            },
        ),
        "CovarianceSet.merge": Case(
            lambda other: covariance_set().merge(other),
            lambda w: {"other": covariance_set()},
            {"other": [*OTHERS, covariance(), covariance_set(normalize="peft")]},
        ),
        "CovarianceSet.load": Case(
            ck.CovarianceSet.load,
            lambda w: {"path": w.folder / "cov"},
            {"path": PATHS},
        ),
        "CalibrationCheckpoint": Case(
            CalibrationCheckpoint,
            lambda w: {"path": w.folder / "run"},
            {"path": PATHS, "every": [*WHOLE, -1], "resume": FLAGS},
        ),
        "calibrate": Case(
            ck.calibrate,
            lambda w: {"model": w.model, "batches": [batch()], "progress": False},
            CALIBRATION | {"sides": [*CHOICES, None], "labels": [*CHOICES, None]},
        ),
        "calibrate_blocks": Case(
            lambda **options: list(ck.calibrate_blocks(**options)),
            lambda w: {"model": w.model, "batches": [batch()], "progress": False},
            CALIBRATION,
        ),
        "batch": Case(
            lambda model, **changes: ck.calibrate(model, [batch(**changes)], progress=False),
            lambda w: {"model": w.model},
            {"input_ids": IDS, "attention_mask": MASKS},
        ),
        "batch, block by block": Case(
            lambda model, **changes: list(
                ck.calibrate_blocks(model, [batch(**changes)], progress=False)
            ),
            lambda w: {"model": w.model},
            {"input_ids": IDS, "attention_mask": MASKS},
        ),
        "token_batches": Case(
            ck.token_batches,
            lambda w: {
                "data": w.folder / "text.txt",
                "tokenizer": w.tokenizer,
                "samples": 2,
                "seq_len": 8,
            },
            {
                "data": [*PATHS[:-2], [5], "\ud800"],
                "tokenizer": OTHERS,
                "samples": [*COUNTS, None],
                "seq_len": [*COUNTS, None],
                "batch_size": [*COUNTS, None, lambda found: 1.5],
                "field": [5, ["text"], b"text"],
                "template": [5, ["{text}"], b"{text}", "{"],
                "chat_template": FLAGS,
                "answers_only": [*FLAGS, True],
                "pack": FLAGS,
                "seed": SEEDS,
            },
        ),
        "load_model": Case(
            ck.load_model,
            lambda w: {"source": w.folder / "base", "dtype": "float32"},
            {"source": PATHS, "dtype": DTYPES, "device": DEVICES},
        ),
        "load_tokenizer": Case(
            ck.load_tokenizer, lambda w: {"source": w.folder / "base"}, {"source": PATHS}
        ),
        "load_for_training": Case(
            lambda base_model, **options: ck.load_for_training(
                copy.deepcopy(base_model), **options
            ),
            lambda w: {"base_model": w.model, "path": w.folder / "adapter"},
            {"base_model": OTHERS, "path": PATHS, "use_peft": FLAGS},
        ),
        "save_adapter": Case(
            ck.save_adapter,
            lambda w: {"model": adapted(w), "path": w.folder / "saved"},
            {"model": [*OTHERS, nn.Linear(2, 2)]},
        ),
        "export_lora": Case(
            ck.export_lora,
            lambda w: {"source": w.folder / "adapter", "out": w.folder / "lora"},
            {"source": PATHS, "rank": COUNTS},
        ),
        "merge": Case(ck.merge, lambda w: {"model": adapted(w)}, {"model": [*OTHERS, nn.ReLU()]}),
        "init_corda": Case(
            ck.init_corda,
            lambda w: {
                "model": copy.deepcopy(w.model),
                "data": w.covariances,
                "config": config(),
            },
            {
                "model": [*OTHERS, nn.ReLU()],
                "data": [None, 5, [1], "text", []],
                "config": OTHERS,
                "use_peft": FLAGS,
                "keep": [5, "text", [1]],
            },
        ),
        "CordaConfig": Case(
            config,
            lambda w: {"budget": "r=4"},
            {
                "mode": [*CHOICES, None],
                "rank": [*COUNTS, None],
                "budget": [True, NAN, INF, 1e400, -1, 0, [5], "nan%", "r=0", LONG],
                "min_rank": [*WHOLE, -1, None, LONG],
                "max_rank": [*COUNTS, LONG],
                "rank_multiple": [*COUNTS, None, LONG],
                "candidates": [*COUNTS, None],
                "selection": [*CHOICES, None],
                "condition": [*CHOICES, None],
                "hold": [*FINITE, 0, None, "nan"],
                "residual": CHOICES,
                "damping": DAMPINGS,
                "targets": NAMES,
                "experts": CHOICES,
                "exclude_modules": NAMES,
                "modules_to_save": [*NAMES, "lm_head", [3]],
                "lora_dropout": [*FINITE, 1, None],
                "use_dora": FLAGS,
                "method": [*CHOICES, None],
                "seed": [*SEEDS, None],
                "stability": FLAGS,
                "memory_limit": [*WHOLE, -1, "1e400 GB", "8GB"],
                "sides": [*CHOICES, None],
                "labels": CHOICES,
                "freeze_a": [*FLAGS, True],
                "distributed": FLAGS,
                "progress": FLAGS,
            },
        ),
        "RankSchedule": Case(
            ck.RankSchedule,
            lambda w: {"kind": "linear", "first": 1.0, "last": 0.5, "over": 4},
            {
                "kind": [*CHOICES, None],
                "first": [*FINITE, 1.5, None],
                "last": [*FINITE, 1.5, None],
                "over": [*FINITE, 0, None],
            },
        ),
        "RankSchedule.share": Case(
            ck.RankSchedule("linear", 1.0, 0.5, 4).share,
            lambda w: {"at": 2},
            {"at": [NAN, "2", None, True, [2]]},
        ),
        "RankSchedule.apply": Case(
            scheduled, lambda w: {"model": adapted(w)}, {"model": [*OTHERS, nn.ReLU()]}
        ),
        "DriftPenalty": Case(
            lambda **options: ck.DriftPenalty(**options)(),
            lambda w: {"model": adapted(w), "covariances": w.covariances},
            {"model": [*OTHERS, nn.ReLU()], "covariances": OTHERS, "sides": [*CHOICES, "both"]},
        ),
        "CompactnessPenalty": Case(
            lambda **options: ck.CompactnessPenalty(**options)(),
            lambda w: {"model": adapted(w), "covariances": w.covariances},
            {"model": [*OTHERS, nn.ReLU()], "covariances": OTHERS},
        ),
        "syrk_": Case(
            kernels.syrk_,
            lambda w: {"c": torch.zeros(5, 5), "x": W},
            {
                "c": [
                    *TENSORS[:-1],
                    *odd_tensors(torch.zeros(5, 5))[5:],
                    np.zeros((5, 5), dtype=int),
                ],
                "x": [*TENSORS[:-2], *odd_tensors(W)[5:], np.zeros((6, 5), dtype=object), [[1.0]]],
                "alpha": [NAN, INF, "1", True, None, 1j, [1]],
                "absmax": ["text", *odd_tensors(torch.zeros(5))[5:]],
                "outlier_count": [*odd_tensors(torch.zeros(5))[5:6], torch.zeros(5)],
                "outlier_threshold": REAL,
                "precision": [*CHOICES, None],
                "deterministic": FLAGS,
            },
        ),
        "symmetrize_": Case(
            kernels.symmetrize_, lambda w: {"c": C.clone()}, {"c": [*odd_tensors(C), C[:4], C[0]]}
        ),
        "batched_svd": Case(
            kernels.batched_svd,
            lambda w: {"t": C},
            {"t": [*odd_tensors(C), C[:4], C[0], C.half()], "exact": FLAGS},
        ),
        "use_backend": Case(
            in_backend, lambda w: {"name": "reference"}, {"name": [*CHOICES, "gpu", ["cpu"]]}
        ),
        "available_backends": Case(
            kernels.available_backends, lambda w: {"operation": "syrk_"}, {"operation": CHOICES}
        ),
        "preprocess_corda": Case(
            preprocess,
            lambda w: {"model": w.model, "mask": torch.ones(2, 8)},
            {
                "model": OTHERS,
                "mask": MASKS[:5],
                "lora_config": [*OTHERS, LoraConfig()],
                "run_model": [None, 5, "text"],
                "hooked_model": [5, "text"],
                "normalize": [*CHOICES, None],
                "damping": DAMPINGS,
                "method": [*CHOICES, None],
                "on_unseen": [*CHOICES, None],
                "memory_limit": [*WHOLE, -1],
            },
        ),
        "patch_peft": Case(
            patched,
            lambda w: {"normalize": "peft"},
            {
                "normalize": [*CHOICES, None],
                "damping": DAMPINGS,
                "method": CHOICES,
                "on_unseen": CHOICES,
                "memory_limit": [*WHOLE, -1],
            },
        ),
        "svd_llm_whitening": Case(
            statistics.svd_llm_whitening,
            lambda w: {"covariances": w.covariances, "damping": 0.01},
            {"covariances": [*OTHERS, covariance()], "damping": DAMPINGS},
        ),
        "smoothquant_scales": Case(
            statistics.smoothquant_scales,
            lambda w: {"model": w.model, "covariances": w.covariances},
            {"model": OTHERS, "covariances": OTHERS, "alpha": [*FINITE, 1.5, None]},
        ),
        "eva_components": Case(
            statistics.eva_components,
            lambda w: {"covariances": w.covariances, "rank": 2},
            {"covariances": OTHERS, "rank": [*COUNTS, None, 10**30]},
        ),
        "gptq_hessians": Case(
            statistics.gptq_hessians,
            lambda w: {"covariances": w.covariances},
            {"covariances": OTHERS},
        ),
    }
)


@pytest.mark.parametrize("name", CASES)
def test_right_arguments_are_taken(name: str, world: World) -> None:
    case = CASES[name]
    case.call(**case.good(world))


def outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return call(**arguments)
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore::corda_kernels.errors.CordaWarning")
@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments_are_typed_errors_of_one_line(name: str, world: World) -> None:
    case = CASES[name]
    wrong = [(argument, value) for argument, values in case.wrong.items() for value in values]
    offences = []
    for argument, value in wrong:
        found = outcome(case.call, case.good(world) | {argument: value})
        if not isinstance(found, CordaError) or "\n" in str(found) or len(str(found)) >= 500:
            offences.append(f"{argument}={shown(value)}: {found!r}")
    assert not offences, "\n".join(offences)


def test_every_public_function_is_tried() -> None:
    untried = {"errors", "kernels", "__version__"}
    given = {"AdapterFactors", "CoSVD", "RegularizedInverse", "Stability"}  # plain results
    names = set(ck.__all__) - untried - given
    assert names <= CASES.keys()
    assert set(kernels.__all__) <= CASES.keys()
    tried = CASES["CordaConfig"].wrong.keys()
    assert {field.name for field in fields(ck.CordaConfig)} == tried
