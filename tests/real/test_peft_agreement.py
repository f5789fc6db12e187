"""PEFT's CorDA and ours on two layers of SmolLM2-135M; benches/compare_peft.py takes all."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda as peft_own

from corda_kernels import load_model, load_tokenizer, token_batches
from corda_kernels.peft_corda import preprocess_corda

pytestmark = [pytest.mark.real, pytest.mark.slow]

RANK = 32
LAYERS = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")


@pytest.fixture(scope="module")
def model(base_folder):
    loaded = load_model(base_folder)
    loaded.model.layers = loaded.model.layers[:2]  # no other is needed
    return loaded


@pytest.fixture(scope="module")
def prepared(model, base_folder, text, tmp_path_factory):
    """What each of the two made of the same text, by maker and method."""
    folder = tmp_path_factory.mktemp("peft")
    batches = token_batches(text, load_tokenizer(base_folder), samples=8, seq_len=256)

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            model.model(input_ids=batch["input_ids"])

    found = {}
    for maker in ("peft", "ours"):
        for method in ("ipm", "kpm"):
            config = LoraConfig(
                r=RANK,
                target_modules=list(LAYERS),
                init_lora_weights="corda",
                corda_config=CordaConfig(
                    corda_method=method, covariance_file=str(folder / f"{maker}.pt")
                ),
            )
            if maker == "peft":
                peft_own(model, config, run)
            else:
                preprocess_corda(model, config, run, normalize="peft", damping=0.01)
            found[maker, method] = {name: model.get_submodule(name).eigens for name in LAYERS}
    return found, torch.load(folder / "peft.pt", weights_only=True)


@pytest.mark.parametrize("name", LAYERS)
def test_largest_components_agree(prepared, name):
    found, _ = prepared
    peft, ours = (found[maker, "ipm"][name] for maker in ("peft", "ours"))
    cosines = torch.linalg.svdvals(ours.U_WC.double().mT @ peft.U_WC.double())
    assert float(cosines.min()) >= 0.9999
    assert float(((ours.S_WC - peft.S_WC) / peft.S_WC).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_tail_energy_of_the_smallest_is_no_worse(prepared, name, model):
    found, covariances = prepared
    C = covariances[name].double()
    C.diagonal().add_(0.01 * C.diagonal().mean())
    M = model.get_submodule(name).weight.detach().double() @ C
    least = torch.linalg.svdvals(M)[-RANK:].norm()
    peft, ours = (
        float((torch.linalg.qr(found[maker, "kpm"][name].U_WC.double()).Q.mT @ M).norm() / least)
        for maker in ("peft", "ours")
    )
    assert ours <= 1.002
    assert ours <= peft * 1.001
