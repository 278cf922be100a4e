"""What an engine has done since it was made, in numbers."""

import dataclasses


@dataclasses.dataclass
class Statistics:
    """Counts that only grow; the difference of two copies is what happened between them.

    Attributes:
        prompt_tokens: of the prompts that got a slot; again for each time that one was preempted and got another.
        cached_prompt_tokens: those among them that the prefix cache held, so that nobody read them.
        evictions: blocks and snapshots of the prefix cache that gave way to others.
        prefill_dispatches: chunks of prompts, of one slot or of several at once.
        decode_dispatches: groups of decoding steps.
        decode_steps: of all slots at once.
        preemptions: sequences that gave their pages back, to be computed again.
    """

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    evictions: int = 0
    prefill_dispatches: int = 0
    decode_dispatches: int = 0
    decode_steps: int = 0
    preemptions: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that nobody had to read; 0 before the first."""
        return self.cached_prompt_tokens / max(self.prompt_tokens, 1)
