"""The garbage collector of a process that has started."""

import gc


def keep_what_is_there() -> None:
    """Let what exists now stay for good, so that the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
