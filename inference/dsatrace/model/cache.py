"""The paged KV cache's tensors: latents and, apart from them, the indexer's keys.

A latent row is one token of one layer: compressed KV and rope key side by side, so one
gather fetches it. Does not know which request owns a block. `resolve` is the one seam between
selection and attention, where positions become slots, tiers fetch, and forced selections enter.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import torch

from .batch import Batch, Segment
from .layers import ModelSetup, cast

SelectOverride = Callable[[int, Batch, torch.Tensor], torch.Tensor]
"""`(layer_id, batch, positions (N, K)) -> positions (N, K')`: replaces a selection, for replay and tests."""


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for every layer.

    Indexer keys are fp8 with one fp32 scale per token; on a device without fp8 arithmetic the
    same values are in the compute dtype. Without `index_fp8` there is no scale.
    """

    def __init__(
        self,
        setup: ModelSetup,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        *,
        latent_blocks: int | None = None,
        index_layers: int | None = None,
        only_layer: int | None = None,
    ) -> None:
        """`only_layer`: of one layer alone, when the model is computed layer by layer.

        For a subclass that keeps the rest elsewhere: `latent_blocks` with latents, and indexer keys of
        `index_layers` layers, which layers use in turn.
        """
        args = setup.args
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.select_override: SelectOverride | None = None
        on_cuda = torch.device(device).type == "cuda"
        key_dtype = torch.float8_e4m3fn if args.index_fp8 and on_cuda else setup.compute_dtype

        def tensors(count: int, blocks: int, *width: int, dtype: torch.dtype) -> list[torch.Tensor]:
            return [_zeros((blocks, block_size, *width), dtype, device) for _ in range(count)]

        layers = list(range(args.n_layers)) if only_layer is None else [only_layer]
        self.indexer_layers = [layer for layer in layers if args.source_layers[layer] == layer]

        def of(
            layers: Sequence[int], count: int, blocks: int, *width: int, dtype: torch.dtype
        ) -> list[torch.Tensor]:
            """A tensor per layer of the model: `count` that `layers` use in turn, and an empty one else."""
            made = tensors(count, blocks, *width, dtype=dtype) if layers else []
            by_layer = tensors(1, 0, *width, dtype=dtype) * args.n_layers
            for i, layer in enumerate(layers):
                by_layer[layer] = made[i % len(made)]
            return by_layer

        def of_indexers(*width: int, dtype: torch.dtype) -> list[torch.Tensor]:
            count = index_layers or len(self.indexer_layers)
            return of(self.indexer_layers, count, num_blocks, *width, dtype=dtype)

        latent_blocks = num_blocks if latent_blocks is None else latent_blocks
        self.latent = of(  # L x (num_blocks, block, C + R)
            layers, len(layers), latent_blocks, args.latent_dim, dtype=setup.compute_dtype
        )
        self.index_k = of_indexers(args.index_head_dim, dtype=key_dtype)  # L x (num_blocks, block, D)
        self.index_scale = (  # L x (num_blocks, block)
            of_indexers(dtype=setup.precise_dtype) if args.index_fp8 else None
        )
        # The same, a token per row: flattened once, not at each use.
        self._latent_rows = [x.flatten(0, 1) for x in self.latent]
        self._key_rows = [x.flatten(0, 1) for x in self.index_k]
        self._scale_rows = [x.flatten() for x in self.index_scale or ()]

    @property
    def latent_bytes_per_token(self) -> int:
        """Bytes of one token's latent row in one layer, as stored."""
        return self.latent[0].shape[-1] * self.latent[0].element_size()

    @property
    def index_bytes_per_token(self) -> int:
        """Bytes of one token's indexer key and scale in one layer, as stored."""
        size = self.index_k[0].shape[-1] * self.index_k[0].element_size()
        return size + (self.index_scale[0].element_size() if self.index_scale else 0)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers here: a latent in each, an indexer key if it has an indexer."""
        latents = sum(latent.numel() > 0 for latent in self.latent) * self.latent_bytes_per_token
        return latents + len(self.indexer_layers) * self.index_bytes_per_token

    def write_latent(self, layer_id: int, batch: Batch, latent: torch.Tensor) -> None:  # (N, C + R)
        self._latent_rows[layer_id].index_copy_(0, batch.slots, latent)

    def write_index(self, layer_id: int, batch: Batch, key: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Stores the N rows' keys `(N, D)` and, with fp8, their scales `(N,)`."""
        keys = self._key_rows[layer_id]
        if keys.dtype is torch.float8_e4m3fn:  # index_copy_ has no fp8 kernel; the bytes are the same
            keys.view(torch.uint8).index_copy_(0, batch.slots, key.to(keys.dtype).view(torch.uint8))
        else:
            keys.index_copy_(0, batch.slots, key)
        if self.index_scale is not None:
            assert scale is not None
            rows = self._scale_rows[layer_id]
            rows.index_copy_(0, batch.slots, cast(scale, rows.dtype))

    def index_keys(self, layer_id: int, segment: Segment) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys `(context_len, D)` and scales `(context_len,)` of a segment's request, a view if possible."""
        keys = _context(self.index_k[layer_id], self._key_rows[layer_id], segment)
        if self.index_scale is None:
            return keys, None
        return keys, _context(self.index_scale[layer_id], self._scale_rows[layer_id], segment)

    def resolve(self, layer_id: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """Slots `(N, K)` of the selected `positions (N, K)`; -1 stays -1."""
        if self.select_override is not None:
            positions = self.select_override(layer_id, batch, positions)
        places = (positions + batch.table_starts).view(-1)
        return batch.table.index_select(0, places).view(positions.shape)

    def read_latent(self, layer_id: int, slots: torch.Tensor) -> torch.Tensor:
        """Latents `(n, K, C + R)` at `slots (n, K)`, some of those from `resolve`; at -1 anything finite."""
        rows = self._latent_rows[layer_id].index_select(0, slots.clamp_min(0).view(-1))
        return rows.view(*slots.shape, -1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeros; in main memory they are the system's own, so a cache takes the memory of what was written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not num_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _context(paged: torch.Tensor, rows: torch.Tensor, segment: Segment) -> torch.Tensor:
    """What a layer keeps of a segment's request, of its blocks or of the same by row."""
    if segment.first_slot is not None:
        return rows[segment.first_slot : segment.first_slot + segment.context_len]
    return _index_select(paged, segment.blocks).flatten(0, 1)[: segment.context_len]


def _index_select(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if x.dtype is torch.float8_e4m3fn:
        return x.view(torch.uint8).index_select(0, rows).view(x.dtype)
    return x.index_select(0, rows)
