"""Shared prefixes are found by hash exactly where comparing the tokens finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.kv.prefix import PrefixCacheAnalyzer, key_id, load_prefix_secret
from helpers.trace_samples import SECRET

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=8)


def naive_cached_blocks(prompt: list[int], earlier: list[list[int]], block_size: int) -> int:
    """Full leading blocks equal, token by token, to one earlier prompt's full blocks."""
    best = 0
    for other in earlier:
        n = 0
        while (n + 1) * block_size <= min(len(prompt), len(other)) and (
            prompt[: (n + 1) * block_size] == other[: (n + 1) * block_size]
        ):
            n += 1
        best = max(best, n)
    return best


@given(PROMPTS, st.integers(1, 5))
def test_equals_a_comparison_of_tokens(prompts: list[list[int]], block_size: int) -> None:
    analyzer = PrefixCacheAnalyzer(block_size, key_tokens=4, secret=SECRET)
    keys: dict[tuple[int, ...], str] = {}
    for i, prompt in enumerate(prompts):
        found = analyzer.add(prompt)
        assert found.num_cached_blocks == naive_cached_blocks(prompt, prompts[:i], block_size)
        assert found.hit == (found.num_cached_blocks > 0)
        assert keys.setdefault(tuple(prompt[:4]), found.key) == found.key
    assert len(set(keys.values())) == len(keys)


def test_the_key_does_not_limit_the_match() -> None:
    analyzer = PrefixCacheAnalyzer(4, key_tokens=2, secret=SECRET)
    first = analyzer.add([1] * 16)
    second = analyzer.add([1] * 12 + [2] * 4)
    third = analyzer.add([1, 1, 5, 5, 5])
    assert (second.num_cached_blocks, third.num_cached_blocks) == (3, 0)
    assert first.key == second.key == third.key


def test_nothing_but_keyed_hashes_is_kept() -> None:
    one, other = (PrefixCacheAnalyzer(2, secret=secret) for secret in (SECRET, SECRET[::-1]))
    assert one.add([7, 8, 9, 10]).key != other.add([7, 8, 9, 10]).key
    assert one._seen.isdisjoint(other._seen)
    assert all(isinstance(digest, bytes) and len(digest) == 16 for digest in one._seen)


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="16 to 64 bytes, not 3"):
        PrefixCacheAnalyzer(16, secret=b"abc")


def test_the_secret_file_is_private_and_lasting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSATRACE_PREFIX_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    secret = load_prefix_secret()
    path = tmp_path / "dsatrace" / "prefix_key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["prefix_key"]
    assert load_prefix_secret() == secret == path.read_bytes()
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        load_prefix_secret()


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSATRACE_PREFIX_KEY", "sixteen bytes or more")
    secret = load_prefix_secret(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert key_id(secret) == key_id(load_prefix_secret(tmp_path))
    assert len(key_id(secret)) == 8
    monkeypatch.setenv("DSATRACE_PREFIX_KEY", "short")
    with pytest.raises(UserError, match="DSATRACE_PREFIX_KEY is shorter"):
        load_prefix_secret(tmp_path)


def test_an_unwritable_home_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSATRACE_PREFIX_KEY", raising=False)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(UserError, match="set DSATRACE_PREFIX_KEY instead"):
        load_prefix_secret(in_the_way)
