"""A chat as a person sees it in a terminal, and as a script does through pipes."""

import json
import os
import re
import time

import pytest

from gptoss_jax.cli import chat_input
from tests import processes, scripted, terminals
from tests.commands.test_generate import TOOLS, WORDY
from tests.gate import TinyModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models that say what their scripts hold, one that rambles, and a home for caches."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("thinker", "caller"):
        scripted.write(folder / name, name)
    TinyModel(WORDY).write(folder / "rambler")
    return folder


def _terminal(folder, model, *arguments, **options):
    """A command on a model in a terminal."""
    return terminals.run(folder, "gptoss_jax.generate", "--checkpoint", folder / model, *arguments, **options)


SESSION = """\
/help lists the commands; Alt-Enter begins a new line; Ctrl-C stops an answer,
Ctrl-D ends the session
> Why is the sky blue?
[reasoning]
Hmm, why does sky look blue? Recall Rayleigh.

Because air scatters short waves most: **blue** ✨
> /effort extreme
reasoning_effort is 'extreme', expected one of low, medium, high
> /effort high
effort is high (low, medium, high)
> /rest
unknown command /rest: did you mean /reset? (a space in front makes it text)
> /stats
answers: 1, of 35 tokens at N tokens/s
prompts: 73 tokens, 0 of them read before
conversation: 110 of 4096 tokens; effort: high
> and
  in two lines?
[reasoning]
Hmm, why does sky look blue? Recall Rayleigh.

Because air scatters short waves most: **blue** ✨
> /save chat.json
6 messages written to chat.json
> /reset
the conversation is forgotten (6 messages)
> /quit"""


def test_a_session_looks_as_it_did_in_a_terminal(folder):
    """Guards the whole look, line by line: prompts, reasoning, errors, commands. SESSION was captured in tmux."""
    with _terminal(folder, "thinker", "--chat", "--show-reasoning") as terminal:
        terminal.wait_for("\n>")
        terminal.say("Why is the sky blue?\r", "**blue** ✨\n>")
        terminal.say("/effort extreme\r", "low, medium, high\n>")
        terminal.say("/eff\t", "> /effort")
        terminal.say(" h\t", "/effort high")
        terminal.say("\r", "(low, medium, high)\n>")
        terminal.say("/rest\r", "makes it text)\n>")
        terminal.say("/stats\r", "effort: high\n>")
        terminal.say("and\x1b\rin two lines?\r", "**blue** ✨\n>")
        terminal.say("/save chat.json\r", "written to chat.json\n>")
        terminal.say("/reset\r", "(6 messages)\n>")
        terminal.say("/quit\r", "/quit")
        assert terminal.ended() == 0
        shown = terminal.text[terminal.text.index("/help lists") :]
    assert re.sub(r"at [\d.]+ tokens/s", "at N tokens/s", shown).splitlines() == SESSION.splitlines()
    said = json.loads((folder / "chat.json").read_text())
    turn = [("user", None), ("assistant", "analysis"), ("assistant", "final")]
    assert [(message["role"], message["channel"]) for message in said] == [("system", None), *turn, *turn]
    assert said[4]["content"][0]["text"] == "and\nin two lines?"
    assert b"\x1b[2m" in terminal.bytes  # dim


def test_ctrl_c_stops_the_answer_and_not_the_session(folder):
    """Guards the habit of a hand: an answer is cut short and kept, at the prompt a hint comes, Ctrl-D goes."""
    with _terminal(folder, "rambler/published", "--chat") as terminal:
        terminal.wait_for("\n>")
        os.write(terminal.descriptor, b"Tell me a story.\r")
        time.sleep(2)
        terminal.say("\x03\x03\x03", "the answer was interrupted after")  # a hand that insists
        terminal.wait_for("\n>", 2)
        terminal.say("\x03", "(Ctrl-D or /quit ends the session)\n>")
        terminal.say("/stats\r", "effort: medium\n>")  # before the prompt is there, Ctrl-D would go astray
        os.write(terminal.descriptor, b"\x04")
        assert terminal.ended() == 0
        assert "Traceback" not in terminal.text


def test_calls_are_shown_as_calls_and_take_results(folder):
    """Guards tools in a chat: the call is shown, /result answers it, and a second one has nothing to answer."""
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    with _terminal(folder, "caller", "--chat", "--tools", "tools.json", NO_COLOR="1") as terminal:
        terminal.wait_for("\n>")
        terminal.say("/result early\r", "no call")
        terminal.say("Umbrella?\r", 'call get_weather({"city": "Paris"}): /result answers it\n>')
        terminal.say('/result {"rain": true}\r', "/result answers it\n>")
        terminal.say("/save calls.json\r", "written to calls.json\n>")
        os.write(terminal.descriptor, b"\x04")
        assert terminal.ended() == 0
        assert not re.search(rb"\x1b\[[0-9;]*[1-9][0-9;]*m", terminal.bytes)  # NO_COLOR: neither colour nor dim
    said = json.loads((folder / "calls.json").read_text())
    results = [message for message in said if message["role"] == "tool"]
    assert [(m["name"], m["content"][0]["text"]) for m in results] == [("functions.get_weather", '{"rain": true}')]


def test_a_prompt_in_a_terminal_shows_progress_and_takes_it_away(folder):
    """Guards the one-shot look in 80 columns: bars while it loads and compiles, nothing of them in the end."""
    with _terminal(folder, "thinker", "Why?", XDG_CACHE_HOME=str(folder / "new")) as terminal:
        assert terminal.ended() == 0
        assert b"loading" in terminal.bytes
        assert b"compiling" in terminal.bytes
        lines = terminal.text.splitlines()
    assert not any(line.startswith(("loading", "compiling")) for line in lines)
    assert scripted.ANSWER in lines
    assert lines[0].startswith("loaded safetensors (Hugging Face, MXFP4 experts) in ")
    assert all(not line[79:].strip() or " " not in line[78:] for line in lines)


def test_a_chat_can_be_piped(folder, tmp_path):
    """Guards scripts, of Windows too: answers alone on stdout, a backslash continues a line, no code of a terminal."""
    lines = "\ufeffHello\n/effort high\none \\\nprompt\n\n/nonsense\n" + f"/save {tmp_path / 'chat.json'}\n"
    environment = {"XDG_CACHE_HOME": str(folder / "home"), "NO_COLOR": None}
    asked = ("--checkpoint", folder / "thinker", "--chat", "--max-context-tokens", "180")
    done = processes.run("gptoss_jax.generate", *asked, stdin=lines, environment=environment)
    assert done[:2] == (0, 2 * (scripted.ANSWER + "\n")), done.stderr
    assert "unknown command /nonsense" in done.stderr
    assert json.loads((tmp_path / "chat.json").read_text())[1]["content"][0]["text"] == "Hello"
    assert "\x1b" not in done.stdout + done.stderr


def test_a_chat_has_the_days_date_unless_told(folder, tmp_path):
    """Guards --date in a chat: today's, as in other runtimes; none and a date of one's own are echoed and saved."""
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "thinker", "--chat", "--max-new-tokens", "1")
    before = time.strftime("%Y-%m-%d")
    for flags, date in (((), None), (("--date", "none"), "none"), (("--date", "2025-01-31"), "2025-01-31")):
        lines = f"Hello\n/save {tmp_path / 'chat.json'}\n"
        done = processes.run(*asked, *flags, stdin=lines, environment=environment)
        dates = (before, time.strftime("%Y-%m-%d")) if date is None else (date,)
        assert any(f"effort medium, date {each}, seed 0\n" in done.stderr for each in dates), done.stderr
        system = json.loads((tmp_path / "chat.json").read_text())[0]["content"][0]
        assert (system["conversation_start_date"] or "none") in dates
    done = processes.run(*asked, "--messages", tmp_path / "chat.json", stdin="Hello\n", environment=environment)
    assert done.returncode == 0, done.stderr  # its own system message has its own date
    assert "\nseed 0\n" in done.stderr


def test_a_chat_survives_runs_without_breaks(folder):
    """Guards a conversation against a paste of a million letters or spaces: a line, and the session goes on."""
    lines = "Hello\n" + "ACGT" * 250_000 + "\na" + " " * 1_000_000 + "b\nHello\n"
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "thinker", "--chat")
    done = processes.run(*asked, stdin=lines, environment={"XDG_CACHE_HOME": str(folder / "home")})
    assert done[:2] == (0, 2 * (scripted.ANSWER + "\n")), done.stderr
    assert "exceed the context of 4096 tokens" in done.stderr
    assert "its longest run of white space is 1000000" in done.stderr


def test_a_full_context_is_said_and_the_session_goes_on(folder):
    """Guards long chats: what no longer fits is refused in a line, the conversation stays, /reset makes room."""
    lines = "Hello\n" + "word " * 100 + "\nHello\n/reset\n" + "word " * 10 + "\n"
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    asked = ("--checkpoint", folder / "thinker", "--chat", "--max-context-tokens", "180")
    done = processes.run("gptoss_jax.generate", *asked, stdin=lines, environment=environment)
    assert done[:2] == (0, 3 * (scripted.ANSWER + "\n")), done.stderr
    assert (
        "exceed the context of 180 tokens: shorten them, or raise --max-context-tokens (/reset forgets" in done.stderr
    )


def test_a_chat_goes_on_from_a_file(folder, tmp_path):
    """Guards --chat --messages: what was said is there, and a system message of its own cannot be changed."""
    lines = "Hello\n/save FIRST\n/quit\n".replace("FIRST", str(tmp_path / "first.json"))
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    asked = ("--checkpoint", folder / "thinker", "--chat")
    assert processes.run("gptoss_jax.generate", *asked, stdin=lines, environment=environment).returncode == 0
    lines = "/effort high\nAgain\n/save SECOND\n".replace("SECOND", str(tmp_path / "second.json"))
    again = (*asked, "--messages", tmp_path / "first.json")
    done = processes.run("gptoss_jax.generate", *again, stdin=lines, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "brings its own system message, so reasoning_effort cannot be set" in done.stderr
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "second.json"))
    assert second[: len(first)] == first
    assert [m["content"][0]["text"] for m in second if m["role"] == "user"] == ["Hello", "Again"]


def test_several_calls_take_their_results_in_order(folder, tmp_path):
    """Guards /result: the first call that waits is named and answered first; the model goes on after the last."""
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g", "f")]
    chat = [{"role": "user", "content": "Umbrella?"}, {"role": "assistant", "tool_calls": calls}]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "thinker", "--chat", "--messages", tmp_path / "chat.json")
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    lines = f"/result one\n/result two\n/result three\n/save {tmp_path / 'all.json'}\n/reset\n/result four\n"
    done = processes.run(*asked, stdin=lines, environment=environment)
    assert done[:2] == (0, scripted.ANSWER + "\n"), done.stderr
    waits = [line for line in done.stderr.splitlines() if line.endswith(" waits: /result answers it")]
    assert [line.split()[0] for line in waits] == ["functions.f", "functions.g", "functions.f"]
    assert done.stderr.splitlines()[-1] == "no call waits for a result"
    results = [m for m in json.loads((tmp_path / "all.json").read_text()) if m["role"] == "tool"]
    assert [(m["name"][-1], m["content"][0]["text"]) for m in results] == [("f", "one"), ("g", "two"), ("f", "three")]
    done = processes.run(*asked, stdin="/result one\nNever mind.\n", environment=environment)
    assert done[:2] == (0, scripted.ANSWER + "\n"), done.stderr
    assert "functions.g is left without a result\nfunctions.f is left without a result\n" in done.stderr


def test_a_session_survives_what_is_no_text_and_what_is_no_number(folder):
    """Guards long sessions: bad bytes and logits that are not finite cost a line and an answer, not the session."""
    scripted.write(folder / "spoilt", "thinker", spoilt=" short")
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "spoilt", "--chat", "--max-new-tokens", "30")
    done = processes.run(
        *asked, stdin=b"Hell\xff\nHello\n/reset\nHello\n/stats\n/quit\n/help\n", environment=environment
    )
    assert done[:2] == (0, 2 * "Because air scatters short\n"), done.stderr
    assert "what was entered is not valid UTF-8" in done.stderr
    assert done.stderr.count("the answer ended at step 26: logits are not finite") == 2
    assert "answers: 2, of 52 tokens" in done.stderr
    assert "this list" not in done.stderr


def test_a_chat_does_not_read_its_history_again(folder):
    """Guards long sessions: a turn begins as the prompt before it did, and reads what is new."""
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    lines = f"Count: {' '.join(map(str, range(300)))}\n" + "Go on.\n/stats\n" * 2
    done = processes.run(
        "gptoss_jax.generate", "--checkpoint", folder / "thinker", "--chat", stdin=lines, environment=environment
    )
    assert done[:2] == (0, 3 * f"{scripted.ANSWER}\n"), done.stderr
    (first, _), (asked, cached) = [
        tuple(map(int, pair)) for pair in re.findall(r"prompts: (\d+) tokens, (\d+) ", done.stderr)
    ]
    assert asked - cached < first / 2 + 2 * (128 + 40)  # of the first prompt, and of what is new in two turns


def test_hidden_reasoning_is_shown_by_a_command(folder):
    """Guards the hint after an answer that was cut while reasoning: in a session it names the session's command."""
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "thinker", "--chat", "--max-new-tokens", "8")
    done = processes.run(*asked, stdin="Hello\n/reset\n/reasoning\nHello\n", environment=environment)
    assert done.stderr.count("no final answer: the model was still reasoning") == 2
    assert done.stderr.count("still reasoning (/reasoning shows it)") == 1


COMMANDS = """\
/effort
/EFFORT HIGH
/system Be kind.
/system
/retry
/Clear
/rest
/
/save ~/absent/chat.json
/save
/exit
/help
"""
SAID = """\
effort is medium (low, medium, high)
effort is high (low, medium, high)
instructions are set
there are no instructions (before: Be kind.)
there is no answer to draw anew
the conversation is forgotten (0 messages)
unknown command /rest: did you mean /reset? (a space in front makes it text)
unknown command /: /help lists them (a space in front makes it text)
cannot write {home}/absent/chat.json: there is no folder {home}/absent
/save: expected a file name
"""


def test_every_command_says_what_it_did(folder):
    """Guards commands that act without a word, other spellings, and whoever wants to know, not to set."""
    environment = {"XDG_CACHE_HOME": str(folder / "home"), "HOME": str(folder)}
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "thinker", "--chat", "--quiet")
    done = processes.run(*asked, stdin=COMMANDS, environment=environment)
    assert done[:2] == (0, ""), done.stderr
    assert "".join(done.stderr.splitlines(keepends=True)[1:]) == SAID.format(home=folder)


def test_an_answer_is_drawn_anew_in_place_of_the_last(folder, tmp_path):
    """Guards /retry: another draw, which the conversation holds alone; again, another; and no answer after /reset."""
    saved = [tmp_path / f"{i}.json" for i in range(3)]
    lines = "Hello\n/save {}\n/retry\n/save {}\n/retry\n/save {}\n/reset\n/retry\n".format(*saved)
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "rambler" / "published", "--chat")
    done = processes.run(*asked, "--max-new-tokens", "8", stdin=lines, environment=environment)
    assert done.returncode == 0, done.stderr
    conversations = [json.loads(path.read_text()) for path in saved]
    assert [[message["role"] for message in each].count("user") for each in conversations] == [1, 1, 1]
    assert len(set(map(json.dumps, conversations))) == 3
    assert done.stderr.endswith("there is no answer to draw anew\n")


def test_what_was_entered_is_remembered_by_the_next_session(folder, tmp_path):
    """Guards the arrow keys, and prompts from others' eyes; a home that keeps nothing is no reason to stop."""
    home = tmp_path / "home"
    for first in (True, False):
        with _terminal(folder, "thinker", "--chat", XDG_CACHE_HOME=str(home)) as terminal:
            terminal.wait_for("\n>")
            terminal.say("/stats\r" if first else "\x1b[A\x1b[A\r", "effort: medium\n>")
            terminal.type("/quit\r")
            assert terminal.ended() == 0
    history = home / "gptoss_jax" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert [line for line in history.read_text().splitlines() if line[:1] == "+"] == 2 * ["+/stats", "+/quit"]
    history.unlink()
    history.mkdir()
    with _terminal(folder, "thinker", "--chat", XDG_CACHE_HOME=str(home)) as terminal:
        terminal.wait_for("\n>")
        terminal.say("/stats\r", "effort: medium\n>")
        terminal.type("\x04")
        assert terminal.ended() == 0


def test_a_long_history_keeps_its_end(tmp_path):
    """Guards a file that only grows."""
    path = tmp_path / "chat_history"
    entries = [f"\n# some day\n+{'x' * 1000} {i}\n" for i in range(1100)]
    path.write_text("".join(entries))
    chat_input._prepare(path)
    kept = path.read_text()
    assert len(kept) <= chat_input.HISTORY_BYTES // 2
    assert kept == "".join(entries[-len(kept) // len(entries[-1]) :])[-len(kept) :]
    assert kept.startswith("\n# some day\n+x")


def test_a_cut_turn_goes_on_from_its_thoughts(folder, tmp_path):
    """Guards "continue" in a session and from a file: the model, which thinks once, must see what it had thought."""
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "thinker", "--max-new-tokens")
    lines = f"Hello\n/save {tmp_path / 'thought.json'}\ncontinue\n/save {tmp_path / 'answer.json'}\n"
    done = processes.run(*asked, "12", "--chat", stdin=lines, environment=environment)
    begun = scripted.ANSWER[: len(done.stdout) - 1]
    assert done[:2] == (0, begun + "\n"), done.stderr
    assert begun
    for name, answer in (("thought.json", scripted.ANSWER), ("answer.json", scripted.ANSWER)):
        done = processes.run(*asked, "40", "--messages", tmp_path / name, "continue", environment=environment)
        assert done[:2] == (0, answer + "\n"), done.stderr
    said = json.loads((tmp_path / "answer.json").read_text())
    assert [(m["role"], m["channel"], m.get("is_cut")) for m in said[1:]] == [
        ("user", None, None),
        ("assistant", "analysis", True),
        ("user", None, None),
        ("assistant", "final", True),
    ]
