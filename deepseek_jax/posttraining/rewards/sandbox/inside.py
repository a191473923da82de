"""The program inside a sandbox. It is started as a script by `session`, with two pipes and nothing else.

    to it       {"token", "limits"}, then {"token", "source"} or {"token", "script"}, then {"token", "call"}
    from it     {"pid"}, then for each message {"token", "value"} or {"token", "error"}

It never learns what an answer should be. Foreign code runs in this very process and may change all of it, this loop
included; the worst it can say is a wrong value. A script of tests (trusted as little) runs in a sandbox of its own;
its calls leave it as {"token", "call"}, and the answer comes back as the next message.
"""

import builtins
import contextlib
import json
import os
import sys

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 4))
if __name__ == "__main__":  # a script, with no path to the package and nothing that it should show to foreign code
    sys.path.insert(0, ROOT)

from deepseek_jax.posttraining.rewards.sandbox import system_calls, values, walls  # noqa: E402

if __name__ == "__main__":
    sys.path.remove(ROOT)
    sys.argv[0] = ""
    os.environ.clear()


# What a script of tests must not take for an exception that the code raised, as these names are of no class.
NO_FUNCTION, NO_VALUE = "no function of that name", "no plain value"


class CandidateError(Exception):
    """What the tested code raised, where that is no exception of Python's own; its name is the message."""


def raised(name: str) -> Exception:
    """Return what a script sees for an exception of the tested code: Python's own of that name, so it can expect it."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # some cannot be made without arguments
            return kind()
    return CandidateError(name)


class Loop:
    """Answers messages, one after the other, until the pipe closes."""

    def __init__(self, requests: int, answers: int):
        self._requests = os.fdopen(requests, "rb")
        self._answers = answers
        self._token = ""  # of the message that is answered
        self._namespace: dict = {"__name__": "candidate", "__builtins__": __builtins__}

    def receive(self) -> dict:
        """Return the next message; end the process when the pipe closes."""
        line = self._requests.readline()
        if not line:
            os._exit(0)
        message = json.loads(line)
        self._token = message["token"]
        return message

    def send(self, **message) -> None:
        """Write one message, with the token of the one that it answers."""
        line = json.dumps({"token": self._token, **message}).encode() + b"\n"
        while line:
            line = line[os.write(self._answers, line) :]

    def answer(self, message: dict) -> None:
        """Do what a message says and send the value, or the name of what was raised."""
        try:
            if "source" in message:
                exec(compile(message["source"], "candidate", "exec"), self._namespace)
                value = None
            elif "script" in message:
                value = self._test(message)
            else:
                function, arguments, named = message["call"]
                if function not in self._namespace:
                    return self.send(error=NO_FUNCTION)
                called = self._namespace[function]
                value = called(*values.decode(arguments), **{key: values.decode(item) for key, item in named.items()})
            try:
                encoded = values.encode(value)
            except (ValueError, RecursionError):
                return self.send(error=NO_VALUE)
            self.send(value=encoded)
        except BaseException as error:  # SystemExit too. Its text may be hostile, its type's name is short enough
            self.send(error=str(type(error).__name__)[:100])

    def _test(self, message: dict) -> None:
        function = message["function"]

        def candidate(*arguments, **named):
            named = {key: values.encode(item) for key, item in named.items()}
            self.send(call=[function, values.encode(list(arguments)), named])
            reply = self.receive()
            if "error" in reply:
                raise raised(reply["error"])
            return values.decode(reply["value"])

        exec(
            compile(message["script"], "tests", "exec"),
            {"__name__": "tests", "candidate": candidate, function: candidate},
        )


def main() -> None:
    """Build the walls, start the process inside them, and end when it ends."""
    requests, answers, disk_bytes = map(int, sys.argv[1:])
    del sys.argv[1:]
    loop = Loop(requests, answers)
    try:
        walls.die_with_parent()
        walls.build(disk_bytes)
        child = os.fork()
    except OSError as error:
        loop.send(refused=str(error))
        return
    if child:
        loop.send(pid=child)
        os.close(requests)
        os.close(answers)
        os.waitpid(child, 0)
        return
    message = loop.receive()
    try:
        walls.enter(message["limits"])
        system_calls.refuse_system_calls(walls.libc)
    except OSError as error:
        loop.send(refused=str(error))
        return
    loop.send(value=None)
    while True:
        loop.answer(loop.receive())


if __name__ == "__main__":
    main()
