"""Names for full blocks such that equal names mean equal prefixes, and which prompts share one.

A prompt's full blocks are hashed in a chain: each hash takes in the one before, so one comparison
compares the whole prefix. The hashes are keyed by a secret: without it they reveal nothing, and no
token id is kept. Whatever else must keep caches apart (a tenant's salt, an adapter's name) goes into
the root of the chain. Knows no cache and no block id. Exact ids for whole traces, without a hash,
are in `simulation.block_trace`.

    keys = KeyChain(block_size=16, secret=load_prefix_secret(), extra=("tenant-7",))
    keys.extend(prompt_ids)         # keys.keys has one key per full block
    keys.extend([next_token])       # and one more whenever a block is full

    analyzer = PrefixCacheAnalyzer(block_size=16, secret=load_prefix_secret())
    analyzer.add([5] * 40)          # RequestPrefix(num_cached_blocks=0, key="...")
    analyzer.add([5] * 48)          # RequestPrefix(num_cached_blocks=2, key="...")
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsatrace.errors import UserError

SECRET_VARIABLE = "DSATRACE_PREFIX_KEY"
_TOKEN_DTYPE = np.dtype("<i8")
_MIN_SECRET_BYTES, _MAX_SECRET_BYTES = 16, hashlib.blake2b.MAX_KEY_SIZE
_SECRET_BYTES = 32
_BLOCK_DIGEST_BYTES = 16
_KEY_DIGEST_BYTES = 8


class KeyChain:
    """The keys of one request's full blocks, which grow with its tokens: 16 bytes each."""

    def __init__(self, block_size: int, secret: bytes, extra: Sequence[str] = ()) -> None:
        if block_size < 1:
            raise ValueError(f"block_size {block_size} must be at least 1")
        if not _MIN_SECRET_BYTES <= len(secret) <= _MAX_SECRET_BYTES:
            raise ValueError(
                f"a prefix secret has {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} bytes, not {len(secret)}"
            )
        self.keys: list[bytes] = []
        self._block_bytes = block_size * _TOKEN_DTYPE.itemsize
        self._block = hashlib.blake2b(digest_size=_BLOCK_DIGEST_BYTES, key=secret, person=b"prefix-block")
        self._parent = _root(secret, extra) if extra else b""
        self._partial = b""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes in tokens, in order; those of a block that is not yet full are kept for the next call."""
        tokens = self._partial + np.asarray(token_ids, dtype=_TOKEN_DTYPE).tobytes()
        size = self._block_bytes
        num_whole = len(tokens) // size * size
        for begin in range(0, num_whole, size):
            hasher = self._block.copy()  # the secret is taken in already
            hasher.update(self._parent)
            hasher.update(tokens[begin : begin + size])
            self._parent = hasher.digest()
            self.keys.append(self._parent)
        self._partial = tokens[num_whole:]


def _root(secret: bytes, extra: Sequence[str]) -> bytes:
    """The hash of the extra names, which the first block then follows."""
    hasher = hashlib.blake2b(digest_size=_BLOCK_DIGEST_BYTES, key=secret, person=b"prefix-root")
    for text in extra:
        data = text.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.digest()


@dataclasses.dataclass(frozen=True)
class RequestPrefix:
    """How much of a request's prompt equals an earlier request's."""

    num_cached_blocks: int  # full leading blocks
    key: str  # keyed hash of the prompt's first tokens, in hex

    @property
    def hit(self) -> bool:
        return self.num_cached_blocks > 0


class PrefixCacheAnalyzer:
    """Compares each prompt with all earlier ones of the run, block by block.

    Knows no cache: what is "shared" here could be reused, not was. `key_tokens` limits what the
    key hashes, never the match.
    """

    def __init__(self, block_size: int, key_tokens: int = 256, *, secret: bytes) -> None:
        if key_tokens < 1:
            raise ValueError(f"key_tokens {key_tokens} must be at least 1")
        KeyChain(block_size, secret)  # refuses a bad block size or secret now, not at the first prompt
        self._block_size = block_size
        self._key_tokens = key_tokens
        self._secret = secret
        self._seen: set[bytes] = set()

    def add(self, token_ids: Sequence[int]) -> RequestPrefix:
        """The prompt's shared prefix with earlier prompts; later prompts are compared with it too."""
        chain = KeyChain(self._block_size, self._secret)
        chain.extend(token_ids)
        keys = chain.keys
        num_cached = next((i for i, key in enumerate(keys) if key not in self._seen), len(keys))
        self._seen.update(keys[num_cached:])
        return RequestPrefix(num_cached, self.key(token_ids))

    def key(self, token_ids: Sequence[int]) -> str:
        """The keyed hash of the prompt's first tokens, without a comparison."""
        head = np.asarray(token_ids[: self._key_tokens], dtype=_TOKEN_DTYPE).tobytes()
        return hashlib.blake2b(
            head, digest_size=_KEY_DIGEST_BYTES, key=self._secret, person=b"prefix-key"
        ).hexdigest()


def load_prefix_secret(config_folder: Path | None = None) -> bytes:
    """The secret of the keyed hashes: from the environment, else a private file made on first use.

    Runs with the same secret have comparable keys. The file lies in the user's configuration
    folder; only its owner can read it.
    """
    text = os.environ.get(SECRET_VARIABLE)
    if text is not None:
        if len(text.encode()) < _MIN_SECRET_BYTES:
            raise UserError(
                f"{SECRET_VARIABLE} is shorter than {_MIN_SECRET_BYTES} bytes; "
                "use a longer secret or unset it"
            )
        return hashlib.blake2b(text.encode(), digest_size=_SECRET_BYTES).digest()
    path = (config_folder or _user_config_folder()) / "prefix_key"
    try:
        if not path.exists():
            _create_private(path, secrets.token_bytes(_SECRET_BYTES))
        return _read_private(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot keep the prefix secret: {error.strerror}; set {SECRET_VARIABLE} instead"
        ) from error


def key_id(secret: bytes) -> str:
    """A short name for the secret, for the manifest; tells nothing about it."""
    return hashlib.blake2b(b"key-id", digest_size=4, key=secret, person=b"prefix-key-id").hexdigest()


def _user_config_folder() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "dsatrace"


def _create_private(path: Path, secret: bytes) -> None:
    """Writes the file whole under its name, or leaves another process's: both then read the same secret."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
        os.link(temporary, path)
    except FileExistsError:
        pass  # another process was first; its secret is as good
    finally:
        temporary.unlink()


def _read_private(path: Path) -> bytes:
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path}: others can read the prefix secret; run `chmod 600 {path}`")
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise UserError(
            f"{path}: a prefix secret has {_SECRET_BYTES} bytes, not {len(secret)}; remove the file"
        )
    return secret
