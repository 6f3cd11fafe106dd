"""Prompts of any size for each family of tasks: needles, variables, word counts, questions.

A task's plan has made its draws beforehand. Size counts the task's own unit: noise lines,
sentences or needles (niah, vt), other words (cwe), draws (fwe), documents (qa). A bigger
prompt repeats the draws of a smaller one and adds to them, so its token count never falls,
and one seed gives one prompt. Knows no tokenizer.

    niah, vt   In noise or among needles, a needle has a line of its own at any depth; in an essay
               it follows a sentence, at one of 40 depths from 0 to 100 %. In a haystack of
               needles every line is a needle, and one is asked for.
    cwe        Ten words occur 30 times and all others 3 times (below 4096 tokens 6 and 1), in a
               numbered list, after a solved example of 3 and 1.
    fwe        Words of six letters whose counts follow a zeta law of exponent 2; the most
               frequent is shown as "...", and the next three are the answer.
    qa         SQuAD 2.0 (qa_1) or HotpotQA (qa_2), from their own files, read whole (4 and 46 MB).
               The documents a question needs come first, then others of its article or of its
               own ten, then any, over and over if a long prompt needs more; all are shuffled.

    cwe_plan(random.Random(0), 4096).build(50).references       # ten words
    qa_plan(random.Random(0), 0, read_squad(Path("dev-v2.0.json"))).build(20)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from dsatrace.errors import UserError
from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.example import Task
from dsatrace.workloads.ruler.texts import NUM_WORDS, word_pairs, words

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """`build(size)` for any size from `minimum` on."""

    minimum: int
    build: Callable[[int], Prompt]


class FirstOf(Generic[T]):
    """The first `count` things of an iterator, drawn once and kept."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._drawn: list[T] = []

    def __call__(self, count: int) -> list[T]:
        self._drawn.extend(itertools.islice(self._items, max(0, count - len(self._drawn))))
        if len(self._drawn) < count:
            raise UserError(
                f"there is material for a size of {len(self._drawn)} only; ask for a shorter length"
            )
        return self._drawn[:count]


def inserted(lines: Sequence[str], extra: Sequence[tuple[float, str]]) -> list[str]:
    """The lines with each (depth, line) put in: depth 0 before the first, 1 after the last."""
    placed = sorted((round(depth * len(lines)), i, line) for i, (depth, line) in enumerate(extra))
    result, start = list[str](), 0
    for place, _, line in placed:
        result += [*lines[start:place], line]
        start = place
    return [*result, *lines[start:]]


_DEPTHS = [i / 39 for i in range(40)]
_NUM_HOPS = 4
_EXAMPLE_NOISE = 6  # lines of filler in the solved example of vt


def niah_plan(task: Task, draw: random.Random, sentences: Iterable[str]) -> Plan:
    """`sentences` are the essay's, without end; only the essay tasks use them."""
    kind = task.value_kind
    keys = word_pairs(draw) if task.key_kind == "words" else _uuids(draw)
    numbers = _distinct(lambda: str(draw.randrange(1_000_000, 10_000_000)))
    values = numbers if kind == "number" else _uuids(draw)
    hidden = [
        (key, next(values)) for key in itertools.islice(keys, task.num_keys) for _ in range(task.num_values)
    ]
    names = list(dict.fromkeys(key for key, _ in hidden))
    asked = draw.sample(names, task.num_queries)
    references = tuple(value for key in asked for k, value in hidden if k == key)
    needles = [texts.needle(kind, key, value) for key, value in hidden]
    if task.haystack == "essay":
        first, join, depths = FirstOf(sentences), " ", draw.sample(_DEPTHS, len(hidden))
    else:
        others = (texts.needle(kind, key, next(values)) for key in keys)
        first = FirstOf(others if task.haystack == "needles" else itertools.repeat(texts.NOISE))
        join, depths = "\n", [draw.random() for _ in hidden]

    def build(size: int) -> Prompt:
        context = join.join(inserted(first(size), list(zip(depths, needles, strict=True))))
        parts = texts.niah(kind, context, texts.enumeration(asked), plural=len(references) > 1)
        return Prompt(*parts, references)

    return Plan(minimum=0, build=build)


def vt_plan(draw: random.Random) -> Plan:
    """One chain of four hops in noise, after a solved example with shorter names."""
    shown, shown_value = _names(draw, 3), str(draw.randint(10_000, 99_998))
    names, value = _names(draw, 5), str(draw.randint(10_000, 99_998))
    depths = sorted(draw.random() for _ in names)
    example = _chain_prompt(_EXAMPLE_NOISE, shown, shown_value, sorted(draw.random() for _ in shown))
    solved = f"{example.text}{example.answer_prefix} {' '.join(shown)}\n\n"

    def build(size: int) -> Prompt:
        prompt = _chain_prompt(size, names, value, depths)
        return Prompt(solved + prompt.text, prompt.answer_prefix, prompt.references)

    return Plan(minimum=0, build=build)


def _chain_prompt(num_noise: int, names: list[str], value: str, depths: list[float]) -> Prompt:
    lines = inserted([texts.NOISE] * num_noise, list(zip(depths, texts.chain(names, value), strict=True)))
    return Prompt(*texts.vt("\n".join(lines), value, len(names)), tuple(names))


def _names(draw: random.Random, length: int) -> list[str]:
    make = _distinct(lambda: "".join(draw.choices(string.ascii_uppercase, k=length)))
    return list(itertools.islice(make, _NUM_HOPS + 1))


def _uuids(draw: random.Random) -> Iterator[str]:
    return _distinct(lambda: str(uuid.UUID(int=draw.getrandbits(128), version=4)))


def _distinct(make: Callable[[], str]) -> Iterator[str]:
    """Draws without end and never the same twice: a value occurs once in the prompt."""
    seen = set[str]()
    while True:
        item = make()
        if item not in seen:
            seen.add(item)
            yield item


_NUM_COMMON = 10
_ZETA_2 = math.pi**2 / 6
# From here on ranks 4 and 5 differ by a whole word, and so do the ranks before, so the answer is unique.
_MIN_DRAWS = math.ceil(_ZETA_2 / (1 / 4**2 - 1 / 5**2))


def cwe_plan(draw: random.Random, max_length: int) -> Plan:
    """Single words while they last, pairs of words ("brisk-anchor") for longer lists."""
    repeats = (30, 3) if max_length >= 4096 else (6, 1)
    singles, pairs, shuffle_seed = FirstOf(words(draw)), FirstOf(word_pairs(draw)), draw.getrandbits(64)

    def build(size: int) -> Prompt:
        needed = 3 * _NUM_COMMON + size
        pool = singles(needed) if needed <= NUM_WORDS else pairs(needed)
        shown, pool = pool[: 2 * _NUM_COMMON], pool[2 * _NUM_COMMON :]
        example = _word_list(shown, (3, 1), shuffle_seed)
        listed = " ".join(f"{i}. {word}" for i, word in enumerate(example.references, 1))
        prompt = _word_list(pool, repeats, shuffle_seed + size)
        text = f"{example.text}{example.answer_prefix} {listed}\n{prompt.text}"
        return Prompt(text, prompt.answer_prefix, prompt.references)

    return Plan(minimum=1, build=build)


def _word_list(pool: list[str], repeats: tuple[int, int], seed: int) -> Prompt:
    """The first ten words of the pool are the common ones."""
    common = pool[:_NUM_COMMON]
    entries = common * repeats[0] + pool[_NUM_COMMON:] * repeats[1]
    random.Random(seed).shuffle(entries)
    context = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
    return Prompt(*texts.cwe(context, _NUM_COMMON), tuple(common))


def fwe_plan(draw: random.Random, max_length: int) -> Plan:
    """A vocabulary of a 50th of the length asked for, as NVIDIA's."""
    vocabulary = _coded_words(draw, max(max_length // 50, 5))
    shuffle_seed = draw.getrandbits(64)

    def build(size: int) -> Prompt:
        counts = (int(size / (_ZETA_2 * rank**2)) for rank in itertools.count(1))
        text = list[str]()
        for word, count in zip(("...", *vocabulary[1:]), counts, strict=False):
            text += [word] * count
        random.Random(shuffle_seed + size).shuffle(text)
        return Prompt(*texts.fwe(" ".join(text)), tuple(vocabulary[1:4]))

    return Plan(minimum=_MIN_DRAWS, build=build)


def _coded_words(draw: random.Random, count: int) -> list[str]:
    found = dict[str, None]()  # a set that keeps its order
    while len(found) < count:
        found["".join(draw.choices(string.ascii_lowercase, k=6))] = None
    return list(found)


@dataclasses.dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]  # documents that hold the answer
    near: tuple[str, ...]  # documents that mislead better than any other


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    questions: tuple[Question, ...]
    documents: tuple[str, ...]  # every document of the file, once


def qa_plan(draw: random.Random, row: int, data: QuestionSet) -> Plan:
    """The question of this row; size is the number of documents."""
    question = data.questions[row % len(data.questions)]
    first = FirstOf(itertools.chain(question.gold, _distractors(draw, question, data.documents)))
    shuffle_seed = draw.getrandbits(64)

    def build(size: int) -> Prompt:
        documents = first(size)
        random.Random(shuffle_seed + size).shuffle(documents)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        return Prompt(*texts.qa(context, question.text), question.answers)

    return Plan(minimum=len(question.gold), build=build)


def _distractors(draw: random.Random, question: Question, documents: tuple[str, ...]) -> Iterator[str]:
    near = [text for text in question.near if text not in question.gold]
    yield from draw.sample(near, len(near))
    known = {*question.gold, *near}
    others = [text for text in documents if text not in known] or near
    while others:
        yield from draw.sample(others, len(others))


def read_squad(path: Path) -> QuestionSet:
    """`data[].paragraphs[].{context, qas[].{question, is_impossible, answers[].text}}`, the answerable."""
    questions, documents = list[Question](), dict[str, None]()
    for i, article in enumerate(_field(_load(path), "data", list, path, "the file")):
        paragraphs = _field(article, "paragraphs", list, path, f"data[{i}]")
        contexts = tuple(_field(each, "context", str, path, f"data[{i}].paragraphs") for each in paragraphs)
        documents.update(dict.fromkeys(contexts))
        for context, paragraph in zip(contexts, paragraphs, strict=True):
            where = f"data[{i}].paragraphs[].qas"
            for item in _field(paragraph, "qas", list, path, where):
                given = _field(item, "answers", list, path, where)
                answers = dict.fromkeys(_field(each, "text", str, path, where).strip() for each in given)
                if not item.get("is_impossible") and any(answers):
                    text = _field(item, "question", str, path, where)
                    questions.append(Question(text, tuple(filter(None, answers)), (context,), contexts))
    return _checked(path, questions, documents)


def read_hotpotqa(path: Path) -> QuestionSet:
    """`[{question, answer, supporting_facts: [[title, n]], context: [[title, [sentence]]]}]` (distractor)."""
    rows = _load(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: not HotpotQA: a list was expected; give hotpot_dev_distractor_v1.json")
    questions, documents = list[Question](), dict[str, None]()
    for i, row in enumerate(rows):
        where = f"[{i}]"
        facts = {fact[0] for fact in _pairs(row, "supporting_facts", path, where) if isinstance(fact[0], str)}
        titled = {}
        for title, sentences in _pairs(row, "context", path, where):
            if not isinstance(title, str) or not isinstance(sentences, list):
                raise UserError(f"{path}: {where}.context is not a list of [title, [sentence, ...]]")
            titled[title] = f"{title}\n{''.join(map(str, sentences))}"
        documents.update(dict.fromkeys(titled.values()))
        gold = tuple(text for title, text in titled.items() if title in facts)
        answer = _field(row, "answer", str, path, where).strip()
        if answer and gold:
            text = _field(row, "question", str, path, where)
            questions.append(Question(text, (answer,), gold, tuple(titled.values())))
    return _checked(path, questions, documents)


def _load(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise UserError(f"{path}: not JSON: {error}; fetch the file again") from error


def _field(item: Any, name: str, kind: type, path: Path, where: str) -> Any:
    if not isinstance(item, dict) or not isinstance(item.get(name), kind):
        raise UserError(
            f"{path}: {where} has no {name!r} of type {kind.__name__}; give the data set's own file"
        )
    return item[name]


def _pairs(row: Any, name: str, path: Path, where: str) -> list[list[Any]]:
    pairs = _field(row, name, list, path, where)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"{path}: {where}.{name} is not a list of pairs; give the data set's own file")
    return list(pairs)


def _checked(path: Path, questions: list[Question], documents: dict[str, None]) -> QuestionSet:
    if not questions:
        raise UserError(f"{path}: not one question with an answer; give the data set's own file")
    return QuestionSet(tuple(questions), tuple(documents))
