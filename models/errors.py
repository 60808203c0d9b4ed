"""The exception that networks raise for unusable settings."""


class FieldError(ValueError):
    """A setting cannot be used, for example because it names an unknown encoder.

    The caller reports this error together with the flag or file that the setting comes from.

    Args:
        field: Name of the setting, which is a parameter or a dataclass field.
        reason: Problem and remedy, beginning with the value, such as "7: the model has 6 blocks".
            The caller prepends the name of the flag.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field} {reason}")
        self.field = field
        self.reason = reason
