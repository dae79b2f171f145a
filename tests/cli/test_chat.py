"""``hf-ext chat`` end to end, piped and at a pseudo-terminal."""

import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import hf_ext.cli.chat as chat_module
from hf_ext.caches import storage

SMALL = "sirllm:sink_size=2,memory_size=60,recent_size=60,block_size=8"


@pytest.fixture
def chat(hf_ext_command, folder, monkeypatch):
    """Lines typed -> (status, stdout, stderr)."""

    def call(lines, *options):
        typed = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt="": next(typed, None) or _end())
        return hf_ext_command("chat", folder, "--max-new-tokens", 8, "--temperature", 0, *options)

    def _end():
        raise EOFError

    return call


def test_answers_and_says_what_is_kept(chat):
    status, out, _ = chat(["Hi", "Well?"])
    assert status == 0
    assert "Memory: sirllm of 1,024 tokens" in out
    assert out.count("tokens kept") == 2 and "KiB" in out


def test_memory_stays_within_its_budget(chat):
    _, out, _ = chat(["a long line " * 20, "b" * 100, "c" * 100, "/memory 3"], "--cache", SMALL)
    kept = [int(line.split("[")[1].split()[0]) for line in out.splitlines() if "tokens kept" in line]
    assert len(kept) == 3 and max(kept) <= 122
    table = out[out.index("entropy (nats)") :].splitlines()
    entropies = [float(line.split()[0]) for line in table[1:4]]
    assert entropies == sorted(entropies, reverse=True)
    assert "2 sink, " in out and "60 recent" in out and "…" in out


def test_commands(chat, tmp_path):
    file = tmp_path / "talk"
    typed = ["/help", "/memory", "Hi", f"/save {file}", "/reset", f"/load {file}", "/nonsense", "/memory x", "/save"]
    status, out, _ = chat([*typed, f"/load {tmp_path}/nothing", "/quit", "never read"])
    assert status == 0
    assert "/memory [N]" in out and "Nothing is remembered yet." in out
    assert f"Saved to {file}." in out and "Forgotten." in out and "Going on after 1 turns" in out
    assert "There is no command /nonsense." in out and "/memory takes a number of tokens, got 'x'" in out
    assert "/save needs a file name." in out and "there is no saved cache at" in out
    assert "never read" not in out


def test_a_space_in_front_says_what_would_be_a_command(chat, tmp_path):
    chat([" /reset", "   "], "--save", tmp_path / "talk")
    assert [message["content"] for message in messages(tmp_path / "talk")][:1] == ["/reset"]


def test_past_the_context_is_said(chat):
    assert "past the model's context of 2,048" in chat(["x" * 2100], "--cache", "full")[1]


def messages(file):
    return storage.load(file)["values"]["chat"]["messages"]


def test_saves_on_leaving_and_goes_on_after_loading(chat, tmp_path):
    first, second, at_once = (tmp_path / name for name in ("first", "second", "at_once"))
    assert f"Saved to {first}." in chat(["Hi"], "--save", first)[1]
    assert "Going on after 1 turns" in chat(["Well?"], "--load", first, "--save", second)[1]
    chat(["Hi", "Well?"], "--save", at_once)
    assert messages(second) == messages(at_once) and len(messages(second)) == 4


def test_saves_when_something_breaks(chat, tmp_path, monkeypatch):
    file = tmp_path / "talk"
    original = chat_module.Chat.handle

    def handle(self, line):
        if line == "break":
            raise RuntimeError("out of memory")
        original(self, line)

    monkeypatch.setattr(chat_module.Chat, "handle", handle)
    with pytest.raises(RuntimeError, match="out of memory"):
        chat(["Hi", "break"], "--save", file)
    assert file.exists()


def test_other_caches_and_plain(chat):
    assert "Memory: full." in chat(["Hi"], "--cache", "full")[1]
    out = chat(["Hi", "/memory"], "--cache", "sink_window:window_size=100")[1]
    assert "Memory: sink_window of 104 tokens" in out and "/memory needs the sirllm cache" in out
    assert "tokens kept" in chat(["Once upon a time"], "--plain")[1]


def test_a_backslash_joins_lines(chat, tmp_path):
    chat(["one\\", "two"], "--save", tmp_path / "talk")
    assert messages(tmp_path / "talk")[0]["content"] == "one\ntwo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must not be negative, got -1.0"),
        (["--cache", "sirlm"], "'sirlm' is no kind of cache"),
        (["--load", "/no/such/file"], "there is no saved cache at /no/such/file"),
        (["--plain", "--system", "x"], "--system needs a chat template"),
    ],
)
def test_mistakes_are_one_sentence(chat, options, message):
    status, _, err = chat(["Hi"], *options)
    assert status == 1
    assert message in err and err.count("\n") == 1


class Terminal:
    """A child process at a pseudo-terminal."""

    def __init__(self, *command):
        self.process, self.screen, self.read_to = 0, "", 0
        self.process, self.file = pty.fork()
        if self.process == 0:
            os.environ |= {"TERM": "dumb", "OMP_NUM_THREADS": "1"}
            os.execv(sys.executable, [sys.executable, "-m", "hf_ext", *map(str, command)])

    def type(self, text):
        os.write(self.file, text.encode())

    def wait_for(self, text, seconds=300, again=""):
        """Read on until ``text`` comes, after whatever was waited for before; type ``again`` while nothing does."""
        end = time.monotonic() + seconds
        while text not in self.screen[self.read_to :]:
            assert time.monotonic() < end, f"{text!r} did not come; the screen shows {self.screen!r}"
            if select.select([self.file], [], [], 10)[0]:
                self.screen += os.read(self.file, 65536).decode(errors="replace")
            else:
                self.type(again)
        self.read_to = self.screen.index(text, self.read_to) + len(text)

    def wait_for_more(self):
        self.screen += os.read(self.file, 1).decode(errors="replace")

    def leave(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def endless(folder, tmp_path):
    """The same model without an end token, so that no answer is over before it is interrupted."""
    path = Path(shutil.copytree(folder, tmp_path / "endless"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**settings, "eos_token_id": None}))
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX terminal")
def test_at_a_terminal_interrupts_lose_nothing(endless, tmp_path):
    file = tmp_path / "talk"
    terminal = Terminal("chat", endless, "--max-new-tokens", 1500, "--temperature", 1, "--save", file)
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for("Hi\r\n")
    terminal.wait_for_more()  # the answer has begun
    terminal.type("\x03")
    terminal.wait_for("[stopped, ")
    terminal.wait_for("\n> ")
    terminal.type("\x03")
    terminal.wait_for("Saved to", again="\x03")  # Python's input() misses a signal that comes just before it waits
    assert terminal.leave() == 0 and file.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX terminal")
def test_a_terminated_chat_saves(folder, tmp_path):
    file = tmp_path / "talk"
    terminal = Terminal("chat", folder, "--max-new-tokens", 4, "--save", file)
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for("tokens kept")
    os.kill(terminal.process, signal.SIGTERM)
    terminal.wait_for("Saved to")
    assert terminal.leave() == 128 + signal.SIGTERM and file.exists()
