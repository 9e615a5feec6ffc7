"""What `print` shows of results."""

from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.shown import Printed, human_bytes
from precision_lab.watching.alarms import Alarm

FOUND = Explanation(
    "overflow in exp",
    "its operand reaches 112.8, and float32 ends at 3.403e+38.",
    phase="forward",
    operation="exp",
    module="blocks.0",
    remedies=[Remedy("code", "clamp it", "clamp it", "finite")],
)


def test_printed_is_what_rich_shows_without_colours():
    class Green(Printed):
        def __rich__(self) -> str:
            return "[green]one[/green] \n" + "word " * 30

    lines = str(Green()).splitlines()
    assert lines[0] == "one" and max(map(len, lines)) == 99 and "\x1b" not in str(Green())


def test_an_explanation_prints_its_operation_and_remedy():
    text = str(FOUND)
    assert text.startswith("First wrong: exp (forward) blocks.0\n") and "clamp it" in text
    assert repr(FOUND).startswith("Explanation(kind=")


def test_an_alarm_prints_its_explanation():
    alarm = Alarm("loss", 3, float("nan"), "the loss of step 3 is nan")
    assert str(alarm) == "the loss of step 3 is nan"
    alarm.explanation = FOUND
    assert str(alarm) == f"the loss of step 3 is nan\n{FOUND}"
    alarm.explanation, alarm.unexplained = None, "its batch is not known"
    assert str(alarm).endswith("\nits batch is not known")


def test_bytes_have_three_digits():
    assert [human_bytes(number) for number in (None, 999, 2048, 5 * 2**30)] == ["-", "999 B", "2 KiB", "5 GiB"]
