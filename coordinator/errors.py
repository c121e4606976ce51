"""Which errors the project raises, and with which exit code a command ends on each.

    SwarmError                  1   anything below that has no code of its own
    ├── UsageError              2   wrong flags, wrong spec file (argparse ends with 2, too)
    │   └── SpecError           2   a run spec that is malformed or not the one trusted
    ├── DataError               3   the data file: missing, unreadable, unusable
    ├── ModelError              4   the model: not found, not an encoder, wrong hash
    ├── NetworkError            5   no entry point answers, the p2p daemon does not run
    │   └── RoundError          5   one attempt at a round failed; the session tries again
    ├── StateError              6   the output directory: not writable, not of this run
    └── AccessError             7   a private run: no credential, or one that is expired, revoked, of another

A run that was told to stop ends with 130 (Ctrl-C) or 143 (SIGTERM), as shells expect.
"""

from __future__ import annotations

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class SwarmError(Exception):
    """An error that a person can act on: the message says what is wrong, where, and what to do."""

    exit_code = 1


class UsageError(SwarmError):
    exit_code = 2


class SpecError(UsageError):
    pass


class DataError(SwarmError):
    exit_code = 3


class ModelError(SwarmError):
    exit_code = 4


class NetworkError(SwarmError):
    exit_code = 5


class RoundError(NetworkError):
    pass


class StateError(SwarmError):
    exit_code = 6


class AccessError(SwarmError):
    exit_code = 7
