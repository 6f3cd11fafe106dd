"""Captures as engines leave them, made by hand: positions, slots, offsets, rows that were never captured.

ids = position_rows(np.random.default_rng(0), num_rows=60, num_sets=2, top_k=8)      # (60, 2, 8) int32
slots = as_slots(ids, slot_of)
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def position_rows(
    rng: np.random.Generator, num_rows: int, num_sets: int = 2, top_k: int = 8, first: int = 0
) -> np.ndarray:
    """(R, S, K) int32 of queries `first` ..; -1 pads on the right; about half a set stays."""
    ids = np.full((num_rows, num_sets, top_k), -1, dtype=np.int32)
    for r in range(num_rows):
        visible = first + r + 1
        for s in range(num_sets):
            size = min(top_k, visible)
            kept = [i for i in ids[r - 1, s].tolist() if i >= 0][: size // 2] if r else []
            others = np.setdiff1d(np.arange(visible), kept)
            chosen = [*kept, *rng.choice(others, size - len(kept), replace=False).tolist()]
            ids[r, s, :size] = rng.permutation(chosen)
    return ids


def as_slots(ids: np.ndarray, slot_of: np.ndarray) -> np.ndarray:
    """Positions by another name each; -1 stays."""
    return np.where(ids >= 0, slot_of[ids], -1).astype(np.int32)


def random_slots(rng: np.random.Generator, num_positions: int, page: int = 1) -> np.ndarray:
    """(num_positions,) slots in pages of a pool, in no order."""
    pages = rng.permutation(4 * (-(-num_positions // page)))[: -(-num_positions // page)] + 1
    return (pages[:, None] * page + np.arange(page)).ravel()[:num_positions].astype(np.int32)


def response(ids: np.ndarray, prompt_tokens: int, first: int = 0, **meta: Any) -> dict[str, Any]:
    """SGLang's, with the capture in its meta_info."""
    completion = first + len(ids) - prompt_tokens + 1
    return {
        "text": 'so \\ "it" is',
        "output_ids": list(range(completion)),
        "meta_info": {
            "indexer_topk": base64.b64encode(np.ascontiguousarray(ids, dtype="<i4").tobytes()).decode(),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion,
            "finish_reason": {"type": "length", "length": completion},
            **meta,
        },
    }


def write_responses(path: Path, *responses: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in responses))
    return path


def choices(*answers: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """vLLM's response, OpenAI's form."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"id": "cmpl-1", "choices": list(answers), "usage": usage}


def npy_text(ids: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, ids)
    return base64.b64encode(file.getvalue()).decode()


def log_header(layer_ids: list[int], top_k: int, **changes: Any) -> bytes:
    """The beginning of an SGLTOPK1 log."""
    header = {
        "version": 1,
        "topk": top_k,
        "num_model_layers": layer_ids[-1] + 1,
        "layer_ids": layer_ids,
        "ids_are_token_positions": True,
        "model_path": "some/model",
        "rank": 0,
        **changes,
    }
    data = json.dumps(header).encode()
    return b"SGLTOPK1" + struct.pack("<I", len(data)) + data


def log_forward(number: int, members: list[tuple[int, int]], ids: np.ndarray) -> bytes:
    """One forward of it: `members` are (hash, tokens seen), `ids` (B, L, K)."""
    steps = np.diff(np.sort(ids, axis=-1), axis=-1, prepend=np.int32(0))
    payload = zlib.compress(np.ascontiguousarray(steps, dtype="<i4").tobytes(), 1)
    head = struct.pack("<QII", number, len(members), len(payload))
    return head + b"".join(struct.pack("<QI", *one) for one in members) + payload
