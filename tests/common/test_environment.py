"""Commands run without a passwd entry, a user name and a home directory."""

import getpass
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.environment import complete_environment
from tests.helpers import ROOT

USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
FORGET_USER = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""
IMPORT_COMMANDS = """
import train, sample_ddp, preprocessing.encode_latents
import timm, diffusers
from huggingface_hub import constants
print(constants.HF_HOME)
"""


@pytest.fixture
def unknown_user(monkeypatch, tmp_path):
    """Run a test as a user without environment variables and passwd entry."""

    def getpwuid(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (*USER_VARIABLES, "HOME"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)


def test_user_and_home_are_set_if_they_are_unknown(unknown_user, tmp_path):
    complete_environment()
    assert getpass.getuser() == f"user-{os.getuid()}"
    home = Path("~").expanduser()
    assert home.parent == tmp_path and home.stat().st_mode & 0o777 == 0o700
    complete_environment()
    assert Path("~").expanduser() == home


def test_home_of_another_user_is_not_used(unknown_user, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / f"home-{os.getuid()}").symlink_to(tmp_path / "other")
    complete_environment()
    home = Path("~").expanduser()
    assert home.is_dir() and home.resolve() != tmp_path / "other"


def test_known_user_and_home_are_unchanged(monkeypatch, tmp_path):
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    complete_environment()
    assert dict(os.environ) == before


def test_missing_temporary_directory_is_reported_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
    with pytest.raises(SystemExit) as stop:
        complete_environment()
    assert stop.value.code == 2
    expected = "error: No usable temporary directory found in ['/nonexistent']: set TMPDIR to a"
    assert capsys.readouterr().err.startswith(expected)


def test_commands_are_imported_without_user_and_home(tmp_path):
    """Libraries read the environment when they are imported, so this needs a new process."""
    removed = (*USER_VARIABLES, "HOME", "HF_HOME", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in removed}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", FORGET_USER + IMPORT_COMMANDS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / f"home-{os.getuid()}"))
    assert not (tmp_path / "~").exists()
