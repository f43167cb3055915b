"""The one way in for requests that draw, with the same promises whichever route they came by.

A route translates its body into a `GenerateRequest` and gives it to its `Intake`. Scope and rate of the key
were checked before (`access`); the caller, its unfinished jobs and its Idempotency-Key are looked after here.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import BaseModel
from starlette.types import Receive

from ditserve.service.errors import DeadlineExceeded, IdempotencyConflict
from ditserve.service.formats import MediaFormat
from ditserve.service.http.context import Api, Context, Unshared, caller, note
from ditserve.service.http.models import Model
from ditserve.service.http.reuse import Sharing
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.http.submission import Idempotency, Submission
from ditserve.service.jobs import JobResult
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
        media_format: MediaFormat,
        rung: Rung | None = None,
        sharing: Sharing = "running",
    ) -> Submission:
        """Queue `drawing`, which the route made of `body`.

        Takes `rung`, and raises, as `Submissions.submit` does.
        """
        idempotency = None
        if self.key is not None:
            idempotency = Idempotency(self.key, self._fingerprint(body, media_format))
        sender = caller(self.request, idempotency=idempotency)
        submit = partial(model.submissions.submit, caller=sender, media_format=media_format, rung=rung)
        submission = await submit(drawing, sharing=sharing)
        note(self.request, job=submission.job.id)
        if not submission.holder:
            return submission

        async def again() -> Submission:
            alone = await submit(_in_the_time_left(drawing, submission, model))
            note(self.request, job=alone.job.id)
            return alone

        return replace(submission, again=again)

    async def result(
        self, model: Model, submission: Submission, *, receive: Receive | None = None
    ) -> tuple[Submission, JobResult]:
        """Wait for the images, and return the submission that they are of: it may have been made again.

        With an Idempotency-Key the job goes on when the client goes away. `receive` tells when that is, in
        place of the request's own.

        Raises:
            IdempotencyConflict: an earlier request with this key is still running.
            ServiceError: as `Context.result` does.
        """
        if submission.pending and not submission.new and not submission.holder:
            raise IdempotencyConflict(
                "The first request with this Idempotency-Key is still running.", retry_after=1
            )
        keep, receive = self.key is not None, receive or self.request.receive
        try:
            return submission, await self.api.result(model, submission, receive, keep=keep)
        except Unshared:
            assert submission.again is not None
            submission = await submission.again()
        return submission, await self.api.result(model, submission, receive, keep=keep)

    def _fingerprint(self, body: BaseModel, media_format: MediaFormat) -> str:
        """Return a digest that is equal for equal requests to the same route.

        Fields at their default are left out, so that a release with more fields computes the same.
        """
        fields = body.model_dump(mode="json", exclude_defaults=True)
        content = json.dumps([self.request.scope["route"].path, fields, media_format], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _in_the_time_left(drawing: GenerateRequest, submission: Submission, model: Model) -> GenerateRequest:
    """Return the request with what is left of its deadline. Raises `DeadlineExceeded` where nothing is."""
    if submission.answer_by is None:
        return drawing
    left_ms = int((submission.answer_by - model.queue_client.queue.clock()) * 1000)
    if left_ms < 1:
        raise DeadlineExceeded("The images were not ready by the deadline.")
    return drawing.model_copy(update={"deadline_ms": left_ms})


def replay_headers(submission: Submission) -> dict[str, str]:
    """Return the headers that tell of an answer that was not drawn for this request alone."""
    if submission.cache is not None:
        return {"x-cache": submission.cache}
    return {} if submission.new else {"idempotency-replayed": "true"}


async def _intake(
    request: Request,
    api: Api,
    idempotency_key: Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$")] = None,
) -> Intake:
    return Intake(request, api, idempotency_key)


RequestIntake = Annotated[Intake, Depends(_intake)]
