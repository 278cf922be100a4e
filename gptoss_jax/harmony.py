"""Messages -> token ids, by openai-harmony. Knows no jax.

This stage renders one user message; conversations, tools and the parsing of answers have an issue of their own.
"""

from openai_harmony import Conversation, Message, ReasoningEffort, Role, SystemContent

from gptoss_jax import tokenizer

REASONING_EFFORTS = {
    "low": ReasoningEffort.LOW,
    "medium": ReasoningEffort.MEDIUM,
    "high": ReasoningEffort.HIGH,
}


def render_prompt(text: str, *, reasoning_effort: str = "medium", vocab_path: str | None = None) -> list[int]:
    """Token ids of a conversation in which the user says `text` and the assistant is to answer.

    No date is put in: the same text always gives the same ids.
    """
    system = SystemContent.new().with_reasoning_effort(REASONING_EFFORTS[reasoning_effort])
    messages = [
        Message.from_role_and_content(Role.SYSTEM, system),
        Message.from_role_and_content(Role.USER, text),
    ]
    encoding = tokenizer.harmony_encoding(vocab_path)
    return encoding.render_conversation_for_completion(Conversation.from_messages(messages), Role.ASSISTANT)
