"""What went wrong, in one line that says what to do."""


class UsageError(ValueError):
    """Raised where the user's input, not the code, is at fault. Tools print it without a trace."""
