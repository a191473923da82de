"""HTTP as clients speak it, with the patience that a loaded machine needs: httpx gives up after five seconds."""

import functools

import httpx2

from tests.support.patience import SECONDS

get = functools.partial(httpx2.get, timeout=SECONDS)
post = functools.partial(httpx2.post, timeout=SECONDS)
options = functools.partial(httpx2.options, timeout=SECONDS)
stream = functools.partial(httpx2.stream, timeout=SECONDS)
Client = functools.partial(httpx2.Client, timeout=SECONDS)
