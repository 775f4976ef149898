"""`lopro-fx`: the command line. One line says what went wrong; `--debug` shows where."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lopro_fx
import lopro_fx.passes
from lopro_fx import streams
from lopro_fx.errors import LoProError
from lopro_fx.memory import keep_freed_memory

_OK, _INTERNAL, _ERROR, _INTERRUPTED, _TERMINATED = 0, 1, 2, 130, 143
# Command: (module, what it does). Only the module of the given command is imported.
_COMMANDS = {
    "quantize": ("quantize", "quantise a model, with perplexity before and after"),
    "eval": ("evaluate", "perplexity, divergence from the original, and tasks"),
    "generate": ("generate", "continue a prompt"),
    "export": ("export", "compile a saved folder to an AOTInductor package"),
    "explain": ("explain", "list the layers that would be quantised, and why others not"),
    "bench": ("bench", "speed and memory of a package that generates"),
    "report": ("report", "list what was done to each layer of a saved folder"),
}
_OURS = tuple(str(Path(path).resolve()) for path in (*lopro_fx.__path__, *lopro_fx.passes.__path__))


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends the run as Ctrl-C does."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(_ERROR, f"lopro-fx: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; by default the process's own.

    Returns:
        0, 1 after an error that is not the user's, 2 after one that is, 130 after Ctrl-C, 143 after SIGTERM.
    """
    streams.open_closed()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(arguments).parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    except LoProError as error:
        return _fail(_ERROR, f"error: {error}", "--debug" in arguments)
    try:
        keep_freed_memory()
        with _quiet(args.debug), _ending():
            args.run(args)
    except _TerminatedError:
        return _fail(_TERMINATED, f"terminated{_kept(args)}", args.debug)
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED, f"interrupted{_kept(args)}", args.debug)
    except BrokenPipeError:  # the reader of `lopro-fx report DIR | head` has seen enough
        streams.abandon(sys.stdout)
    except LoProError as error:
        return _fail(_ERROR, f"error: {error}", args.debug)
    except Exception as error:  # a traceback helps nobody who did not ask for one
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return _fail(_INTERNAL, f"internal error: {type(error).__name__}: {reason} (--debug shows where)", args.debug)
    return _OK


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="lopro-fx", description="Quantise language models to 2-4 bits after training.")
    parser.add_argument("--version", action="version", version=f"lopro-fx {lopro_fx.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' warnings")
        if arguments[:1] == [name]:
            implementation = _import(module)
            implementation.add(command)
            command.set_defaults(run=implementation.run)
    return parser


def _import(module: str) -> Any:
    from importlib import import_module

    return import_module(f"lopro_fx.commands.{module}")


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Show lopro_fx's warnings as one line each, and those of other libraries only with `debug`."""
    if debug:
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _ending() -> Iterator[None]:
    """Let SIGTERM clear up what was begun; a signal's action is the main thread's to set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    if category is UserWarning and str(Path(filename).resolve()).startswith(_OURS):
        streams.note(f"lopro-fx: warning: {str(message).splitlines()[0]}")


def _kept(args: argparse.Namespace) -> str:
    out = getattr(args, "out", None)
    if out is None:
        return ""
    from lopro_fx.commands.target import journal_of

    if not (journal := journal_of(Path(out))).is_dir():
        return ""
    return f"; finished layers are kept in {journal}, and the same command continues there"


def _fail(code: int, line: str, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    streams.note(f"lopro-fx: {line}")
    return code
