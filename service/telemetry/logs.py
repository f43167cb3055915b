"""Logs as events with fields: one JSON line each, or readable lines in a terminal. Everything goes to stderr.

Modules use `structlog.get_logger()` and name the event in a word or two, with `job`, `sample`, `rung`, `rows`
… as fields. Records that libraries write through `logging` have the same form.
"""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor

_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)


def configure(*, style: Literal["auto", "json", "text"], level: str) -> None:
    """Set up this process's logging. "auto" is text when stderr is a terminal, else JSON."""
    text = style == "text" or (style == "auto" and sys.stderr.isatty())
    render: list[Processor] = (
        [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
        if text
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    numeric = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*_SHARED, *render],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    foreign = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=list(_SHARED), processors=foreign)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(numeric)
