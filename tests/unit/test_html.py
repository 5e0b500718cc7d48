"""What a notebook shows of outputs, configs and statistics: well-formed, escaped, and the same in every run."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from folovllm import CacheConfig, CompletionOutput, EngineConfig, ModelConfig, RequestOutput
from folovllm.engine.stats import StepStats
from folovllm.logprobs import Logprob
from folovllm.outputs import RequestMetrics
from folovllm.utils.html import table, tinted_token


class Text(HTMLParser):
    """The text of a piece of HTML, and whether each element is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def make_output(**kwargs) -> RequestOutput:
    answer = CompletionOutput(0, "a <b> fox", [5, 6], finish_reason="stop", stop_reason="<end>", **kwargs)
    return RequestOutput("id-17", "2 < 3", [1, 2], [answer], True, RequestMetrics(1795680456.9))


class TestRequestOutput:
    def test_prompt_answer_and_reason_are_shown_as_text(self):
        text = " ".join(Text(make_output()._repr_html_()).text)
        assert all(part in text for part in ("2 < 3", "a <b> fox", "answer 0", "2 tokens", "stop, '<end>'"))

    def test_no_id_and_no_time_is_shown(self):
        shown = make_output()._repr_html_()
        assert "id-17" not in shown and "1795680456" not in shown

    def test_tokens_are_tinted_by_their_probability_where_it_was_asked_for(self):
        logprobs = [{5: Logprob(-0.01, 1, " <b>")}, {6: Logprob(-5.0, 90, " fox")}]
        shown = make_output(logprobs=logprobs)._repr_html_()
        text = Text(shown).text
        assert " <b>" in text and " fox" in text and "a <b> fox" not in text
        assert 'title="p = 0.99"' in shown and 'title="p = 0.01"' in shown

    def test_a_prompt_of_token_ids_is_counted(self):
        output = make_output()
        output.prompt = None
        assert "2 tokens" in " ".join(Text(output._repr_html_()).text)


def test_a_config_is_three_tables_with_every_field():
    config = EngineConfig(ModelConfig("a<b>", max_model_len=12), CacheConfig(block_size=7))
    text = Text(config._repr_html_()).text
    for part in (config.model_config, config.cache_config, config.scheduler_config):
        assert type(part).__name__ in text
    assert text[text.index("block_size") + 1] == "7" and text[text.index("model") + 1] == "'a<b>'"


def test_statistics_are_a_table_without_times():
    text = Text(StepStats(num_prefill_tokens=41, seconds={"run": 0.5})._repr_html_()).text
    assert text[text.index("num_prefill_tokens") + 1] == "41" and "seconds" not in text


@pytest.mark.parametrize("prob", [0.0, 0.019, 0.02, 0.5, 0.9, 1.0])
def test_letters_can_be_read_on_their_ground(prob):
    shown = tinted_token("x", prob)
    ground, letters = (shown.split(f"{name}:#")[1][:6] for name in ("background", "color"))

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(ground), luminance(letters)))
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_a_table_escapes_what_it_shows():
    assert Text(table("a&b", [("<i>", "</td>")])).text == ["a&b", "<i>", "</td>"]
