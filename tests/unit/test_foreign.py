"""What people give in place of a checkpoint: each is named, with what to do, by everything that opens a folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from converters.random_checkpoint import with_vocab_size, write_checkpoint
from gptoss_jax.checkpoints import published
from gptoss_jax.checkpoints.opening import open_weights
from gptoss_jax.checkpoints.published import INDEX
from gptoss_jax.errors import LISTED, GptossError

ROOT = Path(__file__).parents[2]
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
SMALL = with_vocab_size(json.loads((ROOT / "configs" / "tiny.json").read_text()), 512) | TWO_LAYERS
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A published model, for reading only."""
    dst = tmp_path_factory.mktemp("small") / "published"
    write_checkpoint(dst, SMALL, shard_bytes=250_000)
    return dst


@pytest.fixture
def broken(small, tmp_path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(small, tmp_path / "published"))


def refusal(path: Path) -> str:
    """The lines in which generate and score, and the converter, refuse a folder: the same ones."""
    texts = []
    for open_folder in (open_weights, lambda path: published.open_source(path).check_headers()):
        with pytest.raises(GptossError) as error:
            open_folder(path)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert all(line.isprintable() and len(line) < 1000 for line in texts[0].splitlines())
    return texts[0]


def holding(*names: str, **contents: object) -> Callable[[Path], Path]:
    """Makes a folder with these files: empty ones, and JSON by the part of its name before the dot."""

    def make(folder: Path) -> Path:
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"")
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return make


def cache(below: str = "") -> Callable[[Path], Path]:
    """Makes a hub cache with one whole download, and names it or what lies `below`."""

    def make(folder: Path) -> Path:
        snapshot = folder / "hub" / "models--openai--gpt-oss-20b" / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        return folder / below

    return make


SNAPSHOT = "hub/models--openai--gpt-oss-20b/snapshots/0123abcd"
FOLDERS = {
    "empty": (holding(), "no *.safetensors and no model.safetensors.index.json, neither here nor in original/"),
    "GGUF": (holding("gpt-oss-20b.gguf"), "no *.safetensors; GGUF, llama.cpp's format, is not read"),
    "PyTorch": (
        holding("pytorch_model-00001-of-00002.bin", config=SMALL),
        "no *.safetensors; PyTorch's .bin files are not read, since they may run code: save it as safetensors: ",
    ),
    "TensorFlow": (holding("tf_model.h5"), "TensorFlow's .h5 files are not read"),
    "adapter": (
        holding("adapter_model.safetensors", adapter_config={"base_model_name_or_path": "openai/gpt-oss-20b"}),
        "an adapter of 'openai/gpt-oss-20b', not a whole model: merge it first: in peft, ",
    ),
    "adapter without config": (holding("adapter_model.safetensors"), "an adapter, not a whole model"),
    "damaged adapter": (holding("adapter_model.safetensors", adapter_config=[]), "an adapter, not a whole model"),
    "the user's cache": (
        cache(),
        f"of the hub's cache, whose files lie deeper: name such a folder, as {{folder}}/{SNAPSHOT}",
    ),
    "the hub's cache": (cache("hub"), f"name such a folder, as {{folder}}/{SNAPSHOT}"),
    "a model's cache": (
        cache("hub/models--openai--gpt-oss-20b"),
        f"name such a folder, as {{folder}}/{SNAPSHOT}",
    ),
    "snapshots": (cache("hub/models--openai--gpt-oss-20b/snapshots"), f"name such a folder, as {{folder}}/{SNAPSHOT}"),
    "a folder of checkpoints": (
        lambda folder: (folder / "mine").mkdir(parents=True) or (folder / "mine/config.json").write_text("") or folder,
        "no checkpoint, but holds folders with one: name such a folder, as {folder}/mine",
    ),
    "broken cache": (
        lambda folder: (folder / "models--openai--gpt-oss-20b" / "refs").mkdir(parents=True) or folder,
        "the hub's cache, in which no download is whole: hf download openai/gpt-oss-20b fetches one",
    ),
    "llama as PyTorch": (
        holding("pytorch_model.bin", config=LLAMA),
        "config.json: model_type is 'llama', expected 'gpt_oss': another model family, not read here",
    ),
    "llama with adapter": (holding("adapter_model.safetensors", config=LLAMA), "model_type is 'llama'"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_kinds_are_named(name, tmp_path):
    """Guards against `no *.safetensors` where anybody could see what lies there, and what to do."""
    make, text = FOLDERS[name]
    refused = refusal(make(tmp_path / "folder"))
    assert text.format(folder=tmp_path / "folder") in refused and "\n" not in refused


def test_what_is_no_folder_is_named(small, tmp_path, monkeypatch):
    """Guards hub ids, which other tools download; files, and links to nothing."""
    monkeypatch.chdir(tmp_path)
    fetch = "hf download openai/gpt-oss-20b --local-dir gpt-oss-20b, then name that folder"
    for name in ("openai/gpt-oss-20b", "https://huggingface.co/openai/gpt-oss-20b", "hf://openai/gpt-oss-20b"):
        assert refusal(Path(name)).endswith(f"; nothing is downloaded here: {fetch}")
    (tmp_path / "someone").mkdir()
    assert refusal(tmp_path / "gpt-oss-20b").endswith(f"; nothing is downloaded here: {fetch}")
    assert refusal(Path("someone/gpt-oss")) == "someone/gpt-oss: no such folder, expected a checkpoint's folder"
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf: a file (GGUF, llama.cpp's format, is not read: " in refusal(tmp_path / "model.gguf")
    assert ": a safetensors file, expected a checkpoint's folder" in refusal(next(small.glob("*.safetensors")))
    (tmp_path / "link").symlink_to("gone\n")
    assert refusal(tmp_path / "link").endswith(
        r"link: a link to gone\n, which is not there, expected a checkpoint's folder"
    )


def test_a_snapshot_whose_blobs_are_gone_is_named(broken):
    """Guards copies of a hub snapshot without its blobs: links that lead nowhere."""
    files = sorted(broken.glob("*.safetensors"))
    files[0].unlink()
    files[0].symlink_to("../../blobs/0123")
    gone = "a link to ../../blobs/0123, which is not there: fetch it again"
    assert refusal(broken) == f"{files[0]}: {gone}"
    (broken / INDEX).unlink()
    (broken / INDEX).symlink_to("../../blobs/4567")
    assert f"{broken / INDEX}: no index of safetensors (a link to ../../blobs/4567, which is not" in refusal(broken)
    (broken / "config.json").unlink()
    (broken / "config.json").symlink_to("../../blobs/89ab")
    assert (
        refusal(broken) == f"{broken / 'config.json'}: a link to ../../blobs/89ab, which is not there: fetch it again"
    )


def test_lfs_pointers_are_named(broken):
    """Guards clones without Git LFS: every large file is three lines of text."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4792272488\n"
    files = sorted(broken.glob("*.safetensors"))
    for path in files:
        path.write_bytes(pointer)
    lines = refusal(broken).splitlines()
    assert len(lines) == len(files)
    assert all(": a Git LFS pointer in place of the file: run `git lfs pull` in its folder" in line for line in lines)


Edit = Callable[[dict], dict]


def edit_headers(folder: Path, edit: Edit):
    """Changes the header of every file, and takes the index away."""
    (folder / INDEX).unlink()
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        text = json.dumps(edit(json.loads(raw[8:start]))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


def renamed(change: Callable[[str], str]) -> Edit:
    """Tensors under other names."""
    return lambda header: {name if name[:2] == "__" else change(name): value for name, value in header.items()}


def typed(dtype: str) -> Edit:
    """Every bfloat16 tensor said to be of another format of as many bytes."""

    def edit(header: dict) -> dict:
        for value in header.values():
            if value.get("dtype") == "BF16":
                value["dtype"] = dtype
        return header

    return edit


QUANTISED = {
    "bitsandbytes": lambda name: name.replace("_proj_scales", "_proj.weight.absmax"),
    "bitsandbytes nf4": lambda name: name.replace("_scales", "s.0.weight.quant_state.bitsandbytes__nf4"),
    "GPTQ or AWQ": lambda name: name.replace("_proj_blocks", "_proj.qweight"),
    "compressed-tensors": lambda name: name.replace("_proj_scales", "_proj.weight_scale"),
}


@pytest.mark.parametrize("tool", QUANTISED)
def test_other_tools_quantisation_is_named_alone(tool, broken):
    """Guards bitsandbytes layouts, which were taken for MXFP4 experts with hundreds of missing tensors."""
    edit_headers(broken, renamed(QUANTISED[tool]))
    refused = refusal(broken)
    assert refused.startswith(f"{broken}: quantised by {tool.partition(' nf4')[0]}") and "\n" not in refused
    assert "hf download openai/gpt-oss-20b" in refused


def test_half_precision_is_one_line_that_says_how_to_cast(broken):
    """Guards float16 exports: the same fault in each of their tensors."""
    edit_headers(broken, typed("F16"))
    refused = refusal(broken)
    assert refused.count("\n") == 0
    cast = r"from_pretrained(SRC, dtype=torch.bfloat16), then save_pretrained"
    assert f"dtype F16, expected BF16: cast it, as transformers does: {cast} (and 32 more like it)" in refused


def test_names_of_another_model_are_two_lines(broken):
    """Guards against a line for each tensor that is missing, and for each that is unknown."""
    edit_headers(broken, renamed(lambda name: f"transformer.h.{name}"))
    lines = refusal(broken).splitlines()
    assert len(lines) == 2
    assert all(line.endswith(" (and 40 more like it)") for line in lines)
    assert "missing from all files" in lines[0] and "has no such tensor" in lines[1]


def test_names_are_shortened_and_spelled_out(broken):
    """Guards terminals against names of tensors: megabytes long, or made to clear the screen."""
    name = "\x1b[2J\n" + "x" * 100_000
    edit_headers(broken, lambda header: {name if key == "lm_head.weight" else key: v for key, v in header.items()})
    refused = refusal(broken)
    assert r"\x1b[2J\n" + "x" * 115 + "...: unknown, the format" in refused and len(refused) < 1000


@pytest.mark.parametrize("layers", [1, 3, 36, 1024])
def test_layers_are_counted_before_anything_is_made_of_their_number(layers, broken):
    """Guards against a thousand layers declared, or hundreds of missing tensors, where one number is wrong."""
    config = SMALL | {"num_hidden_layers": layers}
    del config["layer_types"]
    (broken / "config.json").write_text(json.dumps(config))
    assert refusal(broken) == (
        f"{broken / 'config.json'}: num_hidden_layers is {layers}, but the safetensors hold 2 layers: of another model"
    )


def test_another_size_is_a_line_for_each_kind_of_shape(broken):
    """Guards against a line for each of the tensors that have another shape than config.json gives them."""
    (broken / "config.json").write_text(json.dumps(SMALL | {"hidden_size": 128}))
    lines = refusal(broken).splitlines()
    assert len(lines) < 4 * LISTED
    assert any(
        "shape [96], expected [128] (and " in line or "shape [512, 96], expected [512, 128]" in line for line in lines
    )
