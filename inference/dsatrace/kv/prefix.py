"""Finds prompts that begin like an earlier one, without keeping a single token id.

A prompt's full blocks are hashed in a chain, each hash keyed by a secret and taking in
the one before, so equal hashes mean equal prefixes and the hashes tell nothing to who
lacks the secret. Knows no cache: what is "shared" here could be reused, not was.

    analyzer = PrefixCacheAnalyzer(block_size=16, secret=load_prefix_secret())
    analyzer.add([5] * 40)       # RequestPrefix(num_cached_blocks=0, key="...")
    analyzer.add([5] * 48)       # RequestPrefix(num_cached_blocks=2, key="..." )
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
from dsatrace.kv.block_keys import MIN_SECRET_BYTES, TOKEN_DTYPE, BlockHasher

SECRET_VARIABLE = "DSATRACE_PREFIX_KEY"
_SECRET_BYTES = 32
_KEY_DIGEST_BYTES = 8


@dataclasses.dataclass(frozen=True)
class RequestPrefix:
    """How much of a request's prompt equals an earlier request's.

    `num_cached_blocks` counts the full leading blocks, `key` is the keyed hash of the
    prompt's first tokens, in hex.
    """

    num_cached_blocks: int
    key: str

    @property
    def hit(self) -> bool:
        return self.num_cached_blocks > 0


class PrefixCacheAnalyzer:
    """Compares each prompt with all earlier ones of the run, block by block.

    `key_tokens` limits only what the key hashes, never the match.
    """

    def __init__(self, block_size: int, key_tokens: int = 256, *, secret: bytes) -> None:
        if key_tokens < 1:
            raise ValueError(f"key_tokens {key_tokens} must be at least 1")
        self._hasher = BlockHasher(block_size, secret)
        self._key_tokens = key_tokens
        self._secret = secret
        self._seen: set[bytes] = set()

    def add(self, token_ids: Sequence[int]) -> RequestPrefix:
        """The prompt's shared prefix with earlier prompts; later prompts are compared with it too."""
        keys = self._hasher.chain(b"", np.asarray(token_ids, dtype=TOKEN_DTYPE).tobytes())
        num_cached = next((i for i, key in enumerate(keys) if key not in self._seen), len(keys))
        self._seen.update(keys[num_cached:])
        return RequestPrefix(num_cached, self.key(token_ids))

    def key(self, token_ids: Sequence[int]) -> str:
        """The keyed hash of the prompt's first tokens, without a comparison."""
        head = np.asarray(token_ids[: self._key_tokens], dtype=TOKEN_DTYPE).tobytes()
        return hashlib.blake2b(
            head, digest_size=_KEY_DIGEST_BYTES, key=self._secret, person=b"prefix-key"
        ).hexdigest()


def load_prefix_secret(config_folder: Path | None = None) -> bytes:
    """The secret of the keyed hashes: from the environment, else a private file made on first use.

    Runs with the same secret have comparable keys. The file lies in the user's
    configuration folder and is readable by its owner only.
    """
    text = os.environ.get(SECRET_VARIABLE)
    if text is not None:
        if len(text.encode()) < MIN_SECRET_BYTES:
            raise UserError(
                f"{SECRET_VARIABLE} is shorter than {MIN_SECRET_BYTES} bytes; use a longer secret or unset it"
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
