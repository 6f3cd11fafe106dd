"""`dsatrace.attach`: records what a model selects while the caller's own script runs it.

Loads torch only when it is called.

    with dsatrace.attach(model, "outputs/mine", prefill="last"):
        model.generate(**inputs, max_new_tokens=64)

    with dsatrace.attach(None, "outputs/mine", num_layers=4, top_k=16) as trace:     # a model of your own
        trace.selection(layer, ids, positions)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsatrace.captures.attached_run import AttachedRun
from dsatrace.errors import UserError
from dsatrace.trace.config import TraceConfig, check_run_folder

_NO_SETTINGS = ("out", "level", "store_scores", "keep_order")
"""Of `TraceConfig`: what a run of this door has no choice of, since it knows no scores."""
_SETTINGS = tuple(field.name for field in dataclasses.fields(TraceConfig) if field.name not in _NO_SETTINGS)
_OWN = ("num_layers", "top_k", "heads", "unit", "unit_tokens")
_ABOUT = ("selections", "argv", "tokenizer", "chat", "data_source")
"""Of `RunInfo`: what the manifest says of the run."""


def attach(model: Any, out: str | Path, **settings: Any) -> AttachedRun:
    """Records what `model` selects into the folder `out`, new or empty, until the result is closed.

    Any transformers model with an indexer: each prompt of a `generate` call is a request. `prefill`:
    "off" records decode steps, "last" also the prompt's last position, "all" all its positions. Other
    settings are those of `TraceConfig`: `block_size`, `format`, `sample_rate`, `queue_policy`, ... For the
    manifest: `selections`, "random_weights" for a model that was not trained, `argv`, `tokenizer`, `chat`,
    `data_source`.

    With `num_layers` and `top_k` the model is the caller's own, which `model` may leave None, and hands
    its selections over with `selection(layer, ids, positions)`; `heads`, `unit` and `unit_tokens` say what
    the ids are. Raises `UserError` for what cannot be recorded, before anything is written.
    """
    own, about = ({name: settings.pop(name) for name in of if name in settings} for of in (_OWN, _ABOUT))
    for name in settings:
        if name not in _SETTINGS:
            known = ", ".join((*_SETTINGS, *_ABOUT, *_OWN))
            raise UserError(f"attach: {name} is no setting of it; use some of {known}")
    if about.get("selections", "model") not in ("model", "random_weights"):
        raise UserError(f"attach: selections {about['selections']}: use model or random_weights")
    config = TraceConfig(Path(out).absolute(), **settings)
    check_run_folder(config.out)
    if own:
        from dsatrace.captures.own_model import OwnModelRun, own_kind

        return OwnModelRun(config, own_kind(**own), **about)

    from dsatrace.captures.generation import GenerationRun

    return GenerationRun(model, config, **about)
