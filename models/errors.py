"""The error that networks raise for a setting that cannot be used."""


class FieldError(ValueError):
    """A setting that cannot be used, such as an unknown encoder.

    The caller knows the flag or file that the setting came from and names it in its own message.

    Args:
        field: Name of the setting, a parameter or a dataclass field.
        reason: What is wrong and how to fix it, beginning with the value: "7: the model has 6
            blocks". The caller puts its flag in front.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field} {reason}")
        self.field = field
        self.reason = reason
