"""The watch of the other processes ends with its own process."""

import threading

import jax

from deepseek_jax.parallel import watch
from tests.support.patience import SECONDS


class Client:
    """A coordinator's client that answers until it is shut down, and then raises, as JAX's does."""

    open = True

    def __init__(self):
        self.refused = threading.Event()

    def shutdown(self):
        """Return when the watch has met the end, before the farewell says what it means."""
        self.open = False
        assert self.refused.wait(SECONDS)

    def key_value_dir_get(self, folder):
        if not self.open:
            self.refused.set()
            raise RuntimeError("shut down")
        return []

    def key_value_set(self, key, value, allow_overwrite):
        pass


def test_a_watch_ends_after_the_farewell_and_ends_nobody(monkeypatch):
    """A thread in C++ while Python ends aborts the process with 134, after its work was done."""
    client, codes = Client(), []
    monkeypatch.setattr(watch, "_over", threading.Event())
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watch, "GRACE_SECONDS", SECONDS)  # `_over` ends the wait
    monkeypatch.setattr(watch, "end", codes.append)  # what it raises in the thread would fail no test
    monkeypatch.setattr(jax.distributed, "shutdown", client.shutdown)
    thread = threading.Thread(target=watch._keep_looking, args=(watch.Watch(client, 0),), daemon=True)
    thread.start()
    watch._say_farewell(thread)
    assert not thread.is_alive() and codes == []
