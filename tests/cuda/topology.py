"""XLA's compiler for an H100, without one: a topology that programs are lowered for.

It chooses kernels and lays out memory as it would on a device, but times none: nothing is said of
speed, and where timing would decide, the default stands. Needs JAX's CUDA plugin and NVIDIA's
wheels (infra/container/gpu.lock), and no driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import jax
from jax._src import xla_bridge
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100() -> SingleDeviceSharding:
    """Where programs are placed that are to be compiled for an H100."""
    xla_bridge.get_backend()  # the CPU's, before the name of the other is known
    original = xla_bridge.canonicalize_platform

    def canonicalize(name: str) -> str:
        # "cuda" is known only where a device is found.
        return "cuda" if name in ("gpu", "cuda") else original(name)

    xla_bridge.canonicalize_platform = canonicalize
    found = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
    return SingleDeviceSharding(found.devices[0])


@contextmanager
def tracing_for_h100() -> Iterator[None]:
    """Within it Keras and KerasHub choose as on an H100 what they have it compute.

    They look at JAX's devices and at cuDNN. Nothing may run meanwhile.
    """
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    asked = {
        "check_cudnn_version": lambda: 90800,
        "check_compute_capability": lambda wanted: tuple(map(int, wanted.split("."))) <= (9, 0),
        "is_cuda_compute_capability_equal": lambda wanted: wanted == "9.0",
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(jax, "devices", lambda *_: [device]))
        for name, answer in asked.items():
            stack.enter_context(patch.object(fused_attention_stablehlo, name, answer))
        yield


def placed(shapes: Any, where: SingleDeviceSharding) -> Any:
    """The same shapes, on that device."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            if isinstance(x, jax.ShapeDtypeStruct)
            else x
        ),
        shapes,
        is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct),
    )
