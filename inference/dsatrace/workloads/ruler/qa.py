"""Questions over documents: SQuAD 2.0 (qa_1) and HotpotQA (qa_2), in their own files' schema.

The documents a question needs come first, then others of its article or of its own ten,
then any, round after round where a long prompt asks for more than there are; they are
shuffled into the prompt. Files are read whole (SQuAD dev 4 MB, HotpotQA dev 46 MB).

    questions = read_squad(Path("dev-v2.0.json"))
    qa_plan(random.Random(0), 0, questions).build(20)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.plans import FirstOf, Plan, Prompt


@dataclasses.dataclass(frozen=True)
class Question:
    """`gold` holds the answer, `near` are documents that mislead better than any other."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """All questions of a file, and every document once."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


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
