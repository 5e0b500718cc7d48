"""Messages become the token ids that transformers makes of them, or one sentence says which message is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from folovllm.chat import apply_chat_template, normalize_messages, split_conversations
from folovllm.engine.encode import encode_text

WRITES_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TRIMS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}"
CONCATENATES = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
PARTS_ONLY = "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
BOTH = (
    "{% macro show(x) %}{% if x is string %}{{ x }}{% else %}{% for p in x %}{{ p['text'] }}{% endfor %}{% endif %}"
    "{% endmacro %}{% for m in messages %}[{{ m.role }}]{{ show(m.content) }}{% endfor %}"
)
FOR_STRINGS = [WRITES_BOS, TRIMS, CONCATENATES]
USER = [{"role": "user", "content": "a b"}]


def make_tokenizer(chat_template: Any = None) -> PreTrainedTokenizerBase:
    """Bytes for everything, as Llama 2's for what it has no word for, with <s> in front."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "▁"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=8
    )
    made.chat_template = chat_template
    return made


def transformers_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs: Any) -> list[int]:
    kwargs = {"add_generation_prompt": True, **kwargs}
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """As `LLM.chat` has it encoded: the template has written the beginning-of-text token, so none is added."""
    return encode_text(tokenizer, text, 10_000, add_special_tokens=False)


TOKENIZERS = {template: make_tokenizer(template) for template in [*FOR_STRINGS, PARTS_ONLY, BOTH]}
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "ipython"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), min_size=1, max_size=5)


class TestTokenIds:
    @given(st.sampled_from([*FOR_STRINGS, BOTH]), PLAIN, st.booleans())
    def test_they_are_those_of_transformers(self, template, messages, add_generation_prompt):
        tokenizer = TOKENIZERS[template]
        text = apply_chat_template(tokenizer, messages, add_generation_prompt=add_generation_prompt)
        expected = transformers_ids(tokenizer, messages, add_generation_prompt=add_generation_prompt)
        assert encoded(tokenizer, text) == expected
        assert text == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def test_a_template_that_writes_the_bos_gives_one(self):
        tokenizer = TOKENIZERS[WRITES_BOS]
        text = apply_chat_template(tokenizer, USER)
        assert text.startswith("<s>[user]") and encoded(tokenizer, text).count(tokenizer.bos_token_id) == 1

    def test_a_template_that_writes_none_gives_none(self):
        tokenizer = TOKENIZERS[TRIMS]
        assert tokenizer.bos_token_id not in encoded(tokenizer, apply_chat_template(tokenizer, USER))

    def test_a_long_text_is_no_cause_for_a_warning(self, caplog, capfd):
        tokenizer = TOKENIZERS[TRIMS]  # its model_max_length is 8
        encoded(tokenizer, apply_chat_template(tokenizer, [{"role": "user", "content": "a" * 100}]))
        assert caplog.text == "" and capfd.readouterr() == ("", "")

    @given(st.sampled_from(list(TOKENIZERS)), PLAIN, st.data())
    def test_parts_say_the_same_as_strings(self, template, messages, data):
        tokenizer = TOKENIZERS[template]
        parts = copy.deepcopy(messages)
        for message in data.draw(st.lists(st.sampled_from(parts), unique_by=id)):
            kind = data.draw(st.sampled_from(["text", "input_text", "output_text"]))
            message["content"] = [{"type": kind, "text": message["content"]}]
        before = copy.deepcopy(parts)
        assert apply_chat_template(tokenizer, tuple(parts)) == apply_chat_template(tokenizer, messages)
        assert parts == before

    @pytest.mark.parametrize(
        "template, expected", [(WRITES_BOS, "<s>[user] a\nb [assistant]"), (BOTH, "[user]ab"), (PARTS_ONLY, "[user]ab")]
    )
    def test_several_parts(self, template, expected):
        messages = [{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]
        assert apply_chat_template(TOKENIZERS[template], messages) == expected

    def test_a_template_that_reads_parts_only_is_given_parts(self):
        assert apply_chat_template(TOKENIZERS[PARTS_ONLY], USER) == "[user]a b"


class TestWhatTheTemplateIsGiven:
    TEMPLATE = (
        "{{ tools | length if tools else 0 }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined and enable_thinking is false %}<no think>{% endif %}"
    )

    def test_variables_and_tools(self):
        tokenizer = make_tokenizer(self.TEMPLATE)
        tools = [{"type": "function", "function": {"name": "f"}}]
        kwargs = {"enable_thinking": False}
        text = apply_chat_template(tokenizer, USER, tools=tools, chat_template_kwargs=kwargs)
        assert text == "1a b<no think>"
        assert encoded(tokenizer, text) == transformers_ids(tokenizer, USER, tools=tools, **kwargs)
        assert apply_chat_template(tokenizer, USER) == "0a b"

    def test_another_template(self):
        tokenizer = make_tokenizer({"default": "default", "other": "other"})
        assert apply_chat_template(tokenizer, USER) == "default"
        assert apply_chat_template(tokenizer, USER, chat_template="other") == "other"
        assert apply_chat_template(make_tokenizer(), USER, chat_template="{{ messages[0].content }}!") == "a b!"

    @pytest.mark.parametrize("name", ["template.jinja", "chatml", "", Path("template.jinja"), 5])
    def test_a_name_is_no_template(self, name):
        tokenizer = make_tokenizer({"default": "default {{ messages[0].content }}"})
        with pytest.raises(ValueError, match=r"or the name of one of the tokenizer's \(default\), got"):
            apply_chat_template(tokenizer, USER, chat_template=name)
        with pytest.raises(ValueError, match=r"must be the text of a template in Jinja, got|no chat template"):
            apply_chat_template(make_tokenizer(), USER, chat_template=name)

    def test_arguments_of_tool_calls_are_objects(self):
        function = {"name": "f", "arguments": '{"city": "Ulm"}'}
        messages = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}]
        before = copy.deepcopy(messages)
        template = "{% for c in messages[0].tool_calls %}{{ c.id }}{{ c.function.arguments['city'] }}{% endfor %}"
        assert apply_chat_template(make_tokenizer(template), messages) == "1Ulm"
        assert messages == before
        messages[0]["tool_calls"][0]["function"]["arguments"] = {"city": "Ulm"}
        assert apply_chat_template(make_tokenizer(template), messages) == "1Ulm"

    @pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
    def test_a_call_without_arguments(self, arguments):
        messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
        assert normalize_messages(messages)[0]["tool_calls"][0]["function"]["arguments"] == {}

    @pytest.mark.parametrize("arguments", ["{", "[1]", "5", 5, "[" * 100_000])
    def test_arguments_a_model_got_wrong_are_left_out_with_a_warning(self, arguments, caplog):
        messages = [USER[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
        assert normalize_messages(messages)[1]["tool_calls"][0]["function"]["arguments"] == {}
        assert "messages[1]['tool_calls'][0]" in caplog.text

    def test_no_tool_calls_are_no_key(self):
        for calls in ([], None):
            messages = [{"role": "assistant", "content": "a", "tool_calls": calls}]
            assert normalize_messages(messages) == [{"role": "assistant", "content": "a"}]

    def test_what_an_assistant_thought_and_other_keys_stay(self):
        messages = [{"role": "assistant", "content": "a", "reasoning": "why", "mood": "good"}]
        assert normalize_messages(messages) == [{**messages[0], "reasoning_content": "why"}]

    def test_the_result_of_a_tool_is_a_string_in_every_format(self):
        messages = [{"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        for content_format in ("string", "openai", "given"):
            assert normalize_messages(messages, content_format)[0]["content"] == "a\nb"


CONTENT = {"role": "user", "content": "a"}


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        "messages, words",
        [
            ("hello", "messages must be a list"),
            (b"hello", "messages must be a list"),
            (None, "messages must be a list"),
            (CONTENT, "messages must be a list"),
            ([], "at least one message"),
            ([CONTENT, "hello"], r"messages\[1\] must be a dict"),
            ([CONTENT, None], r"messages\[1\] must be a dict"),
            ([CONTENT, {"content": "x"}], r"messages\[1\] must have a 'role'"),
            ([{"role": 5, "content": "x"}], r"messages\[0\]\['role'\] must be a non-empty string, got 5"),
            ([{"role": "", "content": "x"}], r"messages\[0\]\['role'\]"),
            ([{"role": "user"}], r"messages\[0\] must have 'content'"),
            ([{"role": "user", "content": None}], r"messages\[0\] must have 'content'"),
            ([{"role": "user", "content": 5}], r"\['content'\] must be a string or a list of parts, got 5"),
            ([{"role": "user", "content": {"text": "a"}}], r"messages\[0\]\['content'\]"),
            ([{"role": "user", "content": [5]}], r"messages\[0\]\['content'\]\[0\] must be a part"),
            ([{"role": "user", "content": [{"text": "a"}]}], r"messages\[0\]\['content'\]\[0\] must be a part"),
            ([{"role": "user", "content": ["a", {"type": "image_url", "image_url": {}}]}], "of type 'image_url'"),
            ([{"role": "user", "content": [{"type": "text", "text": None}]}], r"\[0\]\['text'\] must be a string"),
            ([{"role": "assistant", "tool_calls": 5}], r"messages\[0\]\['tool_calls'\]"),
            ([{"role": "assistant", "tool_calls": [5]}], r"messages\[0\]\['tool_calls'\]\[0\]"),
            ([{"role": "assistant", "tool_calls": [{"type": "x", "function": {}}]}], r"of type 'function'"),
            ([{"role": "user", "content": "caf\udce9"}], r"must be Unicode text, got '\\udce9'"),
        ],
    )  # fmt: skip
    def test_messages(self, messages, words):
        with pytest.raises(ValueError, match=words):
            apply_chat_template(TOKENIZERS[WRITES_BOS], messages)

    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "arguments", "x"]), inner
            )
        ),
        max_leaves=12,
    )

    @given(st.sampled_from(list(TOKENIZERS)), anything)
    def test_anything_is_written_or_refused_by_a_value_error(self, template, messages):
        try:
            text = apply_chat_template(TOKENIZERS[template], messages)
        except ValueError as error:
            assert str(error)
        else:
            assert isinstance(text, str)

    @pytest.mark.parametrize(
        "template, words",
        [
            ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
            ("{% for %}", "Expected an expression"),
            ("{{ nothing.at.all }}", "'nothing' is undefined"),
            ("{{ messages + 'a' }}", "can only concatenate"),
            ("{{ 1 / 0 }}", "division by zero"),
        ],
    )
    def test_a_template_that_raises(self, template, words):
        with pytest.raises(ValueError, match=f"chat template .*{words}"):
            apply_chat_template(make_tokenizer(template), USER)

    def test_what_a_template_quotes_can_be_printed(self):
        template = "{{ raise_exception('no ' ~ messages[0]['content']) }}"
        with pytest.raises(ValueError, match=r"no caf\\udce9$") as caught:
            apply_chat_template(make_tokenizer(template), [{"role": "user", "content": "caf\udce9"}])
        assert str(caught.value).encode()

    def test_no_template(self):
        with pytest.raises(ValueError, match="no chat template"):
            apply_chat_template(make_tokenizer(), USER)

    @pytest.mark.parametrize(
        "key", ["tokenize", "chat_template", "tools", "add_generation_prompt", "messages", "padding"]
    )
    def test_variables_that_are_arguments(self, key):
        with pytest.raises(ValueError, match=f"chat_template_kwargs must not have '{key}'"):
            apply_chat_template(TOKENIZERS[TRIMS], USER, chat_template_kwargs={key: True})

    @pytest.mark.parametrize("kwargs", [5, [("a", 1)], {1: 2}, "a"])
    def test_variables_that_are_no_dict(self, kwargs):
        with pytest.raises(ValueError, match="chat_template_kwargs must be a dict"):
            apply_chat_template(TOKENIZERS[TRIMS], USER, chat_template_kwargs=kwargs)

    @pytest.mark.parametrize("tools", [5, "f", {"name": "f"}, ["f"], [None]])
    def test_tools(self, tools):
        with pytest.raises(ValueError, match=r"tools.* must be a "):
            apply_chat_template(TOKENIZERS[TRIMS], USER, tools=tools)


class TestConversations:
    @pytest.mark.parametrize("make", [list, tuple, iter], ids=["list", "tuple", "iterator"])
    def test_one_or_several(self, make: Callable):
        assert split_conversations(make(USER)) == [USER]
        assert split_conversations(make([USER, tuple(USER * 2)])) == [USER, USER * 2]
        assert split_conversations(make([])) == []

    @pytest.mark.parametrize("messages", ["hello", CONTENT, None, 5, [USER, "hello"], [USER, CONTENT]])
    def test_neither(self, messages):
        with pytest.raises(ValueError, match="must be a list of messages"):
            split_conversations(messages)
