"""The built-in byte vocabulary, without a file."""

from __future__ import annotations

import json

from dsatrace.workloads.tokenizer import Tokenizer, byte_tokenizer_json


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    return Tokenizer(json.dumps(byte_tokenizer_json()).encode(), "the built-in byte vocabulary")
