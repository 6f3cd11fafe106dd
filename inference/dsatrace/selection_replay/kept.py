"""Results of parts that are done, in a folder: what lets a killed replay go on.

Several processes may use one folder: a result appears whole. One that is no longer as it was written is
not taken, so that its part is replayed anew.

    kept = KeptResults(Path("outputs/mine_replay/parts"))
    kept.put(key, result); kept.get(key)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
import zlib
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.files import write_atomically
from dsatrace.selection_replay.result import Result


@dataclasses.dataclass(frozen=True)
class KeptResults:
    """By a key that tells two parts, and two ways to replay them, apart."""

    folder: Path

    def get(self, key: str) -> Result | None:
        """None where there is none, or a damaged one."""
        path = self._path(key)
        try:
            digest, _, text = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot read it: {error.strerror}") from error
        if digest != _digest(text):
            return None
        return Result.from_json(json.loads(zlib.decompress(text)), str(path))

    def put(self, key: str, result: Result) -> None:
        text = zlib.compress(json.dumps(result.to_json(), separators=(",", ":")).encode(), level=1)
        own = self._path(f"{key}.{uuid.uuid4().hex}")  # another process may keep the same part
        write_atomically(own, _digest(text) + b"\n" + text)
        own.replace(self._path(key))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.part"


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
