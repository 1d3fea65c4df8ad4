"""`nemoe chat`: its conversation, its messages, and the whole of it in a terminal of its own."""

import codecs
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from nemoe_jax.checkpoints.reader import read_config
from nemoe_jax.cli import main
from nemoe_jax.errors import UserError
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.serving.engine.completion import harmless
from nemoe_jax.serving.engine.request import Request, RequestOutput, ScoredToken
from nemoe_jax.serving.request_builder import RequestBuilder
from nemoe_jax.serving.terminal import repl
from nemoe_jax.serving.terminal.conversation import Conversation
from nemoe_jax.serving.terminal.session import Session
from nemoe_jax.serving.terminal.terminal import PipeIO, history_file, is_whole, message_of
from nemoe_jax.text.chat import render
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.command_models import write_model
from tests.support.configs import write_tokenizer

CONTEXT = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "moe", context=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def conversation_of(tokenizer, turns, context=CONTEXT, system=""):
    conversation = Conversation(tokenizer, context)
    conversation.system = system
    for number in range(turns):
        conversation.ask(f"question {number}")
        conversation.answer(f"answer {number}")
    return conversation


def test_the_prompt_is_the_chat(tokenizer):
    conversation = conversation_of(tokenizer, 2, system="Be kind.")
    conversation.ask("and now?")
    assert conversation.prompt(10) == (tuple(render.render_chat(tokenizer, conversation.messages)), 0)
    assert conversation.messages[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("left_out", [0, 1, 3, 4])
def test_the_oldest_turns_are_left_out_where_the_context_is_full(tokenizer, left_out):
    conversation = conversation_of(tokenizer, 4, system="Be kind.")
    conversation.ask("and now?")
    system, turns = conversation.messages[:1], conversation.messages[1:]
    expected = render.render_chat(tokenizer, system + turns[2 * left_out :])
    conversation.context = len(expected) + 10
    assert conversation.prompt(10) == (tuple(expected), left_out)
    assert len(conversation.messages) == 10  # nothing is forgotten: /save writes all
    conversation.context -= 1
    if left_out < 4:
        assert conversation.prompt(10).left_out == left_out + 1
    else:
        with pytest.raises(UserError, match=rf"takes {len(expected)} tokens: expected 10 more"):
            conversation.prompt(10)


def test_what_is_forgotten(tokenizer):
    conversation = conversation_of(tokenizer, 2, system="Be kind.")
    assert conversation.reopen() and conversation.messages[-1]["content"] == "question 1"
    assert conversation.reopen() and conversation.messages[-1]["content"] == "question 1"
    assert conversation.undo() == "question 1" and conversation.messages[-1]["content"] == "answer 0"
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]
    assert not conversation.reopen() and conversation.undo() == "" and conversation.system == "Be kind."
    conversation.system = ""
    assert conversation.messages == []


def test_a_file_keeps_messages_and_tools(tokenizer, tmp_path):
    conversation = conversation_of(tokenizer, 2, system="Grüße")
    conversation.save(tmp_path / "chat.json")
    assert render.read_messages(tmp_path / "chat.json") == conversation.messages
    conversation.undo()
    conversation.save(tmp_path / "chat.json")  # over messages: as often as one likes
    other = Conversation(tokenizer, CONTEXT)
    other.load(tmp_path / "chat.json")
    assert other.messages == conversation.messages and other.tools is None
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    (tmp_path / "tools.json").write_text(json.dumps({"messages": other.messages, "tools": tools}))
    other.load(tmp_path / "tools.json")
    other.save(tmp_path / "tools.json")
    assert render.read_tools(tmp_path / "tools.json") == tools
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.json", "tools.json"]


def test_files_that_are_no_chats(tokenizer, tmp_path):
    conversation = conversation_of(tokenizer, 1)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds no messages: not replaced"):
        conversation.save(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"
    with pytest.raises(UserError, match="No such file or directory"):
        conversation.save(tmp_path / "none" / "chat.json")
    before = list(conversation.messages)
    (tmp_path / "bad").write_text('[{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]')
    for name, message in {"notes": "not a JSON file", "none": "No such file", "bad": "tool cannot follow user"}.items():
        with pytest.raises(UserError, match=message):
            conversation.load(tmp_path / name)
    assert conversation.messages == before


MESSAGES = {
    "plain": ("Hello", "Hello"),
    "backslash": ("one\\\ntwo\\\nthree", "one\ntwo\nthree"),
    "fence": ('"""one\ntwo"""', "one\ntwo"),
    "fence on lines of its own": ('"""\none\\\n\ntwo\n"""', "one\\\n\ntwo"),
    "quotes inside": ('say """ loud', 'say """ loud'),
}
UNFINISHED = ["one\\", "one\\\ntwo\\", '"""', '"""one\ntwo', '"""one""" two', '""""']


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_of_several_lines(name):
    text, expected = MESSAGES[name]
    assert is_whole(text) and message_of(text) == expected


@pytest.mark.parametrize("text", UNFINISHED)
def test_messages_that_go_on(text):
    assert not is_whole(text)


def test_a_model_cannot_drive_the_terminal():
    assert harmless("a\x1b[2J\tb\r\nc\x9b1m\x7f") == "a␛[2J\tb␍\nc\ufffd1m␡"


def test_the_history_is_under_the_state_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "nemoe" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "nemoe" / "chat_history"


class InTerminal:
    """`nemoe chat` in a terminal of its own, as somebody who types and reads."""

    PROGRAM = (sys.executable, "-m", "nemoe_jax.cli.main")
    # Ctrl-C reaches who has the terminal for his own
    LAUNCHER = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"

    def __init__(self, *arguments, state):
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        environment |= {"COLUMNS": "500"}  # no line is wrapped
        self.terminal, other_end = pty.openpty()
        command = [sys.executable, "-c", self.LAUNCHER, *self.PROGRAM, "chat", *map(str, arguments)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), other_end)
        self.child = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.close(other_end)
        self.seen = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, text):
        os.write(self.terminal, text.encode())

    def read(self, pattern, seconds=60):
        """What is printed up to a pattern, from where the last one ended, without colors and the like."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                data = self.decoder.decode(os.read(self.terminal, 65536))
                self.seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data)
        read, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return read

    def ask(self, text, pattern=r"\d+ tokens in [^\n]*\n"):
        self.type(text + "\r")
        return self.read(pattern)

    def close(self):
        """Ends it by Ctrl-D, when the input line is there; its exit status."""
        self.read("> ")
        self.type("\x04")
        try:
            self.read("never printed", 30)
        except OSError:  # the other end is closed
            return self.child.wait(30)

    def kill(self):
        self.child.kill()
        self.child.wait()
        os.close(self.terminal)


@pytest.fixture
def in_terminal(model, tmp_path):
    # the end token never comes, so that every answer is as long as may be
    session = InTerminal(
        model, "--system", "Be kind.", "--max-new-tokens", "5", "--logit-bias", "2=-100", "--seed", "7",
        state=tmp_path / "state",
    )  # fmt: skip
    yield session
    session.kill()


def test_a_chat_in_a_terminal(in_terminal, model, tmp_path):
    session, file = in_terminal, tmp_path / "chat.json"

    def saved():
        session.ask(f"/save {file}", r"\d+ messages")
        return [(message["role"], message["content"]) for message in render.read_messages(file)]

    session.read("/help shows the commands")
    assert re.search(r"5 tokens in [\d.]+ s,.* cut off there", session.ask("Hello"))
    session.read("> ")  # until then the terminal would make a line end of \r
    session.ask("one\x1b\rtwo\\\rthree")
    first = saved()
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [role for role, _ in first] == roles and first[0][1] == "Be kind." and first[3][1] == "one\ntwo\nthree"

    session.ask("/regenerate")
    again = saved()
    assert again[:4] == first[:4] and again[4] != first[4]

    session.ask("/set max_new_tokens 1500", "max_new_tokens 1500")
    session.type("a long one\r")
    session.read("a long one(.|\n)*\ufffd")  # it has begun: random bytes are rarely text
    session.type("\x03")
    stopped = session.read(r"\d+ tokens in [^\n]*\n")
    assert "stopped" in stopped and int(re.search(r"(\d+) tokens in", stopped)[1]) < 1500
    partial = saved()
    assert partial[:5] == again and [role for role, _ in partial[5:]] == ["user", "assistant"] and partial[6][1]

    session.ask("/undo", "forgotten: a long one")
    session.ask("/nonsense", "error: /nonsense: no such command")
    session.ask("/set temperature -1", "error: temperature: expected a number from 0")
    session.ask("/preset creative", "preset: creative")
    session.ask("/set", "temperature 0.8")
    session.ask(f"/load {file}", "7 messages")
    session.ask("/tokens", rf"\d+ of {CONTEXT} tokens")
    session.ask("/clear", "all but the system prompt")
    session.ask("/help", "/regenerate")
    assert saved() == [("system", "Be kind.")]
    session.read("> ")
    session.type("not sent\x03")
    session.read("/quit ends the chat")
    assert session.close() == 0
    assert "+one" in (tmp_path / "state" / "nemoe" / "chat_history").read_text()


def run_piped(capsys, monkeypatch, model, text, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = main.main(["chat", str(model), "--max-new-tokens", "4", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_chat_through_a_pipe(capsys, monkeypatch, model, tmp_path):
    file = tmp_path / "chat.json"
    text = f'Hello\n//slash\n"""\ntwo\nlines"""\n\n/save {file}\n/quit\nnever asked'
    status, out, err = run_piped(capsys, monkeypatch, model, text, "--temperature", 0)
    assert status == 0 and err.count("4 tokens in ") == 3
    messages = render.read_messages(file)
    assert [message["content"] for message in messages[::2]] == ["Hello", "/slash", "two\nlines"]
    answers = [message["content"] for message in messages[1::2]]
    assert out == "".join(answer if answer.endswith("\n") else answer + "\n" for answer in answers)
    # the same as `nemoe generate --chat` answers
    file.write_text(json.dumps(messages[:3]))
    arguments = ["generate", str(model), "--chat", str(file), "--max-new-tokens", "4", "--json"]
    assert main.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["text"] == answers[1]


class Parrot:
    """An engine that answers each request with a number, and keeps it."""

    def __init__(self):
        self.requests = []

    def submit(self, request, on_piece):
        self.requests.append(request)
        on_piece(RequestOutput(str(len(self.requests)), (ScoredToken(1),)))
        on_piece(RequestOutput("", (ScoredToken(2),), "stop"))


def test_a_full_context_leaves_out_the_oldest_turns_and_says_so(capsys, monkeypatch, model, tokenizer):
    first = "first " * 20
    context = len(render.render_chat(tokenizer, [{"role": "user", "content": first}])) + 6
    conversation, engine = Conversation(tokenizer, context), Parrot()
    builder = RequestBuilder(read_config(model), tokenizer)
    session = Session(conversation, engine, builder, Request((), 4, SamplingParams(seed=7)))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{first}\nsecond\n/regenerate\n"))
    repl.run(session, PipeIO())
    printed = capsys.readouterr()
    assert printed.out == "1\n2\n3\n"
    assert printed.err.count("the context is full: the model no longer sees the oldest turn") == 1
    assert [message["content"] for message in conversation.messages] == [first.strip(), "1", "second", "3"]
    second = tuple(render.render_chat(tokenizer, [{"role": "user", "content": "second"}]))
    assert [request.prompt for request in engine.requests[1:]] == [second, second]
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 9]
    assert engine.requests[0].max_new_tokens == 4


BAD = {
    "unknown command": ("/nonsense", [], "/nonsense: no such command"),
    "no number": ("/set top_k many", [], "top_k: expected a number, got 'many'"),
    "no setting": ("/set heat 1", [], "heat: no such setting"),
    "no room": ("/set max_new_tokens 0", [], "max_new_tokens: expected a positive number, got '0'"),
    "no preset": ("/preset dull", [], "preset: expected one of nemo, factual"),
    "no such token": ("/set logit_bias 400=1", [], "logit_bias: expected tokens from 0 to 399, got 400"),
    "nothing to answer": ("/regenerate", [], "there is no question yet"),
    "nothing to undo": ("/undo", [], "there is no question yet"),
    "nowhere to save": ("/save", [], "expected a file, such as /save chat.json"),
    "nothing to load": ("/load /none.json", [], "/none.json: No such file or directory"),
    "too long": ("word " * 50, ["--context", "40"], "more for the answer, and the context is of 40"),
    "context too long": ("", ["--context", str(CONTEXT + 1)], "--context: expected 2 to the model's 2048, got 2049"),
    "no tokens": ("", ["--max-new-tokens", "0"], "--max-new-tokens: expected a positive number, got 0"),
    "hot": ("", ["--temperature", "101"], "temperature: expected a number from 0 to 100"),
    "no file": ("", ["--load", "/none.json"], "/none.json: No such file or directory"),
    "no adapter": ("", ["--adapter", "/none"], "/none: no such directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_through_a_pipe(capsys, monkeypatch, model, name):
    text, arguments, message = BAD[name]
    status, out, err = run_piped(capsys, monkeypatch, model, text, *arguments)
    assert status == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_a_model_without_a_chat_format(capsys, monkeypatch, model, tmp_path):
    write_tokenizer(tmp_path, 400)
    for file in (model / "config.json", *model.glob("*.safetensors*")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    status, _, err = run_piped(capsys, monkeypatch, tmp_path, "Hello")
    assert status == 2 and "no chat template" in err and "nemoe generate continues plain text" in err
