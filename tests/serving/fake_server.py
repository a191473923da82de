"""Serve the fake engine, to try clients without a model: `python -m tests.serving.fake_server --port=8000`."""

import argparse

from deepseek_jax.serving.app import make_app
from deepseek_jax.serving.server import Server, bind
from deepseek_jax.serving.service import Service
from tests.serving.served import fake_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds_per_token", type=float, default=0.02)
    parser.add_argument("--template", default="v3", help="v3, r1, v3.1")
    parser.add_argument("--key", action="append", default=[])
    flags = parser.parse_args()
    service = Service(model=fake_model(flags.template, seconds_per_token=flags.seconds_per_token))
    Server(make_app(service, keys=flags.key), service, bind("127.0.0.1", flags.port), 5.0).run()
