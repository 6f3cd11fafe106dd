"""The `dsatrace` command: a verb, and the module whose `main()` it calls.

dsatrace report outputs/generate_20260101_120000
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsatrace.commands.dispatch import Verb, dispatch
from dsatrace.errors import exits_cleanly
from dsatrace.version import __version__

VERBS = {
    "generate": Verb("dsatrace.commands.generate", "answer prompts, and trace what the indexer selects"),
    "run": Verb("dsatrace.commands.run", "serve RULER, LongBench v2, ShareGPT or BurstGPT, and trace"),
    "attach": Verb("dsatrace.commands.attach", "run a transformers checkpoint, and trace what it selects"),
    "import": Verb("dsatrace.commands.import_capture", "a run of what SGLang, vLLM or your script captured"),
    "layerwise": Verb("dsatrace.commands.layerwise", "transcripts through a checkpoint, layer by layer"),
    "check": Verb("dsatrace.commands.check", "what a capture or a run really is, and if it was sparse"),
    "report": Verb("dsatrace.commands.report", "tables, a picture or a page of a traced run"),
    "replay": Verb("dsatrace.commands.replay", "what a hot buffer of any size would have missed"),
    "diff": Verb("dsatrace.commands.diff", "whether two runs of the same tokens selected the same"),
    "export": Verb(
        "dsatrace.commands.export", "a run to Parquet, for replay, as arrays or a timeline, and back"
    ),
    "estimate": Verb("dsatrace.commands.estimate", "how large a trace will be, before it is run"),
    "verify": Verb("dsatrace.commands.verify", "re-derive a run's records, and name the first bad one"),
    "summarize": Verb("dsatrace.commands.summarize", "recompute a summary from runs' files, and merge runs"),
    "convert": Verb("dsatrace.commands.convert", "a Hugging Face checkpoint to one file per rank"),
    "download": Verb("dsatrace.commands.download", "a data set from the hub to data/"),
    "calibrate": Verb("dsatrace.commands.calibrate", "what a read from this machine's KV stores costs"),
    "needle": Verb("dsatrace.commands.needle", "write a needle-in-a-haystack prompt"),
    "make-tiny-checkpoint": Verb("dsatrace.commands.make_tiny_checkpoint", "a small random checkpoint"),
    "study": Verb("dsatrace.commands.study", "how much conversations share, and what a cache makes of it"),
    "warmup": Verb("dsatrace.commands.warmup", "compile all kernels beforehand"),
    "sanity": Verb("dsatrace.commands.sanity", "synthetic records through the plain implementation"),
}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Calls the verb's `main`; without one, lists them. An unknown verb exits 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--version"]:
        print(f"dsatrace {__version__}")
        return 0
    return dispatch("dsatrace", VERBS, argv, note="\n\ndsatrace --version prints the version.")


if __name__ == "__main__":
    sys.exit(main())
