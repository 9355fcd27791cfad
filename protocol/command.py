"""How a command ends: one line on stderr and an exit code, never a traceback for what the user can mend.

0 done; 1 the run failed for a reason we know; 2 the configuration is wrong; 130 interrupted from the keyboard.
Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from protocol.errors import ConfigError, HeadwayError

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130


def run_command(prog: str, body: Callable[[], int]) -> int:
    """Call `body` and return the exit code; a known error becomes `prog: error: ...` on stderr."""
    try:
        return body()
    except ConfigError as error:
        return _fail(prog, error, EXIT_CONFIG)
    except (HeadwayError, OSError) as error:  # OSError: full disk, port in use, missing file; its text names it
        return _fail(prog, error, EXIT_FAILED)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fail(prog: str, error: Exception, code: int) -> int:
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
