"""How the demo model is made: its data, its first weights, its evaluation, and its packing into the package."""
