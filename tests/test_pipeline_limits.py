from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import Calibrated
from torch import Tensor, nn

from corda_kernels import CordaConfig, CovarianceSet
from corda_kernels.calibration.needs import covariance_bytes
from corda_kernels.errors import ConfigError, OutOfMemoryWarning
from corda_kernels.init import corda_adapter

pytestmark = pytest.mark.slow

OUTPUT = "model.layers.0.self_attn.o_proj"


def config(mode: Any = "ipm", **options: Any) -> CordaConfig:
    return CordaConfig(mode, **({"rank": 4, "stability": True, "progress": False} | options))


def random_batches(count: int = 4, rows: int = 4, length: int = 16) -> list[Tensor]:
    return [torch.randint(3, 64, (rows, length)) for _ in range(count)]


def test_the_cpu_takes_over_where_a_decomposition_runs_out_of_memory(
    calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corda_kernels.init import layers

    model, covariances = calibrated()
    expected = corda_adapter(model, covariances, config())
    original = layers.co_svd_layers
    decomposed: list[str] = []
    tried: list[str] = []

    def cramped(weights: dict[str, Tensor], *arguments: Any, **options: Any) -> Any:
        # Three layers fit, then none beside others, and o_proj does not even on its own.
        for name, part in original(weights, *arguments, **options):
            if (len(weights) > 1 and len(decomposed) == 3) or (OUTPUT in weights and not tried):
                tried.extend(weights if len(weights) == 1 else ())
                raise torch.OutOfMemoryError("CUDA out of memory")
            decomposed.append(name)
            yield name, part

    monkeypatch.setattr(layers, "co_svd_layers", cramped)
    with pytest.warns(OutOfMemoryWarning, match=f"decompose layer {OUTPUT}: the CPU takes over"):
        found = corda_adapter(model, covariances, config())
    assert tried == [OUTPUT]
    assert sorted(decomposed) == sorted(covariances)
    assert list(found.layers) == list(covariances)
    for name, layer in found.layers.items():
        assert torch.equal(layer.A, expected.layers[name].A), name
        assert torch.equal(layer.B, expected.layers[name].B), name


def blockwise(adapter: Any, whole: Any, same_components: Callable[..., bool]) -> None:
    """Whether two adapters are the same, and were made of the same text."""
    assert list(adapter.layers) == list(whole.layers)
    for name, layer in adapter.layers.items():
        assert same_components(layer, whole.layers[name]), name
    assert adapter.record.stability["tokens"] == whole.record.stability["tokens"]
    assert adapter.record.stability["layers"].keys() == whole.record.stability["layers"].keys()
    assert adapter.record.calibration == whole.record.calibration


def one_block(model: nn.Module) -> int:
    """The least limit that can be kept: both halves of a block and their mean."""
    return 3 * covariance_bytes(model)[1]


def test_a_limit_below_one_block_is_refused_before_the_work(calibrated: Calibrated) -> None:
    model, _ = calibrated()
    least = one_block(model)
    calls: list[object] = []
    model.get_submodule("model.layers.1").register_forward_pre_hook(lambda *a: calls.append(a))
    with pytest.raises(ConfigError, match=rf"one decoder block take {least} bytes .* stability"):
        corda_adapter(model, random_batches(rows=16), config(memory_limit=least - 1))
    assert len(calls) == 1  # the two tokens by which sizes are found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_memory_limit_changes_the_way_but_not_the_adapter(
    calibrated: Calibrated,
    same_components: Callable[..., bool],
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from corda_kernels.init import covariances as covariances_of_text

    model, covariances = calibrated(architecture)
    batches = random_batches(rows=16)
    # Both halves and their mean.
    size = 3 * sum(4 * covariance.matrix.numel() for covariance, _ in covariances.groups())
    whole = corda_adapter(model, batches, config("kpm", memory_limit=size))
    monkeypatch.setattr(covariances_of_text, "calibrate", None)
    found = corda_adapter(model, batches, config("kpm", memory_limit=size - 1))
    blockwise(found, whole, same_components)


def test_nothing_of_a_block_is_left_when_the_next_one_runs(
    calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    from corda_kernels.calibration.kept_text import KeptText

    model, _ = calibrated(num_hidden_layers=3)
    made: list[weakref.ref[CovarianceSet]] = []
    left: list[int] = []
    original, advance = CovarianceSet.__init__, KeptText.advance

    def noted(self: CovarianceSet, *arguments: Any, **options: Any) -> None:
        made.append(weakref.ref(self))
        original(self, *arguments, **options)

    def watched(*arguments: Any) -> Any:
        gc.collect()
        left.append(sum(reference() is not None for reference in made))
        return advance(*arguments)

    monkeypatch.setattr(CovarianceSet, "__init__", noted)
    monkeypatch.setattr(KeptText, "advance", watched)
    corda_adapter(model, random_batches(rows=16), config(memory_limit=one_block(model)))
    # Two halves and their mean in each of three blocks.
    assert (len(made), left) == (9, [0, 0, 0])


def test_an_offloaded_model_gets_its_adapter_block_by_block(
    calibrated: Calibrated, same_components: Callable[..., bool], tmp_path: Any
) -> None:
    from accelerate import disk_offload

    model, _ = calibrated()
    batches = random_batches(rows=16)
    whole = corda_adapter(model, batches, config("kpm"))
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    found = corda_adapter(model, batches, config("kpm", memory_limit=one_block(model)))
    blockwise(found, whole, same_components)
    assert found.record.base["sample"] == whole.record.base["sample"]
