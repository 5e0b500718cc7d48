"""The numbers that chapters 16 to 18 quote in their text and print nowhere, or as another number, computed again."""

from __future__ import annotations

import json
import math
import re

import pytest
from book_helpers import NOTEBOOKS, assert_says, joined, read

from folovllm.book.plotting import expected_tokens
from folovllm.simulator.cost import Efficiency, Roofline
from folovllm.simulator.presets import GPUS, MODELS
from folovllm.tales import EMBEDDED_DRAFT, EMBEDDED_MODEL
from folovllm.tales.grammar import CARD_SLOTS, continuations

GUESSING, SEARCHING, FITTING = "16_guess_and_check", "17_searching", "18_only_what_fits"
MODEL, GPU = MODELS["qwen3-8b"], GPUS["h100"]
REACHED = Roofline(MODEL, GPU)


def shown(name: str, beginning: str) -> str:
    """The line of a chapter's output that begins like this, or the description of a figure."""
    outputs = (output for cell in read(NOTEBOOKS / f"{name}.ipynb").code for output in cell.outputs)
    texts = (joined(o.get("text", "")) + joined(o.get("data", {}).get("text/plain", "")) for o in outputs)
    return next(line for text in texts for line in text.splitlines() if line.startswith(beginning))


def numbers(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def gain(batch: int, rate: float, draft: Roofline | None = None) -> float:
    """How many times as fast four guesses make a step."""
    past = [500] * batch
    drafting = 0 if draft is None else 4 * draft.step([1] * batch, past).total
    guessing = REACHED.step([5] * batch, past, rows=5 * batch).total + drafting
    return expected_tokens(rate, 4) * REACHED.step([1] * batch, past).total / guessing


def test_when_guessing_pays() -> None:
    assert_says(
        GUESSING,
        "with the other two from 46 on. With so many, the rows of all sequences, five of each, are more than the ridge",
    )
    assert gain(1, 0.8) - gain(45, 0.8) < 0.02 < gain(45, 0.8) - gain(46, 0.8)
    assert_says(GUESSING, "at 226 rows here and not at the 295 of the data sheet")
    sheet = Roofline(MODEL, GPU, Efficiency.data_sheet())
    assert (round(REACHED.ridge), round(sheet.ridge)) == (226, 295) and 5 * 45 < REACHED.ridge < 5 * 46
    draft = Roofline(MODELS["qwen3-0.6b"], GPU)
    assert_says(GUESSING, "With the draft model it shrinks from some 16 on, since each of its passes reads every past")
    assert gain(8, 0.8, draft) - gain(16, 0.8, draft) < 0.02 < gain(16, 0.8, draft) - gain(32, 0.8, draft)
    assert_says(GUESSING, "a draft model, whose passes have to be paid for, where *either* holds")
    assert gain(1, 0.5, draft) < 1
    assert_says(GUESSING, "Up to 64 sequences all three are a gain")
    assert min(gain(64, 0.8), gain(64, 0.3), gain(64, 0.8, draft)) > 1.1 > gain(128, 0.3)
    assert_says(
        GUESSING, "is a loss with 128 sequences, where equally good guesses that were looked up are still a gain"
    )
    assert gain(128, 0.8, draft) < 1 < gain(512, 0.8) < 1.4 and gain(128, 0.3) < 1


def test_what_was_guessed() -> None:
    assert_says(GUESSING, "Together with the 15 before them these are 24 tokens, which need six blocks")
    assert numbers(shown(GUESSING, "0 guesses"))[:2] == [0, 15] and math.ceil((15 + 1 + 8) / 4) == 6
    assert_says(GUESSING, "One guess was right, so that 17 tokens count")
    assert numbers(shown(GUESSING, "8 guesses"))[:2] == [8, 15 + 1 + 1]
    assert_says(GUESSING, "Hundreds of guesses were checked")
    assert sum(numbers(shown(GUESSING, "[58"))) > 200
    assert_says(GUESSING, "One tale alone makes 32 guesses, of which three are accepted")
    assert numbers(shown(GUESSING, " 1 tales"))[2:] == [32, 3]


def test_what_a_draft_model_takes() -> None:
    assert_says(GUESSING, "a fifth of the weights")
    large, small = (numbers(shown(GUESSING, f"{layers} layers"))[1] for layers in (4, 2))
    assert small / large == pytest.approx(1 / 5, abs=0.02)
    assert_says(GUESSING, "a block of the cache grows by a quarter")
    configs = (json.loads((path / "config.json").read_text()) for path in (EMBEDDED_MODEL, EMBEDDED_DRAFT))
    large, small = (c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] for c in configs)
    assert small / large == 1 / 4


def test_what_a_search_computes() -> None:
    assert_says(SEARCHING, "the 31 tokens of the prompt, and one for each of the four texts in each of the 19 steps")
    assert numbers(shown(SEARCHING, "107"))[0] == 31 + 4 * 19
    assert_says(SEARCHING, "some eight tokens instead of one")
    assert (numbers(shown(SEARCHING, "651"))[0] - 31) / (4 * 19) == pytest.approx(8, abs=0.5)


def test_why_a_beam_misses_the_likeliest_tale() -> None:
    assert_says(SEARCHING, "by a factor of four altogether (0.6 to 0.4 for the verb, and *e*")
    tale = (
        "Once upon a time, in the forest, there lived a little fox named Mira. Mira loved to sing. One morning in the "
        "forest, Mira"
    )
    verbs = continuations(tale)
    assert (verbs[" lost"], verbs[" found"]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert 0.6 / 0.4 * math.e == pytest.approx(4, abs=0.1)


def test_how_large_masks_are() -> None:
    assert_says(FITTING, "For 32 rows of Qwen3's vocabulary it would be 0.6 MiB; as floats it would be 18.5 MiB")
    words = math.ceil(151_936 / 32)
    assert round(32 * 4 * words / 2**20, 1) == 0.6 and round(32 * 4 * 151_936 / 2**20, 1) == 18.5


def test_what_is_certain() -> None:
    assert_says(FITTING, "Ten of 51 are certain, and all of them are in the names of the keys")
    told = shown(FITTING, "The answer {")
    assert "in 51 boxes" in told and "a single one in 10," in told
    assert sum(len(slot.split("_")) * 2 - 1 for slot in CARD_SLOTS) == 10
    assert_says(FITTING, "and at 3 all of them")
    assert "to 0 at 3" in shown(FITTING, "Lines of the percentage")
