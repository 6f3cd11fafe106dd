"""mkdocs' hook: pages of the site that stand outside docs/, and links between the two.

README is the first page. A link to a file that is no page keeps its words and loses its address.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "data/models/needle-2k/README.md": "needle-2k.md",
    "data/traces/needle-2k/README.md": "open-trace.md",
}
"""Source, from the root, and its name on the site."""
_SOURCES = {page: source for source, page in OUTSIDE.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    source = _SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            return match[0]  # mkdocs says that it is missing
        name = OUTSIDE.get(path, path.removeprefix("docs/"))
        return f"{picture}[{words}]({name}{anchor})" if files.get_file_from_path(name) else words

    return _LINK.sub(moved, markdown)
