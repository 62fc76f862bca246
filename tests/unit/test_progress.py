"""Progress away from a terminal: few lines, the first and the last always among them."""

import pytest

from std_fast.runtime.metrics import Progress


@pytest.mark.parametrize(
    ("total", "seconds", "printed"),
    [
        (1000, 1000.0, list(range(1, 1000, 10)) + [1000]),  # 1 image/s: every 10 s
        (1000, 100.0, list(range(1, 1000, 50)) + [1000]),  # every 5 %, which takes 5 s
        (1000, 4.0, [1, 251, 501, 751, 1000]),  # never more than one a second
        (0, 1000.0, list(range(1, 1000, 10))),  # the total is unknown
    ],
)
def test_lines_printed(total: int, seconds: float, printed: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress("converted", total, "images", clock=lambda: now[0])
    for done in range(1, 1001):
        now[0] = done * seconds / 1000
        progress.note(done, "converting")
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == printed
    assert lines[0] == f"converted 1/{total} images  converting"


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("converted", 10, "images", quiet=True).note(10, "done")
    assert capsys.readouterr().err == ""
