"""The HTTP server: OpenAI's completions and chat over the engine."""
