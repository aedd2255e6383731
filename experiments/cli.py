"""What every command shares: flags from a Config, one-sentence errors, devices."""

import dataclasses
import functools
import logging
import math
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

_HEARTBEAT_SECONDS = 30  # Without one, a process counts as dead, and the others end.
# Flags of where files are, how a command goes on and what it may use at once.
_BESIDE = {"out", "data_dir", "overwrite", "resume", "checkpoint_seconds", "runs_per_device"}
early_signals: list[int] = []  # Of one of several processes, before its training notes them.
_NO_MEMORY = "RESOURCE_EXHAUSTED"
_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}  # Control characters, surrogates, line and paragraph ends.


class Interrupted(BaseException):
    """A signal ended the program; no error, hence as KeyboardInterrupt.

    Attributes:
      status: The exit status, 128 and the signal's number.
    """

    def __init__(self, number: int, folder: str | Path = ""):
        done = (
            f"; what is done is in {folder}; go on with the same flags, and --resume where the "
            "command has it"
        )
        super().__init__(f"stopped by {signal.Signals(number).name}{done if folder else ''}.")
        self.status = 128 + number


def interrupting(folder: str | Path) -> Callable[[int, Any], None]:
    """A handler that raises `Interrupted`."""

    def handle(number: int, _: Any) -> None:
        raise Interrupted(number, folder)

    return handle


def flag(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that `launch` makes a flag of.

    Args:
      default: A bool, int, float, str, or a tuple of floats, for a comma-separated list.
      text: What `--help` says.
      choices: The values that a str admits, where it admits only some.
    """
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def check(config: Any) -> None:
    """Refuses what no flag of its kind can be; each Config calls it before its own checks.

    Texts are file names or choices and have no line breaks or other control characters, numbers are
    finite, integers fit into JAX's default type, and lists have a value.

    Raises:
      ValueError: if a value is another, which the sentence names.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        choices = field.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(choices)}, got {value!r}.")
        if isinstance(value, str):
            if {unicodedata.category(character) for character in value} & _NO_TEXT:
                raise ValueError(f"--{name} must be one line of text, got {value!r}.")
            continue
        entries = value if isinstance(value, Sequence) else (value,)
        if not entries and field.default != ():
            raise ValueError(f"--{name} needs at least one value.")
        for entry in entries:
            if isinstance(entry, int) and not -(2**31) < entry < 2**31:
                raise ValueError(f"--{name} must be between -2**31 and 2**31, got {entry}.")
            if not math.isfinite(entry):
                raise ValueError(f"--{name} must be finite, got {entry}.")


def check_least(config: Any, least: int, *names: str) -> None:
    """Raises a ValueError if one of these flags is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(config, name)}.")


def check_each(config: Any, least: float, *names: str) -> None:
    """Raises a ValueError if a number of one of these lists is below `least`."""
    for name in names:
        for value in getattr(config, name):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}.")


def whole(name: str, values: Sequence[float]) -> tuple[int, ...]:
    """Returns the values of a flag as integers, which they must be, and positive.

    Raises:
      ValueError: if one is not.
    """
    if not all(float(value).is_integer() and value >= 1 for value in values):
        raise ValueError(f"--{name} must be whole and positive, got {list(values)}.")
    return tuple(map(int, values))


def settings(config: Any) -> dict[str, Any]:
    """What decides the results, as config.json records it: all flags but _BESIDE."""
    values = {name: getattr(config, name) for name in setting_names(type(config))}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def setting_names(config: type) -> list[str]:
    """The names of `settings` of a Config."""
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if name not in _BESIDE]


def launch(
    main: Callable[[Any], None],
    config: type,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    several_processes: bool = False,
) -> None:
    """Runs `main` with the Config of the command line.

    Each field of the Config is a flag; a flag not given has the value of the --preset, if there
    are presets, or else the default. A ValueError, an OSError or a lack of memory ends the program
    with a sentence and status 1, SIGTERM or SIGINT with one and the status of the signal. Float64
    is allowed, and on a machine without an accelerator each core is a device. Compiled programs are
    kept in $JAX_COMPILATION_CACHE_DIR, or else in the user's cache folder.

    Args:
      main: The command.
      config: A dataclass whose fields are made by `flag`.
      presets: Values of fields by the name of the preset; the first is the default.
      several_processes: Whether the command can be one of the processes of a job; it then has the
        flags of `_define_processes`.
    """
    jax.config.update("jax_enable_x64", True)
    # Says at each start on a CPU that there is no TPU.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells each of its steps.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", num_cores())
    _keep_compiled()

    holders = {field.name: _define(field) for field in dataclasses.fields(config)}
    presets = presets or {"default": {}}
    names = list(presets)
    preset = flags.DEFINE_enum("preset", names[0], names, "Values of the flags not given.")
    place = _define_processes() if several_processes else {}
    for holder in (preset, *holders.values(), *place.values()):  # Else --help would not list them.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])

    def with_config(argv: Sequence[str]) -> None:
        holder = holders.get("out", holders.get("run"))  # Some write into what they read.
        folder = "" if holder is None else holder.value  # A flag has no truth value.
        goes_on = "resume" in holders or "overwrite" not in holders
        done = folder if goes_on else ""
        try:
            signal.signal(signal.SIGTERM, interrupting(done))
            if argv[1:]:
                raise ValueError(f"only flags are understood, got {argv[1]!r}; see --help.")
            given = {name: holder.value for name, holder in holders.items() if holder.present}
            settings = config(**{**presets[preset.value], **given})
            _join(**{name: holder.value for name, holder in place.items()})
            if jax.distributed.is_initialized():
                # JAX would lose it, and a process that ended alone would leave the others waiting.
                signal.signal(signal.SIGTERM, lambda number, _: early_signals.append(number))
            main(settings)
        except (ValueError, OSError) as error:
            said = str(error)
            if isinstance(error, OSError) and error.strerror:
                # A full disk does not say where.
                where = error.filename or f"writing into {folder or Path.cwd()}"
                said = f"{where}: {error.strerror}"
            raise SystemExit(f"error: {said.rstrip('.')}.") from error
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and _NO_MEMORY not in str(error):
                raise
            reason = (str(error).splitlines() or ["no memory"])[0][:200].rstrip(".")
            raise SystemExit(f"error: out of memory, name smaller sizes: {reason}.") from error
        except Interrupted as interruption:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Some send it again.
            print(interruption, file=sys.stderr)
            raise SystemExit(interruption.status) from interruption
        except KeyboardInterrupt as interruption:
            print(Interrupted(signal.SIGINT, done), file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from interruption

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (flags.Error, ValueError) as error:
            raise SystemExit(f"error: {error}.") from error

    app.run(with_config, flags_parser=parse)


def _define_processes() -> dict[str, flags.FlagHolder]:
    return {
        "coordinator_address": flags.DEFINE_string(
            "coordinator_address",
            "",
            "HOST:PORT of the first of several processes; auto where JAX knows the cluster (Slurm, "
            "Open MPI, Kubernetes, Cloud TPU); empty for one process.",
        ),
        "num_processes": flags.DEFINE_integer(
            "num_processes", 1, "How many; not needed with auto."
        ),
        "process_id": flags.DEFINE_integer(
            "process_id", 0, "Which of them this is; not needed with auto."
        ),
    }


def _join(coordinator_address: str = "", num_processes: int = 1, process_id: int = 0) -> None:
    """Makes this one of the processes of a job, if there are several."""
    if not coordinator_address:
        if num_processes != 1 or process_id != 0:
            raise ValueError("--num_processes and --process_id need a --coordinator_address.")
        return
    initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
    if coordinator_address == "auto":
        try:
            initialize()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "--coordinator_address=auto finds no cluster here, or not all of its processes; "
                "give HOST:PORT, --num_processes and --process_id."
            ) from error
        return
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must be from 0 to {num_processes - 1}, one less than --num_processes, "
            f"got {process_id}."
        )
    port = re.fullmatch(r".+:(\d{1,5})", coordinator_address)
    if not (port and 1 <= int(port[1]) <= 65535):
        raise ValueError(
            "--coordinator_address must be HOST:PORT, the port from 1 to 65535, or auto, got "
            f"{coordinator_address!r}."
        )
    try:
        initialize(coordinator_address, num_processes, process_id)
    except RuntimeError as error:
        raise ValueError(
            f"--coordinator_address={coordinator_address} cannot be joined as process {process_id} "
            f"of {num_processes}; is another program at that port, or the first process missing?"
        ) from error


def _keep_compiled() -> None:
    """Switches JAX's persistent compilation cache on, unless it is or no folder can be written."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = root / "dufm_jax" / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # On Linux; elsewhere there are no such limits.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _FloatsParser(flags.ArgumentParser):
    def parse(self, argument: Any) -> tuple[float, ...]:
        values = argument.split(",") if isinstance(argument, str) else argument
        try:
            return tuple(float(value) for value in values)
        except ValueError:
            raise ValueError(f"comma-separated numbers are needed, got {argument!r}") from None

    def flag_type(self) -> str:
        return "comma-separated numbers"


class _FloatsSerializer(flags.ArgumentSerializer):
    def serialize(self, value: tuple[float, ...]) -> str:
        return ",".join(map(repr, value))


def _define(field: dataclasses.Field) -> flags.FlagHolder:
    default: Any = field.default
    text, choices = field.metadata["help"], field.metadata["choices"]
    if choices:
        return flags.DEFINE_enum(field.name, default, choices, text)
    if isinstance(default, tuple):
        parser, serializer = _FloatsParser(), _FloatsSerializer()
        return flags.DEFINE(parser, field.name, default, text, serializer=serializer)
    define: dict[type, Any] = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    return define[type(default)](field.name, default, text)
