"""Requests and responses as clients write them, OpenAI's forms and our own: JSON <-> what an engine is asked."""
