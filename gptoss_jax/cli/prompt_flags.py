"""The flags that say what the system and developer messages say."""

from absl import flags

from gptoss_jax.harmony.settings import DEFAULT_KNOWLEDGE_CUTOFF, REASONING_EFFORTS

PROMPT_FLAGS = (
    "system",
    "reasoning_effort",
    "date",
    "knowledge_cutoff",
    "tools",
    "builtin_tools",
    "response_format",
)
FLAG_OF = {"instructions": "system", "current_date": "date"}
"""Field of `Settings` -> flag, where they differ."""


def define_flags() -> None:
    """The flags named in PROMPT_FLAGS; `prompts.opening` reads them."""
    flags.DEFINE_string("system", None, "TEXT: Instructions: the developer message, or system prompt.")
    flags.DEFINE_enum("reasoning_effort", "medium", REASONING_EFFORTS, "How long the model is asked to think.")
    flags.DEFINE_string(
        "date",
        None,
        "DATE: The date in its prompt: YYYY-MM-DD, today or none; left out: today with --chat, else none.",
    )
    flags.DEFINE_string("knowledge_cutoff", DEFAULT_KNOWLEDGE_CUTOFF, "MONTH: The end of its knowledge: YYYY-MM.")
    flags.DEFINE_string("tools", None, "FILE: Functions that it may call: a JSON list in OpenAI's form.")
    flags.DEFINE_list("builtin_tools", [], "NAMES: Tools that it knows: browser, and python or stateless_python.")
    flags.DEFINE_string(
        "response_format", None, "FILE: The form that answers are held to: OpenAI's response_format, JSON."
    )
