from __future__ import annotations

import pytest

from corda_kernels.report.names import by_kind, place, printable, short


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.12.self_attn.q_proj", "self_attn.q_proj", 12),
        ("transformer.h.3.attn.c_proj", "attn.c_proj", 3),
        ("model.layers.1.mlp.experts.7.w1", "mlp.experts.*.w1", 1),
        ("lm_head", "lm_head", 0),
        ("0", "0", 0),
        ("layers.4", "layers", 4),
        ("", "", 0),
        ("a.99999999999.b", "a.99999999999.b", 0),
        ("a.²3.b", "a.²3.b", 0),
        ("a.3x.4", "a.3x", 4),
        ("m.0.1.2", "*.*", 0),
    ],
)
def test_a_name_tells_kind_and_block(name: str, kind: str, block: int) -> None:
    assert place(name) == (kind, block)


def test_layers_of_a_kind_come_together_in_the_models_order() -> None:
    names = ["m.0.q", "m.0.up", "m.1.q", "m.1.up", "head"]
    assert by_kind(names) == {
        "q": [(0, "m.0.q"), (1, "m.1.q")],
        "up": [(0, "m.0.up"), (1, "m.1.up")],
        "head": [(0, "head")],
    }


def test_what_cannot_be_shown_is_replaced() -> None:
    assert printable('<b a="1">\ud800\x00\n') == '<b a="1">���'
    assert short("abc\x07", 4) == "abc�"
    assert short("abcdef", 4) == "…def"
