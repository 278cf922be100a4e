r"""Answers over HTTP: OpenAI's APIs, for any client that speaks them.

    python -m gptoss_jax.serve --checkpoint DIR
    python -m gptoss_jax.serve --checkpoint DIR --port 8000 --slots 32 \
        --max-context-tokens 32768 --api-key-file keys.txt

    curl http://127.0.0.1:8000/v1/chat/completions \
        -H 'Content-Type: application/json' \
        -d '{"messages": [{"role": "user", "content": "What is 417 + 258?"}]}'

Without --checkpoint the package's tiny demo model answers. Paths are
/v1/chat/completions, /v1/responses, /v1/completions, /v1/models, /health and
/metrics; docs/serve.md says what differs from OpenAI's. Options below are
defaults that a request overrides; without --seed each request draws its own.

It listens to this machine alone unless --host says otherwise: give
--api-key-file then, and put what ends TLS in front of it. SIGTERM or Ctrl-C:
what waits is refused, what runs has --finish-seconds to end; a second one ends
it at once.

Exit codes: 0 ended by SIGTERM; 1 a bug, or a device that failed; 2 bad input;
130 ended by Ctrl-C.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import sys

from absl import flags

from gptoss_jax.cli import command, model_flags, prompt_flags, sampling_flags, tool_flags
from gptoss_jax.errors import GptossError

SECTIONS = {
    "Who may ask, and where": ("host", "port", "api_key_file", "allow_origins", "model_names"),
    "How much": (
        "slots",
        "pool_tokens",
        "queue",
        "connections",
        "max_body_bytes",
        "stored_responses",
        "finish_seconds",
        "quiet",
    ),
    "What the system and developer messages say, where a request does not": prompt_flags.PROMPT_FLAGS,
    "What is run here for requests to /v1/responses that ask for it": tool_flags.TOOL_FLAGS,
    "How tokens are drawn, where a request does not say": sampling_flags.SAMPLING_FLAGS,
    "Model and machine": (*model_flags.MODEL_FLAGS, *sampling_flags.ENGINE_FLAGS),
}


def define_flags() -> None:
    """This command's flags, the shared ones among them."""
    flags.DEFINE_string("host", "127.0.0.1", "ADDRESS: Where it listens: 127.0.0.1 is this machine alone, 0.0.0.0 all.")
    flags.DEFINE_integer("port", 8000, "N: At which port; 0: any that is free, which is said.")
    flags.DEFINE_string("api_key_file", None, "FILE: Keys, one a line, one of which a request needs.")
    flags.DEFINE_list("allow_origins", [], "URLS: Pages in browsers that may ask, such as http://localhost:3000.")
    flags.DEFINE_list("model_names", [], "NAMES: What requests may call the model; left out: by its size.")
    flags.DEFINE_integer("slots", 16, "N: Answers that are drawn at once; rounded up to the mesh's data shards.")
    flags.DEFINE_integer("pool_tokens", None, "N: Tokens in the cache at most; left out: all slots at their longest.")
    flags.DEFINE_integer("queue", 128, "N: Answers that may wait for a slot; more get 429 and Retry-After.")
    flags.DEFINE_integer(
        "connections", None, "N: Connections open at once; more get 503. Left out: 1000, or half of `ulimit -n`."
    )
    flags.DEFINE_integer("max_body_bytes", 8 << 20, "N: Bytes of a request at most.")
    flags.DEFINE_integer("stored_responses", 1000, "N: Responses that a next one can go on from, in memory; 0: none.")
    flags.DEFINE_float("finish_seconds", 30.0, "X: Time that answers under way have after SIGTERM.")
    flags.DEFINE_bool("quiet", False, "Print no notes and no progress on stderr: only what is wrong.")
    prompt_flags.define_flags()
    tool_flags.define_flags()
    sampling_flags.define_flags()
    model_flags.define_flags()


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    if arguments:
        raise GptossError(f"{arguments[0]}: expected flags only (--checkpoint names the model)")
    from gptoss_jax.cli import serving  # here, so that --help need not wait for what it imports

    sys.exit(serving.run(flags.FLAGS))


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "serve", SECTIONS)


if __name__ == "__main__":
    cli()
