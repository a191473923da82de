"""Code that attacks the judge that runs it. `f` returns "escaped" where it got what it must not get.

`OUTSIDE` stands for a folder of the judge, `JUDGE` for the judge's process number, `SECRET` for a variable of its
environment. Those of `HANGING` do not end by themselves.
"""

ATTACKS = {
    "fork bomb": """
import os
def f(x):
    for _ in range(100):
        if os.fork() == 0:
            while True: pass
    return "escaped"
""",
    "fork by the C library": """
import ctypes
def f(x):
    return "escaped" if ctypes.CDLL(None).fork() >= 0 else "none"
""",
    "thread bomb": """
import threading, time
def f(x):
    for _ in range(1000):
        threading.Thread(target=time.sleep, args=(60,)).start()
    return "escaped"
""",
    "memory": """
def f(x):
    kept = []
    for _ in range(64):
        kept.append(bytearray(1 << 26))
    return "escaped"
""",
    "memory that is not address space": """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.shmget(0, ctypes.c_size_t(1 << 32), 0o1600) >= 0: return "escaped"
    os.memfd_create("x")
    return "escaped"
""",
    "disk": """
def f(x):
    for i in range(100):
        with open(f"/scratch/{i}", "wb") as file: file.write(bytes(1 << 20))
    return "escaped"
""",
    "many files": """
def f(x):
    for i in range(10000): open(f"/scratch/{i}", "w").close()
    return "escaped"
""",
    "open files": """
import os
def f(x):
    for _ in range(10000): os.pipe()
    return "escaped"
""",
    "zip bomb": """
import zlib
def f(x):
    packed = zlib.compress(bytes(1 << 26))
    return "escaped" if len(b"".join(zlib.decompress(packed) for _ in range(16))) > 1 << 29 else "none"
""",
    "huge print": """
import sys
def f(x):
    for _ in range(20): sys.stdout.write("x" * (1 << 20)); sys.stderr.write("x" * (1 << 20))
    return "printed"
""",
    "huge answer": """
def f(x): return "x" * (1 << 22)
""",
    "signal to the parent": """
import os, signal
def f(x):
    for number in (os.getppid(), -1, JUDGE):
        try: os.kill(number, signal.SIGKILL)
        except OSError: continue
        if number == JUDGE: return "escaped"
    return "none"
""",
    "signal to the process group": """
import os, signal
def f(x):
    os.killpg(os.getpgid(0), signal.SIGKILL)
    os.kill(0, signal.SIGTERM)
    return "alive"
""",
    "TCP": """
import socket
def f(x):
    socket.create_connection(("1.1.1.1", 80), timeout=1)
    return "escaped"
""",
    "loopback": """
import socket
def f(x):
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).bind(("127.0.0.1", 0))
    return "escaped"
""",
    "UDP": """
import socket
def f(x):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53))
    return "escaped"
""",
    "unix socket": """
import socket
def f(x):
    socket.socket(socket.AF_UNIX).bind("\\0name")
    return "escaped"
""",
    "DNS": """
import socket
def f(x):
    socket.gethostbyname("example.com")
    return "escaped"
""",
    "the reward's own files": """
import sys
def f(x):
    for name, module in sys.modules.items():
        if "posttraining" in name and getattr(module, "__file__", None):
            try: return "escaped" + open(module.__file__).read()[:20]
            except OSError: pass
    return "none"
""",
    "import of the judge": """
import sys, os
def f(x):
    sys.path[:0] = ["OUTSIDE", "/", os.getcwd()]
    import deepseek_jax.posttraining.rewards.code
    return "escaped"
""",
    "proc of the judge": """
def f(x):
    for name in ("environ", "mem", "maps", "fd/0", "cmdline"):
        for number in ("self", "1", JUDGE):
            try: open(f"/proc/{number}/{name}", "rb").read(1)
            except OSError: continue
            return "escaped"
    return "none"
""",
    "mounting proc": """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None)
    os.mkdir("/scratch/p")
    if libc.mount(b"proc", b"/scratch/p", b"proc", 0, None) == 0: return "escaped"
    os.unshare(os.CLONE_NEWUSER)
    return "escaped"
""",
    "ptrace": """
import ctypes
def f(x):
    return "escaped" if ctypes.CDLL(None).ptrace(16, JUDGE, 0, 0) == 0 else "none"
""",
    "memory of the judge": """
import ctypes
def f(x):
    space = ctypes.create_string_buffer(8)
    here = (ctypes.c_uint64 * 2)(ctypes.addressof(space), 8)
    there = (ctypes.c_uint64 * 2)(id(None), 8)
    return "escaped" if ctypes.CDLL(None).process_vm_readv(JUDGE, here, 1, there, 1, 0) >= 0 else "none"
""",
    "writing outside": """
import os, sys
def f(x):
    for folder in ("OUTSIDE", "/", "/tmp", "/usr/lib", "/dev/shm", os.path.dirname(os.__file__), "/empty", "/root"):
        try: open(folder + "/written", "w").close()
        except OSError: continue
        return "escaped"
    return "none"
""",
    "symbolic links": """
import os
def f(x):
    os.symlink("OUTSIDE", "/scratch/link")
    open("/scratch/link/written", "w").close()
    return "escaped"
""",
    "climbing out": """
import os
def f(x):
    if os.path.exists("../" * 20 + "OUTSIDE"): return "escaped"
    os.mkdir("/scratch/r")
    os.chroot("/scratch/r")
    return "escaped"
""",
    "chmod": """
import os
def f(x):
    for path in ("/", "/usr", os.__file__):
        try: os.chmod(path, 0o777)
        except OSError: continue
        return "escaped"
    return "none"
""",
    "becoming root": """
import os
def f(x):
    os.setuid(0)
    return "escaped"
""",
    "raising limits": """
import resource
def f(x):
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU):
        try: resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (ValueError, OSError): continue
        return "escaped"
    return "none"
""",
    "answers in frames and objects": """
import gc, sys
def f(x):
    frame = sys._getframe()
    while frame:
        if "right" in repr(frame.f_locals): return "escaped"
        frame = frame.f_back
    return "escaped" if any("right-" + "answer" in repr(o) for o in gc.get_objects() if type(o) is dict) else "none"
""",
    "printing answers": """
import os
def f(x):
    for fd in range(3): os.write(fd, b'{"token": "", "value": "right-answer"}\\n')
    return "none"
""",
    "os._exit(0)": """
import os
def f(x): os._exit(0)
""",
    "sys.exit": """
import sys
def f(x): sys.exit(0)
""",
    "exit while loading": "raise SystemExit(0)\n",
    "patched builtins": """
import builtins, json
builtins.AssertionError = builtins.Exception
builtins.all = builtins.any = lambda *a: True
json.dumps = lambda *a, **k: "true"
def f(x): return True
""",
    "__eq__ that agrees": """
class Always(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = str.__hash__
def f(x): return Always("wrong")
""",
    "an object that pickles": """
class Bomb:
    def __reduce__(self): return (print, ("escaped",))
def f(x): return Bomb()
""",
    "hostile text of an exception": """
class Hostile(Exception):
    def __str__(self): return "x" * (1 << 34)
    __repr__ = __str__
def f(x): raise Hostile
""",
    "hostile name of an exception": """
class Meta(type):
    __name__ = property(lambda cls: "right-answer" * 10000)
class Hostile(Exception, metaclass=Meta): pass
def f(x): raise Hostile
""",
    "atexit": """
import atexit, os
atexit.register(lambda: os.system("touch OUTSIDE/written"))
def f(x): raise SystemExit
""",
    "closing the pipes": """
import os
def f(x):
    os.closerange(0, 100)
    return "none"
""",
    "writing into the pipes": """
import os
def f(x):
    for fd in range(3, 4096):
        try: os.write(fd, b'{"token": "0", "value": "right-answer"}\\n' * 100)
        except OSError: pass
    return "none"
""",
    "recursion": """
import sys
sys.setrecursionlimit(10**9)
def f(x): return f(x) + f(x)
""",
    "nested answer": """
import os, sys
def f(x):
    frame = sys._getframe(1)
    frame.f_locals["self"]._answers
    os.write(frame.f_locals["self"]._answers, b"[" * 500000 + b"\\n")
    return "none"
""",
    "cyclic answer": """
def f(x):
    value = []
    value.append(value)
    return value
""",
    "NaN": 'def f(x): return float("nan")\n',
    "huge integer": "def f(x): return 10 ** 100000\n",
    "deleting the folder": """
import os, shutil
def f(x):
    shutil.rmtree("/scratch", ignore_errors=True)
    shutil.rmtree(os.path.dirname(os.__file__) + "/json", ignore_errors=True)
    return "none" if os.path.exists(os.path.dirname(os.__file__) + "/json/decoder.py") else "escaped"
""",
    "another program": """
import os, subprocess
def f(x):
    try: subprocess.run(["/bin/sh", "-c", "true"])
    except OSError: pass
    os.execv("/proc/self/exe", ["python"])
    return "escaped"
""",
    "standard input": """
import sys
def f(x): return "escaped" if sys.stdin.read() else "none"
""",
    "secrets of the environment": """
import os
def f(x): return "escaped" if "SECRET" in str(dict(os.environ)) or "PATH" in os.environ else "none"
""",
    "crash": """
import ctypes
def f(x): ctypes.string_at(1)
""",
}

HANGING = {
    "endless loop": "def f(x):\n    while True: pass\n",
    "endless loop in C": "def f(x): return len(str(7 ** (10 ** 9)))\n",
    "endless loop while loading": "while True: pass\n",
    "sleep": "import time\ndef f(x): time.sleep(1000)\n",
    "catching everything": """
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "ignoring SIGTERM": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: time.sleep(1)
""",
    "stopping itself": """
import os, signal, time
def f(x):
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)
""",
    "expression of minutes": "import re\ndef f(x): return re.match('(a+)+b', 'a' * 40)\n",
}
