"""What every route of a server shares."""

import asyncio
import dataclasses
import functools

from deepseek_jax.serving.answers import Mailbox
from deepseek_jax.serving.metrics import Metrics
from deepseek_jax.serving.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server bears.

    Attributes:
        body_bytes: of a request's body.
        body_seconds: in which it must come.
        request_seconds: after which a text ends wherever it stands.
        heartbeat_seconds: after which a stream says that it still lives.
        requests: that are answered at the same time; more get 429.
        requests_per_minute: of one key, or of one address without keys; 0 for any number.
    """

    body_bytes: int = 16 << 20
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    heartbeat_seconds: float = 10.0
    requests: int = 1024
    requests_per_minute: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """The model that a server serves, and its limits."""

    model: Model
    limits: Limits = Limits()
    metrics: Metrics = dataclasses.field(default_factory=Metrics)

    @functools.cached_property
    def mailbox(self) -> Mailbox:
        """What brings deltas into the event loop; made by the first request in it."""
        return Mailbox(asyncio.get_running_loop())
