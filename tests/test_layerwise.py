"""A sweep layer by layer selects what step-by-step decode of the same tokens selects."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from dsatrace.layerwise.transcripts import Recorded, Transcript
from dsatrace.model.config import ModelArgs
from dsatrace.model.selection import Selection
from dsatrace.model.tiny import write_checkpoint
from helpers.layerwise import GLM, V32, as_sets, decoded, in_dtype, load, random_transcripts, swept

FAMILIES = {"V3.2": V32, "GLM-5": GLM}
NEEDLE = ROOT / "data" / "models" / "needle-2k"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layers straddle the shards. Weights in fp32, so that fp64 computes what fp32 does but for rounding."""
    folder = tmp_path_factory.mktemp("layerwise")
    for name, args in FAMILIES.items():
        write_checkpoint(folder / f"{name} fp32", args, weights="fp32", num_shards=5)
        write_checkpoint(folder / f"{name} fp8", in_dtype(args, "fp8"), weights="fp8", num_shards=5)
    return {path.name: path for path in folder.iterdir()}


def differing(
    sets: dict[int, list[frozenset[int]]], found: dict[int, list[Selection]], one: Recorded
) -> list[tuple[int, int]]:
    """(layer, row) of every set that is another one, ascending."""
    rows = one.recorded(one.positions.start, one.positions.stop)
    return [
        (layer, row)
        for layer, of_layer in sets.items()
        for row, (mine, theirs) in enumerate(zip(of_layer[rows], found[layer], strict=True))
        if mine != as_sets(theirs.positions)[0]
    ]


@pytest.mark.parametrize("chunk_rows", [7, 400])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp64_gives_decodes_sets(
    family: str, chunk_rows: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    args, folder = in_dtype(FAMILIES[family], "fp64"), checkpoints[f"{family} fp32"]
    transcripts = random_transcripts(args, (60, 50, 44), prompt=40)
    ids, recorded, _ = swept(folder, args, transcripts, tmp_path / "run", chunk_rows=chunk_rows)
    model = load(folder, args, folder.parent / f"{family} converted")
    sets = {layer: as_sets(of_layer) for layer, of_layer in ids.items()}
    assert list(sets) == [layer for layer in range(args.n_layers) if args.source_layers[layer] == layer]
    for one in recorded:
        found = decoded(model, one.transcript, one.positions)
        assert sum(map(len, found.values())) == args.n_layers * len(one.positions) > 0
        assert differing(sets, found, one) == []


def check_within_rounding(
    folder: Path, args: ModelArgs, transcripts: list[Transcript], out: Path, tolerance: float
) -> tuple[int, int]:
    """(sets that differ, sets); the first that does, in layer and row, has its k-th and next score apart by
    rounding alone: less than `tolerance` of the largest. Those after it may follow from it."""
    ids, recorded, _ = swept(folder, args, transcripts, out, chunk_rows=64)
    model = load(folder, args, folder.parent / f"{folder.name} converted")
    sets = {layer: as_sets(of_layer) for layer, of_layer in ids.items()}
    num_different = 0
    for one in recorded:
        found = decoded(model, one.transcript, one.positions)
        different = differing(sets, found, one)
        num_different += len(different)
        if different:
            layer, row = different[0]
            selection = found[layer][row]
            largest = selection.scores[selection.positions >= 0].abs().max()
            assert selection.margin <= tolerance * largest, f"layer {layer}, row {row}"
    return num_different, sum(map(len, sets.values()))


@pytest.mark.parametrize(
    ("stored", "dtype", "numerics", "tolerance"),
    [
        ("fp32", "fp32", "plain", 1e-5),
        ("fp32", "bf16", "plain", 2**-5),
        ("fp32", "bf16", "released", 2**-4),  # which rounds to fp8
        ("fp8", "fp8", "released", 2**-4),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_other_set_is_a_near_tie(
    family: str,
    stored: str,
    dtype: str,
    numerics: str,
    tolerance: float,
    checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:
    args = in_dtype(FAMILIES[family], dtype, plain=numerics == "plain")
    transcripts = random_transcripts(args, (62, 70), prompt=48)
    folder = checkpoints[f"{family} {stored}"]
    different, of_all = check_within_rounding(folder, args, transcripts, tmp_path / "run", tolerance)
    assert different < of_all / 4  # the consequences


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_needle_2k(dtype: str, tmp_path: Path) -> None:
    args = dataclasses.replace(ModelArgs.from_json(NEEDLE / "serving_config.json"), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(300, 900, (2, 312), generator=generator).numpy()
    transcripts = [Transcript(f"r{i}", ids, 290) for i, ids in enumerate(words)]
    copy = tmp_path / "hf"
    copy.symlink_to(NEEDLE)
    different, of_all = check_within_rounding(
        copy, args, transcripts, tmp_path / "run", {"fp64": 0.0, "fp32": 1e-5, "bf16": 2**-5}[dtype]
    )
    assert different == 0 if dtype == "fp64" else different < of_all / 4
