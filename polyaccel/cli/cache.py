"""``polyaccel cache list`` and ``polyaccel cache clear``: the kernels that backends compiled and keep."""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise

from polyaccel.cli.kernel_folders import KernelFolder, cache_root, kernel_folders
from polyaccel.cli.options import Commands

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("cache", help="list or clear the kernels that backends compiled")
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    listing = actions.add_parser("list", help="what is cached for which versions and devices")
    listing.add_argument("--backend", metavar="NAME", help="of this backend alone")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(run=run_list)
    clear = actions.add_parser("clear", help="remove cached kernels; what is needed again is compiled again")
    clear.add_argument("--backend", metavar="NAME", help="of this backend alone")
    which = clear.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="everything (default)")
    which.add_argument(
        "--others", action="store_true", help="all but the last used of each backend: other versions and devices"
    )
    clear.set_defaults(run=run_clear)


def run_list(options: argparse.Namespace) -> int:
    caches = kernel_folders(options.backend)
    if options.json:
        print(json.dumps([_row(cache) for cache in caches], indent=2))
        return 0
    if not caches:
        print(f"no kernels are cached in {cache_root()}")
    now = time.time()
    for cache in caches:
        ages = f"{_age(now - cache.created)} old, used {_age(now - cache.used)} ago"
        print(f"{cache.backend}  {cache.key}  {len(cache.entries())} kernels, {_bytes(cache.size())}, {ages}")
        print(f"    {cache.problem or ', '.join(f'{name} {value}' for name, value in cache.fields.items())}")
    return 0


def run_clear(options: argparse.Namespace) -> int:
    caches = kernel_folders(options.backend)
    if options.others:
        # Within a backend they are in order of use, the last used first.
        caches = [cache for before, cache in pairwise(caches) if before.backend == cache.backend]
    removed = 0
    for cache in caches:
        size = cache.size()
        cache.remove()
        removed += size
        print(f"removed {cache.backend}  {cache.key}  {_bytes(size)}")
    print(f"{len(caches)} removed, {_bytes(removed)}")
    return 0


def _row(cache: KernelFolder) -> dict[str, object]:
    return {
        "backend": cache.backend,
        "key": cache.key,
        "fields": cache.fields,
        "kernels": len(cache.entries()),
        "bytes": cache.size(),
        "created": cache.created,
        "used": cache.used,
        "path": str(cache.path),
        "problem": cache.problem,
    }


def _age(seconds: float) -> str:
    for unit, length in UNITS:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "0 s"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} B"
