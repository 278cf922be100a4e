"""Published checkpoints in, Orbax checkpoints out: readers, tables, and the command."""
