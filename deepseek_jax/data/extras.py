"""Libraries that only some corpora need: the [data] extra, and `datasets`."""

import importlib
from typing import Any

from deepseek_jax.data.documents import CorpusError

INSTALL = "pip install -e '.[data]'"  # in a clone: no package index has this project


def optional_library(module: str, package: str | None = None, install: str = INSTALL) -> Any:
    """Import a module.

    Raises:
        CorpusError: it is not installed; the message says how to do so.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.split(".")[0]
        raise CorpusError(f"reading this corpus needs {package}; install it in the clone with: {install}") from error
