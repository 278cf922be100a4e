"""What pyproject.toml promises holds here, and the test session is as strict as tests/conftest.py says."""

import asyncio
import importlib.metadata
import math
import re
import shlex
import socket
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from packaging.requirements import Requirement

import gptoss_jax
from gptoss_jax.checkpoints import huggingface
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model.config import read_config

ROOT = Path(__file__).parents[2]
TOPS = ("gptoss_jax", "pallas_kernels", "cpu_kernels", "converters")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_installed_version_is_within_bounds(line):
    """Guards against a bound that excludes the versions the tests pass with."""
    requirement = Requirement(line)
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name))


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0", "0.11.2"])
def test_jax_bounds_admit_both_supported_minor_versions(version):
    """Guards against a narrowed bound on jax, in the dependencies or in one accelerator's extra only."""
    extras = PROJECT["optional-dependencies"]
    lines = [line for line in PROJECT["dependencies"] if Requirement(line).name == "jax"]
    lines += [line for extra in ("cuda12", "cuda13", "tpu") for line in extras[extra]]
    assert len(lines) == 4
    assert all(Requirement(line).specifier.contains(version) for line in lines)


@pytest.mark.parametrize("name", gptoss_jax.__all__)
def test_public_names_are_where_the_package_says(name):
    """Guards against a lazy name whose module has moved, which fails for the first user who asks for it."""
    assert getattr(gptoss_jax, name).__name__ == name


def test_other_names_are_refused_and_the_version_is_known():
    """Guards `hasattr`, which lazy names break if they raise anything but AttributeError."""
    assert not hasattr(gptoss_jax, "generate_everything")
    assert gptoss_jax.__version__ == PROJECT["version"]


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_console_script_points_at_a_module_and_a_function(target):
    """Guards against a console script that fails at its first line, since its module moved or has no such function."""
    module, function = target.split(":")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert f"\ndef {function}(" in source


def test_packages_found_are_all_packages():
    """Guards against a subpackage without __init__.py, which works in the checkout and is missing from the wheel."""
    folders = {p.parent for top in TOPS for p in (ROOT / top).rglob("*.py")}
    assert folders
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_session_has_eight_cpu_devices_and_strict_promotion():
    """Guards against sharding tests on one device and silent dtype promotion: both pass everything."""
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8
    with pytest.raises(ValueError, match="dtype promotion"):
        jnp.add(jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.float32))


def test_session_checks_annotations():
    """Guards against a pytest option that is lost, so that no shape or type annotation is checked in any test."""
    number: Any = 5
    with pytest.raises(jaxtyping.TypeCheckError):
        tokenizer.load_tokenizer(vocab_path=number)


def test_session_blocks_network_but_not_event_loops():
    """Guards against a test that quietly downloads something; or a block so wide that asyncio no longer works."""
    with pytest.raises(RuntimeError, match=r"may not use the network: connection to \('127.0.0.1', 9\)"):
        with socket.socket() as connection:
            connection.connect(("127.0.0.1", 9))
    assert asyncio.run(asyncio.sleep(0, "works")) == "works"


def test_the_readmes_download_gives_each_option_one_value():
    """Guards the first line that people copy: current `hf` takes a second pattern for the one file to fetch."""
    [line] = re.findall(r"^    hf download (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    repository, *options = shlex.split(line)
    assert repository == "openai/gpt-oss-20b"
    assert dict(zip(options[::2], options[1::2], strict=True)) == {"--local-dir": "gpt-oss-20b", "--exclude": "*/*"}


def test_the_readmes_tree_names_every_module():
    """Guards the map: a file that the README does not name is one that a newcomer does not find."""
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    modules = [path for package in ("gptoss_jax", "converters") for path in (ROOT / package).rglob("*.py")]
    names = {path.stem for path in modules} - {"__init__"}
    assert {name for name in names if not re.search(rf"\b{name}\b", tree)} == set()


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_what_is_declared_is_imported(line):
    """Guards against a package that is installed for nothing; tensorstore is Orbax's, bounded for its files' sake."""
    name = Requirement(line).name
    module = {"orbax-checkpoint": "orbax", "absl-py": "absl"}.get(name, name).replace("-", "_")
    if name == "tensorstore":
        module = "orbax"
        assert "tensorstore" in " ".join(importlib.metadata.requires("orbax-checkpoint") or [])
    sources = [path.read_text() for top in TOPS for path in (ROOT / top).rglob("*.py")]
    assert any(re.search(rf"^\s*(import|from) {module}\b", source, re.MULTILINE) for source in sources)


def test_the_readme_says_how_large_the_weights_are():
    """Guards the two sizes, which follow from the tables of published tensors."""
    sizes = []
    for name in ("20b", "120b"):
        recipes = huggingface.mxfp4_recipes(read_config(ROOT / "configs" / f"gpt-oss-{name}.json")).values()
        tensors = {recipe.tensor: math.prod(recipe.shape) * (2 if recipe.dtype == "BF16" else 1) for recipe in recipes}
        sizes.append(f"{sum(tensors.values()) / 1e9:.1f} GB ({name})")
    assert " and ".join(sizes) in " ".join((ROOT / "README.md").read_text().split())
