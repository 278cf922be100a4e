"""Files <-> leaves: the Orbax checkpoint, and the published formats that one is made from."""
