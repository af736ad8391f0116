"""The error of a value that cannot be stored exactly; it loads nothing, since keys are made with the standard library alone."""


class Unpackable(Exception):  # noqa: N818 (of one value, which its caller gets all the same)
    """A value that cannot be stored exactly.

    Args:
        reason: What of it cannot be, as the end of a sentence, without the value.
        advice: What helps.
        is_type: Whether no value of its type can be stored.
        is_size: Whether it is too large.
    """

    def __init__(self, reason: str, advice: str, *, is_type: bool = False, is_size: bool = False) -> None:
        super().__init__(f"{'type' if is_type else 'size' if is_size else 'value'}, {reason} ({advice})")
        self.reason = reason
        self.advice = advice
        self.is_type = is_type
        self.is_size = is_size
