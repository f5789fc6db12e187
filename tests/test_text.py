"""Calibration text: formats, templates, chat, and what is refused."""

import gzip
import json
import re
from pathlib import Path

import pytest
from byte_tokenizer import all_tokens, byte_tokenizer, write, write_records
from characters import CHARACTERS
from hypothesis import given
from hypothesis import strategies as st

from corda_kernels.documents import decode_escapes, read_texts
from corda_kernels.errors import ConfigError, DataError
from corda_kernels.text import token_batches

TEXTS = st.text(CHARACTERS)
CHATML = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return byte_tokenizer(layout="<bos> $A", chat_template=CHATML)


class TestFormats:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL"])
    def test_json_lines_give_their_text_field(self, tmp_path, name):
        path = write(tmp_path, '{"text": "one"}\n\n  \r\n{"text": "two", "id": 3}', name)
        assert list(read_texts(path)) == ["one", "two"]

    def test_line_separators_within_a_json_string_do_not_end_the_line(self, tmp_path):
        path = write(tmp_path, '{"text": "one\u2028two\x85three"}\n')
        assert list(read_texts(path)) == ["one\u2028two\x85three"]

    def test_byte_order_mark_is_not_text(self, tmp_path):
        assert list(read_texts(write(tmp_path, '\ufeff{"text": "one"}'))) == ["one"]

    def test_half_a_surrogate_pair_is_replaced(self, tmp_path, tokenizer):
        path = write(tmp_path, '{"text": "a\\ud83d"}')
        assert list(read_texts(path)) == ["a?"]

    def test_blank_documents_are_skipped(self, tmp_path):
        path = write_records(tmp_path, {"text": " \n"}, {"text": "one"}, {"text": ""})
        assert list(read_texts(path)) == ["one"]

    def test_path_may_be_a_string(self, tmp_path):
        assert list(read_texts(str(write(tmp_path, "one", "a.txt")))) == ["one"]

    def test_plain_text_documents_are_whole_paragraphs(self, tmp_path):
        paragraphs = ["aaa\naaa", "bb", "cccccccc", "d"]
        path = write(tmp_path, "\n\n".join(paragraphs), "a.txt")
        assert list(read_texts(path, min_chars=8)) == ["aaa\naaa\n\nbb", "cccccccc", "d"]

    def test_plain_text_without_blank_lines_is_cut_at_line_ends(self, tmp_path):
        path = write(tmp_path, "12345\n" * 100, "a.txt")
        assert set(read_texts(path, min_chars=8)) == {"12345\n12345"}

    def test_one_endless_line_is_cut_and_nothing_is_lost(self, tmp_path):
        text = "".join(chr(ord("a") + n % 26) for n in range(1000))
        documents = list(read_texts(write(tmp_path, text, "a.txt"), min_chars=8))
        assert "".join(documents) == text
        assert max(map(len, documents)) == 32

    def test_samples_of_a_long_text_come_from_different_places(self, tmp_path, tokenizer):
        path = write(tmp_path, "\n\n".join(f"{n:06} is a number" for n in range(2000)), "a.txt")
        batches = token_batches(path, tokenizer, samples=8, seq_len=64)
        numbers = re.findall(
            r"\d{6}", "".join(tokenizer.decode(b["input_ids"][0]) for b in batches)
        )
        assert max(map(int, numbers)) - min(map(int, numbers)) > 500


class TestTemplate:
    def render(self, folder, template, record):
        (text,) = read_texts(write_records(folder, record), template=template)
        return text

    @pytest.mark.parametrize(
        ("template", "text"),
        [
            ("Q: {question}?\nA: {answer[0]}", "Q: who?\nA: me"),
            ("{answer[1]} {{question}}", "you {question}"),
            ("{info[name]}: {info[scores][1]}", "数é: 2.5"),
            ("{count} {flag}", "3 True"),
            ("{two words}", "yes"),
        ],
    )
    def test_renders(self, tmp_path, template, text):
        record = {
            "question": "who",
            "answer": ["me", "you"],
            "info": {"name": "数é", "scores": [1, 2.5]},
            "count": 3,
            "flag": True,
            "two words": "yes",
        }
        assert self.render(tmp_path, template, record) == text

    @given(before=TEXTS, value=TEXTS, after=TEXTS)
    def test_any_text_and_value_pass_unchanged(self, tmp_path_factory, before, value, after):
        def braces(text):
            return text.replace("{", "{{").replace("}", "}}")

        expected = f"x{before}{value}{after}"
        rendered = self.render(
            tmp_path_factory.getbasetemp(), f"x{braces(before)}{{v}}{braces(after)}", {"v": value}
        )
        assert rendered == expected

    def test_field_is_a_plain_name(self, tmp_path):
        path = write_records(tmp_path, {"a.b{}": "one"})
        assert list(read_texts(path, field="a.b{}")) == ["one"]

    @pytest.mark.parametrize(
        "template",
        ["{}", "{0}", "{0[a]}", "{a.b}", "{a[0].b}", "{a!r}", "{a:>3}", "{a[]}", "{a[0]b}"],
    )
    def test_refuses_other_placeholders(self, tmp_path, template):
        path = write_records(tmp_path, {"a": "b", "0": "c"})
        with pytest.raises(DataError, match=r"must be \{name\}, \{name\[0\]\} or \{name\[key\]\}"):
            read_texts(path, template=template)

    @pytest.mark.parametrize("template", ["{a", "a}", "{a[0}"])
    def test_refuses_a_lone_brace(self, tmp_path, template):
        with pytest.raises(DataError, match="literal brace is written twice"):
            read_texts(write_records(tmp_path, {"a": "b"}), template=template)

    @pytest.mark.parametrize("template", ["", "{{question}}"])
    def test_refuses_a_template_without_fields(self, tmp_path, template):
        with pytest.raises(DataError, match="names no field"):
            read_texts(write_records(tmp_path, {"question": "b"}), template=template)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{anwser}", "no field 'anwser': present: question, answer, info, none; .*--template"),
            ("{info[names]}", r"no field 'info\[names\]': present: name;"),
            ("{question[0]}", r"no field 'question\[0\]': present: nothing, a str has no items"),
            ("{none[0]}", "a NoneType has no items"),
            ("{answer[2]}", r"no field 'answer\[2\]': present: 0, 1;"),
            ("{answer[first]}", r"no field 'answer\[first\]': present: 0, 1;"),
            ("{answer}", r"'answer' is a list, not a text; .*\{answer\[0\]\}"),
            ("{info}", r"'info' is a dict, not a text; .*\{info\[name\]\}"),
            ("{none}", "'none' is a NoneType, not a text"),
        ],
    )
    def test_names_the_line_and_what_does_not_fit(self, tmp_path, template, message):
        record = {"question": "who", "answer": ["me", "you"], "info": {"name": "x"}, "none": None}
        path = write(tmp_path, "\n" + json.dumps(record))
        with pytest.raises(DataError, match=rf"data\.jsonl:2\b.*{message}"):
            next(read_texts(path, template=template))

    def test_neither_field_nor_template_nor_text(self, tmp_path):
        path = write_records(tmp_path, {"question": "who", "answer": "me"})
        message = (
            r"data\.jsonl:1 has no field 'text': present: question, answer; .* \(--field, --te"
        )
        with pytest.raises(DataError, match=message):
            next(read_texts(path))

    def test_field_and_template_exclude_each_other(self, tmp_path):
        with pytest.raises(ConfigError, match="field and template exclude each other"):
            read_texts(write_records(tmp_path, {}), field="a", template="{a}")

    @pytest.mark.parametrize("choice", [{"field": "a"}, {"template": "{a}"}])
    def test_plain_text_has_no_fields(self, tmp_path, choice):
        with pytest.raises(DataError, match=r"a\.txt is plain text and has no fields"):
            next(read_texts(write(tmp_path, "one", "a.txt"), **choice))


class TestEscapes:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            (r"Q: {q}\nA: é\t数", "Q: {q}\nA: é\t数"),
            (r"\\n", r"\n"),
            (r"\x41\u00e9\U0001f600", "Aé😀"),
            (r"\'\"", "'\""),
            ("a\nb", "a\nb"),
        ],
    )
    def test_are_read_as_in_python(self, written, meant):
        assert decode_escapes(written) == meant

    @given(TEXTS)
    def test_every_text_can_be_written(self, text):
        written = text.replace("\\", "\\\\").replace("\n", r"\n").replace("\t", r"\t")
        assert decode_escapes(written) == text

    @pytest.mark.parametrize("escape", ["\\q", "\\", "\\数", "\\x4", "\\u12", "\\U00110000", "\\1"])
    def test_invalid_ones_are_refused(self, escape):
        with pytest.raises(DataError, match="is not an escape; write a backslash as two"):
            decode_escapes(f"A: {escape}")


class TestChat:
    def test_messages_are_laid_out_and_not_closed_twice(self, tmp_path, chat_tokenizer):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        path = write_records(tmp_path, {"messages": messages})
        text = all_tokens(path, chat_tokenizer, chat_template=True)
        assert text == "[user]hi<eos>\n[assistant]ho<eos>\n"

    @pytest.mark.parametrize("options", [{}, {"field": "messages"}, {"template": "{messages[0]}"}])
    @pytest.mark.parametrize("inner", ["", "[role]"])
    def test_conversations_lead_to_the_chat_template(self, tmp_path, options, inner):
        if "template" in options:
            options = {"template": f"{{messages[0]{inner}}}"}
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        path = write_records(tmp_path, {"messages": messages})
        with pytest.raises(DataError, match=r"conversation.* give --chat-template"):
            list(read_texts(path, **options))

    def test_rendered_text_is_a_users_message(self, tmp_path, chat_tokenizer):
        path = write_records(tmp_path, {"q": "hi", "messages": []})
        text = all_tokens(path, chat_tokenizer, chat_template=True, template="Q: {q}")
        assert text == "[user]Q: hi<eos>\n"

    def test_plain_text_is_a_users_message(self, tmp_path, chat_tokenizer):
        path = write(tmp_path, "hi\n", "a.txt")
        assert list(read_texts(path, chat_tokenizer=chat_tokenizer)) == ["[user]hi<eos>\n"]

    def test_a_blank_message_is_no_document(self, tmp_path, chat_tokenizer):
        path = write_records(tmp_path, {"text": " "}, {"text": "hi"})
        assert len(list(read_texts(path, chat_tokenizer=chat_tokenizer))) == 1

    def test_eos_is_added_where_the_chat_template_does_not(self, tmp_path):
        tokenizer = byte_tokenizer(chat_template="{{ messages[0]['content'] }}")
        path = write_records(tmp_path, {"text": "hi"})
        assert all_tokens(path, tokenizer, chat_template=True) == "hi<eos>"

    def test_a_tokenizer_without_chat_template_is_refused(self, tmp_path, tokenizer):
        path = write_records(tmp_path, {"text": "hi"})
        with pytest.raises(DataError, match="tokenizer has no chat template"):
            token_batches(path, tokenizer, chat_template=True)

    @pytest.mark.parametrize("messages", [None, "hi", [], ["hi"], [{"content": "hi"}]])
    def test_malformed_messages_name_their_line(self, tmp_path, chat_tokenizer, messages):
        path = write_records(tmp_path, {"messages": messages})
        with pytest.raises(DataError, match=r"data\.jsonl:1: 'messages' must be a list"):
            token_batches(path, chat_tokenizer, chat_template=True)

    def test_what_the_chat_template_refuses_names_its_line(self, tmp_path):
        tokenizer = byte_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
        path = write_records(tmp_path, {"messages": [{"role": "user", "content": "hi"}]})
        with pytest.raises(DataError, match=r"data\.jsonl:1: .* refuses it: roles must alternate"):
            token_batches(path, tokenizer, chat_template=True)


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b" \n\t\n", "is empty"),
            (b"caf\xe9", r"is not UTF-8 text \(at byte 3\)"),
            (b"\x1f\x8b\x08\x00", r"is compressed and damaged \("),
            (gzip.compress(b"one" * 99, mtime=0)[:-9], r"is compressed and damaged \("),
            (b"PAR1\0\0", "is binary"),
        ],
    )
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_unusable_content(self, tmp_path, tokenizer, name, content, message):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{re.escape(str(path))} {message}"):
            token_batches(path, tokenizer)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(DataError, match=r"none\.txt: no such data file"):
            read_texts(tmp_path / "none.txt")

    def test_a_folder(self, tmp_path):
        with pytest.raises(DataError, match="cannot be read: Is a directory; give one file"):
            read_texts(tmp_path)

    def test_what_the_system_refuses_to_read(self, tmp_path):
        with pytest.raises(DataError, match="cannot be read: File name too long"):
            read_texts(tmp_path / ("a" * 300))

    def test_what_the_user_may_not_read(self, tmp_path, monkeypatch):
        def denied(*_args, **_options):
            raise PermissionError(13, "Permission denied")

        # Stands in for chmod, which does not stop a superuser.
        monkeypatch.setattr(Path, "read_bytes", denied)
        with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
            read_texts(write(tmp_path, "one", "a.txt"))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                "{'text': 1}",
                "is not valid JSON: Expecting property name enclosed in double quotes; one object",
            ),
            ('["one"]', "is a JSON list, not an object"),
            ('"one"', "is a JSON str, not an object"),
            ("[" * 100_000, "is not valid JSON: .*one object a line"),
        ],
    )
    def test_a_line_that_is_no_object(self, tmp_path, tokenizer, line, message):
        path = write(tmp_path, f'\n{{"text": "one"}}\n{line}\n')
        with pytest.raises(DataError, match=rf"data\.jsonl:3 {message}"):
            token_batches(path, tokenizer)

    @pytest.mark.parametrize("pack", [True, False])
    def test_only_empty_documents(self, tmp_path, pack):
        path = write_records(tmp_path, {"text": ""}, {"text": "  "})
        with pytest.raises(DataError, match=r"data\.jsonl: every document in it is empty"):
            token_batches(path, byte_tokenizer(layout="<bos> $A"), pack=pack)

    @pytest.mark.parametrize("name", ["samples", "seq_len", "batch_size"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_counts_that_are_not_positive(self, tmp_path, tokenizer, name, value):
        path = write_records(tmp_path, {"text": "one"})
        with pytest.raises(ConfigError, match=f"{name} must be a whole .* 1, got {value}"):
            token_batches(path, tokenizer, **{name: value})

    def test_a_document_length_that_is_not_positive(self, tmp_path):
        with pytest.raises(ConfigError, match="min_chars must be a whole number of at least 1"):
            read_texts(write(tmp_path, "one", "a.txt"), min_chars=0)

    def test_messages_are_one_line(self, tmp_path, tokenizer):
        path = write_records(tmp_path, {"answer": ["a"]})
        for options in ({}, {"field": "answer"}, {"template": "a\n{b}"}, {"template": "\n{"}):
            with pytest.raises(DataError) as caught:
                token_batches(path, tokenizer, **options)
            assert "\n" not in str(caught.value)
