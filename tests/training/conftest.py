"""What tests of runs share."""

import pytest
from absl import logging


@pytest.fixture
def absl_to_caplog(caplog):
    """Let `caplog` see what absl logs."""
    logging.get_absl_logger().addHandler(caplog.handler)
    yield
    logging.get_absl_logger().removeHandler(caplog.handler)
