"""A model to train: the served modules with weights worth starting from, drawn from a seed.

The head starts as the embedding and stays tied to it while training, so that what copying
needs is learnt once for all tokens; a checkpoint holds both. Knows no data.

    model = new_model(ModelArgs.from_json("config.json"), seed=0)
"""

from __future__ import annotations

import torch

from dsatrace.model.config import ModelArgs
from dsatrace.model.transformer import Transformer

EMBEDDING_STD = 0.5
FIRST_LOGIT_SCALE = 0.25
"""The last norm's first weight: tied logits start small."""


def new_model(args: ModelArgs, seed: int) -> Transformer:
    """Weights of std 1/sqrt(fan in), a branch's output smaller by sqrt(2 layers); the head tied."""
    model = Transformer(args)
    generator = torch.Generator().manual_seed(seed)
    branch = (2 * args.n_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
        elif parameter.dim() == 1:
            parameter.data.fill_(FIRST_LOGIT_SCALE if name == "norm.weight" else 1.0)
        else:
            is_branch = name.endswith(("wo.weight", "w2.weight"))
            std = EMBEDDING_STD if name == "embed.weight" else parameter.shape[-1] ** -0.5
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(values * std * (branch if is_branch else 1.0))
    model.head.weight = model.embed.weight
    return model
