"""The forms by the URL that clients send them to, and our own."""

from collections.abc import Mapping

from gptoss_jax.api import chat, completions, plain, responses
from gptoss_jax.api.asked import Form

PLAIN: Form = plain
RESPONSES: Form = responses
OPENAI: Mapping[str, Form] = {
    "/v1/chat/completions": chat,
    "/v1/responses": RESPONSES,
    "/v1/completions": completions,
}
