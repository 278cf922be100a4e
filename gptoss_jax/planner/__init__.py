"""What a mesh would hold, move and compute, and how fast, from the model's numbers alone. Knows no JAX."""
