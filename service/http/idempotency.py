"""Requests that are sent again: what makes two of them the same, and under which id their job is found. Pure."""

from __future__ import annotations

import hashlib
import json

from ditserve.service.http.schemas import GenerateRequest


def keyed_id(caller: str, key: str, model: str) -> str:
    """The job's id for an Idempotency-Key of a caller. `model`: what is asked, so that two never have jobs of one id."""
    return hashlib.blake2s(f"{caller}\0{key}\0{model}".encode(), digest_size=16).hexdigest()


def fingerprint_of(request: GenerateRequest, image_format: str) -> str:
    """Equal for equal requests."""
    canonical = json.dumps([request.model_dump(mode="json"), image_format], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
