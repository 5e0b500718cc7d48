"""Pictures that move: what they say is what the engine did, and everybody can move them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from book_helpers import PATHS, joined, read
from bs4 import BeautifulSoup
from headless import Page, chromium_page, find_chromium
from hypothesis import given, settings
from hypothesis import strategies as st
from test_browser import FIND_FAINT_TEXT, run_axe

from folovllm import LLM, SamplingParams
from folovllm.book import players
from folovllm.book.palette import REQUEST_COLORS
from folovllm.book.players import Player, Trace, exact_logits, play_sampling, play_trace, record
from folovllm.book.players.player import read_part
from folovllm.book.players.sampling import NUM_SEEDS, RESOLUTION
from folovllm.book.plotting.style import PALETTE
from folovllm.book.recording import run_requests
from folovllm.sample.sampler import Sampler, SamplingMetadata
from folovllm.tales import EMBEDDED_MODEL

PHONE = 360
LARGEST = 150_000
"""Bytes of all players of one page."""
FOLDER = Path(players.__file__).parent
SCRIPTS = sorted(FOLDER.glob("*.js"))

REQUESTS = [
    ("A", "Once upon a time", SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, logprobs=3)),
    ("B", "Long ago, in the swamp, there lived", SamplingParams(seed=1, max_tokens=12, ignore_eos=True, logprobs=3)),
    ("C <&>", "Once upon a time, in the", SamplingParams(seed=2, max_tokens=9, n=2, ignore_eos=True)),
    ("D", "从前", SamplingParams(temperature=0, max_tokens=1)),
]
"""Greedy and seeded, two answers to one prompt, one that is over at once, and a name that HTML would misread."""


GUESSES = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}

BEGINNINGS = ("Once upon a time, in the", "Once upon a", "Once upon a time, in the forest, there lived a")


def make_llm(**config: Any) -> LLM:
    config = {"block_size": 4, "num_blocks": 12, "max_num_seqs": 4, "max_model_len": 64, **config}
    return LLM(str(EMBEDDED_MODEL), device="cpu", dtype="float32", **config)


def watched_run(**config: Any) -> tuple[Trace, list[dict[str, Any]], dict[str, Any]]:
    """A run with its trace, what the runner itself made of each step, and the outputs."""
    llm = make_llm(**config)
    seen = []
    prepare = llm.engine.runner.prepare

    def watched(scheduled: Any) -> Any:
        found = prepare(scheduled)
        seen.append(
            {
                "ids": found[0].tolist(),
                "positions": found[1].tolist(),
                "slots": found[2].slot_mapping.tolist(),
                "counts": list(llm.engine.cache.pool.ref_counts),
            }
        )
        return found

    llm.engine.runner.prepare = watched
    with record(llm) as trace:
        outputs, _ = run_requests(llm.engine, REQUESTS, [0, 1, 1, 6])
    return trace, seen, outputs


@pytest.fixture(scope="module")
def run() -> tuple[Trace, list[dict[str, Any]], dict[str, Any]]:
    return watched_run(enable_prefix_caching=True)


@pytest.fixture(scope="module")
def rows() -> dict[str, torch.Tensor]:
    """Logits of the embedded model after three beginnings, and some of which most tokens were taken out."""
    found = exact_logits(BEGINNINGS, make_llm().get_tokenizer())
    logits = found[BEGINNINGS[-1]]
    allowed = torch.arange(len(logits)) % 7 == 3
    found["as if a grammar allowed every seventh token"] = logits.masked_fill(~allowed, -torch.inf)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_llm().get_tokenizer()


# What is written down


def test_an_engine_that_is_not_recorded_keeps_nothing() -> None:
    llm = make_llm()
    runner, params = llm.engine.runner, SamplingParams(seed=5, max_tokens=8)
    (before,) = llm.generate("Once upon a time", params, use_tqdm=False)
    with record(llm) as trace, record(llm.engine) as inner:
        (during,) = llm.generate("Once upon a time", params, use_tqdm=False)
    assert llm.engine.runner is runner and llm.engine.step_hooks == []
    llm.generate("Once upon a time", params, use_tqdm=False)
    assert before.outputs[0].token_ids == during.outputs[0].token_ids
    assert repr(trace) == repr(inner) == f"Trace(1 sequences, {len(during.outputs[0].token_ids)} steps)"
    assert trace.seqs[0].name == "request 1", "a name that LLM made up is not the same twice"


def test_a_step_that_fails_leaves_no_trace_and_the_engine_as_it_was() -> None:
    llm = make_llm()
    runner = llm.engine.runner
    runner.run = lambda scheduled: 1 / 0
    with pytest.raises(ZeroDivisionError), record(llm) as trace:
        llm.generate("Once upon a time", use_tqdm=False)
    assert trace.steps == [] and llm.engine.runner is runner and llm.engine.step_hooks == []
    with pytest.raises(ValueError, match="has no step"):
        play_trace(trace)


def tokens_of(trace: Trace, step: Any, known: list[int]) -> list[int]:
    """The tokens of a step's flat batch; ``known``, how many each sequence had before it, is brought up to date."""
    ids = []
    for number, first, count in step.work:
        seen = trace.seqs[number].token_ids[: known[number]] + step.guesses.get(number, [])
        ids += seen[first : first + count]
    for number, count in step.num_new_tokens.items():
        known[number] += count
    return ids


def slots_of(trace: Trace, step: Any) -> list[int]:
    return [
        step.tables[number][position // trace.block_size] * trace.block_size + position % trace.block_size
        for number, first, count in step.work
        for position in range(first, first + count)
    ]


@settings(max_examples=8, deadline=None)
@given(
    num_blocks=st.integers(9, 16),
    max_num_seqs=st.integers(1, 4),
    preemption_mode=st.sampled_from(["recompute", "swap"]),
    enable_prefix_caching=st.booleans(),
    enable_chunked_prefill=st.booleans(),
    speculative_config=st.sampled_from([None, GUESSES]),
)
def test_a_trace_is_what_the_runner_computed(**config: Any) -> None:
    budget = {"max_num_batched_tokens": 6} if config["enable_chunked_prefill"] else {}
    trace, seen, outputs = watched_run(**config, **budget)
    assert len(trace.steps) == len(seen)
    known = [seq.num_first_tokens for seq in trace.seqs]
    for step, true in zip(trace.steps, seen):
        work = [(number, p) for number, first, count in step.work for p in range(first, first + count)]
        assert [position for _, position in work] == true["positions"]
        assert tokens_of(trace, step, known) == true["ids"]
        assert slots_of(trace, step) == true["slots"]
        tables = [block for table in step.tables.values() for block in table]
        assert [tables.count(block) for block in range(trace.num_blocks)] == true["counts"]
        assert not {*step.places} & {*step.waiting, *step.swapped} and {n for n, *_ in step.work} <= {*step.places}
    for name, output in outputs.items():
        got = sorted(seq.token_ids[seq.num_prompt_tokens :] for seq in trace.seqs if seq.name.startswith(name))
        assert got == sorted(answer.token_ids for answer in output.outputs)
    assert sorted(n for step in trace.steps for n in step.finished) == list(range(len(trace.seqs)))


def test_bars_are_the_probabilities_behind_each_token(run: Any) -> None:
    trace, _, outputs = run
    answer = outputs["B"].outputs[0]
    number = next(i for i, seq in enumerate(trace.seqs) if seq.name == "B")
    bars = [bar for step in trace.steps for bar in step.bars.get(number, [])]
    assert len(bars) == len(answer.token_ids)
    for bar, token_id, found in zip(bars, answer.token_ids, answer.logprobs):
        probs = {i: round(torch.tensor(x.logprob).exp().item(), 3) for i, x in found.items()}
        assert dict(bar) == {i: p for i, p in probs.items() if p or i == token_id}
        assert token_id in dict(bar) and [p for _, p in bar] == sorted((p for _, p in bar), reverse=True)
    assert not any(trace.seqs[n].name.startswith(("C", "D")) for step in trace.steps for n in step.bars)


def test_a_recording_may_begin_in_the_middle_of_a_run(tokenizer: Any) -> None:
    llm = make_llm()
    llm.engine.add_request("A", "Once upon a time", SamplingParams(temperature=0, max_tokens=9))
    for _ in range(4):
        llm.engine.step()
    with record(llm) as trace:
        llm.engine.step()
    (seq,), (step,) = trace.seqs, trace.steps
    assert (seq.num_prompt_tokens, seq.num_first_tokens, len(seq.token_ids)) == (4, 8, 9)
    assert step.work == [(0, 7, 1)] and step.num_new_tokens == {0: 1}
    (data,) = play_trace(trace).data["runs"][0]["seqs"]
    assert data["first"] == 8 and len(data["tokens"]) == 9


def test_a_description_counts(run: Any) -> None:
    trace, seen, outputs = run
    told = repr(play_trace(trace))
    assert f"{sum(len(true['ids']) for true in seen)} tokens computed" in told
    assert f"{sum(len(a.token_ids) for o in outputs.values() for a in o.outputs)} tokens written" in told
    assert f"at most {max(sum(c > 0 for c in true['counts']) for true in seen)} of 12 blocks" in told


# What every player is


def test_the_same_run_gives_the_same_output(run: Any) -> None:
    again, _, _ = watched_run(enable_prefix_caching=True)
    assert play_trace(run[0])._repr_html_() == play_trace(again)._repr_html_()


def test_colors_are_those_of_the_figures() -> None:
    assert {color.lower() for color in REQUEST_COLORS} >= {c.lower() for c in PALETTE if c != "#E69F00"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_plain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert "://" not in text and not re.search(r"\b(?:fetch|import|require|eval|localStorage)\b", text)


def test_only_small_vocabularies_are_kept_whole(tokenizer: Any) -> None:
    logits = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    player = play_sampling({"a": logits, "b": -logits}, None)
    data = player.data
    assert len(data["texts"]) == 1500 and data["vocabSize"] == 100_000
    assert data["texts"][0].startswith("#") and len(player._repr_html_()) < LARGEST


def test_exact_logits_are_those_of_the_engine(rows: Any) -> None:
    llm = make_llm(max_logprobs=-1)
    outputs = llm.generate([*BEGINNINGS], SamplingParams(max_tokens=1, logprobs=-1), use_tqdm=False)
    for text, output in zip(BEGINNINGS, outputs):
        (found,) = output.outputs[0].logprobs
        logprobs = torch.tensor([found[i].logprob for i in range(len(found))])
        torch.testing.assert_close(rows[text].log_softmax(-1).float(), logprobs, rtol=1e-5, atol=1e-4)


def test_the_order_in_which_a_machine_adds_does_not_reach_the_data(rows: Any, tokenizer: Any) -> None:
    steps = torch.cat([rows[text] for text in BEGINNINGS]) * RESOLUTION
    margin = (steps - steps.floor() - 0.5).abs().min() / RESOLUTION
    assert margin > 1e-11, "a logit so near the middle of two steps may be rounded to either"
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(num_threads, 2))
        again = exact_logits(BEGINNINGS, tokenizer)
    finally:
        torch.set_num_threads(num_threads)
    assert play_sampling(again, tokenizer).data == play_sampling({t: rows[t] for t in BEGINNINGS}, tokenizer).data


def test_what_cannot_be_played_is_refused() -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        play_sampling({}, None)
    with pytest.raises(ValueError, match="one vocabulary, got 3 and 4 logits"):
        play_sampling({"a": torch.zeros(3), "b": torch.zeros(4)}, None)
    for largest, why in ((torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf")):
        with pytest.raises(ValueError, match=f"'a' leave no token to draw: their largest is {why}"):
            play_sampling({"a": torch.tensor([-torch.inf, largest])}, None)


def stored(path: Path) -> list[str]:
    """The players of a chapter, as HTML."""
    outputs = [joined(o.get("data", {}).get("text/html", "")) for cell in read(path).code for o in cell.outputs]
    return [html for html in outputs if "folo-player" in html]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_players_of_a_page_are_small_and_of_today(path: Path) -> None:
    size = sum(len(html.encode()) for html in stored(path))
    assert size <= LARGEST, f"the players of {path.name} take {size:,} bytes"
    for html in stored(path):
        name = re.search(r'data-player="([\w-]+)"', html)[1]
        parts = read_part("player.css"), read_part(f"{name.split('-')[0]}.js").replace("PLAYER", name)
        assert all(part in html for part in parts), f"run tests/book/refresh.py notebooks/{path.name}"


def test_the_chapters_that_should_have_a_player_have_one() -> None:
    with_player = {path.stem[:2] for path in PATHS if stored(path)}
    assert with_player >= {"00", "02", "08", "09", "10", "11", "12", "13", "16", "18"}


# In a browser

needs_browser = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium_page(find_chromium()) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.set_dark(False)
    browser.set_width(1000)
    browser.requests.clear()
    browser.errors.clear()
    return browser


@pytest.fixture(scope="module")
def trace_player(run: Any) -> Player:
    return play_trace(run[0])


@pytest.fixture(scope="module")
def two_runs(run: Any) -> Player:
    return play_trace(run[0], watched_run(num_blocks=24)[0], labels=("with a cache", "without"))


@pytest.fixture(scope="module")
def sampling_player(rows: Any, tokenizer: Any) -> Player:
    return play_sampling(rows, tokenizer)


def show(page: Page, folder: Path, *shown: Player, body: str = "{}") -> None:
    """Opens a page with players on it."""
    text = body.format("\n".join(player._repr_html_() for player in shown))
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    (folder / "page.html").write_text(
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{viewport}<title>Players</title></head>'
        f"<body><main><h1>Players</h1>{text}</main></body></html>",
        encoding="utf-8",
    )
    page.open(folder / "page.html")


def go_to(step: int | str) -> str:
    return (
        "(() => { const slider = document.querySelector('.folo-player input'); "
        f"slider.value = {step}; slider.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )


def step_of(page: Page, player: int = 0) -> int:
    return int(page.evaluate(f"document.querySelectorAll('.folo-player')[{player}].dataset.step"))


@needs_browser
@pytest.mark.parametrize("speculative_config", [None, GUESSES], ids=["plain", "with guesses"])
def test_each_step_on_the_page_is_the_step_that_was_computed(
    page: Page, tmp_path: Path, tokenizer: Any, speculative_config: Any
) -> None:
    trace, seen, _ = watched_run(enable_prefix_caching=True, speculative_config=speculative_config)
    assert any(step.guesses for step in trace.steps) == bool(speculative_config)
    show(page, tmp_path, play_trace(trace))
    shown = page.evaluate(
        f"""(() => {{
            const found = [];
            for (let step = 1; step <= {len(seen)}; step++) {{
                {go_to("step")};
                const texts = (selector) => [...document.querySelectorAll(selector)].map((e) => e.textContent);
                const textsIn = (e, selector) => [...e.querySelectorAll(selector)].map((s) => s.textContent);
                const blocks = [...document.querySelectorAll(".fp-block")].map((e) =>
                    [textsIn(e, ".fp-head")[0], textsIn(e, ".fp-slot")]);
                found.push({{
                    positions: texts(".fp-token i").map(Number), slots: texts(".fp-token small").map(Number),
                    guesses: texts(".fp-guess b"), wrong: texts(".fp-guess s").length,
                    words: texts(".fp-token b"), shared: document.querySelectorAll(".fp-shared").length,
                    blocks, said: document.querySelector(".fp-status").textContent,
                }});
            }}
            return found;
        }})()"""
    )
    known = [seq.num_first_tokens for seq in trace.seqs]
    for number, (page_step, true, step) in enumerate(zip(shown, seen, trace.steps), 1):
        assert (page_step["positions"], page_step["slots"]) == (true["positions"], true["slots"])
        words = [tokenizer.decode([i]).replace(" ", "␣") for i in true["ids"]]
        assert page_step["words"] == words
        assert page_step["shared"] == sum(count > 1 for count in true["counts"])
        assert f"Step {number} of {len(seen)}" in page_step["said"]
        blocks = {int(head.split()[1]): (head.split(" · ")[1], slots) for head, slots in page_step["blocks"]}
        for seq_number, table in step.tables.items():
            seq = trace.seqs[seq_number]
            first, count = next(((f, c) for n, f, c in step.work if n == seq_number), (0, 0))
            for index, block in enumerate(table):
                owners, slots = blocks[block]
                assert seq.name in owners
                ids = seq.token_ids[: known[seq_number]] + step.guesses.get(seq_number, [])
                texts = [tokenizer.decode([i]).replace(" ", "␣") for i in ids[: first + count]]
                mine = texts[index * trace.block_size : (index + 1) * trace.block_size]
                assert slots[: len(mine)] == mine
        guesses = [guess for guesses in step.guesses.values() for guess in guesses]
        assert page_step["guesses"] == [tokenizer.decode([i]).replace(" ", "␣") for i in guesses]
        assert page_step["wrong"] == wrong_guesses(trace, step, known)
        tokens_of(trace, step, known)


def wrong_guesses(trace: Trace, step: Any, known: list[int]) -> int:
    """How many guesses of a step are not the tokens that came; one after a wrong one is wrong, too."""
    wrong = 0
    for number, guesses in step.guesses.items():
        new = trace.seqs[number].token_ids[known[number] :][: step.num_new_tokens[number]]
        right = next((i for i, (a, b) in enumerate(zip(guesses, new)) if a != b), min(len(guesses), len(new)))
        wrong += len(guesses) - right
    return wrong


SETTINGS = """(settings) => settings.map((setting) => {
    const root = document.querySelector(".folo-player");
    for (const [name, value] of Object.entries(setting)) root.querySelector(`[name="${name}"]`).value = value;
    root.querySelector("input").dispatchEvent(new Event("input", { bubbles: true }));
    return [Number(root.dataset.token), Number(root.dataset.kept)];
})"""


@needs_browser
def test_the_page_draws_the_very_tokens_of_the_sampler(
    page: Page, tmp_path: Path, rows: Any, sampling_player: Player
) -> None:
    show(page, tmp_path, sampling_player)
    rng = random.Random(0)
    asked = [
        {
            "row": rng.randrange(len(rows)),
            "temperature": rng.choice([0, *(round(0.05 * i, 2) for i in range(1, 61))]),
            "top_k": rng.choice([0, 0, rng.randint(1, 50)]),
            "top_p": rng.choice([1, round(0.05 * rng.randint(1, 20), 2)]),
            "min_p": rng.choice([0, round(0.01 * rng.randint(1, 50), 2)]),
            "seed": rng.randrange(NUM_SEEDS),
        }
        for _ in range(200)
    ]
    drawn = page.evaluate(f"({SETTINGS})({json.dumps(asked)})")
    minus_inf = -float("inf")
    logits = [
        torch.tensor([minus_inf if x is None else x / RESOLUTION for x in row["logits"]])
        for row in sampling_player.data["rows"]
    ]
    for setting, (token, kept) in zip(asked, drawn):
        wanted = {**setting, "top_k": setting["top_k"] or -1}
        row = logits[wanted.pop("row")].unsqueeze(0)
        params = SamplingParams(**wanted)
        assert Sampler()(row, SamplingMetadata([params])).token_ids == [token], setting
        assert int((Sampler().compute_probs(row, SamplingMetadata([params])) > 0).sum()) == kept, setting
    assert len({token for token, _ in drawn}) > 10


@needs_browser
def test_players_share_a_page_and_leave_nothing_on_it(
    page: Page, tmp_path: Path, trace_player: Player, two_runs: Player, sampling_player: Player
) -> None:
    show(page, tmp_path)
    clean = page.evaluate("Object.keys(window).sort().join()")
    show(page, tmp_path, trace_player, sampling_player, trace_player, two_runs)
    assert page.evaluate("Object.keys(window).sort().join()") == clean
    assert page.evaluate("document.querySelectorAll('.folo-player [id]').length") == 0
    assert page.evaluate("document.querySelectorAll('.fp-controls input').length") == 3
    page.evaluate(go_to(5))
    assert [step_of(page, player) for player in (0, 2, 3)] == [5, 1, 1]
    assert all(url.startswith("file:") for url in page.requests) and not page.errors


@needs_browser
def test_by_keys_alone(page: Page, tmp_path: Path, trace_player: Player) -> None:
    show(page, tmp_path, trace_player)
    total = len(trace_player.data["runs"][0]["steps"])
    for _ in range(5):
        page.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    assert page.evaluate("document.activeElement.labels[0].textContent.trim()") == "Step"
    assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    steps = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        page.press(key)
        steps.append(step_of(page))
    assert steps == [2, 3, 2, total, 1]
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == f"step 1 of {total}"
    page.press("Tab", shift=True)
    page.press("Enter")
    assert step_of(page) == total and page.evaluate("document.activeElement.title") == "Last step"


@needs_browser
def test_by_mouse_and_by_finger(page: Page, tmp_path: Path, trace_player: Player) -> None:
    total = len(trace_player.data["runs"][0]["steps"])
    show(page, tmp_path, trace_player)
    box = page.evaluate(
        "(({x, y, width}) => ({x, y, width}))(document.querySelector('.fp-still').getBoundingClientRect())"
    )
    for kind, share in (("mousePressed", 0.5), ("mouseMoved", 0.75), ("mouseMoved", 1.2), ("mouseReleased", 1.2)):
        x, y = box["x"] + share * box["width"], box["y"] + 20
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        if share == 0.5:
            assert 1 < step_of(page) < total
    assert step_of(page) == total
    page.set_width(PHONE)
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        place = page.evaluate(
            """(() => {
                const button = document.querySelector('[data-to="first"]');
                button.scrollIntoView();
                const {x, y, width, height} = button.getBoundingClientRect();
                return [x + width / 2, y + height / 2, height];
            })()"""
        )
        page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": place[0], "y": place[1]}])
        page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        page.evaluate("new Promise((done) => setTimeout(done, 100))")
    finally:
        page.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert step_of(page) == 1 and place[2] >= 40


@needs_browser
def test_the_controls_stay_in_sight(page: Page, tmp_path: Path, trace_player: Player) -> None:
    """A phone is not as high as a player, and the box of a cell's output scrolls by itself."""
    page.set_width(PHONE, 640)
    show(page, tmp_path, trace_player, body='<div style="overflow: auto">{}</div>')
    bottom = page.evaluate(
        """(() => { document.querySelector(".folo-player").scrollIntoView();
        return document.querySelector(".fp-controls").getBoundingClientRect().bottom; })()"""
    )
    assert page.evaluate("document.querySelector('.folo-player').offsetHeight") > 640 and bottom <= 640


@needs_browser
def test_it_plays_when_asked_and_not_where_motion_is_unwelcome(
    page: Page, tmp_path: Path, trace_player: Player
) -> None:
    show(page, tmp_path, trace_player)
    assert page.evaluate("document.querySelector('[data-to=\"play\"]')") is None
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "no-preference"}])
    show(page, tmp_path, trace_player)
    page.evaluate("window.setInterval = (f) => (window.tick = f, 1)")  # no test waits for a clock
    assert step_of(page) == 1
    page.evaluate("document.querySelector('[data-to=\"play\"]').click()")
    page.evaluate("tick()")
    assert step_of(page) == 2 and page.evaluate("document.querySelector('[role=status]').ariaLive") == "off"
    page.evaluate("document.querySelector('[data-to=\"play\"]').click()")
    assert page.evaluate("document.querySelector('[role=status]').ariaLive") == "polite"


IN_JUPYTERLAB = """<div class="jp-RenderedHTMLCommon jp-RenderedHTML"></div><template>{}</template><script>
document.body.dataset.jpThemeLight = "false";
const host = document.querySelector(".jp-RenderedHTML");
host.innerHTML = document.querySelector("template").innerHTML;
for (const script of host.querySelectorAll("script")) {{
  const fresh = document.createElement("script");
  for (const each of script.attributes) fresh.setAttribute(each.name, each.value);
  fresh.textContent = script.textContent;
  script.replaceWith(fresh);
}}
document.querySelector("template").remove();
</script>"""
"""What JupyterLab does with the output of a trusted cell: it sets the HTML, and makes each script anew."""

GROUND = "getComputedStyle(document.querySelector('.folo-player')).backgroundColor"


@needs_browser
def test_in_jupyterlab(page: Page, tmp_path: Path, trace_player: Player, sampling_player: Player) -> None:
    show(page, tmp_path, trace_player, sampling_player, body=IN_JUPYTERLAB)
    page.evaluate(go_to(3))
    assert step_of(page) == 3 and not page.errors
    assert page.evaluate("document.querySelectorAll('.fp-bar').length") > 8
    assert page.evaluate(GROUND) == "rgb(18, 18, 18)", "its theme is dark, whatever the system's is"
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")
    page.set_dark(True)
    assert page.evaluate(GROUND) == "rgb(255, 255, 255)"


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1000, PHONE])
def test_players_are_for_everybody(
    page: Page, tmp_path: Path, two_runs: Player, sampling_player: Player, width: int, dark: bool
) -> None:
    """In the system's themes and the site's: nothing scrolls sideways, no text is faint, axe-core finds nothing."""
    page.set_width(width)
    page.set_dark(dark)
    show(page, tmp_path, two_runs, sampling_player)
    page.evaluate(go_to(8))
    wrong = run_axe(page, colors=True) + json.loads(page.evaluate(FIND_FAINT_TEXT))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(GROUND) == ("rgb(18, 18, 18)" if dark else "rgb(255, 255, 255)")
    page.evaluate(f"document.documentElement.dataset.theme = '{'light' if dark else 'dark'}'")
    assert page.evaluate(GROUND) == ("rgb(255, 255, 255)" if dark else "rgb(18, 18, 18)"), "the site's switch counts"
    assert not wrong + page.errors, "\n".join(wrong + page.errors)


@needs_browser
def test_without_a_script_and_on_paper_there_is_a_still_picture(
    page: Page, tmp_path: Path, trace_player: Player, sampling_player: Player
) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        show_without = tmp_path / "page.html"
        show_without.write_text(trace_player._repr_html_() + sampling_player._repr_html_(), encoding="utf-8")
        page.open(show_without, settle=False)
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    visible = "[...document.querySelectorAll('{}')].filter((e) => e.checkVisibility()).length"
    assert page.evaluate(visible.format("svg[role=img]")) == 2
    assert page.evaluate(visible.format("button, input, select")) == 0
    show(page, tmp_path, trace_player, sampling_player)
    page.set_dark(True, paper=True)
    assert page.evaluate(visible.format("svg.fp-still")) == 2
    assert page.evaluate(visible.format("button, input, select")) == 0
    assert page.evaluate(GROUND) == "rgb(255, 255, 255)"


def test_still_pictures_are_described(trace_player: Player, two_runs: Player, sampling_player: Player) -> None:
    for player in (trace_player, two_runs, sampling_player):
        drawings = BeautifulSoup(player.still, "html.parser").select("svg:not([aria-hidden])")
        told = [drawing["aria-label"] for drawing in drawings]
        assert " ".join(told) == repr(player) and all(drawing["role"] == "img" for drawing in drawings)


@needs_browser
def test_a_page_of_its_own(page: Page, tmp_path: Path, trace_player: Player) -> None:
    file = tmp_path / "run.html"
    file.write_text(trace_player.to_page("A run & more"), encoding="utf-8")
    page.open(file)
    assert page.evaluate("document.title") == "A run & more" and step_of(page) == 1
    assert run_axe(page, colors=True) == [] and page.requests == [file.as_uri()]
