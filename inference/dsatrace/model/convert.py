"""Hugging Face safetensors to `model{r}-mp{N}.safetensors`, a few rows of one tensor in memory at a time.

`plan` lays out every output file before a byte of data moves; then each source tensor is
streamed once, in file order, and each block of rows goes to its ranks. Types are copied bit
for bit, and so are the tokenizer's files (`COPIED`).

    convert_checkpoint("DeepSeek-V3.2", "converted", n_experts=256, model_parallel=8)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from .plan import Piece, has_leftover_quantisation, plan, read_model, read_source
from .shards import CheckpointError, Layout, ShardWriter, StoredTensor, num_bytes

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all)."""

COPIED = ("*token*", "config.json", "generation_config.json", "chat_template.jinja")
"""What a run needs beside the weights."""

_BLOCK_BYTES = 4 << 20


def convert_checkpoint(
    hf_path: str | Path,
    save_path: str | Path,
    n_experts: int | None,
    model_parallel: int,
    progress: Progress | None = None,
    *,
    ignore_keys: Sequence[str] = (),
) -> list[Path]:
    """Converts a whole checkpoint; returns the files written, one per rank.

    `n_experts` is the expected number of routed experts; None: the config's. `ignore_keys` are read
    as if `config.json` did not hold them. Nothing appears under `save_path`, nor is an earlier conversion
    replaced, before all of it is on disk. Every mistake raises `CheckpointError`.
    """
    hf_path, save_path = Path(hf_path), Path(save_path)
    source = read_source(hf_path)
    args = read_model(hf_path, ignore_keys)
    if n_experts not in (None, args.n_routed_experts):
        raise CheckpointError(
            f"{hf_path}: holds {args.n_routed_experts} routed experts per layer, not the {n_experts} asked "
            "for; leave --n-experts out"
        )
    pieces = plan(hf_path, source, args, model_parallel)
    layouts: dict[str, Layout] = {shard_name(rank, model_parallel): {} for rank in range(model_parallel)}
    for name, parts in pieces.items():
        for piece in parts:
            layouts[shard_name(piece.rank, model_parallel)][piece.name] = (source[name].dtype, piece.shape)
    try:
        with _published(save_path) as folder:
            _check_space(save_path, folder, layouts)
            with ExitStack() as stack:
                writers = [stack.enter_context(ShardWriter(folder / file, layouts[file])) for file in layouts]
                _stream(source, pieces, writers, progress)
            for file in sorted({file for pattern in COPIED for file in hf_path.glob(pattern)}):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
                    _sync(folder / file.name)
            if has_leftover_quantisation(source, args):
                _write_without_quantisation(hf_path / "config.json", folder / "config.json")
    except OSError as error:
        raise CheckpointError(
            f"{save_path}: cannot convert into it: {error.strerror} ({error.filename})"
        ) from error
    return [save_path / file for file in layouts]


def _write_without_quantisation(source: Path, target: Path) -> None:
    """For a checkpoint that was cast from fp8 but kept its config."""
    config = json.loads(source.read_bytes())
    del config["quantization_config"]
    target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _sync(target)


def shard_name(rank: int, world_size: int) -> str:
    """The file of one rank, as DeepSeek's demo names it."""
    return f"model{rank}-mp{world_size}.safetensors"


def _check_space(save_path: Path, folder: Path, layouts: dict[str, Layout]) -> None:
    needed = sum(num_bytes(*tensor) for layout in layouts.values() for tensor in layout.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{save_path}: needs {needed:,} bytes, but its disk has {free:,} left")


def _stream(
    source: dict[str, StoredTensor],
    pieces: dict[str, list[Piece]],
    writers: list[ShardWriter],
    progress: Progress | None,
) -> None:
    total = sum(source[name].num_bytes for name in pieces)
    done = 0
    for name, parts in pieces.items():
        for first_row, block in _row_blocks(source[name]):
            for piece in parts:
                _write_block(writers[piece.rank], piece, first_row, block)
            done += block.numel()
            if progress is not None:
                progress(done, total)


def _row_blocks(stored: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first row, rows as bytes (R, W) uint8) of about 4 MB; the next reuses the buffer."""
    num_rows = stored.shape[0] if stored.shape else 1
    width = stored.num_bytes // max(num_rows, 1)
    if not width:
        return
    rows_per_block = max(1, min(num_rows, _BLOCK_BYTES // width))
    buffer = bytearray(rows_per_block * width)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        for row in range(0, num_rows, rows_per_block):
            rows = min(rows_per_block, num_rows - row)
            view = memoryview(buffer)[: rows * width]
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{stored.path}: became shorter while it was read; fetch it again")
                view = view[count:]
            yield row, torch.frombuffer(buffer, dtype=torch.uint8)[: rows * width].view(rows, width)


def _write_block(writer: ShardWriter, piece: Piece, first_row: int, block: torch.Tensor) -> None:
    begin = max(piece.rows[0], first_row)
    end = min(piece.rows[1], first_row + block.shape[0])
    if begin >= end:
        return
    part = block[begin - first_row : end - first_row, slice(*piece.row_bytes)]
    writer.write(piece.name, part, offset=(begin - piece.rows[0]) * part.shape[1])


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder whose files move into `target`, synced, when the block ends well; else it is removed.

    It lies within a target that exists, which may be a mount, or else beside it.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; give a folder to write the checkpoint into")
    is_new = not target.exists()
    partial = target.parent / f".{target.name}.partial" if is_new else target / ".partial"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{partial}: another conversion is running, or was killed there; remove it and start again"
        ) from None
    try:
        yield partial
        _sync(partial)
        if is_new:
            partial.rename(target)
        else:
            # Tokenizer and config first, so that a folder with weights is a whole checkpoint.
            for file in sorted(partial.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                file.replace(target / file.name)
        _sync(target.parent if is_new else target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Puts a file or a folder's entries on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
