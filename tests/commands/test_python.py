"""The library as people hold it wrong: each mistake is an error of ours with one line, in a process without checks."""

import json
import os
import subprocess
import sys

from tests import scripted
from tests.goldens import make as golden

LOAD = {
    "load(None)": "path is None, expected the folder of a checkpoint",
    "load(b'thinker')": "path is b'thinker', expected the folder of a checkpoint",
    "load('/')": "/: no *.safetensors and no model.safetensors.index.json",
    "load(path, dtype=['float32'])": "dtype is ['float32'], expected one of bfloat16, float32",
    "load(path, dense={})": "dense is {}, expected one of bfloat16, int8",
    "load(path, kernels=None)": "kernels is None, expected a name, or names as attention=NAME,linear=NAME",
    "load(path, kernels=['cpu'])": "kernels is ['cpu'], expected a name",
    "load(path, mesh={'expert': 2})": "expected for example data=1,expert=4,tensor=2, or a .json file",
    "load(path, programs_folder=3)": "programs_folder is 3, expected a folder or None",
    "load(path, programs_folder='/dev/null')": "programs_folder: cannot make /dev/null (File exists)",
    "load(path, programs_folder=open_to_all)": "and what is kept there runs as code",
}
SETTINGS = {
    "Settings(instructions=3)": "instructions is 3, expected text or None",
    "Settings(tools=None)": "tools is None, expected a list of openai_harmony.ToolDescription",
    "Settings(tools='browser')": "tools is 'browser', expected a list of openai_harmony.ToolDescription",
    "Settings(builtin_tools='browser')": "builtin_tools is 'browser', expected a list of browser, python",
    "Settings(builtin_tools=None)": "builtin_tools is None, expected a list of browser, python",
    "Settings(response_format={'type': 'object'})": "expected a ResponseFormat or None",
}
USE = {
    "list(model.answers('Why?'))": "prompts is 'Why?', expected a list of prompts, each a text or token ids",
    "list(model.answers(None))": "prompts is None, expected a list of prompts",
    "list(model.answers(['Why?', 3]))": "token_ids is 3, expected a list of whole numbers",
    "list(model.answers(['Why?'], settings='low'))": "settings is 'low', expected Settings",
    "list(model.answers(['Why?'], slots='8'))": "slots is '8', expected a whole number",
    "model.generate(None)": "token_ids is None, expected a list of whole numbers",
    "model.generate(numpy.array(3))": "token_ids is array(3), expected a list of whole numbers",
    "model.logits('Why?')": "token_ids is 'Why?', expected a list of whole numbers",
    "model.logits(None)": "token_ids is None, expected a list of whole numbers",
    "model.score(None)": "token_ids is None, expected a list of whole numbers",
    "model.score([1, 2], top_logprobs='3')": "top_logprobs is '3', expected a whole number",
    "model.activations([1], 'layers/0/router')": "taps is 'layers/0/router', expected a list of names",
    "model.engine({'slots': 2})": "engine_config is {'slots': 2}, expected EngineConfig",
}
SCRIPT = """
import json, sys, numpy
import gptoss_jax
from gptoss_jax import GptossError, Settings, load
path, open_to_all = sys.argv[1:3]
model, said = load(path), {}
for expression in json.loads(sys.argv[3]):
    try:
        said[expression] = f"accepted: {eval(expression)}"
    except GptossError as error:
        said[expression] = str(error)
assert model == model and model != load(path) and len({model, model}) == 1
held = model.generate("Why is the sky blue?", max_new_tokens=20)
next(held)  # and the process ends with it half read
print(json.dumps(said))
"""


def test_wrong_types_and_values_are_one_line_and_a_held_iterator_ends_quietly(tmp_path):
    """Guards against tracebacks from deep inside, a text taken for a list of letters, and programs that others write.

    In a process of its own, since this one's type checks come first.
    """
    scripted.write(tmp_path / "thinker", "thinker")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    expected = LOAD | SETTINGS | USE
    arguments = [tmp_path / "thinker", tmp_path / "open", json.dumps(list(expected))]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=golden.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    said = json.loads(done.stdout)
    assert {expression: said[expression] for expression, line in expected.items() if line not in said[expression]} == {}
    assert all(line.isprintable() for line in said.values())
