"""An upload: one capture as it is now, and the reconstruction that is asked for; the unit of claims, failures, assets.

The plan makes one for each capture; the flows, their events and the submitter use it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from pydantic import BaseModel, ConfigDict

from tasks.capture.listing import Listing, upload_key
from tasks.mesh.publish import published_folder
from tasks.settings import Parameters
from tasks.store.claims import Claims, Failure, failure_of, failures_recorded, forget_failure, record_failure


class Upload(BaseModel):
    """One capture as it is now, and the reconstruction that is asked for.

    A capture with new content, another engine or other parameters is another upload.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    """Folder or URL below which the asset is published."""
    key: str
    """The upload key: a digest of the listing, the engine and the parameters. Empty: there is no capture."""
    id: str
    """The capture's id: the path of its assets below the output."""
    uri: str
    """Folder or URL of the capture."""

    @staticmethod
    def of(listing: Listing, output: str, engine: str, parameters: Parameters) -> Upload:
        """The upload of a capture that has been listed."""
        return Upload(output=output, key=upload_key(listing, engine, parameters), id=listing.id, uri=listing.uri)

    def published(self) -> str | None:
        """The folder of its asset, below the output; None if it has none."""
        return published_folder(self.output, self.id, self.key)

    def failure(self) -> Failure | None:
        """The record of its failures in the store; None if it has none."""
        return failure_of(self.output, self.key)

    def record(self, error: BaseException) -> Failure:
        """Record one more failure."""
        return record_failure(self.output, self.key, self.uri, error)

    def forget(self) -> None:
        """Forget its failures: a person asks for another try."""
        forget_failure(self.output, self.key)

    def recorded(self) -> AbstractContextManager[None]:
        """Within the block it is worked on: an error is recorded as a failure, success forgets earlier ones."""
        return failures_recorded(self.output, self.key, self.uri)

    def claimed(self, claims: Claims) -> AbstractContextManager[bool]:
        """Claim it for the block; gives False if another process, which is alive, has it."""
        return claims.claimed(self.output, self.key)
