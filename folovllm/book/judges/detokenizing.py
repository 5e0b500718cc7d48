"""A judge of a detokenizer: what a user sees after each token."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import cache
from typing import cast

from folovllm.book.exercises.verdict import NotYet, blame_part, expect
from folovllm.book.judges.pretended import (
    make_engine,
    tokenizer,
)
from folovllm.engine.detokenizer import Detokenizer
from folovllm.engine.llm_engine import LLMEngine
from folovllm.sampling_params import SamplingParams

TEXTS: tuple[tuple[str, list[str], bool], ...] = (
    ("Grüße, said the fox 🦊 to Jürgen, the bear 🐻 of Zürich.", [], False),
    ("नमस्ते, 你好, καλημέρα: three ways to begin.", [], False),
    ("Plain words, and then the END of it", ["END"], False),
    ("The first line.\n\nThe second paragraph.", ["\n\nThe s", "paragraph"], False),
    ("She said: the en, the end, the ending.", ["the ending"], False),
    ("To be kept: 你好吗 and no more", ["好吗"], True),
)
"""What is said to a detokenizer: a text, stop strings, and whether the stop string stays in the text."""


def judge_detokenizer(attempt: type, stops: bool = True) -> None:
    """Lets an engine say texts with long characters and stop strings, and compares what a user would see at each step.

    Args:
        attempt: the engine's ``detokenizer_cls``.
        stops: whether there are stop strings, too.

    Raises:
        NotYet: with the sentence about the first thing that is wrong.
    """
    expect(isinstance(attempt, type), "a class was asked for, and yours is something else.")
    missing = [name for name in ("add", "finish", "visible_text") if not hasattr(attempt, name)]
    expect(not missing, f"the engine calls {', '.join(missing)} of a detokenizer, and yours has no such thing.")
    is_method = callable(getattr(attempt, "text", None))
    expect(not is_method, "the engine reads text like an attribute: put @property above it, or set self.text.")
    texts = _texts(stops)
    ours = _our_texts(stops)
    try:
        found = _tell(attempt, texts)
    except Exception as error:
        raise NotYet(f"{blame_part(error)}.") from error
    for (text, stop, _), right, got in zip(texts, ours, found):
        _compare_texts(f"{text!r}{f' with stop={stop}' if stop else ''}", right, got)


def _texts(stops: bool) -> list[tuple[str, list[str], bool]]:
    return [text for text in TEXTS if stops or not text[1]]


@cache
def _our_texts(stops: bool) -> list[list[str]]:
    return _tell(Detokenizer, _texts(stops))


def _tell(part: type, texts: SequenceOf[tuple[str, list[str], bool]]) -> list[list[str]]:
    """What the user of each text has seen after each token; last, why it ended."""
    # Those without stop strings end by the end token, which is no text.
    ends = [[] if stop else [cast(int, tokenizer().eos_token_id)] for _, stop, _ in texts]
    encoded = [tokenizer().encode(text) + end for (text, _, _), end in zip(texts, ends)]
    script = {str(i): token_ids for i, token_ids in enumerate(encoded)}
    engine_cls = cast(type[LLMEngine], type("Engine", (LLMEngine,), {"detokenizer_cls": part}))
    engine = make_engine({"block_size": 16, "num_blocks": 64, "max_model_len": 256}, script, engine_cls)
    seen: list[list[str]] = [[] for _ in texts]
    for i, (_, stop, include) in enumerate(texts):
        params = SamplingParams(
            max_tokens=len(encoded[i]), stop=stop or None, include_stop_str_in_output=include, ignore_eos=bool(stop)
        )
        engine.add_request(str(i), [5], params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            answer = output.outputs[0]
            seen[int(output.request_id)].append(answer.text)
            if output.finished:
                seen[int(output.request_id)].append(f"{answer.finish_reason}, {answer.stop_reason!r}")
    return seen


def _compare_texts(text: str, right: list[str], got: list[str]) -> None:
    shown = ""
    for num, now in enumerate(got[:-1], start=1):
        where = f"after {num} tokens of {text}"
        expect(isinstance(now, str), f"{where} a text is asked for, and yours gives a {type(now).__name__}.")
        expect("\ufffd" not in now, f"{where} yours shows {now[-12:]!r}: a piece of a character that is not complete.")
        expect(
            now.startswith(shown),
            f"{where} yours shows {now[-24:]!r}, and had shown {shown[-24:]!r}: it takes text back.",
        )
        best = right[num - 1] if num < len(right) else None
        expect(best is not None, f"{where} yours goes on, and a stop string has ended the text before.")
        expect(now == best, f"{where} the user should see {best!r}, and sees {now!r}.")
        shown = now
    expect(
        right[-1] == got[-1],
        f"{text} ends by {right[-1]}, yours by {got[-1]}: what add gives back is taken for a stop string.",
    )
