"""Handle flags of the commands of other repositories, so that their command lines can be reused.

A flag that has no effect here is accepted, and a message states the reason. A flag that has another
name here ends the command with an error that states what to pass instead.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.cli import Parser, UserError
from common.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class UnusedFlag:
    """A flag that is accepted and has no effect.

    Args:
        name: The flag, such as "--fused-attn".
        reason: Why it has no effect, as a clause.
        is_switch: Whether the flag takes no value and has the form --no-NAME as well.
    """

    name: str
    reason: str
    is_switch: bool = False

    @property
    def destination(self) -> str:
        """The attribute under which argparse stores the value."""
        return self.name.removeprefix("--").replace("-", "_")


# A flag of the training and sampling commands of REPA and SRA.
FUSED_ATTENTION = UnusedFlag(
    "--fused-attn",
    "PyTorch's scaled_dot_product_attention is always used; it selects a fused kernel if there is "
    "one",
    is_switch=True,
)
# Flags of the training and sampling commands of SiT, as replacements.
_NO_CUTOFF = (
    "not available: an interval of 0.001 is excluded at the end of the time interval where the "
    "prediction is singular; remove the flag"
)
TIME_CUTOFFS = {"--train-eps": _NO_CUTOFF, "--sample-eps": _NO_CUTOFF}


@dataclass(frozen=True)
class ForeignFlags:
    """The flags of other repositories that a command recognizes.

    Args:
        unused: Flags that are accepted and have no effect.
        replacements: For each flag that is not accepted, a phrase that states what to pass instead.
            Words without hyphens are recognized only as the first argument.
    """

    unused: Sequence[UnusedFlag]
    replacements: Mapping[str, str]

    def parse(self, parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line, by default that of the process.

        Raises:
            UserError: A flag has another name here, is unknown, or has a bad value.
        """
        arguments = sys.argv[1:] if argv is None else list(argv)
        self._check_replacements(arguments)
        group = parser.add_argument_group("flags of other repositories without effect here")
        for flag in self.unused:
            action = argparse.BooleanOptionalAction if flag.is_switch else "store"
            help_text = flag.reason.replace("%", "%%")
            group.add_argument(flag.name, action=action, default=argparse.SUPPRESS, help=help_text)
        args = parser.parse_args(arguments)
        for flag in self.unused:
            if hasattr(args, flag.destination):
                logger.info("%s has no effect: %s", flag.name, flag.reason)
        return args

    def _check_replacements(self, arguments: list[str]) -> None:
        """Raise UserError if a flag has another name here. Required flags may be missing."""
        for index, argument in enumerate(arguments):
            name = argument.split("=")[0]
            is_value = index > 0 and not name.startswith("--")
            if name in self.replacements and not is_value:
                raise UserError(f"{name}: {self.replacements[name]}")
