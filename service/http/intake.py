"""The one way in for requests that draw, with the same promises whichever route they came by.

A route translates its body into a `GenerateRequest` and gives it to its `Intake`. Scope and rate of the key
were checked before (`access`); the caller, its unfinished jobs and its Idempotency-Key are looked after here.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import BaseModel
from starlette.types import Receive

from ditserve.service.errors import IdempotencyConflict
from ditserve.service.http.context import Api, Context, caller, note
from ditserve.service.http.models import Model
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.http.submission import Idempotency, Submission
from ditserve.service.jobs import ImageFormat, JobResult
from ditserve.service.rung import Rung


@dataclass(frozen=True, slots=True)
class Intake:
    """One HTTP request that draws, and the Idempotency-Key that it was sent with."""

    request: Request
    api: Context
    key: str | None

    async def submit(
        self,
        model: Model,
        drawing: GenerateRequest,
        *,
        body: BaseModel,
        image_format: ImageFormat,
        rung: Rung | None = None,
    ) -> Submission:
        """Queue `drawing`, which the route made of `body`.

        Takes `rung`, and raises, as `Submissions.submit` does.
        """
        idempotency = None
        if self.key is not None:
            idempotency = Idempotency(self.key, self._fingerprint(body, image_format))
        submission = await model.submissions.submit(
            drawing, caller(self.request, idempotency=idempotency), image_format=image_format, rung=rung
        )
        note(self.request, job=submission.job.id)
        return submission

    async def result(
        self, model: Model, submission: Submission, *, receive: Receive | None = None
    ) -> JobResult:
        """Wait for the images. With an Idempotency-Key the job goes on when the client goes away.

        `receive` tells when that is, in place of the request's own.

        Raises:
            IdempotencyConflict: an earlier request with this key is still running.
            ServiceError: as `Context.result` does.
        """
        if submission.pending and not submission.new:
            raise IdempotencyConflict(
                "The first request with this Idempotency-Key is still running.", retry_after=1
            )
        keep = self.key is not None
        return await self.api.result(model, submission, receive or self.request.receive, keep=keep)

    def _fingerprint(self, body: BaseModel, image_format: ImageFormat) -> str:
        """Return a digest that is equal for equal requests to the same route.

        Fields at their default are left out, so that a release with more fields computes the same.
        """
        fields = body.model_dump(mode="json", exclude_defaults=True)
        content = json.dumps([self.request.scope["route"].path, fields, image_format], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def replay_headers(submission: Submission) -> dict[str, str]:
    """Return the header that marks the answer to a repeated request."""
    return {} if submission.new else {"idempotency-replayed": "true"}


async def _intake(
    request: Request,
    api: Api,
    idempotency_key: Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$")] = None,
) -> Intake:
    return Intake(request, api, idempotency_key)


RequestIntake = Annotated[Intake, Depends(_intake)]
