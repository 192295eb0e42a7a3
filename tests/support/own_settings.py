"""Make this process read its environment again: settings, the store and S3 clients are cached."""

from __future__ import annotations

import s3fs

from tasks.settings import settings
from tasks.store.results import store


def forget() -> None:
    """Clear these caches; the next use reads the environment again."""
    for function in (settings, store):
        function.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
