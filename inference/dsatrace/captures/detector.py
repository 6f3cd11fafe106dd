"""What the ids of a capture are: positions, an engine's slots, offsets, or nothing at all.

An engine may hand out physical cache slots where one expects token positions, and both are small whole
numbers. A row of query t can be told by what it must be like:

| unit | it may choose from | a row holds | while there are no more than top-k |
|---|---|---|---|
| token | positions 0 .. t | exactly min(k, t + 1) of them, none twice | all of 0 .. t |
| entry of m tokens | 0 .. (t + 1) // m - 1: whole entries only | 1 to min(k, as many) | where so many: all |
| block of b tokens | 0 .. t // b | 1 to min(k, as many) | where so many: all |
| expert | 0 .. experts - 1, whatever t is | exactly k, none twice | - |

A row of zeros was never captured: engines clear their buffers. Rows past top-k can hold slots that pass
for positions, so `position` is concluded only from rows that choose from no more than top-k ids;
without any such row the kind is `undetermined`. Rows of the prompt and rows of decode steps are judged
apart, for engines fill them in different kernels. Knows no file and no format.

    detector = Detector(kind)                      # `SelectionKind` as if the ids were positions
    detector.add("r0", 0, 600, ids)                # (R, S, K) of queries 0 .. R - 1; a prompt of 600 tokens
    found = detector.found()
    found.decode.what, found.prompt.what           # "slot", "ragged"
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.trace.kind import SelectionKind

What = Literal["position", "ragged", "slot", "undetermined", "not captured", "mixed", "no rows"]

_SORTED_BYTES = 16 << 20
"""Of ids that are sorted at a time."""
_MEASURED_BYTES = 8 * 8
"""Of a row and set, in `_measure`."""
_COUNT, _LOW, _HIGH, _TWICE, _SHARED, _NEW, _FUTURE, _SAME = range(8)
"""Columns of `_measure`."""
MIN_EQUAL_ROWS = 8
"""Rows past top-k in which a layer must repeat the one before it to be called shared."""


class Broken(NamedTuple):
    """The first row that cannot be what it should."""

    request: str
    position: int  # of the query
    set_index: int
    why: str


@dataclasses.dataclass
class PhaseFound:
    """What was seen of the prompt's rows, or of the decode steps'; counts are of rows, all sets together."""

    rows: int = 0
    not_captured: int = 0
    proven: int = 0  # they choose from 2 .. top-k ids, and hold exactly the positions
    broken: int = 0  # they are no positions
    miscounted: int = 0  # of those: too many ids, too few, or one twice; no slots either
    future: int = 0  # they hold every position, and future ones behind them, which are cut
    ragged: int = 0  # broken, but the distance of row 0's id makes positions of them
    first_broken: Broken | None = None
    first_not_captured: tuple[str, int] | None = None

    @property
    def what(self) -> What:
        if not self.rows:
            return "no rows"
        if self.not_captured == self.rows:
            return "not captured"
        if not self.broken:
            return "position" if self.proven else "undetermined"
        if self.broken == self.ragged:
            return "ragged"
        return "mixed" if self.proven or self.miscounted else "slot"


@dataclasses.dataclass
class Overlaps:
    """Ids that a row past top-k shares with the row before it, summed; per set."""

    pairs: np.ndarray  # (S,) int64
    shared: np.ndarray  # (S,) int64
    selected: np.ndarray  # (S,) int64
    by_chance: np.ndarray  # (S,) float64

    @property
    def share(self) -> float | None:
        total = int(self.selected.sum())
        return int(self.shared.sum()) / total if total else None

    @property
    def chance(self) -> float | None:
        total = int(self.selected.sum())
        return float(self.by_chance.sum()) / total if total else None


@dataclasses.dataclass
class Found:
    """All that the detector saw."""

    prompt: PhaseFound
    decode: PhaseFound
    longest: int  # most ids that a row could choose from
    sparse_records: int  # sets of rows past top-k
    active_positions: int  # of those, the ones that are no recency window, where ids are positions
    active_slots: int  # with more than one id that the row before lacks: no window moves so, under any names
    overlaps: Overlaps
    shared_with_before: list[int]  # sets that were, in every row past top-k, equal to the set before them
    bases: dict[str, int]  # of requests whose prompt's rows count from another position than 0

    @property
    def rows(self) -> int:
        return self.prompt.rows + self.decode.rows

    def num_active(self, are_positions: bool) -> int:
        """Sets past top-k that no recency window explains."""
        return self.active_positions if are_positions else self.active_slots

    def inactive(self, are_positions: bool, most: int) -> str | None:
        """Why no set shows that sparse attention was active; None if one does. `most`: ids of a set."""
        if self.num_active(are_positions):
            return None
        if not self.sparse_records:
            why = f"no row chooses from more than {most} ids, the longest from {self.longest}"
        elif are_positions:
            why = f"each of {self.sparse_records:,} sets past top-k is the newest ids and no others"
        else:
            has = "a row before it to compare it with"
            if self.overlaps.pairs.any():
                has = "more than one id that the row before it lacks"
            return (
                f"nothing shows that sparse attention was active: none of {self.sparse_records:,} sets past "
                f"top-k has {has}"
            )
        return f"sparse attention was never active: {why}"


class Detector:
    """Fed with every row of a capture, request by request or side by side."""

    def __init__(self, kind: SelectionKind, is_exact: bool | None = None) -> None:
        """`is_exact`: a row must hold as many ids as it can; None: as the unit has it."""
        self._kind = kind
        num_sets = len(kind.set_layers)
        self._is_exact = kind.unit in ("token", "expert") if is_exact is None else is_exact
        self._prompt, self._decode = PhaseFound(), PhaseFound()
        self._last: dict[str, tuple[int, np.ndarray]] = {}  # of each live request: its last row, sorted,
        # if it was captured
        self._bases: dict[str, int] = {}
        self._pairs, self._shared, self._selected = np.zeros((3, num_sets), dtype=np.int64)
        self._chance = np.zeros(num_sets)
        self._longest = self._sparse = self._active_positions = self._active_slots = 0
        self._sparse_rows = 0
        self._equal = np.zeros(num_sets, dtype=np.int64)

    def add(self, request: str, first: int, prompt_tokens: int, ids: np.ndarray) -> None:
        """Takes rows (R, S, K) int32 of the queries `first`, `first` + 1, ... of a request."""
        row_bytes = ids.shape[1] * max(4 * ids.shape[2], _MEASURED_BYTES)
        size = max(_SORTED_BYTES // row_bytes, 1)
        for at in range(0, len(ids), size):
            self._add(request, first + at, prompt_tokens, ids[at : at + size])

    def end(self, request: str) -> None:
        """No further row of this request comes."""
        self._last.pop(request, None)

    def found(self) -> Found:
        shared = np.flatnonzero((self._equal == self._sparse_rows) & (self._sparse_rows >= MIN_EQUAL_ROWS))
        return Found(
            prompt=self._prompt,
            decode=self._decode,
            longest=self._longest,
            sparse_records=self._sparse,
            active_positions=self._active_positions,
            active_slots=self._active_slots,
            overlaps=Overlaps(self._pairs, self._shared, self._selected, self._chance),
            shared_with_before=shared.tolist(),
            bases={request: base for request, base in self._bases.items() if base},
        )

    def _add(self, request: str, first: int, prompt_tokens: int, ids: np.ndarray) -> None:
        kind, (num_rows, num_sets, width) = self._kind, ids.shape
        position = first + np.arange(num_rows, dtype=np.int64)  # (R,)
        visible = kind.visible(position + 1)  # (R,)
        ordered = np.sort(ids, axis=2)  # -1 first
        before = np.full((1, num_sets, width), -1, dtype=ids.dtype)
        if request in self._last and self._last[request][0] == first - 1:
            before = self._last[request][1]
        measured = _measure(ordered, before, visible)  # (R, S, 8) int64
        count, low, high = measured[..., _COUNT], measured[..., _LOW], measured[..., _HIGH]
        is_zero = (high == 0) & (count == width) & (kind.top_k > 1)
        is_captured = ~is_zero.any(axis=1)  # (R,)
        # Rows of the prompt and of steps may name ids in two ways, and zeros are nobody's.
        follows = np.concatenate([[True], is_captured[:-1]]) & (position != prompt_tokens)
        measured[~follows, :, _SHARED] = -1
        self._last.pop(request, None)
        if is_captured[-1]:
            self._last[request] = first + num_rows - 1, ordered[-1:].copy()
        many, is_twice = np.minimum(visible[:, None], kind.top_k), measured[..., _TWICE] > 0
        is_counted = (count == many) if self._is_exact else (count > 0) & (count <= many)
        is_counted &= ~is_twice
        is_small = visible[:, None] <= kind.top_k
        # Rows that are not padded: all positions there are, and then future ones.
        is_future = is_small & ~is_twice & (count > many) & (measured[..., _FUTURE] == many)
        fits = (is_counted & (high < visible[:, None])) | is_future
        if kind.unit != "expert" and not self._is_exact:
            fits |= (visible == 0)[:, None] & (count == 0)
        in_prompt = position < prompt_tokens
        base = self._base(request, first, low)
        is_ragged = np.zeros(num_rows, dtype=bool)
        if base and kind.unit == "token":
            is_ragged = (is_counted & (low >= base) & (high - base < visible[:, None])).all(axis=1)
        proves = (is_small & (many >= 2) & (count >= many)).all(axis=1) & fits.all(axis=1)
        for phase, rows in ((self._prompt, in_prompt), (self._decode, ~in_prompt)):
            if not rows.any():
                continue
            phase.rows += int(rows.sum())
            missing = rows & ~is_captured
            phase.not_captured += int(missing.sum())
            if missing.any() and phase.first_not_captured is None:
                phase.first_not_captured = request, int(position[missing.argmax()])
            chosen = rows & is_captured
            broken = chosen & ~fits.all(axis=1)
            phase.proven += int((chosen & proves).sum()) if kind.unit != "expert" else 0
            phase.future += int((chosen & is_future.any(axis=1)).sum())
            phase.broken += int(broken.sum())
            phase.ragged += int((broken & is_ragged).sum()) if phase is self._prompt else 0
            phase.miscounted += int((broken & ~is_counted.all(axis=1)).sum())
            if broken.any() and phase.first_broken is None:
                row = int(broken.argmax())
                s = int((~fits[row]).argmax())
                why = _why(measured[row, s], int(many[row, s]), int(visible[row]), bool(is_counted[row, s]))
                phase.first_broken = Broken(request, int(position[row]), s, why)
        self._add_sparse(measured, visible, is_captured)

    def _base(self, request: str, first: int, low: np.ndarray) -> int:
        """The id of the request's first token, where its row 0 was captured."""
        if first == 0:
            same = (low[0] == low[0, 0]).all()
            self._bases[request] = int(low[0, 0]) if same and low[0, 0] > 0 else 0
        return self._bases.get(request, 0)

    def _add_sparse(self, measured: np.ndarray, visible: np.ndarray, is_captured: np.ndarray) -> None:
        kind = self._kind
        self._longest = max(self._longest, int(visible.max(initial=0)))
        is_sparse = (visible[:, None] > kind.top_k) & is_captured[:, None]  # (R, S)
        if not is_sparse.any():
            return
        count, low, high = measured[..., _COUNT], measured[..., _LOW], measured[..., _HIGH]
        is_window = (high - low + 1 == count) & (high >= visible[:, None] - 1)
        shared = measured[..., _SHARED]
        is_pair = is_sparse & (shared >= 0)
        self._sparse += int(is_sparse.sum())
        self._active_positions += int((is_sparse & ~is_window).sum())
        self._active_slots += int((is_pair & (measured[..., _NEW] > 1)).sum())
        self._pairs += is_pair.sum(axis=0)
        self._shared += np.where(is_pair, shared, 0).sum(axis=0)
        self._selected += np.where(is_pair, count, 0).sum(axis=0)
        chance = np.where(is_pair, count * np.minimum(kind.top_k / visible[:, None], 1.0), 0.0)
        self._chance += chance.sum(axis=0)
        whole = is_sparse.all(axis=1)
        self._sparse_rows += int(whole.sum())
        self._equal += measured[whole, :, _SAME].sum(axis=0)


def _why(measured: np.ndarray, many: int, visible: int, is_counted: bool) -> str:
    count, high = int(measured[_COUNT]), int(measured[_HIGH])
    if measured[_TWICE]:
        return "it holds an id twice"
    if not is_counted:
        return f"it holds {count} ids, and should hold {many}"
    if high >= visible:
        return f"id {high} lies beyond the {visible} that its query can see"
    return "it does not hold all that its query can see"


@cached_njit(nogil=True)
def _measure(ordered, before, visible):  # type: ignore[no-untyped-def]
    """Per row and set: valid ids, the lowest, the highest, repeats; ids shared with the row before and new
    against it (-1: there is none); ids 0, 1, 2, ... in unbroken order that the query can see; whether the
    set before it is equal."""
    rows, sets, width = ordered.shape
    out = np.zeros((rows, sets, 8), np.int64)
    for r in range(rows):
        for s in range(sets):
            row = ordered[r, s]
            last = ordered[r - 1, s] if r else before[0, s]
            i, j = 0, 0
            while i < width and row[i] < 0:
                i += 1
            while j < width and last[j] < 0:
                j += 1
            start, had_last = i, j < width
            repeats, shared, run = 0, 0, 0
            while i < width:
                value = row[i]
                if i > start and row[i - 1] == value:
                    repeats += 1
                if value == run and run < visible[r]:
                    run += 1
                while j < width and last[j] < value:
                    j += 1
                if j < width and last[j] == value:
                    shared += 1
                i += 1
            count = width - start
            out[r, s, 0] = count
            out[r, s, 1] = row[start] if count else -1
            out[r, s, 2] = row[width - 1] if count else -1
            out[r, s, 3] = repeats
            out[r, s, 4] = shared if had_last else -1
            out[r, s, 5] = count - shared if had_last else -1
            out[r, s, 6] = run
            out[r, s, 7] = s > 0 and (row == ordered[r, s - 1]).all()
    return out
