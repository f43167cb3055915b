"""The systemd unit: systemd takes it, and it stops and restarts as the service means it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ditserve.commands import COMMANDS
from ditserve.service.exit_statuses import MISCONFIGURED
from ditserve.service.launch.supervisor import LAST_GRACE_S
from ditserve.service.settings import Settings
from tests.systemd_unit import PREFIX, UNIT, exec_words, unit_settings


def verified(text: str, folder: Path) -> tuple[int, str]:
    """Return the status and the complaints of `systemd-analyze verify`."""
    unit = folder / "ditserve.service"
    unit.write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed; on Debian: apt-get install systemd")
    program = tmp_path / "ditserve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = UNIT.read_text().replace(f"{PREFIX}ditserve", str(program))
    assert verified(text, tmp_path) == (0, "")
    assert "Unknown key" in verified(text.replace("KillMode", "KilMode"), tmp_path)[1]


def test_it_starts_a_command_that_exists() -> None:
    program, command, *flags = exec_words()
    assert (program, flags) == ("ditserve", [])
    assert command in COMMANDS


def test_it_stops_and_restarts_as_the_service_means_it() -> None:
    unit = unit_settings()
    # First the API, then the workers, then the queue server.
    longest = 2 * (Settings.parse().drain_s + LAST_GRACE_S) + LAST_GRACE_S
    assert float(unit["TimeoutStopSec"][0]) > longest
    # The main process alone is told: it stops its children in order.
    assert unit["KillMode"] == ["mixed"]
    assert unit["RestartPreventExitStatus"] == [str(MISCONFIGURED)]
    assert unit["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
