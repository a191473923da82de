"""A server for clients of OpenAI's API, in this order: `server` (socket, signals, drain), `door` (host, key, rate,
log), `app` (routes), `body` and `fields` (JSON, checked), `jobs` (what the engine is asked), `completions` and
`chat` (the two forms of an answer), `answers` (deltas as they come), `events` (SSE), `metrics`.

Only this room and `experiments.serve` import Starlette and uvicorn: the extra `serve`.
"""
