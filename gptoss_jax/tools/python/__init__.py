"""The python tool: code that models write, run in a sandbox of Linux namespaces."""
