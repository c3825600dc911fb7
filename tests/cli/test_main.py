"""The entry point: commands, the version, the environment, misspelt words, signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lrqat_command import COMMANDS, main
from peft_lrqat import __version__
from peft_lrqat.cli.env import PACKAGES, environment
from peft_lrqat.cli.stop import StopOnSignal


ROOT = Path(__file__).resolve().parents[2]


def in_a_fresh_process(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["trian"]], ids=str)
def test_help_version_and_mistakes_do_not_import_torch(words):
    done = in_a_fresh_process(
        "import sys, lrqat_command\n"
        f"try: lrqat_command.main({words})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'peft_lrqat'} & set(sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_one_that_is_imported(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"peft-lrqat {__version__}\n"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "`trian` is not a command; did you mean `train`?"),
        (["xyz"], "`xyz` is not a command; use one of train, prepare,"),
        (
            ["eval", "--windw", "16", "--dataset", "x"],
            "unknown: --windw; did you mean --window?",
        ),
        (["env", "--qqqqqq"], "unknown: --qqqqqq (options: lrqat env --help)"),
    ],
)
def test_misspelt_words(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_env_tells_versions_and_devices(capsys):
    assert main(["env"]) == 0
    lines = dict(line[2:].split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines == environment()
    assert lines["peft-lrqat"] == __version__
    assert {"python", "system", "devices", *PACKAGES} <= lines.keys()
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == lines


def test_ctrl_c_has_no_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_lrqat.cli.env.run_env", interrupted)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "lrqat env: interrupted\n"


def test_signals_are_as_before_after_training():
    before = [signal.getsignal(number) for number in StopOnSignal.SIGNALS]
    stop = StopOnSignal()
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        # A second signal acts as it always does.
        assert [signal.getsignal(number) for number in StopOnSignal.SIGNALS] == before
    assert stop.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in StopOnSignal.SIGNALS] == before
