"""The command `probattn`: parse, call, print."""

import contextlib
import dataclasses
import errno
import io
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

import probattn
from probattn.blocks.promotion import default_promotion
from probattn.inference.cli.commands import (
    Evaluate,
    Fit,
    Generate,
    Sample,
)
from probattn.inference.cli.console import printable
from probattn.inference.cli.exchange_commands import Export, Import, Tune
from probattn.inference.cli.quiet import silence_libraries
from probattn.inference.cli.showing_commands import Demo, Figures
from probattn.inference.cli.text_commands import Compare, Margins, MeasureSensitivity
from probattn.inference.cli.values import PLAIN_VALUES, plain_path
from probattn.inference.config import RunConfig
from probattn.inference.config_files import is_tuned, read_config, read_tables, read_toml
from probattn.inference.config_sampling import SAMPLED_DATA, SAMPLED_OBJECTIVE, SampleRunConfig
from probattn.inference.config_tuning import TUNED_OBJECTIVE, TuneConfig
from probattn.inference.runs.folder import enter
from probattn.inference.runs.opening import check_resumes
from probattn.inference.runtime.compilation_cache import keep_compiled_programs
from probattn.inference.runtime.outputs import keep_outputs_open, lost_output
from probattn.inference.runtime.processes import check_devices, exit_process, use_one_processor
from probattn.inference.runtime.signals import (
    Ended,
    Interrupted,
    ended_by_signals,
    ignore_signals,
)
from probattn.models import ObjectiveConfig

_SHORT = {
    "--data": "--data.source",
    "--objective": "--objective.name",
    "--guide": "--fit.guide",
    "--method": "--sample.method",
    "--model": "--kind",
}
_OF_BASE = ("--model.", "--data.tokenizer")  # which --from brings
_OF_ONE_DEVICE = (Evaluate, Margins, MeasureSensitivity, Generate)
_TABLES = {"latent": ("latent",), "language": ("model", "objective")}  # for `sample`
_DESCRIPTION = (
    "Causal self-attention as a probabilistic program. `probattn help fit` explains a command, and "
    "`probattn --version` names the version."
)
_NO_FAULT_OF_THE_INPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 when the work is done, 1 when it failed, 2 for bad input, 129, 130 or
        143 when SIGHUP, SIGINT or SIGTERM ended it. Errors are one line on standard error.
    """
    if arguments is None:  # the process is the command's own
        _own_process()
    _print_what_the_encoding_holds()
    with ended_by_signals(), default_promotion():
        try:
            status = _main(arguments)
        except Ended as ended:
            ignore_signals()  # so that the line is printed whatever comes
            hint = "; go on with --resume" if isinstance(ended, Interrupted) else ""
            _tell(f"{ended}{hint}")
            status = 128 + ended.signum
        if status:
            exit_process(status)
        return status


def _own_process() -> None:
    silence_libraries()
    keep_outputs_open()
    # Where the command handles no signals, as while Python ends, SIGINT ends the process without
    # Python's traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _main(arguments: Sequence[str] | None) -> int:
    own = arguments is None
    arguments = _lengthened(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"probattn {probattn.__version__}")
        return 0
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    try:
        command = _parse(arguments)
        keep_compiled_programs(_tell)
        if own and isinstance(command, _OF_ONE_DEVICE):
            use_one_processor()
        if getattr(command, "coordinator", None) is None:  # the processes must join first
            check_devices()
        # No markup: names of files and of runs may look like it.
        command(Console(highlight=False, markup=False, emoji=False))
    except OSError as error:
        return _fail(error, status=1 if error.errno in _NO_FAULT_OF_THE_INPUT else 2)
    except (ValueError, ImportError) as error:
        return _fail(error, status=2)
    except (RuntimeError, MemoryError) as error:
        return _fail(error, status=1)
    except Ended:
        raise
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    if lost := lost_output():
        return _fail(f"standard output: {lost.strerror}", status=1)
    return 0


def _print_what_the_encoding_holds() -> None:
    """Print a question mark for what the encoding lacks, such as ±, instead of no output at all."""
    for stream in (sys.stdout, sys.stderr):
        # Other handlers cannot fail; surrogateescape is that of the locale C.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _parse(arguments: list[str]) -> Any:
    sampled = _sample_defaults(arguments)
    fitted = _fit_defaults(arguments)
    commands: Any = (
        Annotated[type(fitted), tyro.conf.subcommand("fit", default=fitted)]
        | Annotated[Sample, tyro.conf.subcommand("sample", default=sampled)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Margins, tyro.conf.subcommand("margins")]
        | Annotated[MeasureSensitivity, tyro.conf.subcommand("sensitivity")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Import, tyro.conf.subcommand("import")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Figures, tyro.conf.subcommand("figures")]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
    )
    # tyro frames its messages and spreads them over lines; a script wants one.
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            command = tyro.cli(
                commands,
                prog="probattn",
                description=_DESCRIPTION,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
                registry=PLAIN_VALUES,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_unframed(stderr.getvalue())) from None
    if isinstance(command, Sample) and not command.start:
        _check_kind(command.kind or "latent", sampled.kind, arguments)
    return command


def _fit_defaults(arguments: list[str]) -> Fit | Tune:
    """Return the defaults of `fit`: those of the configuration file or of the run to resume."""
    path = _configuration(arguments, "fit")
    names = [argument.partition("=")[0] for argument in arguments]
    named = arguments[:1] == ["fit"] and "--from" in names
    if not named and (path is None or not is_tuned(path)):
        config = RunConfig() if path is None else read_config(path)
        return Fit(out=tyro.MISSING, **_tables(config))
    if given := [name for name in names if name.startswith(_OF_BASE)]:
        raise ValueError(
            f"{', '.join(dict.fromkeys(given))} with --from: the run that --from names brings "
            f"network, block and tokenizer; leave {'it' if len(given) == 1 else 'them'} out"
        )
    name = _value_of(arguments, "--objective.name")
    in_file = None if path is None else read_toml(path).get("objective")
    without = ObjectiveConfig("ce")  # and so without the placement of a barrier
    of_ce = isinstance(in_file, dict) and in_file.get("name") == "ce"
    defaults = {"objective": without if of_ce else TUNED_OBJECTIVE}
    tables = _tables(TuneConfig() if path is None else read_tables(path, TuneConfig, defaults))
    tables.pop("base")
    if name not in (None, "margin"):
        tables["objective"] = without
    elif name == "margin" and of_ce:
        tables["objective"] = TUNED_OBJECTIVE
    return Tune(out=tyro.MISSING, **tables)


def _sample_defaults(arguments: list[str]) -> Sample:
    """Return the defaults of `sample`, likewise."""
    path = _configuration(arguments, "sample")
    if path is None:
        return Sample(out=tyro.MISSING)
    defaults = {"data": SAMPLED_DATA, "objective": SAMPLED_OBJECTIVE}
    config = read_tables(path, SampleRunConfig, defaults)
    kind: Literal["latent", "language"] = "language" if config.latent is None else "latent"
    return Sample(out=tyro.MISSING, kind=kind, **_tables(config))


def _check_kind(kind: str, of_file: str | None, arguments: list[str]) -> None:
    """Refuse settings of the model that is not sampled: they would be ignored.

    Flags are sought among the arguments, since one that repeats a default tells of it too.
    """
    [other] = _TABLES.keys() - {kind}
    if of_file == other:
        raise ValueError(
            f"--kind {kind} with {_configuration(arguments, 'sample')}, which describes a {other} "
            f"model: expected --kind {other}, or a file of a {kind} model; leave one of the two out"
        )
    names = [argument.partition("=")[0] for argument in arguments]
    tables = tuple(f"--{table}." for table in _TABLES[other])
    if given := [name for name in names if name.startswith(tables)]:
        expected = " and ".join(f"--{table}.*" for table in _TABLES[kind])
        change = "" if of_file else f", or give --kind {other}"
        raise ValueError(
            f"{', '.join(dict.fromkeys(given))} with a {kind} model: expected {expected}; leave "
            f"{'it' if len(given) == 1 else 'them'} out{change}"
        )


def _configuration(arguments: list[str], command: Literal["fit", "sample"]) -> Path | None:
    """Return the file that holds the defaults of a command, if the arguments call this command."""
    if arguments[:1] != [command]:
        return None
    given, out = _value_of(arguments, "--config"), _value_of(arguments, "--out")
    if given is not None:
        return plain_path(given)
    if out is not None and "--resume" in arguments:
        stored = plain_path(out) / "config.toml"
        enter(Path(out))
        if not stored.exists():
            return None
        check_resumes(stored.parent, command)
        return stored
    return None


def _tables(config: RunConfig | SampleRunConfig | TuneConfig) -> dict[str, Any]:
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    return {name: value for name, value in parts.items() if value is not None}


def _value_of(arguments: list[str], flag: str) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _lengthened(arguments: Sequence[str]) -> list[str]:
    lengthened = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        lengthened.append(_SHORT.get(flag, flag) + equals + value)
    return lengthened


def _unframed(message: str) -> str:
    """Return the message within tyro's frame, without its title and its pointer to --help."""
    lines = [line for line in message.splitlines() if not line.startswith("╭")]
    bare = [line for line in lines if line.strip(" -")]
    if lines[1:2] and lines[1] not in bare:  # the frame of an encoding without boxes
        lines = bare[1:]
    text = " ".join(re.sub(r"[╰╯│─]+", " ", " ".join(lines)).split())
    text = re.sub(r"^Error parsing \S+: ", "", text.partition("For full helptext")[0])
    return f"{text.strip()}; see probattn --help"


def _fail(error: BaseException | str, *, status: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    _tell(f"error: {message}")
    return status


def _tell(message: str) -> None:
    print(f"probattn: {printable(message)}", file=sys.stderr)
