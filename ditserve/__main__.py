"""`ditserve COMMAND`: every command of this project by one name; `ditserve --help` lists them."""

from __future__ import annotations

import difflib
import runpy
import sys

from ditserve.commands import COMMANDS


def usage() -> str:
    """Return the list of all commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    head = "usage: ditserve COMMAND …\n\nServe Diffusion Transformers, and make what is served.\n"
    return "\n".join([head, *lines, "\nditserve COMMAND --help tells more of each."])


def main() -> int:
    """Run the command that the command line names; return the exit status: 2 after an unknown one."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    name = words[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "ditserve --help lists them"
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    module, *first = command.words.split()
    sys.argv = [f"ditserve {name}", *first, *words[1:]]
    try:
        runpy.run_module(f"ditserve.{module}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "ditserve"):
            raise
        print(
            f"error: ditserve {name} needs the package {missing}, which the extra {command.extra} brings: "
            f"pip install 'ditserve[{command.extra}]'",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
