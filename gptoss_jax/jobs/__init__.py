"""Batch jobs: rows of files in, a line for each out, exactly once whatever happens to the process."""
