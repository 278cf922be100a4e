"""What is computed: the config's numbers, the mesh, the layers, the transformer and its cache."""
