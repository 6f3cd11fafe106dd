"""vLLM's own KVCacheManager behind the rule of the schedule `in_order`, where it is installed.

Written from its public interface as of 0.32; vLLM is imported when a manager is made. Hashes
are sha256 over pickled tuples, its default.

    RealManager(block_size=16, num_blocks=400).run((prompts, outputs), concurrency=8, decode=True)
"""

from __future__ import annotations

from collections import deque
from typing import Any


class RealManager:
    """A cache of `num_blocks` blocks, the null block among them."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        import torch
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        self.block_size = block_size
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=1 << 20,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_caching=True,
        )

    def request(self, name: str, prompt: list[int]) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        params = SamplingParams(max_tokens=17)
        params.update_from_generation_config({}, eos_token_id=100)
        hasher = get_request_block_hasher(self.block_size, sha256)
        return Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=params,
            pooling_params=None,
            block_hasher=hasher,
        )

    def run(
        self, requests: tuple[list[list[int]], list[list[int]]], concurrency: int, decode: bool
    ) -> list[int | None]:
        """Hit tokens of each request at its prefill, None where it was rejected."""
        live: deque[Any] = deque()
        answers: list[int | None] = []
        for r, (prompt, output) in enumerate(zip(*requests, strict=True)):
            if len(live) == concurrency:
                self.manager.free(live.popleft())
            request = self.request(str(r), prompt)
            blocks, num_hit, *_ = self.manager.get_computed_blocks(request)
            if not self._slots(live, request, len(prompt) - num_hit, num_hit, blocks):
                answers.append(None)
                continue
            request.num_computed_tokens = len(prompt)
            for token in output if decode else ():
                request.append_output_token_ids(token)
                if not self._slots(live, request, 1):
                    break
                request.num_computed_tokens += 1
            answers.append(num_hit)
            live.append(request)
        return answers

    def _slots(self, live: deque[Any], request: Any, *what: Any) -> bool:
        """Whether the request got its slots, for which the oldest live ones may have to finish."""
        while self.manager.allocate_slots(request, *what) is None:
            if not live:
                return False
            self.manager.free(live.popleft())
        return True
