"""The cache of generated source: content-addressed, atomic, verified before it is executed.

``key.py`` names a variant, ``store.py`` fetches or builds it, ``manage.py`` lists and prunes,
``bound.py`` keeps the whole from growing; ``guard.py`` holds the file-system rules and
``manifest.py`` the checksums.  Nothing here knows what a plan or a kernel is.
"""

from cl_compiler.cache.bound import fetch, max_cache_bytes
from cl_compiler.cache.guard import CacheWarning
from cl_compiler.cache.key import CacheKey, cache_key, canonical_json, environment_fingerprint
from cl_compiler.cache.manage import (
    CachedVariant,
    CacheProblem,
    Removal,
    clear,
    list_entries,
    prune,
    verify,
)
from cl_compiler.cache.store import Entry, Variant, cache_root, is_switched_off

__all__ = [
    "CacheKey",
    "CacheProblem",
    "CacheWarning",
    "CachedVariant",
    "Entry",
    "Removal",
    "Variant",
    "cache_key",
    "cache_root",
    "canonical_json",
    "clear",
    "environment_fingerprint",
    "fetch",
    "is_switched_off",
    "list_entries",
    "max_cache_bytes",
    "prune",
    "verify",
]
