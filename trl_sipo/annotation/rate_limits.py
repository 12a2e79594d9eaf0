# SPDX-License-Identifier: Apache-2.0
"""How often someone may do something: a bucket of tokens for each of them."""

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """Buckets of tokens: `burst` of them at once, and `per_second` new ones from then on.

    Safe to call from many threads. Never are more than `max_keys` buckets kept, so that a flood of new addresses
    cannot fill the memory.

    Args:
        burst: Tokens of a full bucket.
        per_second: Tokens that come back each second.
        max_keys: Buckets to remember; beyond it the one that was least lately used is forgotten.
        clock: Seconds that only grow.
    """

    def __init__(
        self, burst: int, per_second: float, *, max_keys: int = 10_000, clock: Callable[[], float] = time.monotonic
    ):
        self.burst, self.per_second, self.max_keys = burst, per_second, max_keys
        self._clock, self._lock = clock, threading.Lock()
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def take(self, key: Hashable) -> float:
        """Take a token; 0 if there was one, else the seconds until there will be, and nothing is taken."""
        with self._lock:
            bucket = self._filled(key)
            if bucket.tokens < 1:
                return (1 - bucket.tokens) / self.per_second
            bucket.tokens -= 1
            return 0.0

    def give_back(self, key: Hashable) -> None:
        """Put back a token that turned out not to be owed."""
        with self._lock:
            bucket = self._filled(key)
            bucket.tokens = min(self.burst, bucket.tokens + 1)

    def _filled(self, key: Hashable) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(key, _Bucket(self.burst, now))
        bucket.tokens = min(self.burst, bucket.tokens + (now - bucket.filled_at) * self.per_second)
        bucket.filled_at = now
        self._buckets.move_to_end(key)
        if len(self._buckets) > self.max_keys:
            self._buckets.popitem(last=False)
        return bucket


def address_key(address: str) -> str:
    """Who is limited for an address: itself, or its network of 64 bits where one person has as many as they like."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False).network_address)
