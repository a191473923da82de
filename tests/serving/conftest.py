"""One server over the fake engine for all tests of a worker, and the official client of it."""

import openai
import pytest

from deepseek_jax.serving.service import Limits
from tests.serving.served import fake_model, served
from tests.support.patience import SECONDS

BODY_BYTES = 100_000


@pytest.fixture(scope="session")
def server():
    limits = Limits(body_bytes=BODY_BYTES, body_seconds=SECONDS, heartbeat_seconds=0.1)
    with served(fake_model(), limits) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
