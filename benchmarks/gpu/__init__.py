"""What one GPU does, beside what its memory and tensor cores allow: sections, each in a process of its own."""
