"""Check that two processes share the memory of --cache-in-ram; run by test_cache.py."""

import os
import sys
from pathlib import Path

import numpy as np

from common.processes import World
from latents.cache import LatentCache


def main() -> None:
    world = World()
    cache = LatentCache(sys.argv[1])
    cache.load_into_ram(world.rank, world.all_gather)
    location = cache._moments_in_ram.location
    is_owner = location.startswith(f"/proc/{os.getpid()}/")
    total = cache.gather(np.arange(24))[0].double().sum().item()
    results = world.all_gather((is_owner, total))
    assert results == [(True, total), (False, total)], results
    assert "memfd:latents" in Path("/proc/self/maps").read_text()
    world.close()
    print("shared", flush=True)
