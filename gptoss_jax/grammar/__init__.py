"""Answers held to a form: JSON schemas and other grammars -> which token ids may follow, all through an answer."""
