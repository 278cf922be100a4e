"""Which implementation of an op was taken, and why: what each kind of kernel needs, and how the answer looks."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import cpu_kernels

HOPPER = 9  # the major compute capability whose tensor cores the GPU kernels are written for


class KernelError(ValueError):
    """An implementation was asked for by name that is unknown, or cannot run on these devices."""


T = TypeVar("T")


class Implementations(Mapping[str, T]):
    """The implementations of an op by name, each made when it is first taken.

    Importing Pallas's compilers takes a quarter of a second, which nobody should wait for whose devices need none.
    """

    def __init__(self, makers: Mapping[str, Callable[[], T]]):
        """`makers`: name -> what imports an implementation and gives it."""
        self._makers = {name: functools.cache(maker) for name, maker in makers.items()}

    def __getitem__(self, name: str) -> T:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's would make it
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Hardware(NamedTuple):
    """What the devices of a mesh are, as far as kernels care."""

    platform: str  # as JAX calls it: cpu, gpu, tpu
    name: str = ""  # as in "NVIDIA H200" or "TPU v6 lite"
    compute_capability: str = ""  # of NVIDIA GPUs, as in "9.0"

    @classmethod
    def of(cls, device: Any) -> "Hardware":
        """What `device`, a `jax.Device`, is."""
        return cls(device.platform, device.device_kind, str(getattr(device, "compute_capability", "")))


class Choice(NamedTuple):
    """An implementation, and why it was taken."""

    name: str
    implementation: Any
    reason: str


def by_name(op: str, implementations: Mapping[str, Any], name: str, hardware: Hardware) -> Choice:
    """The implementation of `op` called `name`, which then runs or raises: there is no fallback.

    Raises:
        KernelError: none has that name, or it cannot run on `hardware`.
    """
    if name not in implementations:
        raise KernelError(f"{op} kernel {name!r}, expected auto or one of {', '.join(implementations)}")
    if name in KERNELS_OF and (missing := why_not(name, hardware)):
        raise KernelError(f"{op} kernel {name!r} cannot run: {missing}; auto takes the best that can")
    return Choice(name, implementations[name], "asked for by name")


def best(implementations: Mapping[str, Any], hardware: Hardware, otherwise: Choice) -> Choice:
    """The kernel written for `hardware`, if the op has one and it can run; else `otherwise`, with the reason why."""
    name = hardware.platform
    if name not in KERNELS_OF or name not in implementations:
        return otherwise
    if missing := why_not(name, hardware):
        return otherwise._replace(reason=f"{otherwise.reason}; slow: {missing}")
    return Choice(name, implementations[name], f"{KERNELS_OF[name]} for {_described(name, hardware)}")


KERNELS_OF = {"cpu": "C++", "gpu": "Mosaic GPU", "tpu": "Mosaic TPU"}
"""In the tables, a platform's name is that of the kernels written for it; and how they are called."""


def why_not(name: str, hardware: Hardware) -> str | None:
    """Why the kernels called `name`, one of KERNELS_OF, cannot run on `hardware`, in a few words; None if they can."""
    if hardware.platform != name:
        return f"it is {KERNELS_OF[name]} for {name.upper()}s, and the devices are {hardware.platform}"
    if name == "cpu":
        return cpu_kernels.why_not()
    if name == "gpu" and not hardware.compute_capability.startswith(f"{HOPPER}."):
        capability = hardware.compute_capability or "unknown"
        return f"it is for Hopper (compute capability {HOPPER}.x), and {hardware.name} has {capability}"
    return None


def _described(name: str, hardware: Hardware) -> str:
    return cpu_kernels.instruction_sets()[0] if name == "cpu" else hardware.name
