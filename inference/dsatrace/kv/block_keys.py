"""Names for full blocks such that equal names mean equal prefixes: chained, keyed hashes.

A block's key takes in the key before it, so one comparison compares the whole prefix. The
hash is keyed by a secret: keys tell nothing to who lacks it, and no token id is kept. What
else makes caches differ (a salt that separates tenants, an adapter's name) goes into the
root of the chain. Knows no cache and no block id. Exact ids without a hash, for whole
traces at once, are in `block_trace`.

    keys = KeyChain(block_size=16, secret=load_prefix_secret(), extra=("tenant-7",))
    keys.extend(prompt_ids)         # keys.keys has one key for each full block
    keys.extend([next_token])       # and gets one more whenever a block is full
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, hashlib.blake2b.MAX_KEY_SIZE
TOKEN_DTYPE = np.dtype("<i8")
_DIGEST_BYTES = 16


class BlockHasher:
    """The keyed hash of one block behind its prefix: 16 bytes."""

    def __init__(self, block_size: int, secret: bytes) -> None:
        if block_size < 1:
            raise ValueError(f"block_size {block_size} must be at least 1")
        if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
            raise ValueError(
                f"a prefix secret has {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, not {len(secret)}"
            )
        self.block_bytes = block_size * TOKEN_DTYPE.itemsize
        self._block = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=secret, person=b"prefix-block")
        self._root = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=secret, person=b"prefix-root")

    def root(self, extra: Sequence[str]) -> bytes:
        """What the first block follows: nothing, or the hash of the extra keys."""
        if not extra:
            return b""
        hasher = self._root.copy()
        for text in extra:
            data = text.encode()
            hasher.update(len(data).to_bytes(8, "little") + data)
        return hasher.digest()

    def chain(self, parent: bytes, tokens: bytes) -> list[bytes]:
        """The keys of the full blocks of `tokens` (`TOKEN_DTYPE`), the first of which follows `parent`."""
        keys = []
        for end in range(self.block_bytes, len(tokens) + 1, self.block_bytes):
            hasher = self._block.copy()  # the secret is taken in already
            hasher.update(parent)
            hasher.update(tokens[end - self.block_bytes : end])
            parent = hasher.digest()
            keys.append(parent)
        return keys


class KeyChain:
    """The keys of one request's full blocks, which grow with its tokens."""

    def __init__(self, block_size: int, secret: bytes, extra: Sequence[str] = ()) -> None:
        self._hasher = BlockHasher(block_size, secret)
        self._root = self._hasher.root(extra)
        self._partial = b""
        self.keys: list[bytes] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes in tokens, in order; keeps those of a block that is not yet full."""
        tokens = self._partial + np.asarray(token_ids, dtype=TOKEN_DTYPE).tobytes()
        new = self._hasher.chain(self.keys[-1] if self.keys else self._root, tokens)
        self.keys += new
        self._partial = tokens[len(new) * self._hasher.block_bytes :]
