"""What a request asks, whatever form it came in, and what a form is."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from openai_harmony import Message

from gptoss_jax.engine.request import Request
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.grammar.compiled import CompiledForm
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from gptoss_jax.api.tool_turn import ToolTurn


@dataclasses.dataclass(frozen=True)
class Options:
    """How an answer is drawn and where it ends: the defaults, or, a request's own put over them, what acts.

    Attributes:
        settings: what the system and developer messages say.
        sampling: how tokens are drawn; of several answers the first, the next has seed + 1.
        max_new_tokens: length of an answer at most, its reasoning included; None: as far as the context goes.
        stop: texts before which an answer ends.
        stop_ids: ids after which it ends, beside the model's own.
        n: answers.
        logprobs: whether log probabilities are given.
        toolbox: tools that are run here, which a conversation declares beside its own.
    """

    settings: Settings = dataclasses.field(default_factory=Settings)
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    n: int = 1
    logprobs: bool = False
    toolbox: Toolbox | None = None

    def all_stop_ids(self, of_model: Sequence[int]) -> tuple[int, ...]:
        """The model's stop ids and these, each once."""
        return tuple(dict.fromkeys((*of_model, *self.stop_ids)))


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: the prompt's ids and how it is answered.

    Attributes:
        token_ids: the whole prompt.
        options: what acts.
        acting: those options for JSON, by the names that they have in our own form, which takes them back; a setting
            that has no place in the prompt is null.
        raw: the answer is text as it comes, not harmony's.
        metadata: the client's own, given back as it is.
        remarks: what of the request has no place in a prompt, a line each.
        echo: other fields that a response of this form repeats as the client wrote them, `model` among them.
        vocab_path: as for `harmony.tokenizer.load_tokenizer`; responses spell tokens.
        form: what the answer is held to; None: nothing.
        conversation: the messages that the prompt is made of, those in front too; () for plain ids.
        most_calls: how many calls of tools that are run here are carried out; None: any number.
    """

    token_ids: tuple[int, ...]
    options: Options
    acting: Mapping[str, Any]
    raw: bool = False
    metadata: Any = None
    remarks: tuple[str, ...] = ()
    echo: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vocab_path: str | None = None
    form: CompiledForm | None = None
    conversation: Sequence[Message] = ()
    most_calls: int | None = None

    def request(self, model_stop_ids: Sequence[int]) -> Request:
        """What an engine is asked for the first of the answers, but for its text: an engine can check it."""
        options = self.options
        stop_ids = options.all_stop_ids(model_stop_ids)
        return Request(self.token_ids, stop_ids, options.max_new_tokens, options.sampling, constraint=self.form)

    def requests(self, tokenizer: Tokenizer, model_stop_ids: Sequence[int]) -> tuple[list[Request], list[AnswerStream]]:
        """For each of the n answers what an engine is asked, and what reads it."""
        options, requests, streams = self.options, [], []
        first = self.request(model_stop_ids)
        for i in range(options.n):
            streams.append(AnswerStream(tokenizer, stop_strings=options.stop, raw=self.raw))
            sampling = dataclasses.replace(options.sampling, seed=(options.sampling.seed + i) % 2**32)
            requests.append(dataclasses.replace(first, sampling=sampling, ends_at=streams[-1].ends_at))
        return requests, streams


@runtime_checkable
class Form(Protocol):
    """One way to write requests and responses; a module with these names is one."""

    @property
    def FIELDS(self) -> frozenset[str]:
        """The names that a request may hold; `ask` refuses others, so who would rather ignore them drops them first."""
        ...

    def ask(self, body: Mapping[str, Any], defaults: Options, vocab_path: str | None = None) -> Asked:
        """What a request asks.

        Args:
            body: its JSON.
            defaults: what acts where it says nothing, its seed too.
            vocab_path: as for `harmony.render`.

        Raises:
            GptossError: something that cannot be done as asked, or is not known; the message names the field.
        """
        ...

    def response(self, asked: Asked, answers: Sequence[Answer], response_id: str, model: str) -> dict[str, Any]:
        """The response's JSON. It holds no clock: the same answers give the same bytes.

        Args:
            asked: the request.
            answers: all n.
            response_id: the response's own part of its id; a form may put the kind in front, as in "chatcmpl-...".
            model: what the model is called where the request does not name it.
        """
        ...


@runtime_checkable
class TurnForm(Form, Protocol):
    """A form whose requests are conversations, so that tools can be run for them."""

    def response_of_turn(self, turn: "ToolTurn", response_id: str, model: str) -> dict[str, Any]:
        """As `response`, of a request whose calls were carried out; the answers of all rounds are in it.

        Args:
            turn: its rounds, which have ended.
            response_id: the response's own part of its id.
            model: what the model is called where the request does not name it.
        """
        ...
