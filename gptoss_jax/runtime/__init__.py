"""The object people hold, how its weights are loaded, and what is known of the machine."""
