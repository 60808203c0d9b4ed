"""Placeholder."""


class EncoderError(ValueError): ...


class Encoder:
    @classmethod
    def describe(cls, name, resolution):
        return name, 8, 224
