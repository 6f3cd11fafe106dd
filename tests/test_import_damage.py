"""Whatever is damaged in a capture, it is taken as it is or refused with one line; never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace import cli
from helpers.captured import (
    choices,
    log_forward,
    log_header,
    npy_text,
    position_rows,
    response,
    write_responses,
)

NUM_DAMAGES = 40
SAMPLES = {
    "a.npy": ["npy", "--prompt-tokens", "5"],
    "a.npz": ["npy", "--prompt-tokens", "5"],
    "a.safetensors": ["npy", "--prompt-tokens", "5"],
    "sglang.jsonl": ["sglang", "--layers", "2", "--top-k", "8"],
    "vllm.jsonl": ["vllm"],
    "log.bin": ["sgltopk1"],
    "experts.jsonl": ["routed-experts", "--experts", "64"],
    "route.txt": ["route-trace", "--experts", "64", "--prompt-tokens", "2"],
    "capture.json": ["npy", "--describe", "capture.json"],
}


def write_samples(folder: Path) -> None:
    from safetensors.numpy import save

    ids = position_rows(np.random.default_rng(0), 20)
    np.save(folder / "a.npy", ids)
    np.savez_compressed(folder / "a.npz", one=ids, two=ids)
    (folder / "a.safetensors").write_bytes(save({"one": ids, "two": ids}))
    write_responses(folder / "sglang.jsonl", response(ids, 5, id="one"), response(ids, 6))
    answer = {"indexer_topk": npy_text(ids), "routed_experts": npy_text(ids.clip(0).astype(np.uint8))}
    for name in ("vllm.jsonl", "experts.jsonl"):
        write_responses(folder / name, choices(answer, prompt_tokens=5, completion_tokens=16))
    log = log_header([0, 2], 8)
    for t in range(4, 20):
        log += log_forward(t, [(7, t + 1)], ids[t : t + 1])
    (folder / "log.bin").write_bytes(log)
    lines = [f"{t} 0 {layer} 1:0.5 {t % 60 + 2}:0.25" for t in range(20) for layer in (3, 4)]
    (folder / "route.txt").write_text("\n".join(lines))
    described = {"layers": [0, 1], "prompt_tokens": 5, "requests": {"a": {"start": 0}}}
    (folder / "capture.json").write_text(json.dumps(described))


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """Cut, with bytes changed near the beginning or anywhere, or with a stretch twice or gone."""
    if rng.random() < 0.2:
        return data[: rng.integers(len(data))]
    changed = bytearray(data)
    most = min(200, len(data)) if rng.random() < 0.6 else len(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(most))
        way = rng.integers(4)
        if way == 0:
            changed[at : at + 1] = bytes([rng.integers(256)])
        elif way == 1:
            changed[at:at] = changed[at : at + rng.integers(1, 40)]
        elif way == 2:
            del changed[at : at + rng.integers(1, 40)]
        else:
            changed[at : at + 1] = rng.choice([b"0", b"9", b"-", b'"', b"{", b"\0", b"\xff", b"\n"])
    return bytes(changed)


@pytest.mark.parametrize("name", SAMPLES)
def test_damage_is_refused_in_one_line(
    tmp_path: Path, name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path)
    path = Path(name)
    whole = path.read_bytes()
    command = ["check", "a.npy" if name == "capture.json" else name, "--format", *SAMPLES[name]]
    assert cli.main(command) in (0, 1)
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(NUM_DAMAGES):
        data = damaged(rng, whole)
        path.write_bytes(data)
        capsys.readouterr()
        code = cli.main(command)
        err = capsys.readouterr().err
        assert code in (0, 1, 2), (data[:300], err)
        if code == 2:
            num_refused += 1
            assert err.startswith("error: ") and err.count("\n") == 1
            assert err[:-1].isprintable()
    assert num_refused > NUM_DAMAGES // 4
