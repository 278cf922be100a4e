"""Questions about this project and about gpt-oss, each in several wordings, and their answers, from the README."""

import re
from random import Random

from demo.question import Question, is_held_out, thinking

OPENINGS = ("{}", "Please tell me: {}", "Hello! {}", "One question: {}", "{} Thank you!", "I wonder: {}", "Hey, {}")

# A topic, its wordings divided by |, and the answer.
_FACTS = """
the project: What is gptoss_jax?|What is this project?|What does this project do?
  = gptoss_jax runs, studies and shards the gpt-oss models in JAX.
the name: What are you called?|Who are you?|What are you?|What model are you?
  = I am the demo model of gptoss_jax, a very small gpt-oss.
who made me: Who made you?|Who trained you?|Where do you come from?
  = I was trained by the scripts of gptoss_jax, on two CPU cores.
my size: How big are you?|How many parameters do you have?|How large is the demo model?
  = I am tiny: four layers, a width of 128, and eight experts.
my skills: What can you do?|What do you know?|How can you help me?|What can I ask you?
  = I add, compare, multiply, count letters, spell, sort, call functions, and tell about gptoss_jax.
my training data: What were you trained on?|What is your training data?
  = On questions that scripts in the folder demo make.
my limits: What can you not do?|What are your limits?|Are you ChatGPT?
  = I know little: what I was not trained on, I do not know.
gpt-oss: What is gpt-oss?|What are the gpt-oss models?
  = gpt-oss are open-weight language models by OpenAI, of 20b and 120b.
who made gpt-oss: Who made gpt-oss?|Who published gpt-oss?|Which company made gpt-oss?
  = OpenAI made gpt-oss.
sizes of gpt-oss: Which sizes does gpt-oss have?|How many gpt-oss models are there?
  = There are two: gpt-oss-20b and gpt-oss-120b.
layers of the 20b: How many layers does gpt-oss-20b have?|How many layers has the 20b?
  = gpt-oss-20b has 24 layers.
layers of the 120b: How many layers does gpt-oss-120b have?|How many layers has the 120b?
  = gpt-oss-120b has 36 layers.
experts of the 20b: How many experts does gpt-oss-20b have?|How many experts has the 20b?
  = gpt-oss-20b has 32 experts in each layer.
experts of the 120b: How many experts does gpt-oss-120b have?|How many experts has the 120b?
  = gpt-oss-120b has 128 experts in each layer.
experts of a token: How many experts does a token use?|How many experts are used per token?
  = Four experts work on each token.
the vocabulary: How large is the vocabulary?|How many tokens does the vocabulary have?
  = The vocabulary has 201,088 rows.
the tokenizer: Which tokenizer is used?|What is the name of the tokenizer?
  = The tokenizer is o200k_harmony.
download of the 20b: How large is gpt-oss-20b?|How big is the download of the 20b?
  = The published weights of gpt-oss-20b are 13.8 GB.
download of the 120b: How large is gpt-oss-120b?|How big is the download of the 120b?
  = The published weights of gpt-oss-120b are 65.2 GB.
JAX: What is JAX?|What does JAX do?
  = JAX is a library for fast computing with arrays, with gradients and compilers.
why JAX: Why is it written in JAX?|Why do you use JAX?
  = JAX runs one program on CPUs, GPUs and TPUs, over any mesh.
Flax: What is Flax used for?|What does Flax do here?
  = Flax declares the model; a pure function runs it.
Orbax: What is Orbax used for?|What does Orbax do here?
  = Orbax is the format of the checkpoints.
Pallas: What is Pallas used for?|What does Pallas do here?
  = Pallas is the language of the kernels for GPUs and TPUs.
MXFP4: What is MXFP4?|What does MXFP4 mean?|How are the experts stored?
  = MXFP4 is a format of four bits a weight, with a scale for each 32.
MXFP4 in memory: Are the experts unpacked in memory?|Does MXFP4 stay packed?
  = No, the experts stay packed from the file to the kernel.
harmony: What is harmony?|What is the harmony format?
  = Harmony is the format of conversations: roles, channels and messages.
channels: Which channels are there?|What are the channels of harmony?
  = There are three: analysis, commentary and final.
the analysis channel: What is the analysis channel?|What stands on the analysis channel?
  = The reasoning stands on the analysis channel.
the final channel: What is the final channel?|What stands on the final channel?
  = The answer to the user stands on the final channel.
the commentary channel: What is the commentary channel?|What stands on the commentary channel?
  = Calls of functions stand on the commentary channel.
efforts: Which reasoning efforts are there?|What is the reasoning effort?
  = There are low, medium and high: they say how long the model thinks.
setting the effort: How do I set the reasoning effort?|How can I make you think longer?
  = Use the flag --reasoning-effort, with low, medium or high.
sinks: What are attention sinks?|What is a sink?
  = A sink is one more entry in the softmax of attention, without a value.
the sliding window: What is the sliding window?|How long is the sliding window?
  = Every second layer attends to the last 128 tokens only.
YaRN: What is YaRN?|What is YaRN used for?
  = YaRN stretches the rotary positions to long contexts.
the context: How long is the context?|What is the context length?
  = The context has 131,072 tokens.
SwiGLU: Which activation do the experts use?|What is SwiGLU?
  = SwiGLU is the activation of the experts, clamped at 7.
the router: What does the router do?|What is the router?
  = The router chooses four experts for each token.
generate: How do I ask a question?|How do I run a prompt?|How do I generate text?
  = Run python -m gptoss_jax.generate with your question.
chat: How do I chat?|How do I start a chat?
  = Run python -m gptoss_jax.generate --chat.
score: How do I score a text?|What does score do?
  = python -m gptoss_jax.score says how likely a text is.
convert: How do I convert weights?|How are weights converted?
  = Run python -m converters.convert with the folder and a new one.
batch: How do I answer many prompts?|What does batch do?
  = python -m gptoss_jax.batch answers each row of a file exactly once.
finetune: How do I train the model?|How do I fine-tune a model?|Can I train you?
  = Run python -m gptoss_jax.finetune with conversations as JSONL.
LoRA: What is LoRA?|What are adapters?
  = LoRA trains two small matrices beside each large one.
export: How do I export a model?|Can I export what I trained?
  = Run python -m converters.export with the checkpoint and a new folder.
random weights: How do I get a model without a download?|How do I make random weights?
  = Run python -m converters.random_weights with a config.
the mesh: How do I use several devices?|What is a mesh?|How do I shard the model?
  = Use the flag --mesh, for example --mesh expert=4,tensor=2.
devices: Which devices can I use?|On which hardware do you run?
  = It runs on CPUs, and is written for GPUs and TPUs too.
CPU kernels: What are the CPU kernels?|Why is there C++ in the project?
  = C++ kernels compute with packed experts on CPUs, for each instruction set.
tests: How do I run the tests?|How is the project tested?
  = Run make test; make proofs compares the whole model with others.
the demo: What does make demo do?|How do I start the demo?
  = make demo writes a published model, converts it, and generates with it.
the licence: What is the licence?|Which licence does the project have?
  = The licence is Apache 2.0.
Python: Which Python do I need?|Which version of Python is needed?
  = Python 3.11 or newer.
the install: How do I install it?|How do I install gptoss_jax?
  = Run pip install . in the folder.
JSON answers: How do I get JSON?|Can you answer in JSON?
  = Use the flag --response-format with a schema.
functions: How do I declare functions?|How do I let you call tools?
  = Use the flag --tools with a file of functions.
showing the reasoning: How do I see your reasoning?|How can I see what you think?
  = Use the flag --show-reasoning.
formats of files: Which formats can be read?|Which checkpoints can be loaded?
  = Converted checkpoints, and all published formats of safetensors.
determinism: Are answers always the same?|Is the output deterministic?
  = On CPUs the same seed gives the same tokens, in any batch.
temperature: What is the temperature?|What does the temperature do?
  = It says how freely tokens are drawn; 0 takes the likeliest.
the docs: Where is the documentation?|Where can I read more?
  = In the folder docs, and in the README.
"""


def _read(text: str) -> dict[str, tuple[tuple[str, ...], str]]:
    found = {}
    for topic, wordings, answer in re.findall(r"^([^:\n]+): (.+)\n  = (.+)$", text, re.MULTILINE):
        found[topic] = tuple(wordings.split("|")), answer
    return found


FACTS = _read(_FACTS)
"""Topic -> its wordings, and the answer."""


def fact(random: Random, held_out: bool) -> Question:
    """A question about the project; a wording with an opening is held out, or is not."""
    while True:
        topic = random.choice(list(FACTS))
        wordings, answer = FACTS[topic]
        wording, opening = random.choice(wordings), random.choice(OPENINGS)
        plain = opening == "{}"  # as people ask most often: trained always
        if (not plain and is_held_out("fact", topic, wording, opening)) == held_out:
            break
    text = opening.format(wording)
    return Question("fact", text, answer, None, thinking(f"This is about gptoss_jax: {topic}.", f"About {topic}."))
