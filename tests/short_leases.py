"""The flow `batch` as the tests deploy it: claims on object storage are over soon after their holder has died."""

from __future__ import annotations

import tasks.ledger
from flows.batch import batch

__all__ = ["batch"]

tasks.ledger.LEASE_SECONDS, tasks.ledger.RENEW_SECONDS = 6.0, 1.0
