"""Decoding on eight CPU devices against one; run by test_sharding in a process of its own, because a process has as many as it began with.

Takes one JSON object, ``{"programs": names of meshes, "engines": meshes as text}``: what to decode over.
Prints one: for each mesh what differs from a single device, which exchanges its program holds, and how a checkpoint is
read onto it.
"""

from __future__ import annotations

import json
import sys

import jax
from around import bench, trained
from engines import adapted, engines, mixed
from loading import loads, placed_again, quantised, quantised_layers, read_by_one_host
from programs import programs_over
from vocabulary import shared_by_gpus, shared_vocabulary


jax.config.update("jax_num_cpu_devices", 8)
asked = json.loads(sys.argv[1])
meshes = {"2x2x2": {"data": 2, "expert": 2, "tensor": 2}, "1x4x2": {"expert": 4, "tensor": 2}}
found = programs_over(meshes, asked["programs"]) | {
    "adapted": adapted("data=2,expert=2,tensor=2"),
    "loads": loads(meshes),
    "one host": {name: read_by_one_host(axes) for name, axes in (meshes | {"2": {"tensor": 2}}).items()},
    "placed": placed_again("data=2,expert=2,tensor=2", meshes["1x4x2"]),
    "quantised": quantised(meshes["1x4x2"]),
    "quantised layers": quantised_layers(meshes["1x4x2"]),
    "bench": bench({"data": 2, "expert": 2}),
    "trained": trained({"data": 2, "tensor": 2}),
    "engines": engines(asked["engines"]),
    "mixed": mixed("data=2"),
    "shared_vocabulary": shared_vocabulary(),
    "shared_by_gpus": shared_by_gpus(),
}
print(json.dumps(found))
