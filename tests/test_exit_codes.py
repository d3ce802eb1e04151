"""How launchers end."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from fedra_engine.errors import InputError
from fedra_engine.exit_codes import BAD_INPUT, exit_code


def test_bad_input_is_one_line_on_stderr_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise InputError("data.root: found\n  nothing")

    assert exit_code(main) == BAD_INPUT == 2
    captured = capsys.readouterr()
    assert captured.err == "error: data.root: found nothing\n"
    assert captured.out == ""


def test_no_name_in_a_message_or_warning_steers_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def main() -> None:
        logging.getLogger("fedra_engine.data").warning("left out %s", "a\x1b[2J")
        raise InputError("data.root: found \x1b[31m\udcff")

    assert exit_code(main) == BAD_INPUT
    assert capsys.readouterr().err == "left out a\\x1b[2J\nerror: data.root: found \\x1b[31m\\udcff\n"


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert exit_code(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


ALONE = ""
IN_A_JOB = (
    "import torch; torch.distributed.init_process_group('gloo', init_method='file://{0}/job', rank=0, world_size=1)"
)


@pytest.mark.parametrize("start", [ALONE, IN_A_JOB], ids=["alone", "in_a_job"])
def test_an_ending_process_has_said_and_done_all(start: str, tmp_path: Path) -> None:
    lines = [
        start.format(tmp_path),
        "import atexit",
        "from fedra_engine.exit_codes import end",
        "atexit.register(print, 'done')",
        "print('said')",
        "end(2)",
    ]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "said\ndone\n"), ended.stderr
