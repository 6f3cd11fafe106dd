"""A sweep layer by layer selects what step-by-step decode of the same tokens selects."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsatrace.layerwise.transcripts import Recorded
from dsatrace.model.selection import Selection
from dsatrace.model.tiny import write_checkpoint
from helpers.layerwise import GLM, V32, as_sets, decoded, in_dtype, load, random_transcripts, swept

FAMILIES = {"V3.2": V32, "GLM-5": GLM}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fp32 weights, so that fp64 computes what fp32 does but for rounding; layers straddle the shards."""
    folder = tmp_path_factory.mktemp("layerwise")
    for name, args in FAMILIES.items():
        write_checkpoint(folder / name, args, weights="fp32", num_shards=5)
    return {name: folder / name for name in FAMILIES}


def differing(
    swept_sets: dict[int, list[frozenset[int]]],
    found: dict[int, list[Selection]],
    one: Recorded,
) -> list[tuple[int, int]]:
    """(layer, row) of every set that is another one."""
    rows = one.recorded(one.positions.start, one.positions.stop)
    return [
        (layer, row)
        for layer, sets in swept_sets.items()
        for row, (mine, theirs) in enumerate(zip(sets[rows], found[layer], strict=True))
        if mine != as_sets(theirs.positions)[0]
    ]


@pytest.mark.parametrize("chunk_rows", [1, 13, 400])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp64_gives_decodes_sets(
    family: str, chunk_rows: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    args = in_dtype(FAMILIES[family], "fp64")
    transcripts = random_transcripts(args, (90, 61, 120), prompt=40)
    ids, recorded, _ = swept(checkpoints[family], args, transcripts, tmp_path / "run", chunk_rows=chunk_rows)
    model = load(checkpoints[family], args, checkpoints[family].parent / f"{family}_converted")
    sets = {layer: as_sets(of_layer) for layer, of_layer in ids.items()}
    assert list(sets) == [layer for layer in range(args.n_layers) if args.source_layers[layer] == layer]
    for one in recorded:
        found = decoded(model, one.transcript, one.positions)
        assert sum(map(len, found.values())) == args.n_layers * len(one.positions) > 0
        assert differing(sets, found, one) == []
