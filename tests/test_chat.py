"""Conversations: their layouts, the tokenizer's own rendering, and which tokens are answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from torch import nn

from corda_kernels import calibrate, token_batches
from corda_kernels.documents import read_texts
from corda_kernels.errors import ConfigError, DataError, DataWarning

USER, ASSISTANT = "user", "assistant"
CONVERSATIONS = [
    [
        {"role": USER, "content": f"How far is harbour {n}?\n"},
        {"role": ASSISTANT, "content": f"  Not far.\n\n{n}\n"},
        {"role": USER, "content": "And <b> é 数?"},
        {"role": ASSISTANT, "content": "数é 🙂"},
    ]
    for n in range(5)
]
SHAREGPT = {USER: "human", ASSISTANT: "gpt"}

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<eos>\n"
    "{% endfor %}"
)
# The last answer is shown with its reasoning, which the generation prompt opens.
REASONING = (
    "{% for m in messages %}[{{ m['role'] }}]{% if loop.last and m['role'] == 'assistant' %}"
    "<think>\n</think>{% endif %}{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
# Every message is numbered from the end.
SHIFTING = (
    "{% for m in messages %}{{ loop.revindex }}[{{ m['role'] }}]{{ m['content'] }}<eos>\n"
    "{% endfor %}"
)


def records(kind: str) -> list[dict[str, Any]]:
    if kind == "messages":
        return [{"messages": each} for each in CONVERSATIONS]
    if kind == "ShareGPT":
        return [
            {
                "conversations": [
                    {"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in each
                ]
            }
            for each in CONVERSATIONS
        ]
    if kind == "prompt and completion":
        return [{"prompt": each[:3], "completion": each[3:]} for each in CONVERSATIONS]
    return [
        {"prompt": each[0]["content"], "completion": each[1]["content"]} for each in CONVERSATIONS
    ]


def answers(data: Any, template: str, **options: Any) -> list[str]:
    """The text of the tokens that count, sequence by sequence."""
    tokenizer = byte_tokenizer(chat_template=template)
    options = {"samples": 1, "seq_len": 500, "pack": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        batches = token_batches(data, tokenizer, chat_template=True, answers_only=True, **options)
    return [
        tokenizer.decode(ids[counted])
        for batch in batches
        for ids, counted in zip(batch["input_ids"], batch["token_mask"], strict=True)
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "  Not far.\n\n0\n<eos>\n数é 🙂<eos>\n"),
        (MARKED, "  Not far.\n\n0\n数é 🙂"),
        (REASONING, "  Not far.\n\n0\n<eos>\n</think>数é 🙂<eos>\n"),
    ],
)
def test_answers_are_found_in_templates_of_many_kinds(template: str, expected: str) -> None:
    assert answers(records("messages")[:1], template) == [expected]


def test_a_template_that_shows_a_turn_otherwise_later_is_refused() -> None:
    with pytest.raises(DataError, match=r"record 0 .* changes turn 1 .* a conversation of its own"):
        answers(records("messages")[:1], SHIFTING)


def test_an_answer_without_context_is_refused() -> None:
    with pytest.raises(DataError, match=r"record 0 .* begins with an answer"):
        answers([{"messages": CONVERSATIONS[0][1:]}], CHATML)


def test_packing_cuts_answers_with_their_tokens() -> None:
    data = records("texts")
    packed = answers(data, CHATML, samples=40, seq_len=7, pack=True, batch_size=3)
    tokenizer = byte_tokenizer(chat_template=CHATML)
    whole = "".join(answers(data, CHATML, samples=5))
    tokens = len(tokenizer("".join(read_texts(data, chat_tokenizer=tokenizer)))["input_ids"])
    assert len(packed) == tokens // 7
    assert whole.startswith(found := "".join(packed))
    assert len(tokenizer(whole.removeprefix(found))["input_ids"]) < 7


def test_covariances_are_those_of_the_answers_in_their_context(
    tiny_model: Callable[..., nn.Module],
) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=256)
    batches = token_batches(
        records("texts"),
        tokenizer,
        samples=5,
        seq_len=256,
        batch_size=2,
        chat_template=True,
        answers_only=True,
        pack=False,
    )
    found = calibrate(model, batches, progress=False)
    read: list[torch.Tensor] = []
    name = "model.layers.1.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: read.append(args[0][0].double())
    )
    total, count = torch.zeros(found[name].matrix.shape, dtype=torch.float64), 0
    for question, answer, *_ in CONVERSATIONS:
        context = f"[user]{question['content']}<eos>\n[assistant]"
        length = len(tokenizer(context)["input_ids"])
        ids = tokenizer(f"{context}{answer['content']}<eos>\n", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(input_ids=ids)
        for x in read.pop()[length:]:  # token by token
            total += torch.outer(x, x)
            count += 1
    handle.remove()
    assert found[name].tokens == count
    torch.testing.assert_close(found[name].matrix.double(), total / count, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_what_a_table_fills_up_is_taken_off(template: str) -> None:
    """Rows of a table have all columns: where a message has no such key there is None."""
    datasets = pytest.importorskip("datasets")
    template = template.replace("m['content']", "m | tojson")
    first, second = CONVERSATIONS[0][:2]
    data = [{"messages": [first, second | {"name": "me"}]}]
    table = datasets.Dataset.from_list(data)
    assert table[0]["messages"][0]["name"] is None
    assert answers(table, template) == answers(data, template)
    tokenizer = byte_tokenizer(chat_template=template)
    (text,) = read_texts(table, chat_tokenizer=tokenizer)
    assert text == tokenizer.apply_chat_template(data[0]["messages"], tokenize=False)


def test_tools_go_along() -> None:
    tokenizer = byte_tokenizer(chat_template="{{ tools | tojson }}" + CHATML)
    data, tools = records("messages")[0], [{"name": "f"}]
    (text,) = read_texts([data | {"tools": tools}], chat_tokenizer=tokenizer)
    assert text == tokenizer.apply_chat_template(data["messages"], tools=tools, tokenize=False)
    assert text.startswith('[{"name": "f"}]')


def test_a_system_prompt_beside_sharegpt() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (text,) = read_texts([{"system": "be", "conversations": turns}], chat_tokenizer=tokenizer)
    assert text == "[system]be<eos>\n[user]hi<eos>\n[assistant]ho<eos>\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "role 'narrator' .* human, gpt"),
        ({"conversations": [{"who": "human"}]}, "'conversations' must be a list of objects"),
        ({"prompt": 5, "completion": "a"}, "'prompt and completion' must be texts or lists"),
        (
            {"question": "a", "answer": "b"},
            r"no field 'text': present: question, answer; .*--template.* 'messages', 'conversat",
        ),
    ],
)
def test_unknown_layouts_name_what_there_is(record: dict[str, Any], message: str) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    with pytest.raises(DataError, match=rf"record 0 .*{message}"):
        list(read_texts([record], chat_tokenizer=tokenizer))


@pytest.mark.parametrize("data", [["plain"], [{"text": "a", "id": 1}]])
def test_what_is_no_conversation_has_no_answers(data: Any) -> None:
    with pytest.raises(DataError, match=r"no conversation, .* present: (a text|text, id); expect"):
        answers(data, CHATML)


@pytest.mark.parametrize(
    "options",
    [{}, {"chat_template": True, "field": "a"}, {"chat_template": True, "template": "{a}"}],
)
def test_answers_are_of_conversations_alone(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="answers_only counts the assistant's turns"):
        token_batches(["a"], byte_tokenizer(), answers_only=True, **options)


def test_a_tokenizer_that_knows_no_characters_is_refused() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)

    class Slow(type(tokenizer)):
        is_fast = False

    tokenizer.__class__ = Slow
    with pytest.raises(DataError, match=r"Slow cannot tell .* take a fast tokenizer"):
        token_batches(records("texts"), tokenizer, chat_template=True, answers_only=True)


@pytest.mark.parametrize("layout", ["$A", "<bos> $A"])
@pytest.mark.parametrize("trim", [True, False])
def test_white_space_at_the_edges_of_an_answer(layout: str, trim: bool) -> None:
    """A tokenizer may leave it out of a token's offsets; each byte is a token here."""
    from tokenizers import processors

    tokenizer = byte_tokenizer(layout=layout, chat_template=CHATML)
    if trim:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    data = [{"prompt": "hi \n", "completion": "\n a \n"}]
    (batch,) = token_batches(
        data, tokenizer, samples=1, seq_len=500, chat_template=True, answers_only=True, pack=False
    )
    counted = batch["input_ids"][0][batch["token_mask"][0]]
    assert tokenizer.decode(counted) == "\n a \n<eos>\n"
