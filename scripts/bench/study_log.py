"""How long `dsatrace study size` takes on a log of text: the first time, and once its tokens are kept.

The log is made up: conversations of several turns that interleave, ten system texts, words of a small
vocabulary. CPU seconds count all processes; resident memory is the largest of one process.

    python3 scripts/bench/study_log.py                    # 100,000 requests of 2,000 tokens, 0.8 GB
    python3 scripts/bench/study_log.py --requests 2000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TURNS, NUM_SYSTEMS = 5, 10
SYSTEM_WORDS, QUESTION_WORDS, ANSWER_WORDS = 350, 280, 150  # 2,000 tokens per request
MEDIAN_LOG_DELAY_S, SIGMA = 4.1, 1.2  # from turn to turn, log-normal; two conversations begin per second


def write_log(path: Path, num_requests: int) -> None:
    """OpenAI's `messages` with the answer beside them, by time."""
    draw = random.Random(7)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(4000)]
    common = "the of and to in is that for it with as on this be by at from or which you".split()  # noqa: SIM905

    def text(num_words: int, draw: random.Random) -> str:
        return " ".join(draw.choice(common if draw.random() < 0.6 else words) for _ in range(num_words))

    systems = [text(SYSTEM_WORDS, draw) for _ in range(NUM_SYSTEMS)]
    arrivals = []
    num_conversations = num_requests // TURNS
    for chat in range(num_conversations):
        time_s = draw.uniform(0, num_conversations / 2)
        for turn in range(TURNS):
            arrivals.append((time_s, chat, turn))
            time_s += draw.lognormvariate(MEDIAN_LOG_DELAY_S, SIGMA)
    open_chats: dict[int, list[dict[str, str]]] = {}
    with path.open("w") as file:
        for time_s, chat, turn in sorted(arrivals):
            own = random.Random(chat * TURNS + turn)
            system = {"role": "system", "content": systems[chat % NUM_SYSTEMS]}
            messages = open_chats.setdefault(chat, [system])
            messages.append({"role": "user", "content": text(QUESTION_WORDS, own)})
            answer = text(ANSWER_WORDS, own)
            row = {"timestamp": 1764320000 + round(time_s, 3), "session_id": str(chat)}
            file.write(json.dumps({**row, "messages": messages, "response": answer}) + "\n")
            messages.append({"role": "assistant", "content": answer})
            if turn == TURNS - 1:
                del open_chats[chat]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        log, kernels = Path(name) / "log.jsonl", Path("~/.cache/dsatrace/kernels").expanduser()
        write_log(log, args.requests)
        print(f"{args.requests:,} requests, {log.stat().st_size / 1e9:.2f} GB of text")
        places = {"PYTHONPATH": str(ROOT / "inference"), "XDG_CACHE_HOME": name}
        environment = {"NUMBA_CACHE_DIR": str(kernels), **os.environ, **places}
        command = [sys.executable, "-m", "dsatrace", "study", "size", "--log", str(log)]
        command += ["--kv-layout", "deepseek-v3.2", "--skip-visualization"]
        for which in ("first", "again"):
            before, began = _children(), time.perf_counter()
            out = ["--output-dir", f"{name}/{which}"]
            shown = subprocess.run(
                [*command, *out], env=environment, check=True, capture_output=True, text=True
            )
            wall_s, now = time.perf_counter() - began, _children()
            cpu_s = now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime
            # The largest of all children so far, so the second run's only where it is larger.
            print(f"{which}: {wall_s:.1f} s, {cpu_s:.1f} CPU s; {now.ru_maxrss / 2**20:.2f} GiB at most")
            print(*(line for line in shown.stdout.splitlines() if line.startswith("requests: ")), sep="\n")


def _children() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_CHILDREN)


if __name__ == "__main__":
    main()
