"""Answers over HTTP: OpenAI's APIs for any number of connections, one engine in a thread of its own."""
