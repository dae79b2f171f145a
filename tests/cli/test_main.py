"""``hf-ext`` itself: help, unknown commands, exit statuses, errors as one sentence."""

import subprocess
import sys

import pytest

import hf_ext
from hf_ext.cli import COMMANDS


def test_help_names_every_command(hf_ext_command):
    for arguments in ([], ["--help"]):
        status, out, _ = hf_ext_command(*arguments)
        assert status == 0
        assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(hf_ext_command, name):
    status, out, _ = hf_ext_command(name, "--help")
    assert status == 0 and f"hf-ext {name}" in out


def test_version(hf_ext_command):
    assert hf_ext_command("--version") == (0, f"hf_ext {hf_ext.__version__}\n", "")


def test_unknown_command_suggests_the_near_one(hf_ext_command):
    status, out, err = hf_ext_command("chta", "model")
    assert (status, out) == (2, "")
    assert err.startswith("hf-ext: there is no command 'chta'. Did you mean 'chat'? Commands: ")
    assert hf_ext_command("xyzzy")[2].startswith("hf-ext: there is no command 'xyzzy'. Commands: ")


def test_unknown_option_is_status_2(hf_ext_command):
    status, _, err = hf_ext_command("info", "--jsom")
    assert status == 2 and "--jsom" in err


def test_errors_are_one_line(hf_ext_command, tmp_path):
    status, out, err = hf_ext_command("info", tmp_path)
    assert (status, out) == (1, "")
    assert err == f"hf-ext info: {tmp_path} is not a complete model folder: it has no config.json.\n"


def test_a_reader_that_stops_is_no_error(folder):
    code = f"from hf_ext.cli import main; import sys; sys.exit(main(['info', {str(folder)!r}, '--json']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 141) and b"Traceback" not in err


def test_help_loads_no_torch():
    code = "import sys; from hf_ext.cli import main; main([]); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")
