"""A server in a thread, on a free port."""

import contextlib
import threading

from deepseek_jax.serving.app import make_app
from deepseek_jax.serving.chat_format import ChatFormat
from deepseek_jax.serving.model import Model
from deepseek_jax.serving.server import Server, bind, host_names
from deepseek_jax.serving.service import Limits, Service
from tests.serving.fake_engine import FakeEngine, chat_tokenizer
from tests.support.patience import SECONDS

CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Bern"}\n```<｜tool▁call▁end｜>'
SCRIPTS = {
    "weather": f"Let me look.<｜tool▁calls▁begin｜>{CALL}<｜tool▁calls▁end｜>",
    "riddle": "<think>\nIt may be an egg.\n</think>\n\nAn egg.",
    "endless": "<think>\nOn the one hand",
    "pause": "  ",
    "greet": "Grüße, 世界!",
}


def fake_model(template="v3", **settings) -> Model:
    """Return a model without weights; `settings` are those of `FakeEngine`."""
    tokenizer = chat_tokenizer()
    engine = FakeEngine(tokenizer, **{"scripts": SCRIPTS, **settings})
    chat = template and ChatFormat(tokenizer, None, vocab_size=tokenizer.vocab_size, name=template)
    return Model(
        name="fake",
        engine=engine,
        tokenizer=tokenizer,
        num_positions=engine.num_positions,
        most_jobs=engine.most_waiting,
        chat=chat,
        grammars=chat and chat.grammars,
    )


@contextlib.contextmanager
def served(model: Model, limits: Limits | None = None, *, drain_seconds=5.0, log=None, **door):
    """Yield a running server; it has drained when the context ends."""
    service = Service(model=model, limits=limits or Limits())
    lines: list[str] = []
    app = make_app(service, hosts=host_names("127.0.0.1"), log=lines.append if log is None else log, **door)
    server = Server(app, service, bind("127.0.0.1", 0), drain_seconds)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda _: ready.set(),))
    thread.start()
    try:
        assert ready.wait(SECONDS)
        server.lines, server.service = lines, service
        yield server
    finally:
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()
