"""What commands share: the command line, flags, the terminal, the chat session."""
