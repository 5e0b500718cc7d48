"""The grammar of the tales: what the embedded model was trained on, with every probability written down.

A grammar is a list of parts. A string is fixed text in which ``{slot}`` recalls an earlier choice; a
`Choice` is the only place where chance enters; a `Branch` follows one path or another according to an
earlier choice and adds no chance of its own. Because every choice is written down, three questions have exact
answers that no web corpus can give: what may come next after a prefix, how likely each continuation is, and
how many nats of surprise a tale holds. Chapter 2 compares the model's probabilities with these.
"""

from __future__ import annotations

import functools
import math
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Union

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True)
class Choice:
    """One drawn value: writes ``lead + value`` and remembers ``value`` under ``slot``.

    A slot that is already filled (a chat request that named the hero, say) is recalled, not drawn again.
    No value is the beginning of another, so a text can be read back in only one way.
    """

    slot: str
    weights: dict[str, float]
    lead: str = ""

    @functools.cached_property
    def probs(self) -> dict[str, float]:
        """Probability of each value; they sum to 1."""
        total = sum(self.weights.values())
        return {value: weight / total for value, weight in self.weights.items()}

    @functools.cached_property
    def entropy(self) -> float:
        """Entropy of this choice alone, in nats."""
        return -sum(p * math.log(p) for p in self.probs.values())


@dataclass(frozen=True)
class Branch:
    """Continues with ``cases[value]``, where ``value`` is what was drawn for ``slot``."""

    slot: str
    cases: dict[str, list[Part]]


Part = Union[str, Choice, Branch]


@dataclass
class Document:
    """A finished text of the grammar."""

    text: str
    """The whole text, markers included."""
    slots: dict[str, str]
    """The value of every slot: the facts of the tale."""
    logprob: float
    """Log probability of all its choices, in nats; the first one (which opening) is left out, since a prompt gives it."""
    recalls: list[tuple[int, int, str]] = field(default_factory=list)
    """``(start, end, slot)`` of every place, in characters, where an earlier choice is repeated."""


def _zipf(*values: str) -> dict[str, float]:
    """Weights 1, 1/2, 1/3, …: a long tail, so that top-k, top-p and min-p have something to cut."""
    return {value: 1 / rank for rank, value in enumerate(values, 1)}


# fmt: off
_EN: dict[str, dict[str, float]] = {
    "opening": {"Once upon a time": 5, "Long ago": 3, "One spring": 2},
    "place": _zipf("forest", "valley", "village", "harbor", "meadow", "desert", "garden", "swamp", "castle", "island"),
    "trait": {"little": 4, "brave": 3, "quiet": 2, "clever": 2, "sleepy": 1},
    "hero": _zipf("fox", "mouse", "rabbit", "bear", "cat", "turtle", "frog", "wolf", "goat", "duck", "crow", "snail"),
    "name": _zipf("Mira", "Tom", "Luna", "Oskar", "Nia", "Bruno", "Pearl", "Felix", "Juno", "Hugo", "Wanda", "Ravi"),
    "hobby": _zipf("to sing", "to climb trees", "to count the stars", "to bake bread", "to tell jokes", "to paint", "to sleep late", "to fish"),
    "time": {"morning": 4, "evening": 3, "night": 2, "afternoon": 1},
    "color": _zipf("red", "golden", "blue", "tiny", "silver", "green", "wooden", "purple"),
    "thing": _zipf("key", "lantern", "hat", "ring", "drum", "map", "kite", "bell", "spoon", "book", "button", "boat"),
    "where": _zipf("under the bridge", "behind the mill", "beside the well", "inside the barn", "near the river", "on the hill", "below the stairs", "in the tall grass"),
    "friend": _zipf("heron", "hedgehog", "squirrel", "deer", "badger", "donkey", "swan", "mole", "raven", "lizard"),
    "friend_name": _zipf("Pip", "Ada", "Sam", "Olga", "Kofi", "Rosa", "Emil", "Yuki", "Zed", "Greta", "Ivo", "Lila"),
    "mood": {"sad": 4, "worried": 3, "puzzled": 2, "tired": 1},
    "help": _zipf("looked carefully", "followed a trail of crumbs", "asked the wind", "climbed the tallest tree", "drew a plan", "waited for the moon"),
    "spot": _zipf("under a leaf", "behind a stone", "in a nest", "inside a shoe", "near the old gate", "below the snow"),
    "ending": _zipf("they were friends ever after", "they shared a warm pie", "they danced until dark", "they laughed all the way home", "nobody was lonely again"),
}
_ZH: dict[str, dict[str, float]] = {
    "opening": {"从前": 5, "很久以前": 3, "有一年春天": 2},
    "place": _zipf("森林", "山谷", "村庄", "港口", "草原", "沙漠", "花园", "沼泽", "城堡", "小岛"),
    "trait": {"聪明": 4, "勇敢": 3, "安静": 2, "快乐": 2, "爱睡觉": 1},
    "hero": _zipf("狐狸", "老鼠", "兔子", "狗熊", "花猫", "乌龟", "青蛙", "灰狼", "山羊", "鸭子", "乌鸦", "蜗牛"),
    "name": _zipf("米拉", "阿宝", "小满", "多多", "果果", "天天", "豆豆", "乐乐", "星星", "毛毛", "点点", "团团"),
    "hobby": _zipf("唱歌", "爬树", "数星星", "烤面包", "讲笑话", "画画", "睡懒觉", "钓鱼"),
    "time": {"早晨": 4, "傍晚": 3, "夜里": 2, "午后": 1},
    "color": _zipf("红色", "金色", "蓝色", "小小", "银色", "绿色", "木头", "紫色"),
    "thing": _zipf("钥匙", "灯笼", "帽子", "戒指", "小鼓", "地图", "风筝", "铃铛", "勺子", "书本", "纽扣", "木船"),
    "where": _zipf("桥下", "磨坊后面", "井边", "谷仓里", "河边", "山坡上", "楼梯下", "草丛里"),
    "friend": _zipf("猫头鹰", "刺猬", "水獭", "小鹿", "獾", "松鼠", "毛驴", "天鹅", "鼹鼠", "苍鹭"),
    "friend_name": _zipf("皮皮", "阿达", "山姆", "奥加", "可可", "罗莎", "艾米", "雪儿", "石头", "小雨", "安安", "丽丽"),
    "mood": {"难过": 4, "着急": 3, "发呆": 2, "叹气": 1},
    "help": _zipf("仔细地看", "跟着面包屑走", "问了问风", "爬上最高的树", "画了一张图", "等月亮出来"),
    "spot": _zipf("叶子下面", "石头后面", "鸟窝里", "鞋子里", "旧门旁边", "雪堆下面"),
    "ending": _zipf("他们成了永远的朋友", "他们分吃了一个馅饼", "他们跳舞到天黑", "他们一路笑着回家", "谁也不再孤单"),
}


def _en(slot: str, lead: str = " ") -> Choice:
    return Choice(slot, _EN[slot], lead)


def _zh(slot: str) -> Choice:
    return Choice(slot, _ZH[slot])


TALE_EN: list[Part] = [
    ", in the", _en("place"), ", there lived a", _en("trait"), _en("hero"),
    " named", _en("name"), ". {name} loved", _en("hobby"), ". One", _en("time"), " in the {place}, {name}",
    Choice("plot", {"lost": 3, "found": 2}, " "), " a", _en("color"), _en("thing"),
    Branch("plot", {
        "lost": [
            ". {name} looked", _en("where"), ", but the {thing} was not there. {name} forgot {hobby}. Then {name} met",
            _en("friend_name"), " the", _en("friend"), '. "Why are you', _en("mood"),
            '?" asked the {friend}. "I lost my {color} {thing}," said {name}. {friend_name}', _en("help"),
            " and found the {thing}", _en("spot"), ". {name} thanked {friend_name}, and",
        ],
        "found": [
            _en("where"), ". Whose {thing} was it? {name} forgot {hobby}. Then {name} met",
            _en("friend_name"), " the", _en("friend"), '. "Why are you', _en("mood"),
            '?" asked {name}. "I lost my {color} {thing}," said the {friend}. {name}', _en("help"),
            " and gave the {thing} to {friend_name}. {friend_name} thanked {name}, and",
        ],
    }),
    _en("ending"), ".",
]
"""A tale in English, from after its opening."""

TALE_ZH: list[Part] = [
    "，在", _zh("place"), "里，住着一只", _zh("trait"), "的", _zh("hero"),
    "，名叫", _zh("name"), "。{name}喜欢", _zh("hobby"), "。一天", _zh("time"), "，{name}在{place}里",
    Choice("plot", {"丢了": 3, "捡到": 2}), "一个", _zh("color"), "的", _zh("thing"),
    Branch("plot", {
        "丢了": [
            "。{name}去", _zh("where"), "找，可是{thing}不在那里。{name}忘了{hobby}。这时{name}遇见了",
            _zh("friend"), "，它叫", _zh("friend_name"), "。“你为什么", _zh("mood"),
            "？”{friend}问。“我丢了{color}的{thing}。”{name}说。{friend_name}", _zh("help"),
            "，在", _zh("spot"), "找到了{thing}。{name}谢谢{friend_name}，从此",
        ],
        "捡到": [
            "，就在", _zh("where"), "。这是谁的{thing}呢？{name}忘了{hobby}。这时{name}遇见了",
            _zh("friend"), "，它叫", _zh("friend_name"), "。“你为什么", _zh("mood"),
            "？”{name}问。“我丢了{color}的{thing}。”{friend}说。{name}", _zh("help"),
            "，把{thing}还给{friend_name}。{friend_name}谢谢{name}，从此",
        ],
    }),
    _zh("ending"), "。",
]
"""A tale in Chinese, from after its opening."""

CARD_SLOTS = ("hero", "name", "place", "color", "thing", "friend", "friend_name", "plot")
"""The facts of a tale, in the order in which its JSON card lists them."""

_USER, _ASSISTANT = f"{IM_START}user\n", f"{IM_START}assistant\n"
_END_TURN = f"{IM_END}\n"
_CARD = "{{" + ", ".join(f'"{slot}": "{{{slot}}}"' for slot in CARD_SLOTS) + "}}"

_ANSWERS_EN: dict[str, list[Part]] = {
    "Who is the hero?": ["{name} the {hero}."],
    "Where did {name} live?": ["In the {place}."],
    "What did {name} love?": ["{name} loved {hobby}."],
    "Who was the friend?": ["{friend_name} the {friend}."],
    "Whose {thing} was it?": [
        Branch("plot", {"lost": ["The {thing} of {name}."], "found": ["The {thing} of {friend_name}."]})
    ],
}
_ANSWERS_ZH: dict[str, list[Part]] = {
    "主角是谁？": ["{hero}{name}。"],
    "{name}住在哪里？": ["在{place}里。"],
    "{name}喜欢什么？": ["{name}喜欢{hobby}。"],
    "朋友是谁？": ["{friend}{friend_name}。"],
    "{thing}是谁的？": [Branch("plot", {"丢了": ["{name}的{thing}。"], "捡到": ["{friend_name}的{thing}。"]})],
}


def _conversation(request: list[Part], tale: list[Part], answers: dict[str, list[Part]], card: str) -> list[Part]:
    """A request, its tale, a question about the tale, the answer, and the card of the tale's facts."""
    return [
        *request, _END_TURN, _ASSISTANT, *tale, _END_TURN,
        _USER, Choice("question", dict.fromkeys(answers, 1.0)), _END_TURN, _ASSISTANT, Branch("question", answers), _END_TURN,
        _USER, card, _END_TURN, _ASSISTANT, _CARD, IM_END,
    ]


CHAT: list[Part] = [
    Choice("request", {"Tell a tale about a": 3, "讲一个": 2}),
    Branch("request", {
        "Tell a tale about a": _conversation(
            [_en("hero"), Choice("scope", {".": 1, " in the": 1}), Branch("scope", {".": [], " in the": [_en("place"), "."]})],
            [_en("opening", lead=""), *TALE_EN], _ANSWERS_EN, "Write the card."),
        "讲一个": _conversation(
            [_zh("hero"), Choice("scope", {"的故事。": 1, "在": 1}), Branch("scope", {"的故事。": [], "在": [_zh("place"), "里的故事。"]})],
            [_zh("opening"), *TALE_ZH], _ANSWERS_ZH, "写出卡片。"),
    }),
]
"""A conversation, from after the marker that opens it."""

ROOT: list[Part] = [
    Choice("start", {
        **{text: 0.025 * weight for text, weight in _EN["opening"].items()},
        **{text: 0.020 * weight for text, weight in _ZH["opening"].items()},
        _USER: 0.55,
    }),
    Branch("start", {
        **dict.fromkeys(_EN["opening"], [*TALE_EN, END_OF_TEXT]),
        **dict.fromkeys(_ZH["opening"], [*TALE_ZH, END_OF_TEXT]),
        _USER: CHAT,
    }),
]
"""Every document: a tale in English (25 %), one in Chinese (20 %), a conversation (55 %)."""
# fmt: on

STARTS = {"english": tuple(_EN["opening"]), "chinese": tuple(_ZH["opening"]), "chat": (_USER,)}
"""The first words of each kind of document."""

Pick = Callable[[Choice, dict[str, str]], str]


def _expand(template: str, slots: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """The pieces of a template, each with the slot it recalls (None for fixed text)."""
    for literal, slot, _, _ in string.Formatter().parse(template):
        if literal:
            yield literal, None
        if slot is not None:
            yield slots[slot], slot


def _walk(parts: Sequence[Part], slots: dict[str, str], pick: Pick) -> Iterator[tuple[str, str | None]]:
    """Writes a document piece by piece, asking ``pick`` at every choice whose slot is empty."""
    for part in parts:
        if isinstance(part, str):
            yield from _expand(part, slots)
        elif isinstance(part, Choice):
            recalled = part.slot if part.slot in slots else None
            if recalled is None:
                slots[part.slot] = pick(part, slots)
            yield (part.lead + slots[part.slot]).format(**slots), recalled
        else:
            yield from _walk(part.cases[slots[part.slot]], slots, pick)


def sample(rng: random.Random, **given: str) -> Document:
    """Writes one document at random.

    Args:
        rng: source of every draw.
        given: slots fixed in advance, such as ``start="Once upon a time"`` or ``hero="fox"``.
    """
    logprob = 0.0

    def pick(choice: Choice, _: dict[str, str]) -> str:
        nonlocal logprob
        (value,) = rng.choices(list(choice.probs), weights=list(choice.probs.values()))
        if choice.slot != "start":
            logprob += math.log(choice.probs[value])
        return value

    slots = dict(given)
    text, recalls, unwritten = "", [], set(given)
    for piece, slot in _walk(ROOT, slots, pick):
        if slot in unwritten:
            unwritten.discard(slot)
        elif slot is not None:
            recalls.append((len(text), len(text) + len(piece), slot))
        text += piece
    return Document(text, slots, logprob, recalls)


class _PrefixEnds(Exception):
    """Raised inside a walk at the choice that a prefix stops before."""


def continuations(prefix: str) -> dict[str, float]:
    """What may come next after ``prefix``, and how likely each is: ``{text: probability}``, likeliest first.

    Where the prefix ends before a choice these are its values; inside fixed text, the one text that must follow.
    A document's end is ``{}``.

    Raises:
        ValueError: if no document of the grammar begins with ``prefix``.
    """
    position, fixed = 0, ""
    slots: dict[str, str] = {}

    def pick(choice: Choice, slots: dict[str, str]) -> str:
        if fixed:
            raise _PrefixEnds({fixed: 1.0})
        rest = prefix[position:]
        texts = {value: (choice.lead + value).format(**slots) for value in choice.probs}
        for value, text in texts.items():
            if rest.startswith(text):
                return value
        raise _PrefixEnds({text[len(rest) :]: choice.probs[v] for v, text in texts.items() if text.startswith(rest)})

    try:
        for piece, _ in _walk(ROOT, slots, pick):
            rest = prefix[position:]
            if not fixed and rest.startswith(piece):
                position += len(piece)
            elif piece.startswith(rest):
                fixed += piece[len(rest) :]
                position = len(prefix)
            else:
                raise _PrefixEnds({})
        if position < len(prefix):
            raise _PrefixEnds({})
        if fixed:
            raise _PrefixEnds({fixed: 1.0})
    except _PrefixEnds as end:
        (options,) = end.args
        if not options:
            wrong = f"{prefix[position:][:40]!r} after {prefix[:position][-40:]!r}"
            advice = "take a prefix of a text from folovllm.tales.sample()"
            raise ValueError(f"no tale goes on like this: {wrong}; {advice}") from None
        total = sum(options.values())
        return {text: p / total for text, p in sorted(options.items(), key=lambda item: -item[1])}
    return {}


def entropy(parts: Sequence[Part], known: dict[str, dict[str, float]] | None = None) -> float:
    """Entropy of ``parts`` in nats: the expected ``-log p`` of the choices still open, computed exactly.

    Args:
        known: the distribution of every slot that was filled before ``parts`` begin.
    """
    known = dict(known or {})
    total = 0.0
    for i, part in enumerate(parts):
        if isinstance(part, Choice) and part.slot not in known:
            total += part.entropy
            known[part.slot] = part.probs
        elif isinstance(part, Branch):
            rest = parts[i + 1 :]
            return total + sum(
                p * entropy([*part.cases[value], *rest], {**known, part.slot: {value: 1.0}})
                for value, p in known[part.slot].items()
            )
    return total


def document_entropy(kind: str) -> float:
    """Entropy in nats of a document of one kind ("english", "chinese" or "chat"), its first words given."""
    (_, branch) = ROOT
    assert isinstance(branch, Branch)
    return entropy(branch.cases[STARTS[kind][0]])
