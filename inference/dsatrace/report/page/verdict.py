"""The page's head: what the run shows in one sentence, and before it what forbids to believe it.

Knows the manifest, the summary and the replay's figures; computes nothing that is not in them.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...trace.kind import inactive
from ..tables import caveat
from .material import Material
from .section import told


def header(material: Material) -> str:
    warnings = "".join(f"<li>{told(text, None)}</li>" for text in warnings_of(material))
    return (
        f"<header><h1>{told(material.run.folder.absolute().name)}</h1>"
        + (f'<ul class="warnings" role="alert">{warnings}</ul>' if warnings else "")
        + f'<p class="verdict">{told(verdict(material), None)}</p></header>'
    )


def verdict(material: Material) -> str:
    counts = material.summary["counts"]
    return f"{counts['requests']} requests, {counts['steps']} traced decode steps."


def warnings_of(material: Material) -> Iterator[str]:
    """Most grave first."""
    summary = material.summary
    if warning := caveat(summary):
        yield warning
    stored = (material.manifest.get("selection") or {}).get("sparse_active", summary.get("sparse_active"))
    if warning := inactive(summary["counts"]["sparse_records"], stored):
        yield warning
