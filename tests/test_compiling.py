"""Whoever runs the tests can override how they compile."""

from tests.support import compiling


def test_flags_of_the_user_come_last():
    own = "--xla_backend_optimization_level=2"
    assert compiling.flags_with(own) == f"{compiling.FLAGS} {compiling.PATIENCE} {own}"
    assert compiling.flags_with("") == f"{compiling.FLAGS} {compiling.PATIENCE}"
