"""How all verbs speak: results, and one line that says the mend where the call is wrong (status 2).

Covers: standard output that takes no more, too, such as a full disk.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click


class InputError(click.ClickException):
    """The input or the call is wrong; the message says what is and how to mend it."""

    exit_code = 2

    def format_message(self) -> str:
        """Return the message on one line, whatever was quoted in it."""
        return " ".join(self.message.splitlines())


class Verb(click.Command):
    """A command whose usage errors are one line; click's own are four."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the command line.

        Raises
        ------
        InputError
            It is wrong.
        """
        try:
            return super().make_context(*arguments, **options)
        except click.UsageError as error:
            raise _one_line(error, f"dask memusage {self.name} --help") from None


class Verbs(click.Group):
    """The group; lists its verbs in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """Return the names of the verbs."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb.

        Raises
        ------
        InputError
            There is no such verb.
        """
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise _one_line(error, "dask memusage --help") from None


def say(result: object) -> None:
    """Print a result.

    Raises
    ------
    InputError
        Standard output cannot be written.
    """
    try:
        click.echo(result)
    except OSError as error:
        if error.errno == errno.EPIPE:  # who reads has read enough: click ends without a word
            raise
        # What has not gone would be tried once more at the interpreter's end, and fail loudly.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise InputError(
            f"standard output cannot be written ({error.strerror}); send it to where there is room"
        ) from None


def _one_line(error: click.UsageError, where: str) -> InputError:
    message = error.format_message()
    return InputError(f"{message}{'' if message[-1] in '.?!' else '.'} See: {where}")
