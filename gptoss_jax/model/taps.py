"""Activations by name: what a forward gives beside its logits, for those who study or train the model.

Taps are named before the program is traced: a program that has none is the same as if there were no such thing.
"""

from collections.abc import Callable, Iterable

from jaxtyping import Array, Float

from gptoss_jax.errors import GptossError

PLACES = {
    "residual": "the residual stream after the layer, [B, T, D]",
    "router": "the router's logits, [B, T, E]",
    "attention": "what each head attends to, before the output projection, [B, T, N, H]",
}
"""The places in each layer that can be tapped: "layers/3/router" is layer 3's."""

Tap = Callable[[str, Float[Array, "..."]], None]
"""Called by a layer with the name of a place and what is there."""


class Taps:
    """Collects the activations of one forward while it is traced.

    Attributes:
        found: name -> activation, of those that were asked for.
    """

    def __init__(self, names: Iterable[str], num_layers: int):
        """Raises GptossError for a name that no place of this model has."""
        self._names, self._num_layers = frozenset(names), num_layers
        known = {f"layers/{layer}/{place}" for layer in range(num_layers) for place in PLACES}
        if unknown := sorted(self._names - known):
            raise GptossError(
                f"tap {unknown[0]!r}, expected layers/0 to layers/{num_layers - 1}, and of each one of "
                f"{', '.join(PLACES)}: for example layers/0/router"
            )
        self.found: dict[str, Float[Array, ...]] = {}

    def of_layer(self, layer: int) -> Tap:
        """What layer `layer` calls."""

        def tap(place: str, activation: Float[Array, "..."]) -> None:
            name = f"layers/{layer}/{place}"
            if name in self._names:
                self.found[name] = activation

        return tap

    def anew(self) -> "Taps":
        """The same names, and nothing found: for a separately traced part, which gives its own activations."""
        return Taps(self._names, self._num_layers)
