"""What a run is: the contents of `manifest.json`.

Needs nothing installed. The manifest is written first, so that a run that dies at once still says
what it was. Holds no secret, no prompt text and no token id.

    record = manifest(run, config, "running", key_id="1f0a9c22")
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dsatrace.kv.layout import CacheLayout
from dsatrace.schema import QUANTILE_DEFINITION, SCHEMA_VERSION, TIER_CHOICES
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.kind import SelectionKind, engine_kind
from dsatrace.version import __version__

Selections = Literal["model", "random_weights", "synthetic", "none"]
"""What selected the tokens; only a trained model's choice shows locality. "none": no model ran."""

PrefixSource = Literal["analysis", "cache"]
"""What a record calls shared: equal to the beginning of an earlier prompt, or found in the engine's cache."""

CLOCKS = ("real", "virtual")

REDACTED = "***"
_SECRET_WORDS = ("token", "key", "secret", "password", "system-prompt")  # the last one would be prompt text
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+(?=@)")  # up to the last @: a password may hold one


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """A pool behind HBM."""

    store: str  # as the user named it: ram, file:PATH, redis://...
    blocks: int | None  # per layer that it has room for; None: no limit
    latency_kind: Literal["measured", "modelled"]

    def __post_init__(self) -> None:
        if self.latency_kind not in ("measured", "modelled"):
            raise ValueError(f"latency_kind {self.latency_kind}: use measured or modelled")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"{self.store}: a pool of {self.blocks} blocks; use 1 or more, or no limit")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "store": redact_credentials(self.store)}


@dataclasses.dataclass(frozen=True)
class TierSettings:
    """Where the latents lie that HBM does not hold, and how they move."""

    granularity: Literal["block", "row"]
    unit_tokens: int
    unit_bytes: int  # unit_tokens x latent bytes per token and layer
    policy: str  # which unit HBM evicts
    prefetch: str
    on_error: Literal["recompute", "fail"]
    index_keys: Literal["hbm", "offloaded"]
    hbm_blocks: int  # per layer
    local_pool: PoolSettings | None = None
    remote_pool: PoolSettings | None = None

    def __post_init__(self) -> None:
        for name, choices in TIER_CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)}: not one of {', '.join(choices)}")
        if self.hbm_blocks < 1 or self.unit_tokens < 1:
            raise ValueError(
                f"{self.hbm_blocks} blocks in HBM, {self.unit_tokens} tokens per unit; both at least 1"
            )
        if self.granularity == "row" and self.unit_tokens != 1:
            raise ValueError(f"a row is one token, not {self.unit_tokens}")
        if not self.pools:
            raise ValueError("tiers without a pool behind HBM; leave them out")

    @property
    def pools(self) -> dict[str, PoolSettings]:
        """The pools that there are, nearest first."""
        both = {"local_pool": self.local_pool, "remote_pool": self.remote_pool}
        return {name: pool for name, pool in both.items() if pool is not None}

    def to_json(self) -> dict[str, Any]:
        """The manifest's `tiers`."""
        shared = ("granularity", "unit_tokens", "unit_bytes", "policy", "prefetch", "on_error", "index_keys")
        return {
            **{name: getattr(self, name) for name in shared},
            "hbm": {"blocks": self.hbm_blocks},
            "local_pool": self.local_pool and self.local_pool.to_json(),
            "remote_pool": self.remote_pool and self.remote_pool.to_json(),
        }


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What the manifest says of a run, beside how it is traced."""

    model_config: Mapping[str, Any]
    layouts: Sequence[CacheLayout]  # bytes are counted with the first; the others are for comparison
    device: str
    argv: Sequence[str] = ()
    tokenizer: str | None = None
    chat: str | None = None  # how messages became prompts
    data_source: str | None = None  # embedded, a file, or a hub revision
    hbm_stand_in: str | None = None  # what plays HBM, where the device has none
    world_size: int = 1
    seed: int = 0
    selections: Selections = "model"
    serving: Mapping[str, Any] | None = None  # mode, clock and settings, where requests arrived over time
    prefix_source: PrefixSource = "analysis"
    tiers: TierSettings | None = None  # None: everything in HBM
    shared_layers: Mapping[int, int] = dataclasses.field(default_factory=dict)  # see `shared_layers`
    answer_end: Mapping[str, Any] | None = None  # how answers were kept from ending; None: they were not
    kind: SelectionKind | None = None  # of another door's selections; None: the engine's

    def __post_init__(self) -> None:
        if not self.layouts:
            raise ValueError("layouts is empty; name the cache layout that bytes are counted with")
        if self.serving is not None and (
            not isinstance(self.serving.get("mode"), str) or self.serving.get("clock") not in CLOCKS
        ):
            raise ValueError(f"serving {self.serving}: name a mode, and a clock of {', '.join(CLOCKS)}")
        if self.kind is not None:
            self._check_kind(self.kind)
        latent_bytes = self.layouts[0].latent_bytes_per_token
        if self.tiers is not None and self.tiers.unit_bytes != self.tiers.unit_tokens * latent_bytes:
            raise ValueError(
                f"a unit of {self.tiers.unit_tokens} tokens and {self.tiers.unit_bytes} bytes, "
                f"{latent_bytes} bytes per token in layout {self.layouts[0].name}"
            )

    def _check_kind(self, kind: SelectionKind) -> None:
        if kind.door == "serve" or self.tiers is not None or self.shared_layers:
            raise ValueError(
                f"door {kind.door}, tiers {self.tiers}: the engine alone serves, and has no kind"
            )
        if kind.holds("kv_fetch") and self.layouts[0].latent_bytes_per_token < 1:
            raise ValueError(
                f"layout {self.layouts[0].name} has no bytes to count; name them, or put tiers into `missing`"
            )
        heads = max((layer.heads for layer in kind.layers), default=0)
        if any(self.layouts[0].latent_bytes_per_token % layer.heads for layer in kind.layers if layer.heads):
            raise ValueError(f"layout {self.layouts[0].name}: its bytes cannot be shared among {heads} heads")


def manifest(
    run: RunInfo,
    config: TraceConfig,
    state: str,
    *,
    key_id: str,
    started: float | None = None,  # seconds since the epoch
    error: str | None = None,
    failed_requests: int = 0,
    files: Mapping[str, Any] | None = None,  # of a run that has ended: name -> `files.digest`
    sparse_active: int | None = None,  # of a run that has ended
) -> dict[str, Any]:
    """The record of manifest.json, in the schema's field order."""
    model_config = json.loads(json.dumps(dict(run.model_config)))  # as it is read back: no tuples
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": "dsatrace",
        "tool_version": __version__,
        "state": state,
        "error": error,
        **({"failed_requests": failed_requests} if failed_requests else {}),
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "argv": redact_argv(run.argv),
        "selections": run.selections,
        "model_config": model_config,
        "model_config_digest": config_digest(model_config),
        "cache_layout": run.layouts[0].name,
        "cache_layouts": [dataclasses.asdict(layout) for layout in run.layouts],
        "tokenizer": run.tokenizer,
        "chat": run.chat,
        "data_source": None if run.data_source is None else redact_credentials(run.data_source),
        "device": run.device,
        "hbm_stand_in": run.hbm_stand_in,
        "world_size": run.world_size,
        "seed": run.seed,
        "serving": None if run.serving is None else dict(run.serving),
        "prefix_source": run.prefix_source,
        "tiers": None if run.tiers is None else run.tiers.to_json(),
        "selection": _selection(run, sparse_active),
        **({"answer_end": dict(run.answer_end)} if run.answer_end else {}),
        "trace": {
            "level": config.level,
            "block_size_tokens": config.block_size,
            "sample_rate": config.sample_rate,
            "store_scores": config.store_scores,
            "keep_order": config.keep_order,
            "prefill": config.prefill,
            "sync_cuda": config.sync_cuda,
            "prefix_key_tokens": config.prefix_key_tokens,
            "prefix_key_id": key_id,
            "queue_policy": config.queue_policy,
            "queue_steps": config.queue_steps,
            "on_error": config.on_error,
            **({"format": config.format} if config.format != "jsonl" else {}),
        },
        "quantile": QUANTILE_DEFINITION,
        "resumed_at_forward": [],
        "files": None if files is None else dict(files),
    }


def shared_layers(source_layers: Sequence[int | None]) -> dict[int, int]:
    """For each layer without an indexer, the earlier layer whose selection it uses.

    `source_layers` holds that layer, or for a layer with an indexer the layer itself or None.
    """
    return {
        layer: source for layer, source in enumerate(source_layers) if source is not None and source != layer
    }


def shared_layers_of(manifest: Mapping[str, Any]) -> dict[int, int]:
    """`shared_layers` of a run; every layer has an indexer where the manifest does not say."""
    selection = manifest.get("selection")
    return shared_layers([layer["source_layer"] for layer in selection["layers"]]) if selection else {}


def prefix_cache_cold_starts(manifest: Mapping[str, Any]) -> int:
    """How often a run with a prefix cache began anew with an empty one: once per resume."""
    has_cache = manifest.get("prefix_source") == "cache"
    return len(manifest.get("resumed_at_forward", ())) if has_cache else 0


def selection_kind(manifest: Mapping[str, Any]) -> SelectionKind | None:
    """Of a run's selections; None where its manifest does not tell."""
    selection, model = manifest.get("selection"), manifest["model_config"]
    if selection is not None:
        return SelectionKind.of(selection)
    top_k, num_layers = model.get("index_topk"), model.get("n_layers", 1)
    return engine_kind(num_layers, top_k) if isinstance(top_k, int) else None


def _selection(run: RunInfo, sparse_active: int | None) -> dict[str, Any] | None:
    """The manifest's `selection`; None where no model ran or its config does not give the layers."""
    kind = run.kind
    if kind is None:
        top_k, num_layers = (run.model_config.get(name) for name in ("index_topk", "n_layers"))
        if run.selections == "none" or top_k is None or num_layers is None:
            return None
        kind = engine_kind(num_layers, top_k, tuple(run.shared_layers.items()))
    return kind.to_json(sparse_active)


def config_digest(model_config: Mapping[str, Any]) -> str:
    """A hash that does not depend on the order of keys."""
    canonical = json.dumps(model_config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def redact_argv(argv: Iterable[str]) -> list[str]:
    """The command line without the values of secret flags and variables, and without credentials in URLs."""
    shown: list[str] = []
    hide_next = ""
    for argument in argv:
        # argparse takes an argument with a space in it for a value, even after `--`.
        if hide_next and (" " in argument or not argument.startswith("--")):
            shown.append(_hidden(hide_next, argument))
            hide_next = ""
            continue
        name, equals, value = argument.partition("=")
        if equals and _names_secret(name):
            shown.append(f"{name}={_hidden(name, value)}")
        else:
            shown.append(redact_credentials(argument))
        hide_next = name if argument.startswith("-") and not equals and _names_secret(name) else ""
    return shown


def redact_credentials(text: str) -> str:
    """Hides `user:password` in URLs."""
    return _CREDENTIALS.sub(REDACTED, text)


def _names_secret(name: str) -> bool:
    lowered = name.lower().replace("tokenizer", "")
    return any(word in lowered for word in _SECRET_WORDS)


def _hidden(name: str, value: str) -> str:
    """`--max-new-tokens 64` is a count and is shown."""
    is_count = name.lower().endswith("tokens") and value.isdecimal()
    return value if is_count else REDACTED
