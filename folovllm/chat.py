"""Messages in, a prompt's text out. Chapter 13 uses `LLM.chat`, which is built on this module.

A checkpoint brings a chat template: a program in Jinja that writes a conversation as the text the model was trained
on. This module checks the messages and puts them into the shape the template expects; the engine encodes the text.
As in vLLM (``vllm/renderers/hf.py`` and ``chat_utils.py``, 0.32.0), for texts only.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from folovllm.validation import check_str, check_unicode, require, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
"""``{"role": "user", "content": "…"}``, as in OpenAI's API."""
ContentFormat = Literal["string", "openai", "given"]
"""What a template reads as ``content``: a string, a list of parts ``{"type": "text", "text": "…"}``, or either."""

TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""The types of content part that hold a text, and the key it is found under."""

_EXAMPLE = "{'role': 'user', 'content': 'Hello'}"
_PROBE = "folovllm probe"


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Iterable[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> str:
    """A conversation as the text that the model is to read.

    The template writes the beginning-of-text token where the model wants one: encode its text without special tokens.

    Args:
        tokenizer: the checkpoint's.
        messages: the conversation, oldest message first.
        tools: JSON schemas of the functions that the model may call.
        chat_template: a template in Jinja, or the name of one of the tokenizer's; None: the tokenizer's own.
        add_generation_prompt: whether the text ends where the assistant's answer begins.
        chat_template_kwargs: more variables for the template, such as Qwen3's ``enable_thinking``.

    Raises:
        ValueError: if a message is malformed, there is no template, or the template refuses the messages.
    """
    _check_tools(tools)
    _check_chat_template(tokenizer, chat_template)
    render = partial(
        tokenizer.apply_chat_template,
        tools=tools,
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        **_check_chat_template_kwargs(tokenizer, chat_template_kwargs),
    )
    conversation = normalize_messages(messages, _detect_content_format(render))
    require(len(conversation) > 0, f"messages must have at least one message such as {_EXAMPLE}, got none")
    try:
        text = str(render(conversation))
    except Exception as error:  # a template is third-party code: it may raise anything
        raise ValueError(f"the chat template cannot write these messages: {_printable(error)}") from error
    return check_unicode("messages", text)


def split_conversations(messages: Iterable[Message] | Iterable[Iterable[Message]]) -> list[list[Message]]:
    """One conversation or several as a list of conversations; none at all is an empty list.

    Raises:
        ValueError: if it is neither, such as a string, or a message that is not in a list.
    """
    found = _as_list("messages", messages)
    if found and isinstance(found[0], (list, tuple)):
        return [_as_list(f"messages[{i}]", conversation) for i, conversation in enumerate(found)]
    return [found] if found else []


def normalize_messages(messages: Iterable[Message], content_format: ContentFormat = "string") -> list[dict[str, Any]]:
    """Messages in one shape, as copies: ``content`` in one format, arguments of tool calls as objects.

    Parts are joined by line breaks for a template that reads strings, and in the result of a tool.

    Args:
        messages: a conversation.
        content_format: what ``content`` is to be; "given" leaves it a string or a list of parts, as it is.

    Raises:
        ValueError: if a message is malformed; the sentence says which one.
    """
    return [
        _normalize_message(f"messages[{i}]", message, content_format)
        for i, message in enumerate(_as_list("messages", messages))
    ]


def _normalize_message(name: str, message: Any, content_format: ContentFormat) -> dict[str, Any]:
    require(isinstance(message, Mapping), f"{name} must be a dict such as {_EXAMPLE}, got {show(message)}")
    require("role" in message, f"{name} must have a 'role', such as 'user', got only {sorted(map(str, message))}")
    normal = dict(message)
    role = check_str(f"{name}['role']", message["role"])
    content = message.get("content")
    require(
        content is not None or role == "assistant",
        f"{name} must have 'content', which only an assistant may leave out, got {show(normal)}",
    )
    texts = _content_texts(f"{name}['content']", content)
    as_parts = content_format == "openai" or (content_format == "given" and isinstance(content, (list, tuple)))
    if as_parts and role != "tool":
        normal["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        normal["content"] = "\n".join(texts)
    if message.get("reasoning") is not None:
        normal.setdefault("reasoning_content", message["reasoning"])  # the name that most templates use
    calls = normal.pop("tool_calls", None)
    if calls:
        name = f"{name}['tool_calls']"
        normal["tool_calls"] = [_normalize_tool_call(f"{name}[{i}]", c) for i, c in enumerate(_as_list(name, calls))]
    return normal


def _content_texts(name: str, content: Any) -> list[str]:
    """The texts of a message's content."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    require(isinstance(content, (list, tuple)), f"{name} must be a string or a list of parts, got {show(content)}")
    return [_part_text(f"{name}[{i}]", part) for i, part in enumerate(content)]


def _part_text(name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise ValueError(f"{name} must be a part such as {{'type': 'text', 'text': 'Hello'}}, got {show(part)}")
    require(kind in TEXT_KEYS, f"{name} is of type {kind!r}, and only texts can be read: {', '.join(TEXT_KEYS)}")
    text = part.get(TEXT_KEYS[kind])
    if not isinstance(text, str):
        raise ValueError(f"{name}[{TEXT_KEYS[kind]!r}] must be a string, got {show(text)}")
    return text


def _normalize_tool_call(name: str, call: Any) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates expect them; OpenAI's API has them as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise ValueError(f"{name} must be of type 'function' and have a 'function', got {show(call)}")
    return {**call, "function": {**function, "arguments": _parse_arguments(name, function.get("arguments"))}}


def _parse_arguments(name: str, arguments: Any) -> dict[str, Any]:
    parsed = arguments or {}
    if isinstance(parsed, str):
        try:
            parsed = json.loads(parsed)
        except (ValueError, RecursionError):
            parsed = None
    if isinstance(parsed, Mapping):
        return dict(parsed)
    # A model wrote it. An error would refuse every later turn of the conversation too.
    logger.warning("%s has arguments that are no JSON object, which are left out: %s", name, show(arguments))
    return {}


def _detect_content_format(render: Callable[[list[dict[str, Any]]], Any]) -> ContentFormat:
    """What the template reads as ``content``, found by trying.

    vLLM looks for a loop over ``content`` in the template's syntax tree, and passes parts wherever there is one.
    """
    reads_strings = _shows_probe(render, _PROBE)
    reads_parts = _shows_probe(render, [{"type": "text", "text": _PROBE}])
    if reads_parts:
        return "given" if reads_strings else "openai"
    return "string"


def _shows_probe(render: Callable[[list[dict[str, Any]]], Any], content: Any) -> bool:
    """Whether a template shows the text of ``content``, and does not print it as a list."""
    try:
        text = str(render([{"role": "user", "content": content}]))
    except Exception:  # the template's way to say no
        return False
    return _PROBE in text and repr(_PROBE) not in text and json.dumps(_PROBE) not in text


def _printable(error: Exception) -> str:
    """What it says; it may quote half a surrogate pair of a message."""
    return str(error).encode(errors="backslashreplace").decode()


def _check_tools(tools: Any) -> None:
    require(tools is None or isinstance(tools, (list, tuple)), f"tools must be a list of dicts, got {show(tools)}")
    for i, tool in enumerate(tools or ()):
        require(isinstance(tool, dict), f"tools[{i}] must be a dict (a function's JSON schema), got {show(tool)}")


def _check_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Refuses none at all, and what is neither a template nor the name of one, such as the name of a file."""
    require(
        bool(chat_template or tokenizer.chat_template),
        "this tokenizer has no chat template, so it cannot say how messages are written; "
        "pass chat_template, or give the model a prompt of your own",
    )
    if chat_template is None:
        return
    known = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    is_template = isinstance(chat_template, str) and ("{{" in chat_template or "{%" in chat_template)
    names = f", or the name of one of the tokenizer's ({', '.join(known)})" if known else ""
    require(
        is_template or chat_template in known,
        f"chat_template must be the text of a template in Jinja{names}, got {show(chat_template)}",
    )


def _check_chat_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Any) -> dict[str, Any]:
    """Variables for the template; arguments of ours or of transformers are refused."""
    kwargs = {} if kwargs is None else kwargs
    is_dict = isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)
    require(is_dict, f"chat_template_kwargs must be a dict with names as keys, got {show(kwargs)}")
    taken = {"messages", "conversations", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents"}
    for key in kwargs:
        require(key not in taken, f"chat_template_kwargs must not have {key!r}, which is no variable of a template")
    return dict(kwargs)


def _as_list(name: str, value: Any) -> list[Any]:
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    require(is_list, f"{name} must be a list of messages such as {_EXAMPLE}, got {show(value)}")
    return list(value)
