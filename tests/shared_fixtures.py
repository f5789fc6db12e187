"""Fixtures that several test files share: repeatable randomness and tiny random models."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pytest
import torch
import typer.main
from family_sizes import DECODER
from torch import Tensor, nn

if TYPE_CHECKING:
    from corda_kernels import CovarianceSet
    from corda_kernels.adapter import LayerAdapter

# Each save of an adapter compiles the templates of PEFT's card and of ours anew.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)
# Each run of the command line makes its commands anew, from the signatures of our functions.
typer.main.get_command = functools.cache(typer.main.get_command)
# No power fails in a test, and a disk takes 10 ms for each file that it is to have.
os.fsync = lambda _: None
# Without a GPU `torch.manual_seed` notes the stack for errors that may come later: 2 ms.
_seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed

_SIZES = DECODER | {
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_SIZES = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "qwen3": _SIZES,
    "mistral": _SIZES,
    "gemma2": _SIZES,
    "gpt2": _GPT2_SIZES,
    "mixtral": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """A fixed seed, and NaN in all memory that torch hands out unwritten, so that it shows."""
    _seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., torch.nn.Module]:
    """Makes a random causal language model: an architecture's name and changes of its sizes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(architecture: str, **changes: Any) -> torch.nn.Module:
        config = AutoConfig.for_model(architecture, **(_MODELS[architecture] | changes))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def calibrated(
    tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[nn.Module, CovarianceSet]]:
    """Gives a tiny model, loaded from a folder and untouched, with its inputs' covariances.

    The same arguments give the same weights. They are large enough that every layer counts.
    """
    from transformers import AutoModelForCausalLM

    from corda_kernels import calibrate

    made: dict[Any, tuple[nn.Module, CovarianceSet]] = {}

    def give(architecture: str = "llama", **changes: Any) -> tuple[nn.Module, CovarianceSet]:
        key = architecture, *sorted(changes.items())
        if key not in made:
            _seed(0)
            folder = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture, **({"initializer_range": 0.1} | changes)).save_pretrained(
                folder
            )
            model = AutoModelForCausalLM.from_pretrained(folder)
            # "all-linear" would warn of fused experts.
            targets = r"(model|transformer)\.(?!.*\.experts\.).*"
            batches = torch.randint(3, 64, (2, 6, 16))
            made[key] = model, calibrate(model, batches, targets=targets, progress=False)
        model, covariances = made[key]
        return copy.deepcopy(model), covariances

    return give


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[[Path], None]:
    """Writes a tokenizer of the words w0 … w59 into a tiny model's folder."""

    def save(folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(60))]
        vocabulary = {word: index for index, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def adapt() -> Callable[..., nn.Module]:
    """Initialises an adapter of rank 4 from what `calibrated` gives."""
    from corda_kernels import CordaConfig, init_corda

    def attach(
        calibrated: tuple[nn.Module, CovarianceSet], *, use_peft: bool = True, **options: Any
    ) -> nn.Module:
        options = {"mode": "ipm", "rank": 4, "progress": False} | options
        return init_corda(*calibrated, CordaConfig(**options), use_peft=use_peft)

    return attach


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with empty charts: those take seconds, and tests/report/test_page.py looks at them."""
    pytest.importorskip("matplotlib")
    from markupsafe import Markup

    from corda_kernels.report import figures

    monkeypatch.setattr(figures, "_draw", lambda title, *_: (title, Markup("<svg></svg>")))


@pytest.fixture(scope="session")
def logits() -> Callable[[nn.Module], Tensor]:
    """Computes a model's logits on text that never changes."""
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def compute(model: nn.Module) -> Tensor:
        return model.eval()(input_ids=ids).logits

    return compute


@pytest.fixture(scope="session")
def same_logits(logits: Callable[[nn.Module], Tensor]) -> Callable[..., bool]:
    """Whether logits are the model's own, up to three times what its float32 differs by from
    float64: another order of the sums costs about as much as the first.
    """

    def compare(found: Tensor, model: nn.Module) -> bool:
        double = copy.deepcopy(model).double()
        double.config._experts_implementation = "eager"  # the default has no float64
        expected, exact = logits(model), logits(double)
        return bool((found - expected).norm() <= 3 * (expected - exact).norm())

    return compare


@pytest.fixture(scope="session")
def same_components() -> Callable[..., bool]:
    """Whether two layers' untrained adapters have the same components, but for a share of them.

    What counts is the part of the weight that they span, for its basis may differ.
    """

    def projector(vectors: Tensor) -> Tensor:
        basis = torch.linalg.qr(vectors.double()).Q
        return basis @ basis.mT

    def compare(found: LayerAdapter, expected: LayerAdapter, allowed: float = 1e-3) -> bool:
        if found.A.shape != expected.A.shape or (found.initial is None) != (
            expected.initial is None
        ):
            return False
        if found.initial is not None and expected.initial is not None:
            part = expected.initial.product()
            return bool((found.initial.product() - part).norm() <= allowed * part.norm())
        rank = expected.rank // 2
        return all(
            bool((projector(a) - projector(b)).norm() <= allowed * rank**0.5)
            for a, b in (
                (found.B[:, :rank], expected.B[:, :rank]),
                (found.A[rank:].mT, expected.A[rank:].mT),
            )
        )

    return compare


@pytest.fixture(scope="session")
def train() -> Callable[..., nn.Module]:
    """Trains what is trainable, for a few steps that change the logits a lot."""

    def steps(model: nn.Module, count: int = 3) -> nn.Module:
        ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(2))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.02)
        model.train()
        for _ in range(count):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    return steps
