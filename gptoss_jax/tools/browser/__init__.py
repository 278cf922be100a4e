"""The browser tool: pages that models search, open and cite, from a folder or from named hosts."""
