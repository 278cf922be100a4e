"""The python tool: what scripts and sessions give, every limit, and attempts to get out of the sandbox."""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss_jax.errors import GptossError
from gptoss_jax.tools.python.python_tool import PythonTool
from gptoss_jax.tools.python.sandbox import Limits

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
LIMITS = Limits(seconds=60, cpu_seconds=5, memory_bytes=256 * MIB, disk_bytes=8 * MIB, output_bytes=8192, processes=16)


def namespaces_are_here() -> bool:
    """What util-linux says, so that a sandbox that we broke is a failure and no skip."""
    unshare = shutil.which("unshare")
    return bool(unshare) and subprocess.run([unshare, "-Urpmfn", "true"], capture_output=True).returncode == 0


def _tool(**options) -> PythonTool:
    try:
        return PythonTool(**options)
    except GptossError as error:
        if namespaces_are_here():
            raise
        pytest.skip(f"no user namespaces on this machine: {error}")


@pytest.fixture(scope="module")
def python() -> Iterator[PythonTool]:
    """Scripts, with small limits."""
    tool = _tool(limits=LIMITS)
    yield tool
    tool.close()


@pytest.fixture
def session() -> Iterator[PythonTool]:
    """A session, with small limits."""
    tool = _tool(limits=LIMITS, stateful=True)
    yield tool
    tool.close()


def _descendants() -> list[int]:
    """Processes that this one has started, and theirs."""
    found, waiting = [], [os.getpid()]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for task in Path(f"/proc/{process}/task").iterdir():
                started = [int(word) for word in (task / "children").read_text().split()]
                found, waiting = found + started, waiting + started
    return found


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('one')\nprint('two')", "one\ntwo\n"),
        ("1 + 1", ""),
        ("", ""),
        ("import sys\nprint(__name__, sys.argv)", "__main__ ['script.py']\n"),
        ("import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')", "a\nb\nc\n"),
        ("print('é – 【1†L2】 <|end|>')", "é – 【1†L2】 <|end|>\n"),
        ("import sys\nsys.stdout.buffer.write(b'a\\xff\\x00\\xe2\\x82')", "a\ufffd\x00\ufffd"),
        ("raise SystemExit('stopped here')", "stopped here\n"),
        ("import atexit, threading\natexit.register(print, 'last')\nthreading.Timer(0.05, print, ['late']).start()",
         "late\nlast\n"),
        ("input()", 'Traceback (most recent call last):\n  File "script.py", line 1, in <module>\n    input()\n'
                    "EOFError: EOF when reading a line\n"),
        ("x = (", '  File "script.py", line 1\n    x = (\n        ^\nSyntaxError: \'(\' was never closed\n'),
        ("x = '\0'", "SyntaxError: source code string cannot contain null bytes\n"),
        ("import sqlite3, ssl, hashlib, decimal, json\nprint(open('note', 'w').write('four'))", "4\n"),
        ("import os\nprint({*os.environ} - {'LC_CTYPE'}, os.listdir(), os.getcwd())", "set() [] /mnt/data\n"),
        ("class A: pass\nimport pickle\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)", "A\n"),
        ("from multiprocessing import Pool\nwith Pool(2) as pool:\n    print(pool.map(abs, [-1, -2]))", "[1, 2]\n"),
        ("import asyncio, subprocess, sys\nprint(asyncio.run(asyncio.sleep(0, 7)))\n"
         "print(subprocess.run([sys.executable, '-c', 'print(8)'], capture_output=True).stdout)", "7\nb'8\\n'\n"),
    ],
)  # fmt: skip
def test_a_script_gives_what_it_prints(python, code, text):
    """Guards what the model reads: streams in order, tracebacks without our frames, any bytes, no state, no input."""
    output = python.call("python", code)
    assert (output.text.replace("    ~^~\n", ""), output.failed) == (text, False)


def test_a_script_keeps_nothing(python):
    """Guards calls against each other: variables and files are those of one call."""
    python.call("python", "x = 1\nopen('kept', 'w').close()")
    assert python.call("python", "import os\nprint(os.listdir('.'), 'x' in globals())").text == "[] False\n"


def test_a_session_keeps_variables_and_files_and_shows_a_last_expression(session):
    """Guards what the system message promises: a stateful environment like a notebook."""
    cells = (
        ("x = 20\nx + 1", "21\n"),
        ("open('note', 'w').write('kept')", "4\n"),
        ("print(open('/mnt/data/note').read(), x, _)", "kept 20 4\n"),
        ("None", ""),
        ("", ""),
        ("def f(): return 1 // 0\nf()", "ZeroDivisionError: integer division or modulo by zero\n"),
        ("import os\nif not os.fork(): print('child')\nelse: os.wait() and print('parent')", "child\nparent\n"),
        ("raise SystemExit(3)", "SystemExit: 3\n"),
        ("x = (", "SyntaxError: '(' was never closed\n"),
        ("x", "20\n"),
    )
    for code, end in cells:
        output = session.call("python", code)
        assert output.text.endswith(end) and not output.failed and "inside" not in output.text
    assert session.call("python", "x").text == "20\n"


def test_a_session_that_ends_says_so_and_begins_anew(session):
    """Guards a model that goes on with variables it no longer has."""
    session.call("python", "x = 1")
    output = session.call("python", "import os\nprint('bye')\nos._exit(0)")
    assert (output.text, output.failed) == ("bye\n[the session has ended; its variables and files are lost]", True)
    assert session.call("python", "x").text.endswith("NameError: name 'x' is not defined\n")


LIMIT_CASES = {
    "an endless loop": ("print('begun', flush=True)\nwhile True: pass", "begun\n[stopped after 1 seconds]"),
    "signals caught": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *_: None)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
        "[stopped after 1 seconds]",
    ),
    "one process's memory": ("try:\n  x = bytearray(8 << 30)\nexcept MemoryError:\n  print('refused')", "refused\n"),
    "memory of many": (
        "import os, time\nfor _ in range(8):\n  if not os.fork():\n    x = bytearray(60 << 20)\n    break\n"
        "time.sleep(60)",
        "[stopped: its processes held more than 256 MiB of memory]",
    ),
    "shared memory": (
        "import mmap, os, time\nfor _ in range(8):\n  if not os.fork():\n    m = mmap.mmap(-1, 100 << 20)\n"
        "    for n in range(0, 100 << 20, 4096): m[n] = 1\n    time.sleep(60)\ntime.sleep(60)",
        "[stopped: its processes held more than 256 MiB of memory]",
    ),
    "memory that no process maps": ("import os\ntry: os.memfd_create('x')\nexcept OSError as e: print(e.errno)", "1\n"),
    "the disk": (
        "try:\n  for n in range(99):\n    with open(str(n), 'wb') as f: f.write(bytes(1 << 20))\n"
        "except OSError as e: print(n, e.errno)",
        "8 28\n",
    ),
    "a file's size": ("try: open('f', 'wb').truncate(1 << 40)\nexcept OSError as e: print(e.errno)", "27\n"),
    "inodes": ("try:\n  for n in range(9999): open(str(n), 'w').close()\nexcept OSError as e: print(e.errno)", "28\n"),
    "a crash": ("import os, signal\nprint('on')\nos.kill(os.getpid(), signal.SIGSEGV)", "on\n[ended by SIGSEGV]"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMIT_CASES)
def test_a_limit_holds(name):
    """Guards the machine that a model's code runs on, and that the model reads which limit it met."""
    code, text = LIMIT_CASES[name]
    tool = _tool(limits=Limits(**{**vars(LIMITS), "seconds": 1 if "seconds" in text else 60}))
    began = time.monotonic()
    output = tool.call("python", code)
    assert (output.text, output.failed) == (text, text.endswith("]"))
    assert time.monotonic() - began < 40
    assert _descendants() == []


def test_cpu_time_ends_a_process():
    """Guards a session, whose calls may each be short, and a script with threads."""
    tool = _tool(limits=Limits(**{**vars(LIMITS), "cpu_seconds": 1}))
    assert tool.call("python", "while True: pass").text == "[stopped after 1 seconds of CPU time]"


def test_a_fork_bomb_ends_with_the_call():
    """Guards the machine's processes: sixteen at a time, and none afterwards."""
    tool = _tool(limits=Limits(**{**vars(LIMITS), "seconds": 1}))
    most, ended = 0, threading.Event()

    def watch():
        nonlocal most
        while not ended.wait(0.05):
            most = max(most, len(_descendants()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = tool.call("python", "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass")
    ended.set()
    watcher.join()
    assert output.failed and output.text.endswith("[stopped after 1 seconds]")
    assert 10 <= most <= 20  # with the launcher and the sandbox's first process
    assert _descendants() == []


def test_a_gigabyte_of_output_is_cut_while_it_is_read(python):
    """Guards the server's memory and the model's context; the end stays, since a traceback is there."""
    pages, held, ended = (
        Path("/proc/self/statm"),
        [],
        threading.Event(),
    )  # this process: a fork of it is none of its own

    def watch():
        while not ended.wait(0.05):
            held.append(int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = python.call(
        "python", "import os\nfor _ in range(1024): os.write(1, b'x' * (1 << 20))\nprint('end')\n1 / 0"
    )
    ended.set()
    watcher.join()
    assert output.text.startswith("x" * 4096 + "\n[... 1,073,7")
    assert output.text.endswith("ZeroDivisionError: division by zero\n") and "end\n" in output.text
    assert len(output.text) < 8192 + 100
    assert max(held) - min(held) < 100 * MIB


def test_nothing_outlives_a_call_or_a_session(python, session):
    """Guards the machine against what scripts leave: daemons of a call, a session's children, half a close."""
    daemon = "import os, time\nif not os.fork():\n  os.setsid()\n  if not os.fork(): time.sleep(60)\n  os._exit(0)\n"
    began = time.monotonic()
    assert python.call("python", f"{daemon}print('left')").text == "left\n"
    assert _descendants() == []
    assert session.call("python", f"{daemon}print('left')").text == "left\n"
    assert len(_descendants()) >= 3
    session.close()
    assert _descendants() == [] and time.monotonic() - began < 40


def test_close_ends_a_call_that_runs():
    """Guards a server that closes: it does not wait for a script's two minutes."""
    tool = _tool(limits=LIMITS)
    began, outputs = time.monotonic(), []
    caller = threading.Thread(target=lambda: outputs.append(tool.call("python", "import time\ntime.sleep(60)")))
    caller.start()
    time.sleep(0.3)
    tool.close()
    caller.join()
    assert time.monotonic() - began < 40 and _descendants() == []
    refused = tool.call("python", "print(1)")
    assert (refused.text, refused.failed) == ("the sandbox did not start: the tool is closed", True)


def test_the_sandbox_dies_with_its_owner(tmp_path):
    """Guards against orphans of a server that is killed."""
    _tool(limits=LIMITS).close()
    owner = (
        "from gptoss_jax.tools.python.python_tool import PythonTool\ntool = PythonTool(stateful=True)\n"
        "tool.call('python', 'x = 1')\nprint('ready', flush=True)\nimport time\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    started = [pid for pid in _descendants() if pid != process.pid]
    process.kill()
    process.wait()
    process.stdout.close()
    ends_at = time.monotonic() + 5
    while time.monotonic() < ends_at and any(Path(f"/proc/{pid}").exists() for pid in started):
        time.sleep(0.02)
    assert len(started) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in started)


TRY = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, f, *arguments):
    try:
        result = f(*arguments)
    except Exception as error:
        return print(name, "refused")
    print(name, "refused" if result == -1 else f"WORKED {result!r}"[:300])
def read(path):
    with open(path, "rb") as file: return file.read(100)
def write(path):
    with open(path, "wb") as file: return file.write(b"x")
def call(*arguments):
    return libc.syscall(*arguments)
"""


def _worked(tool: PythonTool, attempts: str) -> str:
    """What of a script's attempts was not refused, and a word for one that did not run to its end."""
    output = tool.call("python", f"{TRY}\n{attempts}\nprint('all tried')")
    lines = output.text.splitlines()
    assert lines[-1] == "all tried", output.text
    return "\n".join(line for line in lines[:-1] if not line.endswith(" refused"))


def test_no_network(python):
    """Guards hosts that the machine reaches: its own ports, names, other families; with the same attempt outside."""
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as abstract:
        server.bind(("127.0.0.1", 0))
        server.listen()
        abstract.bind(f"\0gptoss-{os.getpid()}")
        abstract.listen()
        tcp = f"tried('tcp', socket.create_connection, ('127.0.0.1', {server.getsockname()[1]}), 2)"
        unix = f"tried('abstract', lambda: socket.socket(socket.AF_UNIX).connect('\\0gptoss-{os.getpid()}') or 1)"
        outside = subprocess.run([sys.executable, "-c", f"{TRY}\n{tcp}\n{unix}"], capture_output=True, text=True)
        assert outside.stdout.count("WORKED") == 2
        other = "\n".join(
            f"tried({family!r}, socket.socket, {family}, {kind})"
            for family, kind in ((2, 1), (2, 2), (2, 3), (10, 1), (16, 3), (17, 3), (38, 5), (40, 1))
        )
        names = (
            "tried('name', socket.getaddrinfo, 'example.net', 80)\ntried('dns', socket.gethostbyname, 'example.org')"
        )
        assert _worked(python, f"{tcp}\n{unix}\n{other}\n{names}") == ""


def test_no_files_of_the_machine(python, tmp_path):
    """Guards passwords, the repository, home, secrets and devices, by path, link and .. ; with one attempt outside."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    of_the_machine = (
        "/etc/passwd /etc/shadow /proc/1/environ /proc/self/environ /proc/cpuinfo /proc/1/root/etc/passwd "
        "/proc/sys/kernel/core_pattern /sys/kernel/uevent_helper /mnt/data/../../etc/passwd /dev/mem /dev/kmsg /dev/tty"
    )
    paths = (secret, ROOT / "README.md", Path.home() / ".bashrc", *of_the_machine.split())
    reads = "\n".join(f"tried({str(path)!r}, read, {str(path)!r})" for path in paths)
    outside = subprocess.run([sys.executable, "-c", f"{TRY}\n{reads}"], capture_output=True, text=True)
    assert "secret WORKED" in outside.stdout and "passwd WORKED" in outside.stdout
    links = "\n".join(f"os.symlink({str(path)!r}, 'l{n}')\ntried('l{n}', read, 'l{n}')" for n, path in enumerate(paths))
    assert _worked(python, f"{reads}\n{links}") == ""
    listed = python.call("python", "import os\nprint(sorted(os.listdir('/')), os.path.exists('/proc/self'))").text
    assert not {"'proc'", "'sys'", "'home'", "'work'", "'var'", "'run'"} & set(listed.strip("[]\n").split(", "))


def test_packages_of_the_interpreter_are_hidden(python):
    """Guards code that is installed beside the interpreter, and a script against what this machine happens to have."""
    code = "import os, sysconfig\np = sysconfig.get_path('stdlib') + '/site-packages'\nprint(list(os.walk(p))[0][1:])"
    assert python.call("python", code).text == "([], [])\n"


def test_what_python_is_made_of_cannot_be_written(python):
    """Guards the interpreter that this process runs on."""
    attempts = """
tried("module", write, os.__file__)
tried("new module", write, os.path.dirname(os.__file__) + "/planted.py")
tried("interpreter", write, sys.executable)
tried("chmod", lambda: os.chmod(sys.executable, 0o777) or 1)
tried("unlink", lambda: os.unlink(os.__file__) or 1)
tried("root", write, "/planted")
tried("dev", write, "/dev/planted")
tried("node", lambda: os.mknod("/mnt/data/node", 0o20666, os.makedev(1, 1)) or 1)
tried("library", write, "/usr/lib/planted.so")
"""
    assert _worked(python, attempts) == ""


def test_no_way_to_capabilities_or_other_namespaces(python):
    """Guards the namespaces: mounts, new user namespaces, setuid, ptrace, and the numbers of capabilities left."""
    attempts = """
tried("mount", libc.mount, b"tmpfs", b"/mnt/data", b"tmpfs", 0, b"")
tried("remount", libc.mount, None, b"/", None, 0x1020, b"")
tried("bind", libc.mount, b"/", b"/mnt/data", None, 4096, None)
tried("umount", libc.umount2, b"/dev/null", 2)
tried("chroot", os.chroot, "/mnt/data")
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x08000000, 0x04000000, 0x02000000, 0):
    tried(f"unshare {flag:x}", libc.unshare, flag)
    if flag: tried(f"clone {flag:x}", call, {"x86_64": 56, "aarch64": 220}[os.uname().machine], flag | 17, 0, 0, 0, 0)
tried("clone3", call, 435, ctypes.create_string_buffer(88), 88)
tried("setns", libc.setns, 0, 0)
tried("setuid", lambda: os.setuid(0) or 1)
tried("setresgid", lambda: os.setresgid(0, 0, 0) or 1)
tried("chown", lambda: os.chown(".", 0, 0) or 1)
tried("hostname", lambda: socket.sethostname("x") or 1)
tried("nice", os.nice, -5)
tried("ptrace 1", libc.ptrace, 16, 1, 0, 0)
tried("ptrace parent", libc.ptrace, 0, 0, 0, 0)
tried("process_vm_readv", libc.process_vm_readv, 1, None, 0, None, 0, 0)
tried("open_tree", call, 428, -100, b"/", 1)
tried("io_uring", call, 425, 1, None)
tried("bpf", call, {"x86_64": 321, "aarch64": 280}[os.uname().machine], 0, None, 0)
for kind in ("x32 getpid",): tried(kind, call, 0x40000000 + 39)
"""
    assert _worked(python, attempts) == ""
    capabilities = """
import ctypes, os
libc = ctypes.CDLL(None)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
print(libc.capget(header, sets), list(sets), [libc.prctl(23, n, 0, 0, 0) for n in range(40)].count(1))
print(libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0), os.getuid(), os.getgid())
"""
    assert python.call("python", capabilities).text == "0 [0, 0, 0, 0, 0, 0] 0\n1 2 65534 65534\n"


def test_no_signal_leaves(python):
    """Guards the process that called, and its group: a script's signals reach its own kind only."""
    attempts = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tried("parent", lambda: os.kill({os.getpid()}, signal.SIGTERM) or 1)
tried("group of parent", lambda: os.killpg({os.getpgid(0)}, signal.SIGTERM) or 1)
tried("nobody else", lambda: os.kill(-1, signal.SIGTERM) or 1)
for target in (0, 1): os.kill(target, signal.SIGTERM)
os.kill(1, signal.SIGKILL)
print("parent of the first", os.getppid(), "refused")
"""
    assert _worked(python, attempts) == ""


def test_open_files_do_not_get_in(python, tmp_path):
    """Guards what this process has open, inheritable files and sockets too."""
    with open(tmp_path / "open", "w") as file, socket.socket() as connection:
        os.set_inheritable(file.fileno(), True)
        os.set_inheritable(connection.fileno(), True)
        look = "\n  try: print(n, os.fstat(n).st_mode >> 12, end=' ')\n  except OSError: pass"
        code = f"import os\nfor n in range(4096):{look}"
        # /dev/null, two ends of a pipe, that of messages, that of sources
        assert python.call("python", code).text == "0 2 1 1 2 1 3 1 4 1 "


def test_messages_that_a_script_forges_change_its_own_call_only(session, python):
    """Guards the reader of messages, which are the script's to write as well."""
    assert not session.call("python", "import os\nos.write(3, b'done\\n' * 9); x = 1").failed
    forged = python.call(
        "python", "import os\nfor _ in range(99): os.write(3, b'failed: \\x1b[31m' + b'x' * 4000 + b'\\n')"
    )
    assert forged.failed and len(forged.text) < 3000 and "\x1b" not in forged.text
    assert python.call("python", "print('whole')").text == "whole\n"


def test_a_package_folder_is_read_only(tmp_path):
    """Guards `packages`: modules in it are found, by scripts alone, and cannot be changed."""
    tmp_path.chmod(0o755)  # where root asks, scripts are nobody's
    (tmp_path / "mine.py").write_text("value = 42\n")
    tool = _tool(limits=LIMITS, packages=tmp_path)
    assert tool.call("python", "import mine\nprint(mine.value)\nopen(mine.__file__, 'w')").text.startswith(
        "42\nTraceback"
    )
    with pytest.raises(GptossError, match=r"packages is .*none.*, expected a folder \(pip install --target"):
        PythonTool(packages=tmp_path / "none")


def test_scripts_run_side_by_side(python):
    """Guards a server's many conversations: one script's time is not another's wait."""
    outputs = {}
    code = "import time\nprint(time.monotonic())\ntime.sleep(2)\nprint(time.monotonic())"
    callers = [
        threading.Thread(target=lambda n=n: outputs.update({n: python.call("python", code).text})) for n in range(3)
    ]
    for step, caller in itertools.product((threading.Thread.start, threading.Thread.join), callers):
        step(caller)
    begins, ends = zip(*(map(float, text.split()) for text in outputs.values()), strict=True)
    assert len(begins) == 3 and max(begins) < min(ends)


def test_what_is_no_code_is_refused(python):
    """Guards recipients and sizes."""
    assert python.takes("python") and not python.takes("python.run") and not python.takes("functions.python")
    assert python.call("browser.open", "1").failed and python.call("python", "#" * 2_000_000).failed
    with pytest.raises(GptossError, match="seconds is 0, expected a number above 0"):
        Limits(seconds=0)


def test_without_namespaces_there_is_no_tool():
    """Guards the one promise above all: code never runs open. The error names what was missing and what to do."""
    if not namespaces_are_here():
        pytest.skip("no user namespaces on this machine, which the other cases find")
    ask = "from gptoss_jax.tools.python.python_tool import PythonTool\nPythonTool()"
    command = f"echo 0 > /proc/sys/user/max_user_namespaces; exec {sys.executable} -c '{ask}'"
    ran = subprocess.run(["unshare", "-Ur", "sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(
        "gptoss_jax.errors.GptossError: the python tool runs code in a sandbox only, and there can be none here: "
        "user and other namespaces: No space left on device. It takes Linux 5.14"
    )
