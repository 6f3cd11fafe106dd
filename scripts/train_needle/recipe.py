"""The recipe: which model, and the phases it goes through, as plain numbers.

Repeated spans first, until induction appears; then values found by keys of one token or two,
at a growing distance; then needles, dense, while the length grows; then the indexer alone;
then everything, sparse (DeepSeek-V3.2, section 2.1.1). Knows no tensor.

    Recipe.tiny().phases[0].name
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsatrace.model.config import ModelArgs

TINY = ModelArgs(
    vocab_size=3008,
    dim=128,
    inter_dim=256,
    moe_inter_dim=64,
    n_layers=4,
    n_dense_layers=3,
    n_heads=4,
    n_routed_experts=4,
    n_shared_experts=1,
    n_activated_experts=2,
    n_expert_groups=1,
    n_limited_groups=1,
    route_scale=1.0,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=64,
    dtype="fp32",
    index_n_heads=4,
    index_head_dim=32,
    index_topk=192,
    max_seq_len=16384,
    original_seq_len=2048,
    rope_factor=1.0,
)
"""The model of the shipped checkpoint: three dense layers and one with experts, top-192, no YaRN."""

Mode = Literal["dense", "indexer", "sparse"]

# Shares of the samplers in a phase's samples.
FIRST_SPANS = {"subset_repeats": 1.0}
SPANS = {"repeats": 0.7, "subset_repeats": 0.3}
UNITS = {"units": 5.0, "few_repeats": 2.0, "pairs": 2.0, "repeats": 1.0}
PAIRS = {"units": 2.0, "pairs": 6.0, "few_repeats": 1.0, "recital": 1.5}
NEEDLES = {"recital": 4.0, "niah": 4.0, "pairs": 1.0, "few_repeats": 0.7, "locker": 0.4}
EVERYTHING = {
    "niah": 8.0,
    "recital": 2.0,
    "values": 1.0,
    "chain": 0.5,
    "locker": 0.8,
    "word_list": 0.4,
    "copying": 0.3,
}
MANY_KEYS = {**EVERYTHING, "niah": 6.0, "recital": 3.0, "pairs": 2.0, "values": 0.6}
"""Tells apart a hundred keys at a time."""

MOSTLY_NEEDLES = {**EVERYTHING, "recital": 4.0, "values": 0.6, "chain": 0.3}
HARDEST = {"niah": 6.0, "recital": 4.0, "lookalikes": 2.0, "locker": 0.5}
HARD = {**MOSTLY_NEEDLES, "recital": 2.0, "lookalikes": 2.5}


@dataclasses.dataclass(frozen=True)
class Phase:
    """`num_steps` batches of `batch_size` samples of at most `length` tokens.

    The phase ends early once the running share of wholly right answers reaches `enough`.
    `reach` stretches positions up to that many by gaps between sentences. The learning rate
    falls from `lr` to `last_lr` along a cosine, after `warmup` steps up. `decay` is AdamW's
    weight decay: it holds attention soft while circuits form, and keeps it from telling a
    hundred keys apart later.
    """

    name: str
    mode: Mode
    length: int
    batch_size: int
    num_steps: int
    lr: float
    last_lr: float
    mixture: dict[str, float]
    warmup: int = 0
    enough: float = 2.0
    reach: int = 0
    index_weight: float = 0.0
    extra_rows: int = 0
    decay: float = 0.05


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The phases in turn, the seed of weights and data, and the optimiser's constants."""

    phases: tuple[Phase, ...]
    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0

    @classmethod
    def tiny(cls, seed: int = 0) -> Recipe:
        """The shipped checkpoint's."""
        lr, far = 2e-3, 8192
        return cls(
            seed=seed,
            phases=(
                Phase("spans-32", "dense", 32, 64, 3000, lr, lr, FIRST_SPANS, warmup=50, enough=0.8),
                Phase("spans-64", "dense", 64, 32, 2000, lr, lr, SPANS, enough=0.72),
                Phase("units-64", "dense", 64, 32, 4000, lr, lr, UNITS, enough=0.28),
                Phase("pairs-96", "dense", 96, 20, 378, lr, lr, PAIRS),
                Phase("needles-192", "dense", 192, 12, 469, lr, lr, NEEDLES, reach=2048),
                Phase("all-512", "dense", 512, 6, 240, lr, 1.5e-3, EVERYTHING, reach=far),
                Phase("all-1024", "dense", 1024, 3, 200, 1.5e-3, 1e-3, EVERYTHING, reach=far),
                Phase("all-2048", "dense", 2048, 2, 300, 1e-3, 3e-4, MANY_KEYS, reach=far),
                Phase("more-2048", "dense", 2048, 2, 220, 8e-4, 2e-4, MOSTLY_NEEDLES, reach=far),
                Phase("sharp-1024", "dense", 1024, 4, 240, 1e-3, 3e-4, MOSTLY_NEEDLES, reach=far, decay=0.0),
                Phase("sharp-2048", "dense", 2048, 2, 160, 8e-4, 2e-4, MOSTLY_NEEDLES, reach=far, decay=0.0),
                _with_indexer("indexer-2048", "indexer", 400, 3e-3, 1e-3, MOSTLY_NEEDLES),
                _with_indexer("sparse-2048", "sparse", 280, 6e-4, 3e-5, HARD),
                Phase("hard-1024", "dense", 1024, 4, 200, 1.2e-3, 1e-4, HARDEST, reach=far, decay=0.0),
                Phase("hard-2048", "dense", 2048, 2, 220, 1e-3, 1e-4, HARDEST, reach=far, decay=0.0),
                _with_indexer("indexer-again", "indexer", 100, 2e-3, 1e-3, MOSTLY_NEEDLES),
                _with_indexer("sparse-again", "sparse", 100, 3e-4, 2e-5, HARDEST),
            ),
        )


def _with_indexer(
    name: str, mode: Mode, num_steps: int, lr: float, last_lr: float, mixture: dict[str, float]
) -> Phase:
    """A phase in which the indexer learns from the answers' rows and 64 others of each sample."""
    return Phase(
        *(name, mode, 2048, 2, num_steps, lr, last_lr, mixture),
        reach=8192,
        index_weight=1.0,
        extra_rows=64,
        decay=0.0,
    )
