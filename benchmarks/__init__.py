"""Commands that measure what the documents claim; each prints a table, then one JSON line."""
