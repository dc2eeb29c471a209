# SPDX-License-Identifier: Apache-2.0
"""The command line: one file a command; torch is imported once a command runs, not before."""

import os
import sys
from importlib import import_module

from anabranch import __version__
from anabranch.errors import FAILED, AnabranchError, UsageError, did_you_mean

COMMANDS = {
    "measure": "does sharing hurt? a transfer matrix with intervals and a verdict for each task",
    "pretrain": "learn from a folder of images with experts for its clusters, or without as the control",
    "customize": "hand back, for one task, the ordinary checkpoint that serves it",
    "erase": "take out of a diffusion model what it draws unasked: scan, train, sample, eval, bake",
    "align": "a language model that reasons in steps, one expert a step: chain, train, chat, generate",
    "experts": "the experts of a trained mixture of a language model: profile, rank, steer, tune, prune, merge",
    "data": "make data with a concept in it that no caption names",
    "demo": "see it all, on data and models that ship with the package",
    "report": "build the page of a run again, finished or not",
    "list": "every method, from its card",
    "doctor": "is this machine ready? what is missing, and how to get it",
    "completion": "completion of commands, topics and flags for bash, zsh or fish",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    return (
        f"anabranch {__version__}: safe, scalable transfer with dynamic experts\n\n"
        f"usage: anabranch COMMAND [OPTIONS]\n\n{rows}\n\n"
        "  anabranch COMMAND --help   the options of a command\n"
        "  anabranch demo             the place to start: four stories and one page, about twenty minutes\n"
        "  anabranch demo experts     the shortest of them, two minutes\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 done, 1 failed, 2 wrong usage, 3 a check failed, 75 stopped."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise UsageError(f"there is no command {arguments[0]!r}", hint=did_you_mean(arguments[0], COMMANDS))
        code: int = import_module(f"anabranch.cli.{arguments[0]}").main(arguments[1:])
        sys.stdout.flush()
        return code
    except AnabranchError as error:
        print(f"anabranch: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:  # of torch's connections; anything else is ours to mend, and needs its traceback
        told = lost_process(error)
        if told is None:
            raise
        print(f"anabranch: {told}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        if is_read():
            raise
        return FAILED
    except KeyboardInterrupt:
        print("anabranch: interrupted", file=sys.stderr)
        return FAILED
    finally:
        if "anabranch.train.processes" in sys.modules:  # else nothing was connected, and torch may not be loaded
            import_module("anabranch.train.processes").disconnect()


def is_read() -> bool:
    """Whether anybody still reads what is printed; where not, as after `| head`, the rest of it goes nowhere."""
    import select

    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False


def lost_process(error: RuntimeError) -> AnabranchError | None:
    """What to say where another process of the run is gone; None where it is another error."""
    connections = sys.modules.get("anabranch.train.processes")
    if connections is None or connections.launched() < 2 or not connections.lost(error):
        return None
    told: AnabranchError = connections.lost_process(error)
    return told
