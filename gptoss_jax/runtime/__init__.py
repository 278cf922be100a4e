"""The object people hold, how its weights are loaded, and what is asked of the devices."""
