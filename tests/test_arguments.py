"""Wrong arguments of every public function are typed errors, of one line; right ones are taken."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from torch import Tensor, nn

import corda_kernels as ck
from corda_kernels import kernels
from corda_kernels.arguments import real_number, shown, whole_number
from corda_kernels.errors import BatchError, ConfigError, CordaError
from corda_kernels.integrations import statistics
from corda_kernels.linalg.operand import near_one
from corda_kernels.peft_corda import patch_peft, preprocess_corda
from corda_kernels.planning import drift_weights, parse_budget, uniform_budget
from corda_kernels.planning.compactness import log_condition
from corda_kernels.planning.stability import LayerStability

NAN, INF = math.nan, math.inf
W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
C = torch.eye(5) + 0.1
LONG = 10**5000  # Python writes no number of so many digits

OTHERS: list[Any] = [None, "text", 5, [1], object()]
# Of a tensor of floating numbers.
TENSORS: list[Any] = [None, "text", 1.5, [[1.0]], np.eye(5, dtype=np.float32)]
WHOLE: list[Any] = [1.5, True, "8", NAN, INF, [1], torch.tensor([1, 2]), 1j]
COUNTS: list[Any] = [*WHOLE, 0, -1]
REAL: list[Any] = [NAN, "0.1", True, 1j, [1.0], torch.ones(2), -1, -INF, b"1"]
FINITE: list[Any] = [*REAL, INF, 10**400]
DAMPINGS: list[Any] = [*FINITE, 1e308]
SEEDS: list[Any] = [*WHOLE, 2**64, -(2**63) - 1, LONG]
CHOICES: list[Any] = ["other", 5, ["auto"], b"auto", torch.ones(2), np.ones(2)]
FLAGS: list[Any] = ["no", 0, 1, None, [True]]
NAMES: list[Any] = [5, [1], ["q_proj", 1], b"q_proj", NAN, object()]
PATHS: list[Any] = ["x" * 300, "a\0b", 5, 1.5, b"a", None, ["a"], "\ud800"]
DEVICES: list[Any] = ["gpu", "meta", "cuda:99", [1], 1.5, None]
DTYPES: list[Any] = [
    "int4", 5, ["float32"], torch.int8, torch.complex64, torch.float8_e4m3fn, np.ones(2)
]  # fmt: skip
MASKS: list[Any] = [
    torch.full((2, 8), 2),
    torch.full((2, 8), 0.5),
    torch.full((2, 8), -1),
    torch.full((2, 8), NAN),
    torch.zeros(2, 8).index_fill(1, torch.tensor([7]), -INF),
    torch.ones(2, 8).to_sparse(),
    torch.ones(2, 8, device="meta"),
    torch.ones(2, 8) * 1j,
    np.ones((2, 8)),
    [[1] * 8] * 2,
]
IDS: list[Any] = [
    torch.ones(2, 8, dtype=dtype)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.bool, torch.float32, torch.complex64)
] + [
    torch.ones(2, 8, dtype=torch.int64).to_sparse(),
    torch.ones(2, 8, dtype=torch.int64, device="meta"),
    np.ones((2, 8), dtype=np.int64),
    [[1] * 8] * 2,
]


def odd_tensors(good: Tensor) -> list[Any]:
    """Tensors of the same shape, of which nothing could be computed right."""
    kinds = (torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn)
    return TENSORS + [good.to(kind) for kind in kinds] + [good.to_sparse(), good.to("meta")]


WEIGHTS = [*odd_tensors(W), torch.empty(6, 0), W[0], W * NAN, W[:, :4]]
COVARIANCES = [*odd_tensors(C), torch.empty(0, 0), C[0], C * NAN, C[:4, :4], C.tril()]
SQUARES = [*odd_tensors(C), torch.empty(0, 0), C[0], C[:4], C.half()]


@dataclass(frozen=True)
class World:
    """What calls are made with.

    Attributes:
        model: tiny.
        covariances: of its layers.
        folder: with a model in `base`, an adapter in `adapter`, covariances in `cov` and a text.
        tokenizer: stands in for one.
    """

    model: nn.Module
    covariances: ck.CovarianceSet
    folder: Path
    tokenizer: Any

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {name: self.model.get_submodule(name) for name in self.covariances}


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


def config(**options: Any) -> ck.CordaConfig:
    return ck.CordaConfig(**({"mode": "kpm", "rank": 4, "progress": False} | options))


def batch(**changes: Any) -> dict[str, Any]:
    ones = torch.ones(2, 8, dtype=torch.int64)
    return {"input_ids": ones, "attention_mask": ones} | changes


def covariance(**changes: Any) -> ck.Covariance:
    values = {
        "matrix": C,
        "tokens": 10,
        "calls": 1,
        "absmax": torch.ones(5),
        "outlier_count": torch.zeros(5, dtype=torch.int64),
        "outlier_threshold": 6.0,
    }
    return ck.Covariance(**(values | changes))


def covariance_set(**changes: Any) -> ck.CovarianceSet:
    values = {"covariances": {"a": covariance()}, "normalize": "tokens", "left_out": None}
    return ck.CovarianceSet(**(values | {"provenance": None} | changes))


def adapted(world: World) -> nn.Module:
    return ck.init_corda(
        copy.deepcopy(world.model), world.covariances, config(residual="weight"), use_peft=False
    )


def preprocess(model: Any, mask: Any, **options: Any) -> None:
    lora = LoraConfig(
        init_lora_weights="corda",
        target_modules=["q_proj"],
        r=4,
        corda_config=PeftCordaConfig(corda_method="kpm"),
    )

    def run() -> None:
        model(input_ids=torch.ones(2, 8, dtype=torch.int64), attention_mask=mask)

    model = copy.deepcopy(model)
    preprocess_corda(model, **({"lora_config": lora, "run_model": run} | options))


def in_backend(name: Any) -> None:
    with kernels.use_backend(name):
        pass


def scheduled(model: Any) -> None:
    with ck.RankSchedule("linear", 1.0, 1.0, 4).apply(model) as ranks:
        ranks.ranks.append(1.0)  # as if it had generated


def patched(**options: Any) -> None:
    patch_peft(**options).restore()


def mixed(world: World, **options: Any) -> Any:
    return ck.mix_covariances(**({"sets": [world.covariances] * 2, "weights": [1, 1]} | options))


def stability_of(entry: Any, **changes: Any) -> ck.Stability:
    layers = {"a": entry}
    note = {"rank": 4, "damping": 0.01, "tokens": [5, 5], "layers": layers}
    return ck.Stability.from_json(note | changes)


@dataclass(frozen=True)
class Case:
    """A public function: how it is called, with which arguments, and which it refuses."""

    call: Callable[..., Any]
    good: Callable[[World], dict[str, Any]]
    wrong: dict[str, list[Any]]


FOUND = ck.co_svd(W, C, rank=2)
FACTORS = ck.published_factors(W, FOUND)
SPECTRUM = torch.tensor([2.0, 1.0])
CALIBRATION: dict[str, list[Any]] = {
    "model": OTHERS,
    "batches": [None, 5, [None], ["text"], {"input_ids": 1}, [[1, 2]], []],
    "targets": [*NAMES, None, [], "(", "a{99999999999}", "nonsuch"],
    "outlier_threshold": REAL,
    "normalize": CHOICES,
    "on_unseen": CHOICES,
    "checkpoint": ["file", 5, Path("file")],
    "distributed": ["no", 0, 1, None, True],
    "progress": FLAGS,
}
CASES: dict[str, Case] = {
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
            "generator": [0, "text"],
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
            "memory_limit": [*WHOLE, -1],
        },
    ),
    "singular_values": Case(
        ck.singular_values,
        lambda w: {"weight": W, "covariance": C},
        {"weight": WEIGHTS, "covariance": COVARIANCES, "damping": DAMPINGS, "tail": FLAGS},
    ),
    "regularized_inverse": Case(
        ck.regularized_inverse,
        lambda w: {"matrix": C},
        {"matrix": SQUARES, "damping": DAMPINGS, "max_condition": [*REAL, 0.5]},
    ),
    "extreme_eigenvalues": Case(
        ck.extreme_eigenvalues, lambda w: {"matrix": C}, {"matrix": [*SQUARES, C * NAN]}
    ),
    "compactness": Case(
        ck.compactness,
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
        {"weight": [*odd_tensors(W), W[:5], W[0]], "co_svd": OTHERS, "hold": [*FINITE, 0, 1e308]},
    ),
    "published_factors": Case(
        ck.published_factors,
        lambda w: {
            "weight": W,
            "co_svd": FOUND,
            "reconstruction": "inverse",
            "covariance": C,
        },
        {
            "weight": [*odd_tensors(W), W[:5]],
            "co_svd": OTHERS,
            "reconstruction": [*CHOICES, None, "projection"],
            "covariance": [*odd_tensors(C), C[:4, :4]],
        },
    ),
    "residual": Case(
        ck.residual,
        lambda w: {"weight": W, "factors": FACTORS},
        {
            "weight": [*odd_tensors(W), W[:5], W[0]],
            "factors": [*OTHERS, ck.AdapterFactors(FACTORS.A, FACTORS.B[:5])],
        },
    ),
    "CordaLinear": Case(
        ck.CordaLinear,
        lambda w: {"base": nn.Linear(5, 6), "factors": FACTORS},
        {
            "base": [*OTHERS, nn.ReLU(), nn.Linear(6, 5)],
            "factors": [
                *OTHERS,
                ck.AdapterFactors("A", "B"),  # type: ignore[arg-type]
                ck.AdapterFactors(FACTORS.A.to(torch.complex64), FACTORS.B),
                ck.AdapterFactors(FACTORS.A[0], FACTORS.B),
            ],
        },
    ),
    "allocate_ranks": Case(
        ck.allocate_ranks,
        lambda w: {
            "spectra": {"a": SPECTRUM},
            "log_condition": {"a": 1.0},
            "shapes": {"a": (2, 3)},
            "budget": 5,
        },
        {
            "spectra": [*OTHERS, *({"a": each} for each in odd_tensors(SPECTRUM))],
            "log_condition": [*OTHERS, *({"a": each} for each in FINITE)],
            "shapes": [*OTHERS, {"a": (2,)}, {"a": "23"}, {"a": (2.5, 3)}, {"a": 6}, {"a": (0, 3)}],
            "budget": [*WHOLE, None, -1],
            "mode": CHOICES,
            "min_rank": [*WHOLE, -1, LONG],
            "max_rank": [*COUNTS, LONG],
            "rank_multiple": [*COUNTS, None, LONG],
            "rows": [*COUNTS, None, LONG],
        },
    ),
    "parse_budget": Case(
        parse_budget,
        lambda w: {"value": "1%", "shapes": {"a": (2, 3)}, "total_parameters": 100},
        {
            "value": [
                *(True, None, NAN, INF, -INF, 1e400, 1.5, -1, 0, 1j, [5], b"5", LONG),
                *("nan", "nan%", "inf", "-1", "1e400", "1e9999999%", "1e-9999999%", "r=0", "r=-1"),
                *("9" * 5000, "r=" + "9" * 5000, "r=10**30", "", "%", "snan", "101%"),
            ]
        },
    ),
    "uniform_budget": Case(
        uniform_budget, lambda w: {"shapes": {"a": (2, 3)}, "rank": 1}, {"rank": COUNTS}
    ),
    "mix_covariances": Case(
        ck.mix_covariances,
        lambda w: {"sets": [w.covariances] * 2, "weights": [1, Fraction(1, 3)]},
        {
            "sets": [*OTHERS, [], [covariance()] * 2],
            "weights": [
                *(None, 5, "nan", [1], [0, 0], {}, [1, NAN], [1, INF], [-INF, INF], [1e308] * 2),
                *([1, -1], [1, "1"], [1, True], [1, None], [1, 1j], [1, [1]], [1, 10**400]),
            ],
            "normalize": [*CHOICES, None],
        },
    ),
    "drift_weights": Case(
        drift_weights,
        lambda w: {
            "model": w.model,
            "sets": [w.covariances] * 2,
            "held_out": [w.covariances] * 2,
            "steps": 1,
            "progress": False,
        },
        {
            "model": [*OTHERS, nn.Linear(2, 2)],
            "held_out": [*OTHERS, []],
            "rank": COUNTS,
            "steps": [*COUNTS, 10**30],
            "damping": DAMPINGS,
            "normalize": CHOICES,
        },
    ),
    "select_covariance": Case(
        ck.select_covariance,
        lambda w: {"model": w.model, "candidates": [w.covariances], "progress": False},
        {
            "model": [*OTHERS, nn.Linear(2, 2)],
            "candidates": [*OTHERS, [], [lambda: 5], "drift"],
            "selection": [*CHOICES, None],
            "damping": [*DAMPINGS, None],
            "condition": [*CHOICES, None],
        },
    ),
    "subspace_stability": Case(
        ck.subspace_stability,
        lambda w: {
            "modules": w.modules,
            "first": w.covariances,
            "second": w.covariances,
            "rank": 2,
            "bottom": False,
        },
        {
            "modules": [*OTHERS, {"nonsuch": nn.Linear(2, 2)}],
            "first": OTHERS,
            "second": [*OTHERS, covariance_set()],
            "rank": COUNTS,
            "damping": DAMPINGS,
        },
    ),
    "Stability.from_json": Case(
        stability_of,
        lambda w: {"entry": {"top": 0.5}},
        {
            "entry": [*OTHERS, *({"top": each} for each in ("0.5", NAN, INF, True, [1]))],
            "rank": COUNTS,
            "damping": DAMPINGS,
            "tokens": [5, [1], [1, -1], ["1", "2"], [1.5, 2]],
            "layers": OTHERS,
        },
    ),
    "Stability.verdict": Case(
        lambda layer: ck.Stability(2, None, (1, 1), {}).verdict(layer),
        lambda w: {"layer": LayerStability(0.5)},
        {"layer": [*OTHERS, LayerStability()]},
    ),
    "Stability.at": Case(
        lambda end: ck.Stability(2, None, (1, 1), {}).at(end, []),
        lambda w: {"end": "largest"},
        {"end": [*CHOICES, None]},
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
        {"path": PATHS, "device": DEVICES},
    ),
    "CalibrationCheckpoint": Case(
        ck.CalibrationCheckpoint,
        lambda w: {"path": w.folder / "run"},
        {"path": PATHS, "every": [*WHOLE, -1], "resume": FLAGS},
    ),
    "calibrate": Case(
        ck.calibrate,
        lambda w: {"model": w.model, "batches": [batch()], "progress": False},
        CALIBRATION,
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
            "path": w.folder / "text.txt",
            "tokenizer": w.tokenizer,
            "samples": 2,
            "seq_len": 8,
        },
        {
            "path": PATHS,
            "tokenizer": OTHERS,
            "samples": [*COUNTS, None],
            "seq_len": [*COUNTS, None],
            "batch_size": [*COUNTS, None, lambda found: 1.5],
            "field": [5, ["text"], b"text"],
            "template": [5, ["{text}"], b"{text}", "{"],
            "chat_template": FLAGS,
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
        lambda base_model, **options: ck.load_for_training(copy.deepcopy(base_model), **options),
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
            "targets": [*NAMES, None],
            "exclude_modules": NAMES,
            "modules_to_save": [*NAMES, "lm_head", [3]],
            "lora_dropout": [*FINITE, 1, None],
            "use_dora": FLAGS,
            "method": [*CHOICES, None],
            "seed": [*SEEDS, None],
            "stability": FLAGS,
            "memory_limit": [*WHOLE, -1, "1e400 GB", "8GB"],
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
        ck.drift_penalty,
        lambda w: {"model": adapted(w), "covariances": w.covariances},
        {"model": [*OTHERS, nn.ReLU()], "covariances": OTHERS},
    ),
    "CompactnessPenalty": Case(
        ck.compactness_penalty,
        lambda w: {"model": adapted(w), "covariances": w.covariances},
        {"model": [*OTHERS, nn.ReLU()], "covariances": OTHERS},
    ),
    "syrk_": Case(
        kernels.syrk_,
        lambda w: {"c": torch.zeros(5, 5), "x": W, "row_mask": torch.ones(6, dtype=torch.bool)},
        {
            "c": [*TENSORS[:-1], *odd_tensors(torch.zeros(5, 5))[5:], np.zeros((5, 5), dtype=int)],
            "x": [*TENSORS[:-2], *odd_tensors(W)[5:], np.zeros((6, 5), dtype=object), [[1.0]]],
            "alpha": [NAN, INF, "1", True, None, 1j, [1]],
            "absmax": ["text", *odd_tensors(torch.zeros(5))[5:]],
            "outlier_count": [*odd_tensors(torch.zeros(5))[5:6], torch.zeros(5)],
            "outlier_threshold": REAL,
            "row_mask": ["text", torch.ones(6), torch.ones(6, device="meta"), torch.ones(5).bool()],
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
@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, case in CASES.items() for argument in case.wrong],
)
def test_wrong_arguments_are_typed_errors(name: str, argument: str, world: World) -> None:
    case = CASES[name]
    for value in case.wrong[argument]:
        what = f"{argument}={shown(value)}"
        found = outcome(case.call, case.good(world) | {argument: value})
        assert isinstance(found, CordaError), f"{what}: {found!r}"
        assert "\n" not in str(found), what
        assert len(str(found)) < 500, what


def test_every_public_function_is_tried() -> None:
    untried = {"errors", "kernels", "__version__"}
    given = {"AdapterFactors", "CoSVD", "RegularizedInverse", "Stability"}  # plain results
    same = {"drift_penalty": "DriftPenalty", "compactness_penalty": "CompactnessPenalty"}
    names = {same.get(name, name) for name in set(ck.__all__) - untried - given}
    assert names <= CASES.keys()
    assert set(kernels.__all__) <= CASES.keys()
    tried = CASES["CordaConfig"].wrong.keys()
    assert {field.name for field in fields(ck.CordaConfig)} == tried


def test_an_option_that_is_not_allowed_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="hold must be"):
        config(hold=0)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind_are_taken(value: Any) -> None:
    assert type(config(rank=value).rank) is int
    assert whole_number("n", value, 1) == 3
    assert len(ck.co_svd(W, C, rank=value).S) == 3


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), Fraction(1, 2), torch.tensor(0.5)])
def test_real_numbers_of_any_kind_are_taken(value: Any) -> None:
    assert real_number("x", value, "at least 0", lambda x: x >= 0) == 0.5
    assert torch.equal(
        ck.co_svd(W, C, rank=2, damping=value).S, ck.co_svd(W, C, rank=2, damping=0.5).S
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_ones_and_zeros_are_taken_in_any_dtype(dtype: torch.dtype, world: World) -> None:
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5]).to(dtype)
    found = ck.calibrate(world.model, [batch(attention_mask=mask)], progress=False)
    assert found.provenance["tokens"] == 13
    with pytest.raises(BatchError, match=r"batch 1 .* of other values than 1 .*\(mask == 0\)"):
        ck.calibrate(world.model, [batch(), batch(attention_mask=mask.float() - 1)], progress=False)


SCALES = (1e-300, 1e-200, 1e-150, 1.0, 1e150, 1e200, 1e300)


@pytest.mark.parametrize("condition", ["ratio", "bound", "tight"])
@pytest.mark.parametrize(("w", "c"), list(itertools.product(SCALES, SCALES)))
def test_the_score_does_not_go_by_the_units_of_weight_and_inputs(
    w: float, c: float, condition: Any
) -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    weight, covariance = W.double(), x.T @ x / 40
    expected = ck.compactness(weight, covariance, condition=condition)
    found = ck.compactness(w * weight, c * covariance, condition=condition)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_matrices_are_scaled_by_powers_of_two() -> None:
    batch = torch.stack([W.double() * 1e-310, W.double() * 1e300, W.double() * 0])
    scaled = near_one(batch)
    largest = scaled.abs().amax((-2, -1))
    assert ((largest >= 1) & (largest < 2)).tolist() == [True, True, False]
    assert not scaled[2].any()
    assert torch.frexp(scaled[1] / batch[1]).mantissa.unique().tolist() == [0.5]
