"""Checks of the exercises of chapter 13."""

from __future__ import annotations

import builtins
import copy
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any, NoReturn
from unittest import mock

from folovllm.book import faults, judges
from folovllm.book.exercises.verdict import NotYet, exercise, expect, expect_subclass
from folovllm.core.kv_cache import KVCacheManager
from folovllm.request import Sequence as TokenSequence
from folovllm.request import SequenceData
from folovllm.sampling_params import SamplingParams

MIN_BYTES = 16
"""Of a block's hash: with fewer, two blocks with the same one can be found by trying."""

CACHING: tuple[dict[str, Any], ...] = (
    {"max_num_seqs": 4, "block_size": 4, "num_blocks": 100, "enable_prefix_caching": True},
    {"max_num_seqs": 4, "block_size": 4, "num_blocks": 24, "enable_prefix_caching": True},
    {"max_num_seqs": 3, "block_size": 1, "num_blocks": 70, "enable_prefix_caching": True},
)
"""Engines for a hash; the second has too few blocks to keep everything."""

ALIKE: tuple[tuple[tuple[bytes, list[int]], tuple[bytes, list[int]], str], ...] = (
    ((b"", [5, 6, 7, 8]), (b"", [8, 7, 6, 5]), "the order of the tokens counts"),
    ((b"", [5, 6, 7, 8]), (b"", [6, 5, 7, 8]), "the order of the tokens counts"),
    ((b"", [5, 6, 7, 8]), (b"", [9, 6, 7, 8]), "the first token counts"),
    ((b"", [5, 6, 7, 8]), (b"", [5, 6, 7, 9]), "the last token counts"),
    ((b"", [5, 6, 7, 8]), (b"", [5, 9, 7, 8]), "every token counts"),
    ((b"one", [5, 6, 7, 8]), (b"two", [5, 6, 7, 8]), "what stands before a block is in `parent`, and it counts"),
    ((b"anna 1", [5, 6, 7, 8]), (b"anna 2", [5, 6, 7, 8]), "all of `parent` counts"),
    ((b"1 anna", [5, 6, 7, 8]), (b"2 anna", [5, 6, 7, 8]), "all of `parent` counts"),
    ((b"", [1, 23, 4, 5]), (b"", [12, 3, 4, 5]), "1, 23 and 12, 3 are different tokens: keep them apart"),
    ((b"", [1, 2, 3, 4]), (b"", [257, 2, 3, 4]), "token ids are larger than a byte"),
    ((b"", [1, 2, 3, 4]), (b"", [65_537, 2, 3, 4]), "token ids are larger than two bytes"),
)
"""Pairs of blocks that must not have the same hash, and why."""


@contextmanager
def _without_weak_hashes() -> Iterator[None]:
    """Refuses an attempt that calls Python's ``hash``, MD5 or SHA-1."""

    def refuse(why: str) -> Callable[..., NoReturn]:
        def call(*_: Any, **__: Any) -> NoReturn:
            raise NotYet(why)

        return call

    builtin = refuse(
        "your code calls Python's hash(), which gives other numbers after a restart and is not made to withstand "
        "attackers: take a hash of hashlib or hmac."
    )
    broken = refuse(
        "MD5 and SHA-1 are broken, and two contents with one hash can be made of them: take SHA-256 or BLAKE2b, of "
        "which nobody knows how."
    )
    with mock.patch.object(builtins, "hash", builtin), mock.patch.multiple(hashlib, md5=broken, sha1=broken):
        yield


def _restarted(attempt: Callable[..., Any]) -> Callable[..., Any]:
    """A function as after a restart: it has lists, dicts and sets of its own, so nobody else sees what it keeps."""
    known = {id(attempt)}

    def fresh(value: Any) -> Any:
        if isinstance(value, (list, dict, set)):
            return copy.copy(value)
        if not isinstance(value, FunctionType) or id(value) in known:
            return value
        known.add(id(value))
        return remake(value)

    def remake(function: FunctionType) -> FunctionType:
        cells = tuple(CellType(fresh(cell.cell_contents)) for cell in function.__closure__ or ())
        names = {name: value if callable(value) else fresh(value) for name, value in function.__globals__.items()}
        made = FunctionType(function.__code__, names, None, tuple(map(fresh, function.__defaults__ or ())), cells)
        made.__kwdefaults__ = {name: fresh(value) for name, value in (function.__kwdefaults__ or {}).items()}
        return made

    return remake(attempt) if isinstance(attempt, FunctionType) else copy.deepcopy(attempt)


_new_customers = itertools.count()
"""No attempt has seen one of these names before."""


@exercise(
    "the parent and every token count, and nobody finds two blocks with one hash.", gives=f"at least {MIN_BYTES} bytes"
)
def check_block_hash(attempt: Callable[[bytes, list[int]], bytes]) -> None:
    """``attempt(parent, token_ids)``: the hash of a block, for ``KVCacheManager.hash_block``."""
    with _without_weak_hashes():
        _compare_hashes(attempt)
    manager = type("Manager", (KVCacheManager,), {"hash_block": staticmethod(attempt)})
    judges.judge_cache(manager, CACHING)


def _compare_hashes(attempt: Callable[[bytes, list[int]], bytes]) -> None:
    block, other = [5, 6, 7, 8], [9, 10, 11, 12]
    first = attempt(b"", block)
    expect(isinstance(first, bytes), f"a hash should be bytes, yours is of the type {type(first).__name__}.")
    expect(block == [5, 6, 7, 8], f"the list of tokens that you were given is {block} afterwards: leave it as it is.")
    expect(attempt(b"", block) == first, "the same block has another hash when it is asked for again.")
    for one, two, why in ALIKE:
        expect(attempt(*one) != attempt(*two), f"{one} and {two} get the same hash: {why}.")
    expect(
        len(attempt(first, block)) == len(first),
        f"a hash has a fixed length; yours grows from {len(first)} to {len(attempt(first, block))} bytes.",
    )
    expect(
        attempt(first, other) != attempt(attempt(b"", other), block),
        f"{block} followed by {other} gets the same hash as {other} followed by {block}: the order of blocks counts.",
    )
    # Of bytes that always agree with others one counts; one that takes all 256 values shows some 177 of them here.
    columns = set(zip(*(attempt(first, [i, i + 1]) for i in range(300))))
    num_bytes = sum(math.log2(len(set(column))) for column in columns) / math.log2(177)
    expect(
        num_bytes > MIN_BYTES - 0.5,
        f"your hash says no more than {num_bytes:.0f} bytes would, and with fewer than {MIN_BYTES} two blocks with "
        "the same hash can be found by trying: take a digest of hashlib, at least 16 bytes of it.",
    )


@exercise("a salt for each tenant, always the same, which nobody can work out without the secret.", gives="a text")
def check_cache_salt(attempt: Callable[[str, str], str]) -> None:
    """``attempt(tenant, secret)``: the ``cache_salt`` of a tenant's requests."""
    with _without_weak_hashes():
        _compare_salts(attempt)
    _try_salts(attempt("anna", "s3cret"), attempt("bert", "s3cret"))


def _compare_salts(attempt: Callable[[str, str], str]) -> None:
    salt = attempt("anna", "s3cret")
    expect(isinstance(salt, str), f"a salt is a text, yours is of the type {type(salt).__name__}.")
    expect(len(salt) >= 20, f"a salt of {len(salt)} characters can be guessed by trying: make it at least 20 long.")
    expect(
        attempt("anna", "s3cret") == salt,
        "the same tenant has another salt the second time, and finds nothing of its own: don't draw it at random.",
    )
    name = f"new customer {next(_new_customers)}"
    expect(
        _restarted(attempt)(name, "s3cret") == _restarted(attempt)(name, "s3cret"),
        "after a restart, when nothing is remembered, a tenant has another salt: compute it from name and secret.",
    )
    expect("s3cret" not in salt, "the secret can be read in the salt, which may end up in a log: hash both.")
    names = ["anna", "Anna", "bert", "安娜", "贝特", *(f"customer-{i}" for i in range(2000))]
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(attempt(name, "s3cret"), name)
        expect(other == name, f"{other} and {name} have the same salt, and find each other's blocks.")
    for secret in ("another", "s3creT", "S3cret"):
        _expect_mixed(salt, attempt("anna", secret), attempt("bert", "s3cret"), secret)


def _expect_mixed(salt: str, with_other_secret: str, of_other_tenant: str, secret: str) -> None:
    """Nearly every character depends on all of the secret, and on the tenant as well."""
    changed = [i for i, (one, two) in enumerate(zip(salt, with_other_secret)) if one != two]
    expect(
        with_other_secret != salt,
        f"with the secret {secret!r} the salt is the same as with 's3cret', so it can be worked out without it.",
    )
    expect(
        len(changed) >= 10,
        f"with the secret {secret!r} instead of 's3cret' the salt changes in {len(changed)} places only, so the secret "
        "can be read from it or guessed bit by bit: hash both.",
    )
    expect(
        sum(salt[i] != of_other_tenant[i : i + 1] for i in changed) >= 10,
        "what the secret does to the salt is the same for every tenant, so who knows one salt can work out all others: "
        "put name and secret into one hash.",
    )


def _try_salts(anna: str, bert: str) -> None:
    """Sends one prompt from two tenants, twice from the first, and looks at what was found."""
    engine = judges.make_engine(CACHING[0])
    params = SamplingParams(max_tokens=1, seed=0, detokenize=False)
    found = []
    for i, salt in enumerate((anna, bert, anna)):
        arrival = judges.Arrival(f"r{i}", list(range(3, 36)), params, cache_salt=salt)
        metrics = judges.drive(engine, [arrival])[arrival.name].metrics
        found.append(0 if metrics is None else metrics.num_cached_tokens)
    expect(
        found == [0, 0, 32],
        f"in the engine, Anna's first, Bert's and Anna's second request found {found} tokens, and [0, 0, 32] is right.",
    )


def count_computed(requests: Sequence[dict[str, list[int]]], order: Sequence[str], block_size: int = 4) -> int:
    """Tokens that the real cache manager leaves to be computed, when each prompt's parts come in this order.

    Args:
        requests: the token ids of each part by its name, for each request; every request has the same names.
        order: the names.
        block_size: tokens per block.
    """
    cache = KVCacheManager(10_000, block_size, enable_prefix_caching=True)
    computed = 0
    for i, parts in enumerate(requests):
        token_ids = [token_id for name in order for token_id in parts[name]]
        seq = TokenSequence(str(i), str(i), SequenceData(token_ids), SamplingParams())
        seq.num_computed_tokens = cache.get_computed_blocks(seq)
        cache.allocate_slots(seq, len(token_ids))
        computed += len(token_ids) - seq.num_computed_tokens
        cache.free(seq)
    return computed


def _requests(num_requests: int, sizes: dict[str, tuple[int, int]], seed: int) -> list[dict[str, list[int]]]:
    """Requests whose part ``name`` has ``(tokens, different values)``, in turn; all values begin and end alike."""
    rng = random.Random(seed)
    values = {
        name: [[5, *(rng.randrange(3, 1000) for _ in range(num_tokens - 2)), 6] for _ in range(num_values)]
        for name, (num_tokens, num_values) in sizes.items()
    }
    return [{name: list(values[name][i % len(values[name])]) for name in sizes} for i in range(num_requests)]


PROMPTS = (
    _requests(12, {"date": (4, 12), "system": (24, 1), "question": (8, 12)}, 0),
    _requests(12, {"document": (32, 3), "question": (8, 12), "system": (16, 1)}, 1),
    _requests(12, {"a": (8, 12), "b": (24, 1), "user": (12, 4), "d": (16, 2)}, 2),
    _requests(8, {"question": (40, 8), "system": (4, 1), "clock": (4, 8), "rules": (8, 1)}, 3),
    _requests(12, {"z": (4, 1), "m": (32, 2), "k": (4, 12)}, 4),
    _requests(12, {"question": (24, 12), "language": (8, 2), "system": (8, 1)}, 5),
)
"""Prompts in parts: some are the same in every request, some change now and then, some always."""


@exercise("what never changes goes first, what always changes goes last.")
def check_prompt_order(attempt: Callable[[list[dict[str, list[int]]]], list[str]]) -> None:
    """``attempt(requests)``: the names of the parts in the order in which the prefix cache saves most."""
    for requests in PROMPTS:
        names = list(requests[0])
        given = [{name: list(part) for name, part in parts.items()} for parts in requests]
        order = list(attempt(given))
        expect(given == requests, "the requests that you were given are others afterwards: leave them as they are.")
        expect(
            sorted(map(str, order)) == sorted(names),
            f"the parts are {names}, each of them once, and yours are {order}.",
        )
        got = count_computed(requests, order)
        best = min(count_computed(requests, each) for each in itertools.permutations(names))
        expect(
            got == best,
            f"in the order {order} the {len(requests)} requests compute {got} tokens, and {best} would be enough.",
        )


@exercise("a block that is handed out forgets what it held.")
def check_fresh_words(attempt: type) -> None:
    """``attempt``: a mended `folovllm.book.faults.StaleHashes`."""
    expect_subclass(attempt, faults.StaleHashes)
    judges.judge_cache(attempt)
