"""The forms by the URL that clients send them to, and our own."""

from collections.abc import Mapping

from gptoss_jax.api import chat, completions, plain, responses
from gptoss_jax.api.asked import Form

PLAIN: Form = plain
OPENAI: Mapping[str, Form] = {
    "/v1/chat/completions": chat,
    "/v1/responses": responses,
    "/v1/completions": completions,
}
