"""What is published: a source distribution whose tests run, and a wheel with which the README's lines run elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import scripted
from tests.goldens import make as golden

NOT_PUBLISHED = ("*.egg-info", ".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.so")
README = (golden.ROOT / "README.md").read_text()
QUICK_START = README.partition("\n## ")[0]


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A command in `folder`, which must not fail."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done


def build(source: Path, what: str, to: Path) -> Path:
    """The distribution that setuptools makes of `source`, without a C++ compiler."""
    code = f"import sys, setuptools.build_meta as backend; backend.build_{what}(sys.argv[1])"
    no_compiler = {"CC": "/bin/false", "CXX": "/bin/false"}
    done = run([sys.executable, "-c", code, to], source, **no_compiler)
    if what == "wheel":
        assert "no CPU kernels, XLA alone will run there, many times slower" in done.stderr
    [made] = to.iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """What the source distribution of a copy of this checkout unpacks to."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(golden.ROOT, folder / "copy", ignore=shutil.ignore_patterns(*NOT_PUBLISHED))
    with tarfile.open(build(folder / "copy", "sdist", folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def site(unpacked, tmp_path_factory) -> Path:
    """A folder into which the wheel of the source distribution is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build(unpacked, "wheel", folder / "wheel")) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files_of(folder: Path) -> set[str]:
    """Names of all files below a folder, caches left out."""
    ignored = shutil.ignore_patterns(*NOT_PUBLISHED)
    found: set[str] = set()
    for parent, folders, files in os.walk(folder):
        folders[:] = set(folders) - ignored(parent, folders)
        found |= {str((Path(parent) / name).relative_to(folder)) for name in set(files) - ignored(parent, files)}
    return found


def test_the_source_distribution_holds_all_files_and_its_tests_run(unpacked):
    """Guards packagers, who build and test from it alone."""
    assert files_of(golden.ROOT) - files_of(unpacked) == set()
    run([sys.executable, "-m", "pytest", "-q", "tests/unit/test_imports.py"], unpacked, PYTHONPATH="")


def test_the_wheel_holds_packages_types_and_configs(site):
    """Guards who has the wheel alone: a preset's file, the vocabulary, and the marker of types."""
    for name in ("configs/gpt-oss-20b.json", "configs/meshes/expert4-tensor2.json", "gptoss_jax/py.typed"):
        assert (site / name).is_file()
    assert list((site / "gptoss_jax" / "harmony" / "data").glob("*.xz"))
    tops = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"gptoss_jax", "pallas_kernels", "cpu_kernels", "converters", "configs"}


def test_the_readmes_lines_run_from_the_wheel_in_another_folder(site, tmp_path):
    """Guards the first thing that people copy: every line of the quick start, as printed."""
    scripted.write(tmp_path / "gpt-oss-20b", "thinker")
    lines = re.findall(r"^    ((?:export|python) .*)$", QUICK_START, re.MULTILINE)
    assert len(lines) >= 6
    blocks = re.findall(r"^```python\n(.*?)^```$", QUICK_START, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "blocks.py").write_text("".join(blocks))
    environment = {
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XLA_FLAGS": "",
    }
    where = run([sys.executable, "-c", "import gptoss_jax; print(gptoss_jax.__file__)"], tmp_path, **environment)
    assert where.stdout.startswith(str(site))
    script = ["set -eux", *lines, "python blocks.py"]
    done = run(["bash", "-c", "\n".join(script)], tmp_path, **environment)
    assert "slow: cpu_kernels was installed without a C++ compiler" in done.stderr
