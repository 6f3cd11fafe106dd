"""Altered inputs: every reader, and every verb that reads a run, ends them with one line and a known code.

The seed and the number of cases are those of CI, a few seconds; by hand, as large as wanted:

    DSATRACE_FUZZ_CASES=10000 DSATRACE_FUZZ_SEED=7 python -m pytest -s tests/test_damaged_inputs.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from safetensors.numpy import save_file

from conftest import INFERENCE
from dsatrace.commands import export, report, summarize
from dsatrace.commands.damage import damage_named
from dsatrace.commands.verify import verify_run
from dsatrace.errors import exits_cleanly
from dsatrace.kv.stores.simulated import load_preset
from dsatrace.model.config import ModelArgs
from dsatrace.model.shards import read_header
from dsatrace.runner.settings import user_errors
from dsatrace.study.profile import read_profile
from dsatrace.study.request_files import read_requests
from dsatrace.study.requests import block_trace
from dsatrace.trace.export import export_run
from dsatrace.trace.reader import RunReader
from dsatrace.trace.resume import prepare_resume
from dsatrace.trace.resumed_argv import resumed_argv
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from dsatrace.workloads.burstgpt import read_burstgpt
from dsatrace.workloads.chat import choose_chat
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.exports import read_export
from dsatrace.workloads.longbench_v2 import LongBenchV2Loader
from dsatrace.workloads.ruler.plans import read_hotpotqa, read_squad
from dsatrace.workloads.ruler.reader import read_examples
from dsatrace.workloads.sharegpt import ShareGPTLoader
from dsatrace.workloads.tokenizer import load_tokenizer, write_byte_tokenizer
from helpers.damage import alter, draws
from helpers.golden_run import SERVING, write_golden
from helpers.real_data import real_file
from helpers.ruler_samples import ROW, write_rows
from helpers.study_samples import write_three_turns
from helpers.tier_samples import SETUPS
from helpers.waiting import LIMIT_S

SEED = int(os.environ.get("DSATRACE_FUZZ_SEED", "0"))
NUM_CASES = int(os.environ.get("DSATRACE_FUZZ_CASES", "0"))
"""Per family: readers, and verbs on runs. 0: a few, for CI."""
SAMPLES = INFERENCE / "dsatrace" / "workloads" / "samples"

Reader = Callable[[Path], object]


class HungError(Exception):
    """A case took too long."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `HungError` in a block that takes longer."""

    def hung(signum: int, frame: FrameType | None) -> None:
        raise HungError

    previous = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def ended(run: Callable[[], object]) -> tuple[int, str]:
    """The exit code of a command that does this, and what it says on stderr."""
    err = io.StringIO()

    @exits_cleanly
    def main() -> int:
        code = run()
        return code if isinstance(code, int) else 0

    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), at_most(LIMIT_S):
        try:
            code = main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, err.getvalue()


def is_sound(code: int, said: str) -> bool:
    """Whether a command ended as it must on a bad input: never by surprise, and with one line if by 2."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return code in (0, 1, 2) and "Traceback" not in said and (code != 2 or len(lines) == 1)


# ---- readers


def consume(rows: Iterator[object]) -> None:
    for _ in rows:
        pass


def read_config(path: Path) -> None:
    with user_errors():
        _ = ModelArgs.from_json(path).source_layers


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("A ferry left. \N{SNOWMAN}")
    tokenizer.decode([*ids, *range(20)])
    choose_chat(tokenizer, path).encode([Message("user", "hi")])


def ids_of(text: str) -> list[int]:
    return [ord(letter) % 128 for letter in text]


class Letters:
    """A vocabulary of letters, for logs that hold text."""

    name = "letters"

    def encode(self, text: str) -> list[int]:
        return ids_of(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids_of(text) for text in texts]


def blocks_of(path: Path, block_size: int) -> None:
    block_trace(read_requests(path, Letters()), block_size)


def write_archive(folder: Path) -> Path:
    write_rows(folder / "rows", "niah_single_1", [ROW, ROW])
    with tarfile.open(folder / "ruler.tgz", "w:gz") as tar:
        tar.add(folder / "rows", "data")
    return folder / "ruler.tgz"


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value) + "\n")
    return path


HF_CONFIG = {
    "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "first_k_dense_replace": 3, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "indexer_types": ["full"] * 61, "rope_theta": 10000, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
    },
}  # fmt: skip
FIGURE = {"value": 1.5, "source": "measured here", "confidence": "measured"}
PRESET = {
    "name": "ram", "what": "fitted", "alpha_batch_us": FIGURE, "alpha_op_us": FIGURE,
    "read_gb_per_s": FIGURE, "write_gb_per_s": FIGURE,
}  # fmt: skip
SQUAD = {
    "data": [{"title": "t", "paragraphs": [{"context": "The cat sat.", "qas": [
        {"question": "Who?", "id": "1", "is_impossible": False, "answers": [{"text": "cat"}]}]}]}]
}  # fmt: skip
HOTPOT = [
    {"question": "Who?", "answer": "cat", "supporting_facts": [["t", 0]], "context": [["t", ["The cat."]]]}
]
PROFILE = {"qa": {"reuse_probability": 0.5, "mean_reuse_s": 2.0, "admitted": True}}
EXPORT = {
    "name": "x.json", "sha256": "e" * 64, "num_rows": 3, "limit": None, "repo": "a/b",
    "commit": "c" * 40, "file": "x.json", "file_sha256": "d" * 64, "licence": "MIT",
}  # fmt: skip
PROMPTS = [
    {"timestamp": i / 2, "prompt": "hello there", "response": "hi", "conversation_id": "c", "turn_index": i,
     "workload": "chat", "mode": "multi"} for i in range(3)
]  # fmt: skip
HASHES = [
    {"timestamp": i, "input_length": 20, "output_length": 5, "hash_ids": [0, 1], "type": "t", "chat_id": i,
     "parent_chat_id": -1, "turn": 1} for i in range(3)
]  # fmt: skip
MOONCAKE = [{"timestamp": i, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]} for i in range(3)]


def write_all(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenizer_folder(folder: Path) -> Path:
    folder.mkdir()
    return write_byte_tokenizer(folder)


def reader_seeds(folder: Path) -> dict[str, tuple[Path, Reader]]:
    """Name -> a sound file, and what reads it."""
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "one.safetensors")
    settings = tokenizer_folder(folder / "tokenizer")
    return {
        "config": (INFERENCE / "config_tiny.json", read_config),
        "config 671B": (INFERENCE / "config_671B_v3.2.json", read_config),
        "hf config": (write(folder / "config.json", HF_CONFIG), read_config),
        "calibration": (write(folder / "calibration.json", [PRESET]), lambda path: load_preset(str(path))),
        "profile": (write(folder / "profile.json", PROFILE), read_profile),
        "sharegpt": (
            SAMPLES / "sharegpt_sample.json",
            lambda path: [chat for talk in ShareGPTLoader(path) for chat in talk.prompts()],
        ),
        "longbench": (SAMPLES / "longbench_v2_sample.json", lambda path: list(LongBenchV2Loader(path))),
        "burstgpt": (SAMPLES / "burstgpt_sample.csv", lambda path: consume(read_burstgpt(path))),
        "ruler rows": (
            write_rows(folder, "niah_single_2", [ROW, ROW]),
            lambda path: consume(read_examples(path, ["niah_single_2"])),
        ),
        "ruler archive": (write_archive(folder), lambda path: consume(read_examples(path))),
        "squad": (write(folder / "squad.json", SQUAD), read_squad),
        "hotpot": (write(folder / "hotpot.json", HOTPOT), read_hotpotqa),
        "prompts": (
            write_all(folder / "prompts.jsonl", PROMPTS), lambda path: blocks_of(path, 4)
        ),
        "ids": (write_three_turns(folder / "ids.jsonl"), lambda path: blocks_of(path, 4)),
        "bailian": (
            write_all(folder / "bailian.jsonl", HASHES),
            lambda path: blocks_of(path, 16),
        ),
        "mooncake": (
            write_all(folder / "mooncake.jsonl", MOONCAKE),
            lambda path: blocks_of(path, 512),
        ),
        "export": (write(folder / "SOURCE.json", EXPORT), lambda path: read_export(path.parent)),
        "tokenizer": (settings, lambda path: read_tokenizer(path.parent)),
        "tokenizer config": (
            settings.with_name("tokenizer_config.json"), lambda path: read_tokenizer(path.parent)
        ),
        "weights": (
            folder / "one.safetensors",
            checked_header,
        ),
    }  # fmt: skip


def checked_header(path: Path) -> None:
    with user_errors():
        read_header(path)


# ---- runs


def run_seeds(folder: Path) -> dict[str, Path]:
    """Sound runs: every level, serving, tiers, shared layers, Parquet, and one that was killed."""
    seeds = {
        "full": write_golden(folder / "full"),
        "scores": write_golden(folder / "scores", store_scores=True, keep_order=True),
        "blocks": write_golden(folder / "blocks", level="blocks"),
        "stats": write_golden(folder / "stats", level="stats", serving=SERVING),
        "tiers": write_golden(folder / "tiers", tiers=SETUPS["block"], serving=SERVING),
        "shared": write_golden(folder / "shared", shared_layers={1: 0}),
        "killed": write_golden(folder / "killed", state="incomplete"),
    }
    export_run(RunReader(seeds["full"]), "parquet", folder / "parquet")
    return seeds | {"parquet": folder / "parquet"}


def resume(folder: Path) -> int:
    resumed_argv(folder)
    with damage_named(folder):
        prepare_resume(folder).close()
    return 0


def verify_plainly(folder: Path) -> int:
    try:
        verify(folder, plain=True)
    except Mismatch:
        return 1
    return 0


def exported(folder: Path) -> int:
    to = "jsonl" if (folder / "trace_steps.parquet").exists() else "parquet"
    return export.main([str(folder), "--to", to, "--out", f"{folder}_out"])


VERBS: dict[str, Callable[[Path], int]] = {
    "report": lambda folder: report.main([str(folder), "--no-figure"]),
    "summarize": lambda folder: summarize.main([str(folder)]),
    "export": exported,
    "verify": verify_run,
    "verify plainly": verify_plainly,
    "resume": resume,
}


# ---- the tests


class Faults:
    """Cases that did not end as they must; the first few of each kind are shown."""

    def __init__(self) -> None:
        self.codes: Counter[int] = Counter()
        self.shown: dict[str, str] = {}

    def add(self, what: str, code: int, said: str) -> None:
        self.codes[code] += 1
        if not is_sound(code, said):
            last = said.strip().splitlines()[-1:] or ["nothing said"]
            self.shown.setdefault(last[0][-120:], f"{what}: exit {code}: {said.strip()[-400:]}")

    def report(self) -> str:
        return "\n".join(self.shown.values())


def test_readers_refuse_in_one_line(tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    sound.mkdir()
    seeds, faults = reader_seeds(sound), Faults()
    for name, (path, read) in seeds.items():
        code, said = ended(partial(read, path))
        assert code == 0, (name, said)
    names = list(seeds)
    for i, draw in enumerate(draws(SEED, NUM_CASES or 420)):
        name = names[i % len(names)]
        path, read = seeds[name]
        folder = tmp_path / "case"
        shutil.copytree(path.parent, folder) if "tokenizer" in name else folder.mkdir()
        case = folder / path.name
        shutil.copyfile(path, case)
        what = alter(case, draw)
        faults.add(f"{name} {i} {what}", *ended(partial(read, case)))
        shutil.rmtree(folder)
    print(f"{faults.codes.total()} altered inputs of {len(seeds)} kinds, exit codes {dict(faults.codes)}")
    assert faults.codes[2] > faults.codes.total() / 4, "the faults were not met"
    assert not faults.shown, faults.report()


def test_verbs_refuse_altered_runs_in_one_line(tmp_path: Path) -> None:
    seeds, faults = run_seeds(tmp_path), Faults()
    for name, folder in seeds.items():
        for verb, call in VERBS.items():
            if (verb == "resume") == (name == "killed"):
                code, said = ended(partial(call, folder))
                assert code == 0, (name, verb, said)
                shutil.rmtree(f"{folder}_out", ignore_errors=True)
    for i, draw in enumerate(draws(SEED, NUM_CASES or 240)):
        name = draw.choice(list(seeds))
        case = tmp_path / "case"
        shutil.copytree(seeds[name], case)
        what = alter(draw.choice(sorted(case.iterdir())), draw)
        verb = draw.choice(sorted(VERBS))
        if name == "killed" and draw.random() < 0.5:
            verb = "resume"
        faults.add(f"{verb} {name} {i} {what}", *ended(partial(VERBS[verb], case)))
        shutil.rmtree(case)
        shutil.rmtree(tmp_path / "case_out", ignore_errors=True)
    print(f"{faults.codes.total()} altered runs, exit codes {dict(faults.codes)}")
    assert faults.codes[1] + faults.codes[2] > faults.codes.total() / 4, "the faults were not met"
    assert not faults.shown, faults.report()


def recorded(case: str) -> Path:
    return real_file(f"../cases/damaged/{case}")


@pytest.mark.parametrize("verb", ["report", "summarize", "resume", "verify"])
def test_runs_that_once_gave_a_traceback(verb: str, tmp_path: Path) -> None:
    cases = [path for path in recorded("").iterdir() if path.name.startswith(f"run_{verb}")]
    assert cases
    for case in cases:
        shutil.copytree(case, tmp_path / case.name)
        code, said = ended(partial(VERBS[verb], tmp_path / case.name))
        assert is_sound(code, said), (case.name, code, said)
        print(case.name, code, said.strip())


@pytest.mark.parametrize(("kind", "read"), [("config", read_config), ("calibration", load_preset)])
def test_files_that_once_gave_a_traceback(kind: str, read: Callable[[str], object]) -> None:
    cases = [path for path in recorded("").iterdir() if path.name.startswith(f"load_{kind}")]
    assert cases
    for case in cases:
        (path,) = case.iterdir()
        code, said = ended(partial(read, str(path)))
        assert code == 2, (case.name, said)
        assert is_sound(code, said), (case.name, said)
