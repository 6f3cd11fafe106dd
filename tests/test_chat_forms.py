"""Chat forms: DeepSeek's own, a Jinja template beside another vocabulary, plain text; and the answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import INFERENCE
from dsatrace.commands.generate import main
from dsatrace.errors import UserError
from dsatrace.study.tokenization import PieceEncoder, open_vocabulary
from dsatrace.trace.reader import RunReader
from dsatrace.workloads import tokenizer as specials
from dsatrace.workloads.chat import SAID_OF_PLAIN_TEXT, Chat, choose_chat
from dsatrace.workloads.data_set import PromptSettings
from dsatrace.workloads.encoding import Message, encode_chat
from dsatrace.workloads.longbench_v2 import LongBenchV2Loader, build_prompt
from dsatrace.workloads.ruler.generator import generate
from dsatrace.workloads.ruler.workload import RulerWorkload
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.tokenizer import Tokenizer, byte_tokenizer_json, load_tokenizer
from helpers.checkpoints import endless_letters
from helpers.command_runs import told_error
from helpers.study_samples import check_mistake, study

NAMES = {  # of another family, in the places of DeepSeek's
    specials.BOS: "[BEGIN]",
    specials.EOS: "<|endoftext|>",
    specials.PAD: "<|system|>",
    specials.USER: "<|user|>",
    specials.ASSISTANT: "<|assistant|>",
}
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' -%}
<|assistant|></think>{{ message.content.split('</think>')[-1].strip() }}
{%- else -%}
<|{{ message.role }}|>{{ message.content | trim }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ '<think>' if enable_thinking else '</think>' }}{% endif %}
"""
USER, ASSISTANT = "<|user|>", "<|assistant|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder of another family: its vocabulary, its template, and two end tokens."""
    text = json.dumps(byte_tokenizer_json(), ensure_ascii=False)
    for deepseek, other in NAMES.items():
        text = text.replace(json.dumps(deepseek, ensure_ascii=False), json.dumps(other))
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    begin = {"__type": "AddedToken", "content": "[BEGIN]", "special": True}
    settings = {"bos_token": begin, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 259]}))
    return folder


def chosen(folder: Path, **options: object) -> Chat:
    return choose_chat(load_tokenizer(folder), folder, **options)  # type: ignore[arg-type]


def spelled(chat: Chat, ids: list[int]) -> list[str | int]:
    """The ids as one reads them: special tokens by name, each piece of text between them as one string."""
    said: list[str | int] = []
    special = {chat.tokenizer.added_id(name): name for name in (*NAMES.values(), "<think>", "</think>")}
    text: list[int] = []
    for token in [*ids, None]:
        if token is None or token in special:
            if text:
                said.append(chat.tokenizer.decode(text))
                text = []
            if token is not None:
                said.append(f"[{special[token]}]")
        else:
            text.append(token)
    return said


CONVERSATION = [
    Message("system", "S"),
    Message("user", f" q {USER}"),
    Message("assistant", "hm</think> a "),
    Message("user", "r"),
]


# ---- prompts


@pytest.mark.parametrize("thinking", [False, True])
def test_a_template_takes_messages_literally(folder: Path, thinking: bool) -> None:
    chat = chosen(folder, thinking=thinking)
    # The template trims, and cuts thoughts out of answers; what was said stands all the same.
    assert spelled(chat, chat.encode(CONVERSATION)) == [
        *("[[BEGIN]]", "[<|system|>]", "S", f"[{USER}]", f" q {USER}"),
        *(f"[{ASSISTANT}]", "[</think>]", "hm</think> a ", f"[{USER}]", "r"),
        *(f"[{ASSISTANT}]", "[<think>]" if thinking else "[</think>]"),
    ]
    assert chat.frame() == (2, 2)
    assert chat.form.name.startswith("jinja chat_template.jinja sha256:")


def test_an_answer_prefix_follows_the_template(folder: Path) -> None:
    chat = chosen(folder)
    assert spelled(chat, chat.encode([Message("user", "u")], "The")) == [
        *("[[BEGIN]]", f"[{USER}]", "u", f"[{ASSISTANT}]", "[</think>]", "The")
    ]
    with pytest.raises(UserError, match="answer prefix needs thinking off"):
        chosen(folder, thinking=True).encode([Message("user", "u")], "The")


def test_the_ids_are_those_of_transformers(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [Message("system", "Be brief."), Message("user", "q"), Message("assistant", "a"),
                Message("user", "And 2?")]  # fmt: skip
    rows = [{"role": message.role, "content": message.content} for message in messages]
    expected = theirs.apply_chat_template(
        rows, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert chosen(folder).encode(messages) == expected


def test_the_template_may_stand_in_the_tokenizers_config(folder: Path) -> None:
    expected = chosen(folder).encode(CONVERSATION)
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    chat = chosen(folder)
    assert chat.encode(CONVERSATION) == expected
    assert chat.form.name.startswith("jinja tokenizer_config.json sha256:")
    config.write_text(json.dumps({**settings, "chat_template": [{"name": "default", "template": TEMPLATE}]}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: its chat_template is no text"):
        chosen(folder)


def test_a_named_template_goes_first(folder: Path, tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    chat = chosen(folder, template=mine)
    assert spelled(chat, chat.encode([Message("user", "u")])) == [f"[{USER}]", "u"]
    # DeepSeek's vocabulary too, with its own end token.
    mine.write_text(f"{specials.USER}{{{{ messages[0].content }}}}{specials.END_THINK}")
    deepseek = choose_chat(byte_tokenizer, template=mine)
    user, closed = (byte_tokenizer.special_id(name) for name in (specials.USER, specials.END_THINK))
    assert deepseek.encode([Message("user", "u")]) == [user, *byte_tokenizer.encode("u"), closed]
    assert deepseek.stop_tokens == {byte_tokenizer.eos_id}


def test_deepseeks_vocabulary_keeps_its_own_form(tiny_hf: Path, tmp_path: Path, folder: Path) -> None:
    copy = shutil.copytree(tiny_hf, tmp_path / "deepseek", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copy(folder / name, copy)
    chat = chosen(copy)
    assert chat.form.name == "deepseek_v32"
    assert chat.encode(CONVERSATION) == encode_chat(CONVERSATION, chat.tokenizer)
    assert chat.stop_tokens == {chat.tokenizer.eos_id}
    assert chat.frame() == (2, 2)


def test_without_a_template_a_prompt_is_its_text(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    chat = chosen(folder)
    assert chat.form.name == "plain text"
    assert chat.tokenizer.decode(chat.encode(CONVERSATION, "P")) == f"S\n q {USER}\nhm</think> a \nrP"
    assert chat.frame() == (0, 0)
    with pytest.raises(UserError, match=r"--thinking: .*tokenizer\.json has no chat template"):
        chosen(folder, thinking=True)


def test_thinking_needs_an_end_of_thoughts(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("</think>", "<|enough|>"))
    assert not chosen(folder).thinking
    with pytest.raises(UserError, match="has no token </think>"):
        chosen(folder, thinking=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", r"the chat template fails \(line 1\): Unexpected end of template"),
        ("{{ raise_exception('no such role') }}", "the chat template fails: no such role"),
        ("{{ nothing.at.all }}", "the chat template fails: 'nothing' is undefined"),
        ("{{ 1 // 0 }}", "the chat template fails: .*division"),
        ("{{ messages.append(1) }}", "the chat template fails: .*unsafe"),  # the sandbox holds
        ("just some text", "the chat template leaves out a message of the user"),
    ],
)
def test_a_broken_template_is_named_with_its_cause(folder: Path, template: str, said: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=rf"chat_template\.jinja: {said}") as caught:
        chosen(folder)
    assert "\n" not in str(caught.value)


def test_a_template_without_system_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    chat = chosen(folder)
    with pytest.raises(UserError, match="leaves out a message of the system"):
        chat.encode(CONVERSATION)


def test_data_sets_ask_in_the_templates_form(folder: Path) -> None:
    chat = chosen(folder)
    row = next(iter(LongBenchV2Loader(sample_file("longbench_v2"))))
    prompt = build_prompt(row, chat, 900)
    assert prompt.truncated and len(prompt.token_ids) == 900
    assert prompt.token_ids[:2] == tuple(chat.tokenizer.encode_markup(f"[BEGIN]{USER}"))
    examples = list(generate("niah_single_1", 1500, chat.tokenizer, 1, overhead_tokens=sum(chat.frame())))
    (request,) = RulerWorkload(examples, PromptSettings(chat)).requests()
    held = chat.tokenizer.decode(request.prompt_token_ids[p] for p in request.needle_positions)
    assert held == examples[0].references[0]


# ---- answers


def test_thoughts_end_at_their_token_and_at_nothing_else(byte_tokenizer: Tokenizer) -> None:
    end, eos = byte_tokenizer.special_id(specials.END_THINK), byte_tokenizer.eos_id
    text = byte_tokenizer.encode
    thinks, answers = (Chat.deepseek(byte_tokenizer, thinking) for thinking in (True, False))
    generated = [*text("hm </think> no"), end, *text("yes </think>"), end, *text("!"), eos]
    said = thinks.answer(generated)
    assert said == [*text("yes </think>"), end, *text("!")]
    assert thinks.answer([*text("hm </think> A"), eos]) is None
    assert answers.answer(generated) == generated[:-1]
    assert thinks.text(generated) == "hm </think> no</think>yes </think></think>!"
    assert thinks.answer(thinks.as_generated("b")) == text("b")
    assert answers.as_generated("b") == tuple(text("b"))


@pytest.mark.parametrize(
    ("file", "ids", "expected"),
    [
        ("generation_config.json", [1, 259], {1, 259}),
        ("generation_config.json", 7, {7}),
        ("config.json", [260, 1], {1, 260}),
    ],
)
def test_every_end_token_of_the_checkpoint_ends_an_answer(
    folder: Path, file: str, ids: object, expected: set[int]
) -> None:
    (folder / "generation_config.json").unlink()
    (folder / file).write_text(json.dumps({"eos_token_id": ids}))
    chat = chosen(folder)
    assert chat.stop_tokens == expected
    assert chat.text([104, *expected]) == chat.tokenizer.decode([104])


@pytest.mark.parametrize("ids", ["1", [], [1, "2"], [True], -1])
def test_end_tokens_that_are_no_ids_are_refused(folder: Path, ids: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is .*give a token id or"):
        chosen(folder)


def test_a_checkpoint_that_names_no_end_token_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match="nothing says which token ends an answer"):
        chosen(folder)


# ---- generate.py


Generate = Callable[..., int]


@pytest.fixture
def generate_py(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> Generate:
    """`generate.py` on the tiny model with the vocabulary of another family."""
    checkpoint = endless_letters(tiny_checkpoint, tmp_path / "mp1")
    for file in folder.iterdir():
        shutil.copy(file, checkpoint)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello")

    def run(*flags: object) -> int:
        fixed = ("--ckpt-path", checkpoint, "--config", INFERENCE / "config_tiny.json")
        asked = ("--input-file", prompts, "--max-new-tokens", 3, "--temperature", 0, "--device", "cpu")
        return main([str(flag) for flag in (*fixed, *asked, *flags)])

    return run


def test_the_manifest_says_how_messages_became_prompts(
    generate_py: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate_py("--trace-out", tmp_path / "own") == 0
    run = RunReader(tmp_path / "own")
    assert run.manifest["chat"].startswith("jinja chat_template.jinja sha256:")
    assert [request["num_prompt_tokens"] for request in run.requests()] == [2 + len("Hello") + 2]
    assert SAID_OF_PLAIN_TEXT not in capsys.readouterr().err

    (tmp_path / "mp1" / "chat_template.jinja").unlink()
    assert generate_py("--trace-out", tmp_path / "plain") == 0
    run = RunReader(tmp_path / "plain")
    assert run.manifest["chat"] == "plain text"
    assert [request["num_prompt_tokens"] for request in run.requests()] == [len("Hello")]
    assert SAID_OF_PLAIN_TEXT in capsys.readouterr().err

    mine = tmp_path / "mine.jinja"
    mine.write_text("<|user|>{{ messages[-1].content }}")
    assert generate_py("--chat-template", mine, "--trace-out", tmp_path / "mine") == 0
    assert RunReader(tmp_path / "mine").manifest["chat"].startswith("jinja mine.jinja sha256:")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "mine.jinja: cannot read the chat template: No such file or directory"),
        (b"\xff", "mine.jinja: no chat template: byte 0 is not UTF-8"),
        (b"{% if %}", "mine.jinja: the chat template fails (line 1)"),
        (b"no template", "mine.jinja: the chat template leaves out a message of the user"),
    ],
)
def test_a_bad_chat_template_is_one_clear_line(
    generate_py: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes | None, said: str
) -> None:
    mine = tmp_path / "mine.jinja"
    if text is not None:
        mine.write_bytes(text)
    assert said in told_error(capsys, lambda: generate_py("--chat-template", mine))


def test_a_study_writes_prompts_by_the_template_and_reads_their_ids_back(folder: Path) -> None:
    vocabulary = open_vocabulary(folder)
    assert vocabulary.label["form"].startswith("jinja chat_template.jinja sha256:")
    encoder, chat = PieceEncoder(vocabulary.vocabulary), chosen(folder)
    talk = [Message("user", "Hi"), Message("assistant", "Hello."), Message("user", f"{USER} is text")]
    for messages in (talk[:1], talk):
        text = vocabulary.formatter.format_conversation(messages)
        safe = [dataclasses.replace(m, content=m.content.replace(USER, "< |user|>")) for m in messages]
        assert encoder.prompt(text).tolist() == chat.encode(safe)
    before = vocabulary.formatter.format_conversation(talk[:1])
    so_far = [*encoder.prompt(before), *encoder.response(before, "Hello.")]
    assert encoder.prompt(text)[: len(so_far)].tolist() == so_far


def test_a_study_takes_the_template_that_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "other.jinja"
    other.write_text("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    flags = ("explain", "--max-conversations", 2, "--output-dir", folder / "out", "--chat-template", other)
    assert study(*flags, "--tokenizer", folder) == 0
    assert f"tokenizer: {folder}, jinja other.jinja sha256:" in capsys.readouterr().out
    for tokenizer, mistake in (("words", "needs a real tokenizer"), (folder, "leaves out a message")):
        other.write_text("nothing")
        code = study(*flags[:-3], folder / "again", *flags[-2:], "--tokenizer", tokenizer)
        check_mistake(capsys, code, mistake)
