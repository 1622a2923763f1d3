"""Names and numbers as the report's sentences, tables and figures write them."""

from kd_jax.evaluation.significance import Difference
from kd_jax.study.plan import Student
from kd_jax.study.report.numbers import Numbers
from kd_jax.text_tables import escaped

NONE = "–"
WIDEST = 0.5  # half-width of an interval around no change, above which it is uninformative


def signed(value: float, digits: int = 1) -> str:
    """+1.2 or −1.2, with the typographic minus; a value that rounds to zero has no sign."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("−" if value < 0 else "+") + text


def relative(difference: Difference | None) -> tuple[float, float, float] | None:
    """Relative change as a fraction with the ends of its interval; None if there is no error to compare with."""
    if difference is None or difference.relative is None:
        return None
    assert difference.relative_low is not None and difference.relative_high is not None
    return difference.relative, difference.relative_low, difference.relative_high


def leaves_out_zero(difference: Difference) -> bool:
    """Whether the interval that the report shows excludes zero: that of the relative change, if there is one."""
    _, low, high = relative(difference) or (0.0, difference.low, difference.high)
    return low > 0 or high < 0


def uninformative(difference: Difference) -> str | None:
    """Whether there are too few seeds or utterances to tell, in words; None if the interval is informative.

    This is the only definition: the interval contains zero, and it is wider than ± 50 % of the other error or covers a
    single seed.
    """
    change = relative(difference)
    wide = change is not None and change[2] - change[1] > 2 * WIDEST
    if leaves_out_zero(difference) or not (wide or difference.seeds == 1):
        return None
    return "too few seeds to tell" if difference.seeds else "too few utterances to tell"


def relative_text(difference: Difference | None) -> str:
    """Relative change with its interval, in percent; an en dash if undefined, words if the interval says nothing."""
    change = relative(difference)
    if difference is None or change is None:
        return NONE
    value, low, high = (signed(100 * one) for one in change)
    return uninformative(difference) or f"{value} % [{low}, {high}]"


def label(numbers: Numbers, student: Student) -> str:
    """The student's label as Markdown."""
    return escaped(numbers.label(student))


def set_name(numbers: Numbers, student: Student) -> str:
    """The transfer set's part of a distilled student's label, as Markdown."""
    return label(numbers, student).removeprefix("distilled, ")


def plural(count: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentence(text: str) -> str:
    """The text with a capital letter first."""
    return text[:1].upper() + text[1:]
