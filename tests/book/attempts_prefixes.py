"""Attempts at the exercises of chapter 13, wrong ones and right ones."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import secrets
import zlib
from array import array
from collections.abc import Callable
from typing import Any

from folovllm.book import faults
from folovllm.book.exercises.prefixes import count_computed
from folovllm.core.kv_cache import BlockPool, KVCacheManager


def sha(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


KEPT: dict[tuple[str, str], str] = {}


def keeps_salts() -> Callable[[str, str], str]:
    kept: dict[tuple[str, str], str] = {}
    return lambda tenant, secret: kept.setdefault((tenant, secret), secrets.token_hex(16))


class PoolThatForgets(faults.ForgetsNothing):
    def allocate(self) -> int:
        block_id = super().allocate()
        self.forget(block_id)
        return block_id


class PoolThatForgetsTooEarly(BlockPool):
    def release(self, block_id: int) -> None:
        self.forget(block_id)
        super().release(block_id)


class ByValue(faults.StaleHashes):
    block_pool_cls = PoolThatForgets


class TooEarly(faults.StaleHashes):
    block_pool_cls = PoolThatForgetsTooEarly


class SwitchedOff(faults.StaleHashes):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.enable_prefix_caching = False


class ForgetsAtRelease(faults.StaleHashes):
    def release(self, seq: Any) -> None:
        for block_id in seq.block_ids:
            self.pool.forget(block_id)
        super().release(seq)


class PoolIsAnObject(faults.StaleHashes):
    block_pool_cls = BlockPool(12)  # type: ignore[assignment]


def sha_of_a_longer_list(parent: bytes, ids: list[int]) -> bytes:
    ids.append(0)
    return sha(repr((parent, ids)).encode())


def xor(one: bytes, two: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one.ljust(32, b"\0"), two))


def take_out(requests: list[dict[str, list[int]]]) -> list[str]:
    """Takes the parts out of the requests, one after the other."""
    names = []
    while requests[0]:
        names.append(min(requests[0], key=lambda name: len({tuple(request[name]) for request in requests})))
        for request in requests:
            request.pop(names[-1])
    return names


class Untouched(faults.StaleHashes):
    pass


class FindsNothing(faults.StaleHashes):
    def get_computed_blocks(self, seq: Any) -> int:
        return 0


WRONG: dict[str, dict[str, Any]] = {
    "check_block_hash": {
        "no parent": lambda parent, ids: sha(repr(ids).encode()),
        "md5": lambda parent, ids: hashlib.md5(parent + repr(ids).encode()).digest(),
        "sha1": lambda parent, ids: hashlib.sha1(parent + repr(ids).encode()).digest(),
        "parent only": lambda parent, ids: sha(parent),
        "no borders": lambda parent, ids: sha(parent + "".join(map(str, ids)).encode()),
        "one byte each": lambda parent, ids: sha(parent + bytes(i % 256 for i in ids)),
        "two bytes each": lambda parent, ids: sha(parent + array("H", [i % 2**16 for i in ids]).tobytes()),
        "bytes of the list": lambda parent, ids: sha(parent + bytes(ids)),
        "sorted": lambda parent, ids: sha(parent + repr(sorted(ids)).encode()),
        "a set": lambda parent, ids: sha(parent + repr(set(ids)).encode()),
        "their sum": lambda parent, ids: sha(parent + repr(sum(ids)).encode()),
        "first and last": lambda parent, ids: sha(parent + repr((ids[0], ids[-1])).encode()),
        "a checksum": lambda parent, ids: zlib.crc32(parent + repr(ids).encode()).to_bytes(16, "big"),
        "the parent's first bytes": lambda parent, ids: sha(parent[:2] + repr(ids).encode()),
        "the parent's last bytes": lambda parent, ids: sha(parent[-2:] + repr(ids).encode()),
        "both mixed by xor": lambda parent, ids: xor(parent, sha(repr(ids).encode())),
        "eight bytes twice": lambda parent, ids: sha(parent + repr(ids).encode())[:8] * 2,
        "python's hash twice": lambda parent, ids: (hash((parent, tuple(ids))) % 2**64).to_bytes(8, "big") * 2,
        "the last token and the sum": lambda parent, ids: sha(parent + repr((ids[-1], sum(ids))).encode()),
        "changes the list": sha_of_a_longer_list,
        "python's hash": lambda parent, ids: hash((parent, tuple(ids))).to_bytes(16, "big", signed=True),
        "eight bytes": lambda parent, ids: sha(parent + repr(ids).encode())[:8],
        "a text": lambda parent, ids: hashlib.sha256(parent + repr(ids).encode()).hexdigest(),
        "a number": lambda parent, ids: hash((parent, tuple(ids))),
        "at random": lambda parent, ids: secrets.token_bytes(16),
        "no hash at all": lambda parent, ids: parent + array("q", ids).tobytes(),
        "always the same": lambda parent, ids: bytes(16),
        "the identity": lambda parent, ids: sha(repr((parent, id(ids), object())).encode()),
    },
    "check_cache_salt": {
        "the name": lambda tenant, secret: tenant,
        "the secret": lambda tenant, secret: secret,
        "both, readable": lambda tenant, secret: f"{tenant}:{secret}:{'x' * 20}",
        "a hash of the name": lambda tenant, secret: hashlib.sha256(tenant.encode()).hexdigest(),
        "a hash of the secret": lambda tenant, secret: hashlib.sha256(secret.encode()).hexdigest(),
        "at random": lambda tenant, secret: secrets.token_hex(16),
        "at random, and kept": lambda tenant, secret: KEPT.setdefault((tenant, secret), secrets.token_hex(16)),
        "kept in a default": lambda tenant, secret, kept={}: kept.setdefault((tenant, secret), secrets.token_hex(16)),
        "kept in a closure": keeps_salts(),
        "short": lambda tenant, secret: hmac.new(secret.encode(), tenant.encode(), "sha256").hexdigest()[:4],
        "backwards": lambda tenant, secret: (tenant + secret)[::-1] + "0" * 20,
        "as hexadecimal digits": lambda tenant, secret: f"{tenant}:{secret}".encode().hex(),
        "the name and a hash of the secret": lambda tenant, secret: (
            f"{tenant}-{hashlib.sha256(secret.encode()).hexdigest()}"
        ),
        "two hashes": lambda tenant, secret: sha(tenant.encode()).hex() + sha(secret.encode()).hex(),
        "python's hash": lambda tenant, secret: f"{hash((tenant, secret)):064d}",
        "ascii only": lambda tenant, secret: sha(f"{secret}:{tenant}".encode("ascii", "ignore")).hex(),
        "the secret's first letters": lambda tenant, secret: sha(f"{secret[:3]}:{tenant}".encode()).hex(),
        "key as a text": lambda tenant, secret: hmac.new(secret, tenant.encode(), "sha256").hexdigest(),
        "short and filled up": lambda tenant, secret: (
            hmac.new(secret.encode(), tenant.encode(), "sha256").hexdigest()[:4] + "0" * 20
        ),
        "bytes": lambda tenant, secret: hmac.new(secret.encode(), tenant.encode(), "sha256").digest(),
        "small letters": lambda tenant, secret: hmac.new(secret.encode(), tenant.lower().encode(), "md5").hexdigest(),
        "the first letters": lambda tenant, secret: hmac.new(secret.encode(), tenant[:10].encode(), "md5").hexdigest(),
    },
    "check_prompt_order": {
        "as they came": lambda requests: list(requests[0]),
        "backwards": lambda requests: list(requests[0])[::-1],
        "by name": lambda requests: sorted(requests[0]),
        "the longest first": lambda requests: sorted(requests[0], key=lambda name: -len(requests[0][name])),
        "the shortest first": lambda requests: sorted(requests[0], key=lambda name: len(requests[0][name])),
        "what changes most first": lambda requests: sorted(
            requests[0], key=lambda name: -len({tuple(request[name]) for request in requests})
        ),
        "constant parts only": lambda requests: [
            name for name in requests[0] if len({tuple(request[name]) for request in requests}) == 1
        ],
        "constant parts first, the others as they came": lambda requests: sorted(
            requests[0], key=lambda name: len({tuple(request[name]) for request in requests}) > 1
        ),
        "the first two requests decide": lambda requests: sorted(
            requests[0], key=lambda name: requests[0][name] != requests[1][name]
        ),
        "constant parts first, then the longest": lambda requests: sorted(
            requests[0],
            key=lambda name: (len({tuple(request[name]) for request in requests}) > 1, -len(requests[0][name])),
        ),
        "first tokens": lambda requests: sorted(
            requests[0], key=lambda name: len({request[name][0] for request in requests})
        ),
        "changes from one to the next": lambda requests: sorted(
            requests[0], key=lambda name: sum(a[name] != b[name] for a, b in itertools.pairwise(requests))
        ),
        "different tokens": lambda requests: sorted(
            requests[0], key=lambda name: len({token for request in requests for token in request[name]})
        ),
        "takes the parts out": take_out,
        "token ids": lambda requests: list(requests[0].values()),
    },
    "check_fresh_words": {
        "nothing mended": Untouched,
        "forgets what could be found": TooEarly,
        "finds nothing": FindsNothing,
        "switched off": SwitchedOff,
        "forgets at release": ForgetsAtRelease,
        "an object for a class": PoolIsAnObject,
        "from scratch": KVCacheManager,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_block_hash": {
        "as ours": lambda parent, ids: hashlib.blake2b(parent + array("q", ids).tobytes(), digest_size=16).digest(),
        "hexadecimal digits": lambda parent, ids: sha(repr((parent, ids)).encode()).hex().encode(),
        "with commas": lambda parent, ids: sha(parent + ",".join(map(str, ids)).encode()),
    },
    "check_cache_salt": {
        "the name in front": lambda tenant, secret: (
            f"{tenant}-{hmac.new(secret.encode(), tenant.encode(), 'sha256').hexdigest()}"
        ),
        "with an option": lambda tenant, secret, *, name="sha256": hmac.new(
            secret.encode(), tenant.encode(), name
        ).hexdigest(),
        "sha256 of both": lambda tenant, secret: hashlib.sha256(f"{secret}/{tenant}".encode()).hexdigest(),
    },
    "check_prompt_order": {
        "by trying": lambda requests: min(
            itertools.permutations(requests[0]), key=lambda order: count_computed(requests, order)
        )
    },
    "check_fresh_words": {"a pool of its own": ByValue},
}

SAME: dict[str, dict[str, str]] = {
    "check_prompt_order": {
        f"return sorted(requests[0], key=num_values) → return sorted(requests[{i}], key=num_values)": (
            "all requests have the same names, in the same order"
        )
        for i in (1, -1)
    }
}
"""Changes of a solution that mean the same, and why."""
