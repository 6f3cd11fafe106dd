"""Watches a transformers model's `generate`: each prompt is a request, each forward a step.

A hook on every indexer keeps what it gives; one before and one after the model's forward say which of its
rows are recorded. `generate` is wrapped for the prompts and for what it cannot be asked to do here.

    run = GenerationRun(model, config)
    model.generate(**inputs, max_new_tokens=64)
    run.close()
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dsatrace.captures.attached_run import AttachedRun
from dsatrace.captures.families import FAMILIES, json_config, selects_of
from dsatrace.captures.forward_rows import Columns, SetRoom
from dsatrace.errors import UserError
from dsatrace.kv.layout import CacheLayout
from dsatrace.text import plain
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo

if TYPE_CHECKING:
    import torch

    from dsatrace.trace.observe import OnSelect

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_ASSISTED = "several tokens per forward, some of them taken back, are not recorded; leave it out"
_REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda value: value > 1, "beam search moves sequences between rows; use 1"),
    "assistant_model": (lambda value: True, _ASSISTED),
    "prompt_lookup_num_tokens": (lambda value: True, _ASSISTED),
    "assistant_early_exit": (lambda value: True, _ASSISTED),
    "use_mtp": (bool, _ASSISTED),
    "custom_generate": (lambda value: True, "a loop of another's is not known here; leave it out"),
    "penalty_alpha": (bool, "contrastive search computes steps that it drops; leave it out"),
    "use_cache": (lambda value: not value, "each step would compute the whole context; leave it on"),
    "inputs_embeds": (lambda value: True, "prompts are known by their tokens; give input_ids"),
}
"""What `generate` may not be asked for: which values of a setting, and why."""


@dataclasses.dataclass
class _Call:
    """One call of `generate`: B sequences, of which each is a request."""

    prompts: np.ndarray  # (B0, P) int64, before a prompt's several answers get a row each
    ends: frozenset[int]  # tokens that end a sequence
    may_stop: bool  # by other criteria, too
    max_new_tokens: int | None
    arrival_s: float
    requests: list[str] = dataclasses.field(default_factory=list)  # (B,) empty until the first forward
    columns: list[Columns] = dataclasses.field(default_factory=list)  # (B,)
    given_cache: Any = None  # by the caller, with what it holds
    its_cache: Any = None  # of all its forwards
    fed: int = 0  # columns computed so far
    feeding: int = 0  # by the forward under way
    ended: dict[int, float] = dataclasses.field(default_factory=dict)  # row -> seconds, before the call ends

    @property
    def num_prompt(self) -> int:
        """Columns of the prompts."""
        return int(self.prompts.shape[1])


class GenerationRun(AttachedRun):
    """Records what a transformers model with an indexer selects in its `generate` calls."""

    def __init__(self, model: Any, config: TraceConfig, **about: Any) -> None:
        """`about`: fields of `RunInfo`. Raises `UserError` for a model without an indexer, before anything is
        written."""
        indexers, text_config = _indexers(model)
        self._selects = selects = selects_of(text_config, indexers.keys())
        self._text_config = text_config
        dtype_bytes = next(next(iter(indexers.values())).parameters()).element_size()
        info = RunInfo(
            model_config=json_config(text_config.to_dict()),
            layouts=(CacheLayout("transformers", 0, selects.index_head_dim * dtype_bytes),),
            device=str(model.device),
            seed=config.seed,
            kind=selects.kind,
            **about,
        )
        super().__init__(config, info)
        # Here, since it loads torch: `dsatrace.attach` must not before it is called.
        from dsatrace.trace.observe import ForwardRecorder

        self._model = model
        self._room = SetRoom(selects)
        self._callbacks: tuple[OnSelect, ...] = ()
        self._recorder = ForwardRecorder(
            self._watching,
            len(selects.kind.layers),
            self._room.max_rows,
            selects.kind.max_width,
            model.device,
            self.tracer,
            room=self._room,
        )
        self._call: _Call | None = None
        self._forward: contextlib.ExitStack | None = None
        self._num_rows = self._num_calls = self._num_other_forwards = 0
        self._own_generate = vars(model).get("generate")
        self._generate = model.generate
        model.generate = self._watched_generate
        self._handles = [
            model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            model.register_forward_hook(self._end_forward),
            *(
                indexer.register_forward_hook(functools.partial(self._on_output, layer))
                for layer, indexer in indexers.items()
            ),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._own_generate is None:
            del self._model.generate
        else:
            self._model.generate = self._own_generate

    def finish(self) -> None:
        if self._num_rows:
            return
        if not self._num_calls:
            others = f" ({self._num_other_forwards} forwards outside of it)" * bool(self._num_other_forwards)
            raise UserError(
                f"nothing was recorded, since the model's generate was not called{others}; call it, or hand "
                "ids over with trace.selection (docs/attach.md)"
            )
        raise UserError(
            "nothing was recorded: no decode step ran; raise max_new_tokens, or attach with prefill='last'"
        )

    # The call

    def _watched_generate(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self._generate).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        self._call = call = self._begin_call(given)
        self._num_calls += 1
        try:
            result = self._generate(*args, **kwargs)
            self._end_call(call, result)
        finally:
            self._call = None
            self._abandon_forward()
        return result

    def _begin_call(self, given: Mapping[str, Any]) -> _Call:
        setting = functools.partial(_setting, self._model, given)
        for name, (is_refused, why) in _REFUSED.items():
            value = setting(name)
            if value is not None and is_refused(value):
                shown = f" {value}" if isinstance(value, int | float) else ""
                raise UserError(f"generate: {name}{shown}: {why}")
        prompts = given.get("input_ids", given.get("inputs"))
        if prompts is None or prompts.dim() != 2 or prompts.is_floating_point():
            raise UserError("generate: no input_ids (prompts, tokens): prompts are known by their tokens")
        ends = setting("eos_token_id")
        ends = ends.tolist() if hasattr(ends, "tolist") else ends
        criteria = setting("stop_strings") is not None or bool(given.get("stopping_criteria"))
        if criteria and len(prompts) > 1:
            raise UserError(
                "generate: stop_strings, stopping_criteria: of several prompts nobody sees which has ended; "
                "give one prompt per call, or end at eos_token_id alone"
            )
        return _Call(
            prompts=prompts.cpu().numpy(),
            ends=frozenset(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]),
            may_stop=criteria,
            max_new_tokens=setting("max_new_tokens"),
            arrival_s=self.now(),
            given_cache=given.get("past_key_values", given.get("cache")),
        )

    def _end_call(self, call: _Call, result: Any) -> None:
        sequences = getattr(result, "sequences", result)
        new = sequences[:, call.num_prompt :].cpu().numpy()
        now = self.now()
        for row, request_id in enumerate(call.requests):
            at_end = np.flatnonzero(np.isin(new[row], list(call.ends)))
            num_new = int(at_end[0]) + 1 if len(at_end) else len(new[row])
            stopped = len(at_end) > 0 or (call.may_stop and num_new != call.max_new_tokens)
            state = "stop" if stopped else "length"
            self.end_request(request_id, num_new, state, call.ended.get(row, now))

    # Its forwards

    def _begin_forward(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        from dsatrace.trace.observe import ForwardRow

        call = self._call
        if call is None:
            self._num_other_forwards += 1
            return
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if not call.requests:
            self._begin_requests(call, kwargs)
            call.its_cache = cache
        elif cache is not call.its_cache:
            return  # a logits processor's own, as for classifier-free guidance
        tokens = kwargs["input_ids"]  # (B, S)
        num_new, is_prefill = tokens.shape[1], call.fed < call.num_prompt
        if not is_prefill and num_new != 1:
            raise UserError(f"generate: a forward of {num_new} tokens after the prompt: {_ASSISTED}")
        if call.fed + num_new > call.num_prompt and is_prefill:
            raise UserError("generate: input_ids must hold the whole prompt, the part in past_key_values too")
        chosen = self._prompt_rows(call, num_new) if is_prefill else self._decode_rows(call, tokens)
        places = [place for place in chosen if self._sees_any(place[2])]
        rows = [
            ForwardRow(call.requests[b], b * num_new + column - call.fed, seq_len, step_idx)
            for b, column, seq_len, step_idx in places
        ]
        self._room.columns, self._room.num_new = call.columns, num_new
        self._room.seq_len = {row.row: row.seq_len for row in rows}
        self._num_rows += len(rows)
        recording = self._recorder.recording(
            "prefill" if is_prefill else "decode", rows, tokens.numel(), len(tokens)
        )
        self._forward = contextlib.ExitStack()
        self._forward.enter_context(recording)
        call.feeding = num_new

    def _end_forward(self, module: Any, args: Any, output: Any) -> None:
        call, forward = self._call, self._forward
        if call is None or forward is None:
            return
        self._forward = None
        forward.close()
        before, call.fed = call.fed, call.fed + call.feeding
        if before < call.num_prompt <= call.fed:
            for request_id in call.requests:
                self.note_first_token(request_id, self.now())

    def _abandon_forward(self) -> None:
        """Drops a forward that raised."""
        forward, self._forward = self._forward, None
        if forward is not None:
            error = RuntimeError("the forward did not end")
            with contextlib.suppress(RuntimeError):
                forward.__exit__(RuntimeError, error, None)

    def _begin_requests(self, call: _Call, kwargs: Mapping[str, Any]) -> None:
        """From the first forward: which columns hold a token, and how many were computed before."""
        batch = len(kwargs["input_ids"])
        masks = _prompt_mask(kwargs.get("attention_mask"), batch, call.num_prompt)
        call.columns = [Columns.of(mask) for mask in masks]
        kind = self._selects.kind
        for side in {columns.padding for columns in call.columns} - {None, *self._selects.padding}:
            raise UserError(
                f"generate: prompts padded on the {side}: in {self._text_config.model_type} padding shifts "
                f"which tokens the {kind.unit} of {kind.unit_tokens} tokens holds; give prompts of one "
                f"length, or one prompt per call{', or pad on the left' * bool(self._selects.padding)}"
            )
        if call.given_cache is not None:
            call.fed = int(call.given_cache.get_seq_length())
            if call.fed and self.tracer.config.prefill == "all":
                raise UserError(
                    f"generate: past_key_values: {call.fed} positions of the prompt are computed already, so "
                    "prefill='all' cannot record them; use 'last'"
                )
        if self.tracer.config.prefill == "all":
            self._say_size(sum(columns.num_tokens for columns in call.columns))
        prompts = call.prompts.repeat(batch // len(call.prompts), axis=0)
        for prompt, columns in zip(prompts, call.columns, strict=True):
            tokens = prompt[columns.prompt_columns()].tolist()
            call.requests.append(self.begin_request(tokens, call.arrival_s))

    def _prompt_rows(self, call: _Call, num_new: int) -> Iterator[tuple[int, int, int, int]]:
        """(sequence, column, positions visible, step) of the prompt positions that this forward computes and
        the run records."""
        prefill = self.tracer.config.prefill
        for b, columns in enumerate(call.columns):
            held = columns.prompt_columns()
            first = 0 if prefill == "all" else columns.num_tokens - 1
            for position in range(first, columns.num_tokens) if prefill != "off" else ():
                if call.fed <= held[position] < call.fed + num_new:
                    yield b, int(held[position]), position + 1, position - columns.num_tokens

    def _decode_rows(self, call: _Call, tokens: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
        """The same of the sequences that have not ended; a batch goes on until all of them have."""
        step_idx = call.fed - call.num_prompt
        if len(call.requests) > 1 and call.ends:
            for b, token in enumerate(tokens[:, -1].tolist()):
                if token in call.ends:
                    call.ended.setdefault(b, self.now())
        for b, columns in enumerate(call.columns):
            if b not in call.ended:
                yield b, call.fed, columns.num_tokens + step_idx + 1, step_idx

    def _sees_any(self, seq_len: int) -> bool:
        """Whether there is anything to select: of entries, once one is whole."""
        kind = self._selects.kind
        return kind.unit != "entry" or seq_len >= kind.unit_tokens

    def _say_size(self, num_rows: int) -> None:
        kind = self._selects.kind
        ids = num_rows * len(kind.set_layers) * kind.max_width
        print(
            f"prefill all: {num_rows:,} prompt positions x {len(kind.set_layers)} sets of up to "
            f"{kind.max_width:,} ids: {ids * 4 / 2**20:,.0f} MiB in memory, and about "
            f"{ids * _BYTES_PER_ID / 2**20:,.0f} MiB on disk as JSON lines",
            file=sys.stderr,
        )

    def _on_output(self, layer: int, module: Any, args: Any, output: Any) -> None:
        for callback in self._callbacks:
            callback(layer, output)

    @contextlib.contextmanager
    def _watching(self, *callbacks: OnSelect) -> Iterator[None]:
        self._callbacks = callbacks
        try:
            yield
        finally:
            self._callbacks = ()


_BYTES_PER_ID = 7
"""Of a JSON line, with its comma; an estimate for what is said beforehand."""


def _indexers(model: Any) -> tuple[dict[int, Any], Any]:
    """The indexer of each layer that has one, and the config of the text model."""
    if not (hasattr(model, "generate") and hasattr(model, "config") and hasattr(model, "named_modules")):
        raise UserError(
            f"attach: {plain(type(model).__name__)} is no transformers model that generates; load a "
            f"...ForCausalLM or ...ForConditionalGeneration of {', '.join(FAMILIES)}, or give num_layers and "
            "top_k and hand over ids of your own (docs/attach.md)"
        )
    config = model.config.get_text_config()
    found = {}
    for name, module in model.named_modules():
        place = _LAYER.search(name)
        if place and type(module).__name__.endswith("Indexer") and int(place[1]) < config.num_hidden_layers:
            found[int(place[1])] = module
    return found, config


def _setting(model: Any, given: Mapping[str, Any], name: str) -> Any:
    """As `generate` finds it: among its arguments, then in its generation config, then in the model's."""
    if given.get(name) is not None:
        return given[name]
    for config in (given.get("generation_config"), model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def _prompt_mask(mask: Any, batch: int, num_prompt: int) -> np.ndarray:
    """(B, num_prompt) bool: the columns that hold a token, from what a model's forward is given."""
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if hasattr(one, "dim")), None)
    if mask is None:
        return np.ones((batch, num_prompt), dtype=bool)
    if mask.dim() == 4:  # of a static cache, (B, 1, S, T): the last query sees all before it
        last = mask[:, 0, -1, :num_prompt]
        held = last if last.is_floating_point() is False else last == 0
    else:
        held = mask[:, :num_prompt]
    rows: np.ndarray = held.bool().cpu().numpy().reshape(batch, num_prompt)
    return rows
