"""Tools that models call: what runs them, and the loop that answers calls. It knows no JAX."""
