"""`POST /generate` and `GET /models` as an application meets them, on the real broker."""

import base64
from email import message_from_bytes
from email.policy import HTTP

import pytest

from tests.service.conftest import PNG, OpenStage, Stage
