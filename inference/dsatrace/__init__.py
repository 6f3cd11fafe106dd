"""dsatrace: shows what DeepSeek Sparse Attention reads.

The names below load what they need when they are first asked for, so that importing the
package costs nothing and works with nothing installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dsatrace.version import __version__

if TYPE_CHECKING:
    from dsatrace.captures.attach import attach
    from dsatrace.kv.prefix import PrefixCacheAnalyzer
    from dsatrace.model.attention import MLA
    from dsatrace.model.indexer import Indexer
    from dsatrace.report.parts import tables
    from dsatrace.trace.config import TraceConfig
    from dsatrace.trace.load import load
    from dsatrace.trace.tracer import Tracer
    from dsatrace.trace.writer import TraceWriter
    from dsatrace.workloads.chat_format import ChatTemplateFormatter
    from dsatrace.workloads.request_generator import RequestGenerator
    from dsatrace.workloads.sharegpt import ShareGPTLoader

__all__ = [
    "MLA",
    "ChatTemplateFormatter",
    "Indexer",
    "PrefixCacheAnalyzer",
    "RequestGenerator",
    "ShareGPTLoader",
    "TraceConfig",
    "TraceWriter",
    "Tracer",
    "__version__",
    "attach",
    "load",
    "tables",
]

_HOME = {
    "ChatTemplateFormatter": "dsatrace.workloads.chat_format",
    "Indexer": "dsatrace.model.indexer",
    "MLA": "dsatrace.model.attention",
    "PrefixCacheAnalyzer": "dsatrace.kv.prefix",
    "RequestGenerator": "dsatrace.workloads.request_generator",
    "ShareGPTLoader": "dsatrace.workloads.sharegpt",
    "TraceConfig": "dsatrace.trace.config",
    "Tracer": "dsatrace.trace.tracer",
    "TraceWriter": "dsatrace.trace.writer",
    "attach": "dsatrace.captures.attach",
    "load": "dsatrace.trace.load",
    "tables": "dsatrace.report.parts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
