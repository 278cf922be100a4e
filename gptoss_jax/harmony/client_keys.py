"""Keys that clients write around a conversation and that tell a model nothing: taken out, and named."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from gptoss_jax.errors import short

HARMLESS = frozenset(
    # who wrote it, when, under which number, in what state; what it cost, how it was kept and shown
    """
    id uuid object model models modelName modelIdx parent_id parentId children_ids childrenIds message_id
    conversation_id thread_id session_id run_id request_id created created_at createdAt updated_at updatedAt
    timestamp time date status index usage token_count tokens cache_control cachePoint prompt_cache_key metadata
    response_metadata usage_metadata provider_specific_fields provider_options providerOptions providerMetadata
    annotations citations logprobs finish_reason native_finish_reason stop_reason done done_reason signature
    thought_signature system_fingerprint service_tier safety_identifier user store stream stream_options keep_alive
    total_duration load_duration prompt_eval_count prompt_eval_duration eval_count eval_duration weight feedback
    """.split()
)
"""None of these is what somebody said, or says how the model is to answer."""

_DEFAULTS: Mapping[str, object] = {
    **{"type": "message", "tool_choice": "auto", "parallel_tool_calls": True, "n": 1},
    **{"example": False, "prefix": False, "partial": False, "is_error": False},  # LangChain's, Mistral's, Anthropic's
}
# A key that says once more what stands under others -> these.
_REPEATING = {
    **dict.fromkeys(("text", "output_text", "parts", "parsed"), ("content",)),
    "thinking_blocks": ("reasoning_content", "reasoning", "thinking"),  # LiteLLM's
    "parsed_arguments": ("arguments",),  # OpenAI's own client's
}
_OPENED_OBJECTS = ("function", "function_call")
_OPENED = ("messages", "content", "tool_calls", "tools", *_OPENED_OBJECTS)
_OF_CALLS = ("id", "index")
_RESULTS = "results"


def without_harmless(document: object) -> tuple[Any, list[str]]:
    """A conversation, or a list of tools, in JSON without the keys that change nothing; and a line that names them.

    Looks at messages, their parts and calls, and at tools; never into arguments, schemas or results.
    """
    names: dict[str, None] = {}
    return _stripped(document, "", names), _remarks(names)


def results_without_harmless(documents: object) -> tuple[Any, list[str]]:
    """The same for a list of tool results, whose content is the tool's own."""
    names: dict[str, None] = {}
    return _stripped(documents, _RESULTS, names), _remarks(names)


def are_parts(content: list[Any]) -> bool:
    """Whether a message's list is one of parts; a tool may give any other, whose keys are its own."""
    return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)


def _remarks(names: Iterable[str]) -> list[str]:
    shown = ", ".join(map(short, itertools.islice(names, 20)))
    return [f"ignored, since the prompt has no place for it: {shown}"] if shown else []


def _stripped(value: object, within: str, names: dict[str, None]) -> object:
    if isinstance(value, list):
        if within == "content" and not are_parts(value):
            return value
        return [_stripped(part, within, names) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, part in value.items():
        if part not in (None, [], {}) and _is_harmless(key, value, within):
            names[key] = None
        elif within != _RESULTS and isinstance(part, dict if key in _OPENED_OBJECTS else list) and key in _OPENED:
            kept[key] = _stripped(part, key, names)
        else:
            kept[key] = part
    return kept


def _is_harmless(key: str, value: Mapping[str, Any], within: str) -> bool:
    if within == "tool_calls" and key in _OF_CALLS:
        return False
    if within == _RESULTS and key == "role":
        return value[key] in ("tool", "function")
    if key in HARMLESS or re.match(r"_|x[-_]", key):
        return True
    if key in _DEFAULTS and value[key] == _DEFAULTS[key]:
        return True
    others = [other for other in _REPEATING.get(key, ()) if other in value or "role" in value]
    return any(_repeats(value[key], value.get(other)) for other in others)


def _repeats(part: object, content: object) -> bool:
    """Whether a part of a message or call is another in another form."""
    text = _plain_text(content)
    if part == content or (text is not None and _plain_text(part) == text):
        return True
    try:
        return json.loads(text or "") == part
    except (ValueError, RecursionError):
        return False


def _plain_text(content: object) -> str | None:
    """A text, or that of a list of parts; None where there is more than text, an image say."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else "" if content is None else None
    texts = [_text_of_part(part) for part in content if not (isinstance(part, dict) and part.keys() == {"type"})]
    return None if None in texts else "".join(filter(None, texts))


def _text_of_part(part: object) -> str | None:
    text = part.get("text", part.get("thinking")) if isinstance(part, dict) else None
    return text if isinstance(text, str) else None
