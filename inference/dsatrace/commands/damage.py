"""What to say when reading a run fails in a way that its reader did not foresee: is the run damaged?

with damage_named(folder):
    report(RunReader(folder))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dsatrace.errors import UserError


@contextlib.contextmanager
def damage_named(*folders: Path) -> Iterator[None]:
    """Raises `UserError` naming the first bad field if the block fails on a run that `verify` refuses.

    Verifying takes longer than reading, so it is done only then. If the runs are sound the fault is ours,
    and the error leaves as it came.
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        from dsatrace.verify.mismatch import Mismatch
        from dsatrace.verify.run import verify

        for folder in (one for one in folders if isinstance(one, Path)):  # and none at a URL
            try:
                verify(folder)
            except Mismatch as mismatch:
                said = f"{folder}: damaged: {mismatch}; restore the run, or make it again"
                raise UserError(said) from error
        raise
