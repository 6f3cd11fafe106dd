"""How long simulated steps take, and a clock that sees every one of them."""

from dsatrace.engine.clock import VirtualClock
from dsatrace.engine.simulator import StepTime

TIMES = StepTime(step_ns=1_000_000, prefill_token_ns=100_000, decode_token_ns=10_000, context_token_ns=1_000)


class EveryStep(VirtualClock):
    """The same time, never jumped over."""

    jumps = False
