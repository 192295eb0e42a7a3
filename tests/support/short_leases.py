"""The flow `batch` as the tests deploy it: a claim on object storage ends soon after its holder has died."""

from __future__ import annotations

import tasks.store.claims
from flows.batch import batch

__all__ = ["batch"]

tasks.store.claims.LEASE_SECONDS, tasks.store.claims.RENEW_SECONDS = 6.0, 1.0
