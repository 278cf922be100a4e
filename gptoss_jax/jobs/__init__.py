"""Batch jobs: files of requests in, a file of answers out, each row exactly once."""
