"""Devices that can be compiled for and nothing else: GPUs and TPUs on a machine without, or CPUs that JAX simulates.

The compilers are the vendors' own, from wheels that `make gates` installs into .venv/compilers: on PYTHONPATH they are
found. What they read of the environment they read once, as JAX starts: `ENVIRONMENT`.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.errors import GptossError
from gptoss_jax.runtime.program_memory import LOGGED, logged
from pallas_kernels.choice import Hardware

ENVIRONMENT = {  # read when JAX and the TPU's compiler start: no device is looked for, many processes may compile
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
H200_SPEC = Path(__file__).parent / "data" / "h200.txtpb"
_WHEELS = {"tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda13", "nvidia.cu13"), "cpu": ()}

B200_DIFFERS = {  # from XLA's b200.txtpb
    "core_count": "148",
    "memory_bandwidth": "7672320000000",
    "l2_cache_size": "132644864",
    "clock_rate_ghz": "1.965",
    "device_memory_size": "191514411008",
    "cuda_compute_capability": "{ major: 10 feature_extension: ACCELERATED_FEATURES }",
    "platform_version": '"Compute Capability 10.0a"',
    "name": '"NVIDIA B200"',
    "device_description_str": '"NVIDIA B200"',
}
H100_DIFFERS = {  # the same die; memory as NVIDIA's data sheet and its driver say
    "memory_bandwidth": "3350000000000",
    "device_memory_size": "85469887692",
    "name": '"NVIDIA H100"',
    "device_description_str": '"NVIDIA H100"',
}
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # of CPUs' machine code


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
        platform: cpu, gpu or tpu.
        topology: as JAX names it: v6e:2x4, or of GPUs partitions x hosts x GPUs; of CPUs nothing.
        hardware: what kernels are chosen for; None: as the devices say.
        devices: the first so many.
        differs: what of a GPU's description is not an H200's.
        options: of XLA's compiler.
    """

    platform: str
    topology: str
    hardware: Hardware | None
    devices: int
    differs: Mapping[str, str] = {}
    options: Mapping[str, Any] = {}

    @property
    def lowering_platform(self) -> str:
        """As `lower(lowering_platforms=...)` names it."""
        return "cuda" if self.platform == "gpu" else self.platform


_GPUS = {
    "h100": (Hardware("gpu", "NVIDIA H100", "9.0"), H100_DIFFERS, {}),
    "h200": (Hardware("gpu", "NVIDIA H200", "9.0"), {}, {}),
    # CUB asks the device, here for 201,088 logits.
    "b200": (Hardware("gpu", "NVIDIA B200", "10.0"), B200_DIFFERS, {"xla_gpu_enable_cub_radix_sort": False}),
}


def target(slice_name: str, devices: int) -> Target:
    """The devices of a slice as the planner names it: h200x8, v6e:2x4, cpu:8."""
    kind = re.split(r"[x:]", slice_name, maxsplit=1)[0]
    if slice_name.startswith("cpu"):
        return Target("cpu", "", Hardware("cpu"), devices, {}, QUICKLY)
    gpu = next((name for name in _GPUS if re.fullmatch(rf"{name}x\d+", slice_name)), None)
    if gpu is not None:
        hosts = -(-devices // 8)
        hardware, differs, options = _GPUS[gpu]
        return Target("gpu", f"1x{hosts}x{min(devices, 8)}", hardware, devices, differs, options)
    assert kind, slice_name
    return Target("tpu", slice_name, None, devices)


def missing(platform: str) -> str | None:
    """Why nothing can be compiled for `platform` here, in a few words, or None if it can."""
    absent = [name for name in _WHEELS[platform] if not _is_installed(name)]
    if not absent:
        return None
    return f"no compile-only wheels for {platform} here ({', '.join(absent)}): make gates installs them"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it would be in
        return False


def prepare(cpu_devices: int) -> None:
    """Sets what JAX and the compilers read as they start: call it before JAX looks for devices.

    Raises:
        GptossError: JAX has already found other devices than these.
    """
    os.environ.update(ENVIRONMENT)
    flag = "--xla_force_host_platform_device_count"
    others = re.sub(rf"{flag}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{others} {flag}={cpu_devices}".strip()
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
        if len(jax.devices()) < cpu_devices:
            raise GptossError(
                f"JAX has started with {len(jax.devices())} devices and {cpu_devices} are to be simulated: "
                "plan in a process of its own"
            )


def devices(target: Target) -> list[Any]:
    """Devices of `target` that can be compiled for.

    Raises:
        GptossError: the compiler's wheels are not installed, or it knows no such slice.
    """
    import jax
    from jax.experimental import topologies

    if absent := missing(target.platform):
        raise GptossError(absent)
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.devices]
    try:
        if target.platform == "gpu":
            found = topologies.get_topology_desc(
                "", "cuda", topology=target.topology, target_config=gpu_spec(target.differs)
            )
        else:
            os.environ.update(LOGGED)  # read as libtpu is loaded, here
            with logged():
                found = topologies.get_topology_desc(target.topology, "tpu")
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0][:200]
        raise GptossError(f"the compiler for {target.platform.upper()}s has no {target.topology}: {said}") from None
    return found.devices[: target.devices]


def gpu_spec(differs: Mapping[str, str]) -> str:
    """A GPU as XLA describes it, by how it differs from an H200."""
    spec = H200_SPEC.read_text().partition("\n")[2]  # after the comment
    for name, value in differs.items():
        spec, found = re.subn(rf"^( *{name}) ?:? .*$", rf"\1: {value}", spec, flags=re.MULTILINE)
        assert found == 1, name
    return spec
