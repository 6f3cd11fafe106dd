"""Generated RULER prompts: as long as asked, of the benchmark's structure, the answer's tokens known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.example import TASKS, Example, Vocabulary, locate
from dsatrace.workloads.ruler.generator import Sources, generate, largest_fitting
from dsatrace.workloads.ruler.reader import read_examples
from dsatrace.workloads.ruler.texts import ADJECTIVES, ESSAY, NOUNS
from dsatrace.workloads.tokenizer import Tokenizer
from helpers.real_data import real_file
from helpers.ruler_samples import deepseek_tokenizer

WITHOUT_FILES = [task for task in TASKS if TASKS[task].family != "qa"]
LOCATED = [task for task in WITHOUT_FILES if TASKS[task].family in ("niah", "vt")]
NEEDLE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.")
# The most bytes that one more unit can add: a line of filler or of an essay, a needle, a word's entries.
UNIT = {"noise": 100, "essay": 150, "needles": 150, "vt": 100, "cwe": 120, "fwe": 60}


def make(task: str, max_length: int, vocabulary: Vocabulary, num: int = 2, **options: Any) -> list[Example]:
    return list(generate(task, max_length, vocabulary, num, **options))


@pytest.mark.parametrize("max_length", [2560, 6000])
@pytest.mark.parametrize("task", WITHOUT_FILES)
def test_length_is_within_a_unit_of_what_was_asked(
    byte_tokenizer: Tokenizer, task: str, max_length: int
) -> None:
    unit = UNIT[TASKS[task].haystack if TASKS[task].family == "niah" else TASKS[task].family]
    for overhead in (0, 7):
        for example in make(task, max_length, byte_tokenizer, overhead_tokens=overhead):
            num_prompt = len(byte_tokenizer.encode(example.prompt))
            num_prefix = len(byte_tokenizer.encode(example.answer_prefix))
            length = num_prompt + num_prefix + TASKS[task].tokens_to_generate + overhead
            assert example.length == length and max_length - unit < length <= max_length
            assert example.max_length == max_length


@pytest.mark.parametrize("task", WITHOUT_FILES)
def test_seed_and_row_decide_everything(byte_tokenizer: Tokenizer, task: str) -> None:
    three = make(task, 2560, byte_tokenizer, 3)
    assert make(task, 2560, byte_tokenizer, 2) == three[:2]
    assert [example.row for example in three] == [0, 1, 2]
    assert len({example.prompt for example in three}) == 3
    assert make(task, 2560, byte_tokenizer, 1, seed=1)[0].prompt != three[0].prompt


def check_positions(example: Example, vocabulary: Any) -> None:
    """Tokens at the recorded positions spell the references, and no other token does."""
    ids = vocabulary.encode(example.prompt)
    assert example.answer_positions is not None
    spelt = [vocabulary.decode(ids[i] for i in positions) for positions in example.answer_positions]
    assert sorted(text.strip() for text in spelt) == sorted(example.references)
    for (start, end), positions in zip(example.answer_spans, example.answer_positions, strict=True):
        assert vocabulary.decode(ids[: positions[-1] + 1]) == example.prompt[:end]
        assert len(vocabulary.decode(ids[: positions[0]])) <= start
        assert len(vocabulary.decode(ids[: positions[0] + 1])) > start


@pytest.mark.parametrize("task", LOCATED)
def test_recorded_positions_spell_the_answer(byte_tokenizer: Tokenizer, task: str) -> None:
    for example in make(task, 3000, byte_tokenizer, 4):
        check_positions(example, byte_tokenizer)
        assert locate(example, byte_tokenizer) == example
    for example in make("cwe", 3000, byte_tokenizer):
        assert example.answer_positions == ()


@pytest.mark.parametrize("task", LOCATED)
def test_positions_and_lengths_by_the_real_tokenizer(task: str) -> None:
    tokenizer = deepseek_tokenizer()
    assert len(tokenizer.encode(texts.NOISE + "\n")) == 24
    assert len(tokenizer.encode(texts.needle("number", "brisk-anchor", "1234567"))) in (16, 17, 18)
    for example in make(task, 2048, tokenizer, 3):
        check_positions(example, tokenizer)
        assert 2048 - 70 < (example.length or 0) <= 2048


@pytest.mark.parametrize("task", [task for task in LOCATED if task != "vt"])
def test_needles_as_many_as_the_task_says(byte_tokenizer: Tokenizer, task: str) -> None:
    parameters = TASKS[task]
    for example in make(task, 5000, byte_tokenizer, 3):
        found = NEEDLE.findall(example.prompt)
        per_key = Counter(key for _, key, _ in found)
        assert {kind for kind, _, _ in found} == {parameters.value_kind}
        if parameters.haystack == "needles":
            assert len(found) > 20 and set(per_key.values()) == {1}
            lines = example.prompt.splitlines()
            assert sum(line.startswith("One of the special") for line in lines) == len(lines) - 2
        else:
            assert per_key == dict.fromkeys(per_key, parameters.num_values)
            assert len(per_key) == parameters.num_keys
        values = [value for _, _, value in found]
        assert len(set(values)) == len(values)
        question = example.prompt.splitlines()[-1]
        asked = [key for key in per_key if key in question]
        assert len(asked) == parameters.num_queries and all(key in example.answer_prefix for key in asked)
        assert Counter(value for _, key, value in found if key in asked) == Counter(example.references)
        forms = {"number": r"[1-9]\d{6}", "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
        assert all(re.fullmatch(forms[parameters.value_kind], value) for value in values)
        assert ("What are all" in question) == (len(example.references) > 1)


def test_needles_lie_at_every_depth(byte_tokenizer: Tokenizer) -> None:
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        examples = make(task, 3000, byte_tokenizer, 40)
        starts = [example.answer_spans[0][0] / len(example.prompt) for example in examples]
        assert min(starts) < 0.2 and max(starts) > 0.8 and 0.3 < sum(starts) / len(starts) < 0.7


def test_vt_is_one_chain_after_a_solved_example(byte_tokenizer: Tokenizer) -> None:
    for example in make("vt", 4000, byte_tokenizer, 5):
        lines = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", example.prompt, re.MULTILINE)
        names, sources = [name for name, _ in lines], [source for _, source in lines]
        assert list(map(len, names)) == [3] * 5 + [5] * 5 and tuple(names[5:]) == example.references
        for start in (0, 5):
            assert sources[start + 1 : start + 5] == names[start : start + 4]
            assert 10_000 <= int(sources[start]) <= 99_998
        shown, asked = re.findall(r"hold the value (\d+)\?", example.prompt)
        assert (shown, asked) == (sources[0], sources[5]) and asked in example.answer_prefix
        assert f"namely: {' '.join(names[:5])}\n" in example.prompt


@pytest.mark.parametrize(("max_length", "common", "others"), [(4095, 6, 1), (9000, 30, 3), (30_000, 30, 3)])
def test_cwe_counts(byte_tokenizer: Tokenizer, max_length: int, common: int, others: int) -> None:
    (example,) = make("cwe", max_length, byte_tokenizer, 1)
    shown, listed = (Counter(words(part)) for part in example.prompt.split("\nHere is a numbered"))
    assert Counter(shown.values()) == {4: 10, 1: 10}  # three times in the list, once in its answer
    assert {word for word, count in listed.items() if count == common} == set(example.references)
    assert set(listed.values()) == {common, others} and len(example.references) == 10
    assert not set(shown) & set(listed)
    numbers = [int(number) for number in re.findall(r"(\d+)\. ", example.prompt.rsplit("Here is", 1)[1])]
    assert numbers == list(range(1, len(numbers) + 1))


def words(text: str) -> list[str]:
    return re.findall(r"\d+\. (\S+)", text)


def test_long_word_lists_take_pairs_of_words(byte_tokenizer: Tokenizer) -> None:
    (example,) = make("cwe", 60_000, byte_tokenizer, 1)
    listed = Counter(words(example.prompt))
    assert len(listed) > len(ADJECTIVES + NOUNS) and all("-" in word for word in listed)


def test_fwe_follows_the_zeta_law(byte_tokenizer: Tokenizer) -> None:
    for example in make("fwe", 8000, byte_tokenizer, 3):
        counts = Counter(example.prompt.split("often. ", 1)[1].split("\nQuestion")[0].split())
        ranked = counts.most_common()
        assert ranked[0][0] == "..." and tuple(word for word, _ in ranked[1:4]) == example.references
        assert ranked[3][1] > ranked[4][1] and all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        for rank, (_, count) in enumerate(ranked[:6], 1):
            assert count == pytest.approx(ranked[0][1] / rank**2, abs=1)


def test_a_haystack_of_the_users_is_taken_in_order_and_again(byte_tokenizer: Tokenizer) -> None:
    text = "First  things\nfirst. Then what? The rest!"
    example = make("niah_single_2", 3000, byte_tokenizer, 1, sources=Sources(haystack=text))[0]
    lines = example.prompt.splitlines()
    sentences = re.split(r"(?<=[.!?]) ", re.sub(NEEDLE.pattern + " ?", "", lines[1]).strip())
    wanted = itertools.cycle(["First things first.", "Then what?", "The rest!"])
    assert sentences == list(itertools.islice(wanted, len(sentences))) and len(sentences) > 50
    for empty in ("", " \n"):
        with pytest.raises(UserError, match="the haystack text is empty"):
            make("niah_multivalue", 3000, byte_tokenizer, sources=Sources(haystack=empty))


def test_our_own_haystack_differs_from_row_to_row(byte_tokenizer: Tokenizer) -> None:
    first, second = make("niah_single_2", 3000, byte_tokenizer)
    assert first.prompt.splitlines()[1][:40] != second.prompt.splitlines()[1][:40]
    assert not re.search(r"\d", ESSAY) and len(re.findall(r"[.!?]\s", ESSAY)) > 190


def test_no_word_is_part_of_another() -> None:
    everything = ADJECTIVES + NOUNS
    assert len(set(everything)) == len(everything) > 700
    assert not [(a, b) for a, b in itertools.permutations(everything, 2) if a in b]


def squad_file(folder: Path) -> Path:
    """Three articles of four paragraphs; the last question of each paragraph has no answer."""

    def paragraph(article: int, number: int) -> dict[str, Any]:
        name = f"{article}-{number}"
        qas = [
            {"question": f"Who wrote {name}?", "id": name, "is_impossible": False,
             "answers": [{"text": text, "answer_start": 3} for text in (f"Author {name}", "A.", "A.")]},
            {"question": f"When was {name}?", "id": name + "x", "is_impossible": True, "answers": []},
        ]  # fmt: skip
        return {"context": f"By Author {name}, this is text {name}. " + "More of it. " * 5, "qas": qas}

    data = [{"title": str(a), "paragraphs": [paragraph(a, n) for n in range(4)]} for a in range(3)]
    file = folder / "dev-v2.0.json"
    file.write_text(json.dumps({"version": "v2.0", "data": data}))
    return file


def hotpot_file(folder: Path) -> Path:
    rows = [
        {
            "_id": str(i),
            "question": f"Which of them is row {i}?",
            "answer": f"Answer {i}",
            "supporting_facts": [[f"Title {i} 1", 0], [f"Title {i} 3", 1], [f"Title {i} 1", 1]],
            "context": [[f"Title {i} {j}", [f"Sentence {i} {j} a. ", "And b."]] for j in range(5)],
            "type": "bridge",
            "level": "hard",
        }
        for i in range(4)
    ]
    file = folder / "hotpot.json"
    file.write_text(json.dumps(rows))
    return file


def documents(prompt: str) -> list[str]:
    body = prompt.split("\n\n", 1)[1].rsplit("\n\nAnswer the question", 1)[0]
    found = re.split(r"(?:^|\n\n)Document (\d+):\n", body)
    assert [int(number) for number in found[1::2]] == list(range(1, len(found) // 2 + 1))
    return found[2::2]


def test_qa_1_asks_squad_questions_among_other_paragraphs(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    sources = Sources(squad=squad_file(tmp_path))
    examples = make("qa_1", 1300, byte_tokenizer, 14, sources=sources)
    assert examples[13].references == examples[1].references  # twelve questions, then again
    for row, example in enumerate(examples[:12]):
        name = f"{row // 4}-{row % 4}"
        assert example.prompt.endswith(f"\n\nQuestion: Who wrote {name}?")
        assert example.references == (f"Author {name}", "A.")
        given = documents(example.prompt)
        assert len(set(given)) == len(given) >= 5 and sum(f"text {name}." in text for text in given) == 1
        its_article = [f"text {row // 4}-{n}." for n in range(4)]
        assert all(text in "".join(given) for text in its_article)
        assert 1300 - 130 < (example.length or 0) <= 1300
    places = {[e.references[0] in text for text in documents(e.prompt)].index(True) for e in examples}
    assert len(places) > 2
    (long,) = make("qa_1", 6000, byte_tokenizer, 1, sources=sources)
    assert len(set(documents(long.prompt))) == 12 < len(documents(long.prompt))  # distractors come again
    assert sum("text 0-0." in text for text in documents(long.prompt)) == 1


def test_qa_2_keeps_the_supporting_documents(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    for max_length in (600, 1000):
        for row, example in enumerate(
            make("qa_2", max_length, byte_tokenizer, 4, sources=Sources(hotpotqa=hotpot_file(tmp_path)))
        ):
            given = documents(example.prompt)
            assert f"Title {row} 1\nSentence {row} 1 a. And b." in given
            assert f"Title {row} 3\nSentence {row} 3 a. And b." in given
            assert example.references == (f"Answer {row}",) and example.answer_prefix == " Answer:"


def test_qa_says_what_is_missing_or_wrong(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    for task, name in (("qa_1", "dev-v2.0.json"), ("qa_2", "hotpot_dev_distractor_v1.json")):
        with pytest.raises(UserError, match=rf"{task} needs .*{re.escape(name)}; give that file"):
            generate(task, 4096, byte_tokenizer, 1)
    file = tmp_path / "bad.json"

    def refused(task: str, content: bytes, reason: str) -> None:
        file.write_bytes(content)
        with pytest.raises(UserError, match=reason) as error:
            generate(task, 4096, byte_tokenizer, 1, sources=Sources(squad=file, hotpotqa=file))
        assert str(file) in str(error.value) and "\n" not in str(error.value)

    for task in ("qa_1", "qa_2"):
        refused(task, b"{", "not JSON")
        refused(task, b"\xff", "not JSON")
        refused(task, b"[" * 100_000, "not JSON")
    refused("qa_1", b"[]", "the file has no 'data' of type list")
    refused("qa_1", b'{"data": [3]}', r"data\[0\] has no 'paragraphs'")
    refused("qa_1", b'{"data": [{"paragraphs": [{"context": "a"}]}]}', "has no 'qas' of type list")
    refused("qa_1", b'{"data": []}', "not one question with an answer")
    refused("qa_2", b"{}", "a list was expected")
    refused("qa_2", b'[{"supporting_facts": [], "context": 1}]', r"\[0\] has no 'context'")
    refused("qa_2", b'[{"supporting_facts": ["ab"], "context": []}]', "not a list of pairs")
    refused("qa_2", b'[{"supporting_facts": [], "context": [["a", "b"]]}]', "not a list of .title")
    with pytest.raises(UserError, match="cannot read: No such file"):
        generate("qa_1", 4096, byte_tokenizer, 1, sources=Sources(squad=tmp_path / "absent.json"))


def test_impossible_wishes_are_refused(byte_tokenizer: Tokenizer) -> None:
    for task in WITHOUT_FILES:
        with pytest.raises(UserError, match=rf"{task}, row 0: needs at least \d+ tokens, not 200; ask"):
            make(task, 200, byte_tokenizer)
    with pytest.raises(UserError, match="unknown RULER task 'needle'; use one of niah_single_1, "):
        generate("needle", 2048, byte_tokenizer, 1)


@given(
    steps=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    limit=st.integers(0, 300),
    guess=st.integers(0, 100),
)
def test_search_finds_the_largest_size(steps: list[int], limit: int, guess: int) -> None:
    total = [*itertools.accumulate(steps, initial=1)]

    def count(size: int) -> int:
        return total[size] if size < len(total) else total[-1] + 5 * (size - len(total) + 1)

    wanted = max(size for size in range(400) if count(size) <= limit) if limit >= 1 else None
    if wanted is None:
        with pytest.raises(UserError, match="needs at least 1 tokens, not 0"):
            largest_fitting(count, 0, limit, guess)
    else:
        assert largest_fitting(count, 0, limit, guess) == wanted


def test_search_builds_few_prompts() -> None:
    calls: list[int] = []
    largest_fitting(lambda size: calls.append(size) or 24 * size + 60, 0, 131_072)  # type: ignore[func-returns-value]
    assert len(calls) <= 6


def structure(example: Example) -> dict[str, Any]:
    """What must agree between their rows and ours of one length: counts, not words."""
    task = TASKS[example.task]
    lines = example.prompt.splitlines()
    lengths = sorted(map(len, example.references))
    facts: dict[str, Any] = {
        "references": len(lengths) if task.family == "cwe" else lengths,
        "spans": len(example.answer_spans),
        "prefix": example.answer_prefix[0] == " ",
        "budget": (example.tokens_to_generate, example.max_length),
        "needles": len(NEEDLE.findall(example.prompt)) if task.haystack != "needles" else None,
        "chain": [bool(re.match(r"VAR \w+ = VAR", line)) for line in lines if line.startswith("VAR ")],
    }
    if task.family == "cwe":
        last_list = example.prompt[example.prompt.rindex("\n1. ") :]
        facts["repeats"] = Counter(Counter(words(last_list)).values())[6]
    return facts


def test_same_structure_as_nvidias_rows_of_that_length() -> None:
    tokenizer = deepseek_tokenizer()
    theirs = list(read_examples(real_file("ruler")))
    for task in {example.task for example in theirs}:
        (ours,) = make(task, 1024, tokenizer, 1)
        for example in (each for each in theirs if each.task == task):
            assert structure(dataclasses.replace(ours, answer_positions=None)) == structure(example)
            if task == "niah_single_1":
                assert abs(ours.prompt.count(texts.NOISE) - example.prompt.count(texts.NOISE)) <= 1
            if task == "niah_multikey_2" and (example.length or 0) > 1000:
                assert abs(len(NEEDLE.findall(ours.prompt)) - len(NEEDLE.findall(example.prompt))) <= 2
