r"""How likely a model finds a text: log probabilities of tokens, perplexity.

    python -m gptoss_jax.score --checkpoint DIR "The sky is blue."
    python -m gptoss_jax.score --checkpoint DIR --file book.txt --stride 1024
    python -m gptoss_jax.score --checkpoint DIR --file sentences.txt --lines
    python -m gptoss_jax.score --checkpoint DIR --file book.txt --json

Plain text, not a conversation: it is scored as it stands, by the same forward
that generates. The first token has nothing before it and is not scored. A text
longer than the context goes through in windows: each token is scored once, and
has at least --max-context-tokens minus --stride tokens before it.

Prints one line a text: tokens scored, total and mean log probability (natural
logarithm), perplexity; after several texts a line for all of them. --tokens
prints a line a token, --json one document with ids, logprobs and settings.
Exit codes: 0 scored, 2 bad input, 75 another process of several hosts is lost,
130 interrupted, 141 stdout's reader left.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

from absl import flags

from gptoss_jax.cli import command, flag_values, model_flags

TEXTS = ("text", "file", "token_ids")
SECTIONS = {
    "What is scored (text on stdin where none of these is given)": (*TEXTS, "lines"),
    "How": ("max_context_tokens", "stride", "top_logprobs"),
    "What is shown": ("tokens", "json", "quiet"),
    "Model and machine": model_flags.MODEL_FLAGS,
}


def define_flags() -> None:
    """This command's flags, the shared ones among them."""
    flags.DEFINE_string("text", None, "TEXT: The text; the same as giving it without a flag.")
    flags.DEFINE_string("file", None, "FILE: A text file; - is stdin.")
    flags.DEFINE_bool("lines", False, "Each line is a text of its own; empty lines are left out.")
    flags.DEFINE_string("token_ids", None, "IDS: Token ids in place of text: 1,2,3.")
    flags.DEFINE_integer("max_context_tokens", 4096, "N: Tokens in a window at most; memory follows it.")
    flags.DEFINE_integer("stride", None, "N: Tokens between the beginnings of two windows; left out: half a window.")
    flags.DEFINE_integer(
        "top_logprobs", 0, "N: Report this many of the likeliest tokens at each place, up to 20 (--json)."
    )
    flags.DEFINE_bool("tokens", False, "Print a line for each token: place, id, log probability, text.")
    flags.DEFINE_bool("json", False, "Print one JSON document.")
    flags.DEFINE_bool("quiet", False, "Print no notes and no progress on stderr: only what is wrong.")
    model_flags.define_flags()


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    from gptoss_jax.cli import scoring  # here, so that --help need not wait for what it imports

    options = flags.FLAGS
    flag_values.refuse_together(options, ("tokens", "json"), ("token_ids", "lines"))
    flag_values.refuse_without(options, ("top_logprobs", "json"))
    source = flag_values.only_source(options, arguments, "text", TEXTS)
    echoed = [name for names in SECTIONS.values() for name in names]
    scoring.score(options, source or ("file", "-"), echoed)


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "score", SECTIONS)


if __name__ == "__main__":
    cli()
