"""Exports as others read them, run on the spot: transformers' model and llama.cpp's loader; `make gates` installs them.

llama.cpp comes as the wheel xllamacpp, where that is installed. OpenAI's format has no reader among them; its tensors
are held against the others' in `unit/test_export.py`.
"""

# pyright: reportMissingImports=false
# (these packages are installed by `make gates` alone)

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gptoss_jax
from benchmarks import write_gguf
from converters import convert
from gptoss_jax.checkpoints.export import open_export
from tests import gate
from tests.goldens import make as golden

# Export -> the format that the model came from: another, so that config.json and the files' layout are our own.
CAME_FROM = {"huggingface": "huggingface-bf16", "bf16": "huggingface"}
# Loads a GGUF file and gives log probabilities of what follows the ids: in a process of its own, since C++ may abort.
LLAMA = """
import json, sys, xllamacpp
options = xllamacpp.CommonParams()
options.model.path = sys.argv[1]
options.n_ctx, options.n_parallel, options.warmup, options.n_gpu_layers, options.verbosity = 512, 1, False, 0, 0
request = {"prompt": json.loads(sys.argv[2]), "n_predict": 1, "temperature": 0, "n_probs": int(sys.argv[3])}
answer = xllamacpp.Server(options).handle_completions(request)
print(json.dumps(answer if isinstance(answer, dict) else json.loads(answer)))
"""


@pytest.fixture(scope="module")
def exports(tiny, tmp_path_factory) -> dict[str, Path]:
    """The golden model, exported with files of our own."""
    folder = tmp_path_factory.mktemp("exports")
    for format, source in CAME_FROM.items():
        convert.run(convert.Options(tiny.write(folder / source, source), folder / source / "checkpoint"))
        opened = open_export(folder / source / "checkpoint", format, shard_bytes=500_000)
        assert not opened.source_sha256 and len(opened.shards) > 1
        opened.run(folder / format)
    return {format: folder / format for format in CAME_FROM}


@pytest.mark.parametrize("format", CAME_FROM)
def test_transformers_gives_our_logits(format, exports):
    """Guards config.json, names, shapes and the index with another's reader: what we load and what it loads agree."""
    pytest.importorskip("torch", reason="the live comparison needs torch")
    pytest.importorskip("transformers", reason="the live comparison needs transformers")
    tokens = golden.token_ids(400, seed=21)
    theirs = golden.transformers_logits(golden.load_transformers(exports[format], "float32"), tokens)
    ours = gptoss_jax.load(exports[format], dtype="float32").logits(tokens.tolist())
    assert gate.failures(ours, theirs, np.arange(len(tokens))) == []


@pytest.mark.parametrize("format", CAME_FROM)
def test_transformers_writes_the_same_numbers(format, exports, tmp_path):
    """Guards config.json against keys that this version reads otherwise, or not at all: it is saved and read again."""
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    from gptoss_jax.model.config import read_config

    theirs = transformers.AutoConfig.from_pretrained(exports[format])
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path / "config.json") == read_config(exports[format] / "config.json")
    assert hasattr(theirs, "quantization_config") == (format == "huggingface")
    generation = transformers.GenerationConfig.from_pretrained(exports[format])
    assert generation.eos_token_id == [510] and generation.pad_token_id == 511 and generation.do_sample


def test_safetensors_lays_files_out_as_we_do(exports, tmp_path):
    """Guards headers with bfloat16 beside bytes against the library that others write files with."""
    torch = pytest.importorskip("torch", reason="the live comparison needs torch")
    from safetensors.torch import load_file, save_file

    for path in exports["huggingface"].glob("*.safetensors"):
        tensors = load_file(path)
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.bfloat16, torch.uint8}
        save_file(tensors, tmp_path / path.name, metadata={"format": "pt"})
        raw = (tmp_path / path.name).read_bytes()
        theirs, ours = (content[8 : 8 + int.from_bytes(content[:8], "little")] for content in (raw, path.read_bytes()))
        read = [list(json.loads(header).items()) for header in (theirs, ours)]
        assert read[0][1:] == read[1][1:]
        assert len(theirs) % 8 == len(ours) % 8 == 0


@pytest.mark.parametrize("format", CAME_FROM)
def test_llama_cpp_takes_the_gguf_of_an_export(format, exports, tmp_path):
    """Guards the way on to llama.cpp: its loader takes the file, and what it computes is the model."""
    pytest.importorskip("gguf", reason="writing GGUF needs the gguf package")
    pytest.importorskip("xllamacpp", reason="llama.cpp's loader needs the wheel xllamacpp")
    write_gguf.write(tmp_path / "model.gguf", write_gguf.published(exports[format]), "bf16")
    tokens = golden.token_ids(200, seed=22).tolist()
    command = [sys.executable, "-c", LLAMA, tmp_path / "model.gguf", json.dumps(tokens), str(golden.VOCAB)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ((drawn,),) = [choice["logprobs"]["content"] for choice in json.loads(done.stdout.splitlines()[-1])["choices"]]
    theirs = np.full(golden.VOCAB, np.nan)
    for entry in drawn["top_logprobs"]:
        theirs[entry["id"]] = entry["logprob"]
    ours = gptoss_jax.load(exports[format], dtype="float32").logits(tokens)[-1]
    assert np.isfinite(theirs).all() and theirs.argmax() == ours.argmax()
    assert golden.divergence(np.asarray(ours), theirs) < 2e-3  # its activations are rounded to eight bits
