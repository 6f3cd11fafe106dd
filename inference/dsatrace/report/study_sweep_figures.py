"""A sweep's pictures: hit rate against capacity, and policies side by side in a mix. Computes nothing.

draw_capacities(folder.file("cache_hits_qa_lru.png"), "qa", "lru", cells)
draw_mixed(folder.file("mixed_hit_rates.png"), cells)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..study.sweep_cells import OPT, OVERALL, POOL, Cell

LABEL_CHARS = 40


def draw_capacities(path: Path, workload: str, policy: str, cells: Sequence[Cell]) -> Path:
    """A line a block size, against blocks and against the tokens they hold; OPT dashed."""
    chosen = [cell for cell in cells if cell.workload == workload and cell.policy in (policy, OPT)]
    top = max(cell.hit_rate for cell in chosen) or 1.0  # OPT's, so the same for every policy
    with _figure(path, (11, 4.4), columns=2) as (figure, panels):
        for axes, field, unit in zip(
            panels, ("capacity_blocks", "capacity_tokens"), ("blocks", "tokens"), strict=True
        ):
            for number, size in enumerate(sorted({cell.block_size for cell in chosen})):
                for name, style in ((policy, "o-"), (OPT, "--")):
                    line = sorted(
                        (getattr(cell, field), cell.hit_rate)
                        for cell in chosen
                        if cell.block_size == size and cell.policy == name and cell.accesses
                    )
                    label = f"{_plain(name)}, block {size}"
                    style_of = {"color": f"C{number}", "label": label, "markersize": 4}
                    axes.plot(*(zip(*line, strict=True) if line else ([], [])), style, **style_of)
            ticks = sorted({getattr(cell, field) for cell in chosen})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30 if max(ticks) >= 10**5 else 0)
            axes.minorticks_off()
            axes.set(xlabel=f"capacity ({unit})", ylim=(-0.03 * top, 1.05 * top))
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("hit rate (of prompt blocks)")
        panels[0].legend(fontsize=8)
        rejected = max(cell.rejected for cell in chosen)
        note = f"; up to {rejected:,} of {chosen[0].requests:,} requests rejected as too long"
        figure.suptitle(f"{_plain(workload)} under {_plain(policy)}{note if rejected else ''}")
    return path


def draw_mixed(path: Path, cells: Sequence[Cell]) -> Path:
    """A panel for all workloads together and for each, a bar a policy; OPT as a dashed line."""
    workloads = sorted(dict.fromkeys(cell.workload for cell in cells), key=lambda name: name != OVERALL)
    policies = [name for name in dict.fromkeys(cell.policy for cell in cells) if name != OPT]
    by_place = {(cell.policy, cell.workload): cell for cell in cells}
    size = (2.2 + 2.3 * len(workloads), 1.4 + 0.24 * len(policies))
    with _figure(path, size, len(workloads), share_y=True) as (figure, panels):
        for axes, name in zip(panels, workloads, strict=True):
            rates = [by_place[policy, name].hit_rate for policy in policies]
            bound = by_place[OPT, name].hit_rate
            bars = axes.barh(range(len(policies)), rates, color=[_color(policy) for policy in policies])
            axes.bar_label(bars, [f"{100 * rate:.1f}" for rate in rates], fontsize=7, padding=2)
            axes.axvline(bound, color="black", linestyle="--", linewidth=1)
            top = max(*rates, bound)
            axes.set(title=_plain(name), xlim=(0, 1.25 * top if top else 1), xlabel=f"opt {bound:.1%}")
            axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
            axes.xaxis.get_major_locator().set_params(nbins=4)
            axes.grid(axis="x", alpha=0.3)
        panels[0].set_yticks(range(len(policies)), policies, fontsize=8)
        panels[0].set_ylim(len(policies) - 0.4, -0.6)
        cell = cells[0]
        figure.suptitle(
            f"Hit rate of prompt blocks, {cell.capacity_blocks} blocks of {cell.block_size} tokens. "
            f"Blue: leaf-constrained, orange: flat, green: vLLM's pool; dashed: opt, a bound {OVERALL} only",
            fontsize=10,
        )
    return path


def _color(policy: str) -> str:
    """Leaf-constrained, flat, and the block pool."""
    return "C2" if policy == POOL else "C1" if policy.endswith("-flat") else "C0"


def _plain(label: str) -> str:
    """As plain text: a dollar would begin a formula, an underscore in front hide it."""
    text = label if len(label) <= LABEL_CHARS else f"{label[: LABEL_CHARS - 1]}…"
    return " ".join(text.replace("$", r"\$").replace("_", " ").split()) or "unnamed"


@contextmanager
def _figure(
    path: Path, size: tuple[float, float], columns: int, *, share_y: bool = False
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its axes; saved under `path` when the block ends well."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, sharey=share_y)
    try:
        yield figure, list(axes.flat)
        figure.tight_layout()
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the picture: {error.strerror}; use --skip-visualization"
        ) from error
    finally:
        plt.close(figure)
