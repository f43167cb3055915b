"""`python -m service`: the whole service on this machine, or with a command one part of it.

    python -m service [flags]                 a private Valkey if REDIS_URL is unset, workers and the API
    python -m service api [flags]             the API alone
    python -m service worker [flags]          one worker alone
    python -m service dead list [flags]       jobs put aside after too many attempts
    python -m service dead requeue ID [flags]
    python -m service keys add|list|revoke    API keys, in the file that --keys-file names
    python -m service generate "strawberry"   ask a running service for an image
    python -m service models [FOLDER …]       bundles with their state and size
    python -m service schema FOLDER           what a model takes

Flags and environment variables: --help. Each command imports only what it needs.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ditserve.commands import command_line
from ditserve.service.settings import Settings
from ditserve.service.telemetry import output

# Commands that take settings, and those that take arguments of their own.
COMMANDS = {"api": "ditserve.service.http.api:run", "worker": "ditserve.service.worker.main:run"}
TOOLS = {
    "generate": "ditserve.service.client.cli:run",
    "keys": "ditserve.service.api_keys:run",
    "models": "ditserve.service.bundle_table:run",
    "schema": "ditserve.service.http.model_schema:run",
}


def main(argv: Sequence[str]) -> int:
    """Run the command in `argv`; return the exit status."""
    words = list(argv[:1])
    if words == ["dead"]:
        words = [word for word in argv[:3] if not word.startswith("-")]
    command = words[0] if words and not words[0].startswith("-") else ""
    flags = list(argv[len(words) if command else 0 :])
    if command == "dead":
        settings = Settings.load(flags, program=command_line("service dead"))
        dead: Callable[[Sequence[str], Settings], int] = _implementation("ditserve.service.dead_letters:run")
        return dead(words[1:], settings)
    if command in TOOLS:
        tool: Callable[[Sequence[str]], int] = _implementation(TOOLS[command])
        return tool(argv[1:])
    if command not in ("", *COMMANDS):
        known = ", ".join((*COMMANDS, "dead", *TOOLS))
        print(f"error: unknown command {command!r}; choose among {known}", file=sys.stderr)
        return 2
    settings = Settings.load(flags, program=command_line(f"service {command}".rstrip()))
    run: Callable[[Settings], int] = _implementation(
        COMMANDS.get(command, "ditserve.service.launch.supervisor:run")
    )
    output.make_lossy("stdout")
    return run(settings)


def _implementation(name: str) -> Callable[..., int]:
    module, _, attribute = name.partition(":")
    function: Callable[..., int] = getattr(import_module(module), attribute)
    return function


if __name__ == "__main__":
    raise SystemExit(output.run_command(lambda: main(sys.argv[1:])))
