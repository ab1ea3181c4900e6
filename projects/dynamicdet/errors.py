"""What went wrong, in one line that says what to do."""

from types import ModuleType


class UsageError(ValueError):
    """Raised where the user's input, not the code, is at fault. Tools print it without a trace."""


def import_optional(name: str, whose: str, extra: str) -> ModuleType:
    """An optional library.

    Args:
        name (str): Of its module.
        whose (str): Who needs it, in the plural.
        extra (str): The file below requirements that has it.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        return __import__(name)
    except ImportError:
        raise UsageError(
            f"{whose} need '{name}', which is not installed: "
            f'pip install -r requirements/{extra}.txt'
        ) from None


def reason_of(error: Exception) -> str:
    """An error of a library in one line."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__
