"""The `SGLTOPK1` log of a fork of SGLang: the decode steps of all requests, forward by forward.

After the magic, a JSON header with its length before it; then per forward `<QII` (number, batch, payload
bytes), batch times `<QI` (hash of the request, tokens that it sees), and zlib over int32 (batch, layers,
k), each row sorted and written as differences. Requests are told apart by their hash and, since hashes
collide and names are used again, by their length: a request's rows grow by one token each.

    capture = open_log(Path("indexer_topk_rank0.bin"), Description(), taken=set())
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dsatrace.captures.description import Description, layers_text
from dsatrace.captures.rows import Advance, CapturedRequest, Chunk, check_row, opened, request_name
from dsatrace.errors import UserError
from dsatrace.text import plain

MAGIC = b"SGLTOPK1"
_STEP, _MEMBER = struct.Struct("<QII"), np.dtype([("hash", "<u8"), ("length", "<u4")])
_MOST_HEADER_BYTES = 16 << 20
_MOST_STEP_BYTES = 128 << 20
_TOGETHER_BYTES = 16 << 20
"""Of a forward's rows that are unpacked at a time."""


class _Forward(NamedTuple):
    """A forward that is whole in the file."""

    offset: int  # of the payload
    num_bytes: int
    members: list[int]  # index of each row's request


class LogCapture:
    """The requests of a log, interleaved as they were served."""

    def __init__(self, path: Path, taken: set[str]) -> None:
        self._path = path
        self.requests: list[CapturedRequest] = []
        self.notes: list[str] = []
        self._forwards: list[_Forward] = []
        with opened(path) as file:
            header = _header(file, path)
            self.shape = len(header["layer_ids"]), header["topk"]
            check_row(self.shape, str(path))
            is_position = header["ids_are_token_positions"]
            self.said: Mapping[str, Any] = {
                "layers": layers_text(header["layer_ids"]),
                "ids": "position" if is_position else "slot",
                "model": plain(header["model_path"], 200),
            }
            starts, rows = self._look_through(file)
        names = _names(path)
        for (number, first), count in zip(starts, rows, strict=True):
            name = request_name(names.get(number, f"{number:016x}"), taken)
            if first < 1:
                raise UserError(f"{path}: request {name}: a step that sees {first + 1} tokens; a damaged log")
            self.requests.append(CapturedRequest(name, f"{path}: {name}", first, count, first))
        self.num_bytes = sum(forward.num_bytes for forward in self._forwards)

    def chunks(self, starts: Mapping[int, int], advance: Advance) -> Iterator[Chunk]:
        at = [request.first for request in self.requests]
        row_bytes = 4 * math.prod(self.shape)
        size = max(_TOGETHER_BYTES // row_bytes, 1)
        with opened(self._path) as file:
            for number, forward in enumerate(self._forwards):
                file.seek(forward.offset)
                unpack, rest = zlib.decompressobj(), file.read(forward.num_bytes)
                for begin in range(0, len(forward.members), size):
                    members = forward.members[begin : begin + size]
                    rest, ids = self._unpacked(unpack, rest, len(members) * row_bytes, number)
                    for request, rows in zip(members, ids, strict=True):
                        if at[request] >= starts.get(request, 0):
                            yield Chunk(request, at[request], rows[None])
                        at[request] += 1
                advance(forward.num_bytes)

    def _unpacked(self, unpack: Any, rest: bytes, size: int, number: int) -> tuple[bytes, np.ndarray]:
        """The next `size` bytes, as (rows, layers, k) int32."""
        try:
            data = unpack.decompress(rest, size)
        except zlib.error as error:
            raise UserError(f"{self._path}: forward {number}: cannot unpack it: {error}") from error
        if len(data) < size:
            raise UserError(
                f"{self._path}: forward {number}: {len(data):,} of {size:,} bytes; a damaged log, copy it "
                "again"
            )
        steps = np.frombuffer(data, "<i4").reshape(-1, *self.shape)
        return unpack.unconsumed_tail, np.cumsum(steps, axis=-1, dtype=np.int32)

    def _look_through(self, file: IO[bytes]) -> tuple[list[tuple[int, int]], list[int]]:
        """Of each request its hash and first position, and its number of rows; payloads are not read."""
        begin = file.tell()
        end = file.seek(0, 2)
        file.seek(begin)
        starts, rows = list[tuple[int, int]](), list[int]()
        live: dict[int, dict[int, list[int]]] = defaultdict(dict)  # hash -> next length -> requests
        while (at := file.tell()) < end:
            head = file.read(_STEP.size)
            number, batch, num_bytes = _STEP.unpack(head) if len(head) == _STEP.size else (0, 0, 0)
            left = end - at - _STEP.size
            if len(head) < _STEP.size or batch * _MEMBER.itemsize + num_bytes > left:
                self.notes.append(
                    f"{self._path}: 1 forward left out, number {len(self._forwards)}: the log ends within it"
                )
                break
            if not batch or num_bytes > _MOST_STEP_BYTES:
                raise UserError(
                    f"{self._path}: byte {at}: forward {number} of {batch} requests and {num_bytes:,} bytes; "
                    "a damaged log, copy it again"
                )
            found = np.frombuffer(file.read(batch * _MEMBER.itemsize), _MEMBER)
            members = []
            moved: list[tuple[int, int, int]] = []
            for one, length in found.tolist():
                waiting = live[one].get(length)
                if waiting:
                    request = waiting.pop()
                    rows[request] += 1
                    if not waiting:
                        del live[one][length]
                else:
                    request = len(starts)
                    starts.append((one, length - 1))
                    rows.append(1)
                members.append(request)
                moved.append((one, length + 1, request))
            for one, length, request in moved:  # after the whole batch: a row is of one forward
                live[one].setdefault(length, []).append(request)
            self._forwards.append(_Forward(file.tell(), num_bytes, members))
            file.seek(num_bytes, 1)
        return starts, rows


def open_log(path: Path, described: Description, taken: set[str]) -> LogCapture:
    """Raises `UserError` for what the user says of its requests: the log says it."""
    given = {
        "--prompt-tokens": described.prompt_tokens,
        "--start": described.start,
        "--describe: requests": described.requests or None,
    }
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name}: a log tells where each of its requests begins; leave it out")
    return LogCapture(path, taken)


def _header(file: IO[bytes], path: Path) -> dict[str, Any]:
    if file.read(len(MAGIC)) != MAGIC:
        raise UserError(f"{path}: no SGLTOPK1 log; name another --format")
    size = int.from_bytes(file.read(4), "little")
    data = file.read(min(size, _MOST_HEADER_BYTES))
    try:
        header = json.loads(data)
        layers = header["layer_ids"]
        sound = (
            header["version"] == 1
            and type(header["topk"]) is int
            and header["topk"] > 0
            and layers
            and all(type(layer) is int and 0 <= layer < 1 << 20 for layer in layers)
            and layers == sorted(set(layers))
            and type(header["ids_are_token_positions"]) is bool
            and isinstance(header["model_path"], str)
        )
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: its header is damaged: {error}; copy it again") from error
    if not sound:
        raise UserError(f"{path}: its header is of no known version, or damaged; copy it again")
    return dict(header)


def _names(path: Path) -> dict[int, str]:
    """Hash -> name, from the log's own list beside it; {} where there is none."""
    beside = path.with_suffix(".rids.jsonl")
    names: dict[int, str] = {}
    if not beside.exists():
        return names
    with opened(beside) as file:
        for line in file:
            try:
                record = json.loads(line)
                names.setdefault(int(record["hash"]), str(record["rid"]))
            except (ValueError, LookupError, TypeError):
                continue  # a torn last line: the request keeps its hash
    return names
