"""The command line, `muroan train | harden | attack | certify | report | …`: from a user's words to a command."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muroan.cli import attacking, parts, reading, training
from muroan.cli.jobs import config_folder, of, own_overrides, told
from muroan.errors import MuroanError, check_whole

COMMANDS: dict[str, Callable[[DictConfig], None]] = {
    "train": training.train,
    "harden": training.harden,
    "attack": attacking.attack,
    "certify": attacking.certify,
    "report": reading.report,
    "compare": reading.compare,
    "defenses": reading.defenses,
    "transfer": attacking.transfer,
}

HELP = """\
MUROAN, the MUltimodal RObustness ANalyzer: how few image regions, words or sounds flip a multimodal model.

  muroan train   model=mmbt dataset=easy_vqa              train a target model
  muroan attack  model=mmbt dataset=easy_vqa              attack it (attack=decoupling)
  muroan harden  model=mmbt defense=adversarial_training  retrain it under a defence
  muroan attack  model=mmbt defense=adversarial_training  attack the hardened model
  muroan certify model=mmbt dataset=easy_vqa defense=mmcert   how much no attack can do to it
  muroan report  runs=[outputs/attack]                    tables, plots and an HTML page of all attack runs
  muroan compare runs=[outputs/attack]                    attacks side by side, tested in pairs; Markdown, LaTeX, CSV
  muroan defenses runs=[outputs/attack]                   did a defence help? defences by attacks, and a verdict
  muroan transfer runs=[outputs/attack]                   does what flips one model flip the others? models by models

Every command takes Hydra overrides, and -m to sweep over several values of them:

  muroan attack -m model=mmbt,concat attack=decoupling,decoupling_reference seed=0,1,2
  muroan attack attack.objective=parts threat_model.replacement.image=blur threat_model.max_queries=2000
  muroan attack device=ddp tracker=wandb                  all GPUs of this machine, tracked in Weights & Biases
  muroan attack -m seed=0,1,2 hydra/launcher=joblib       several jobs of a sweep at once (docs/sweeps.md)
  muroan attack --cfg job                                 print the whole configuration and stop
"""

# Our files of hydra/launcher name all that they need; that a plugin has a schema of the same name is all right.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")

INTERRUPTED = "interrupted; the same command goes on from here"

OWN_GPU: list[tuple[int, TextIO]] = []  # of `own_gpu`: a lock lasts as long as its file is open
MOST_JOBS = 64  # on one GPU


def main() -> None:
    """Entry point of the `muroan` command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP + choices())
        return
    command = arguments[0]
    if command not in COMMANDS:
        sys.exit(f"muroan: unknown command {command!r}: choose one of {', '.join(COMMANDS)}; `muroan --help` explains")
    trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises to us what it would print with forty frames
    # Hydra's parser wants all overrides side by side, wherever the user put -m.
    overrides = [a for a in arguments[1:] if a[:1] != "-" and ("=" in a or a[:1] == "~")]
    flags = [a for a in arguments[1:] if a not in overrides]
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        overrides.insert(0, f"sweep={sweep_name(command, overrides)}")
    sys.argv = [sys.argv[0], *flags, f"command={command}", *overrides]

    def job(config: DictConfig) -> None:
        run_job(COMMANDS[command], command, config)

    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(job)()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns the one into the other
            sys.exit(f"muroan {command}: {INTERRUPTED}")
        raise
    except Exception as error:
        if problem := launcher_problem(error) or sweep_problem(error, overrides):
            sys.exit(f"muroan {command}: {problem}")
        expected = (MuroanError, HydraException, OmegaConfBaseException)
        if trace or not (isinstance(error, expected) or type(error).__name__ == "MisconfigurationException"):
            raise
        sys.exit(f"muroan {command}: {told(error)}")
    except KeyboardInterrupt:
        sys.exit(f"muroan {command}: {INTERRUPTED}")


def run_job(function: Callable[[DictConfig], None], command: str, config: DictConfig) -> None:
    """One job of a sweep, or the only one, with its surroundings put back as they were afterwards.

    Launchers run it in processes of their own, which have imported this module and done nothing else.
    """
    argv, environment = sys.argv, dict(os.environ)
    # Lightning starts its further processes as our main module with our arguments: give it those of this one job.
    sys.argv = [argv[0], command, *own_overrides("out"), f"out={quoted(config.out)}"]
    sys.modules["__main__"].__spec__ = __spec__
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's own model, dataset or attack lies
    quiet_lightning()
    # SIGTERM ends a job as Ctrl-C does. Lightning alone would note it and go on, through all of a test.
    own = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = True
    try:
        function(config)
        failed = False
    except (HydraException, OmegaConfBaseException) as error:
        # What a constructor or a resolver refuses comes wrapped; on its way between processes the wrapped is lost.
        inner = error.__cause__ or error.__context__
        if isinstance(inner, MuroanError):
            raise inner from None
        raise
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = argv
        leave_process_group()
        parts.close_trackers(failed)
        # What Lightning leaves behind would make the next job of the sweep believe that it is a further process.
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_DATA_DIR"):
            if name not in environment:
                os.environ.pop(name, None)


def quoted(value: str) -> str:
    """A value that Hydra's parser takes for this text, whatever is in it."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', str(value))  # backslashes count before a quotation mark alone
    escaped += re.search(r"\\*$", escaped)[0]  # type: ignore[index]
    return f'"{escaped}"'


def launcher_problem(error: Exception) -> str | None:
    """What a launcher lacks, in a line; None for any other error."""
    plugin = re.match(r"Unknown plugin class : 'hydra_plugins\.hydra_(\w+)_launcher\.", str(error))
    if plugin:
        return f"this launcher is not installed: pip install -e '.[{plugin[1]}]'"
    if str(error).startswith('Could not detect "srun"'):
        return "there is no SLURM here (no srun): hydra/launcher=submitit_local tries a sweep out"
    return None


def sweep_problem(error: Exception, overrides: Sequence[str]) -> str | None:
    """Where Hydra refuses an option of swept choices for the default one not having it; None for any other error."""
    refused = re.match(r"Could not override '((\w+)\.[\w.]+)'", str(error))
    if not refused:
        return None
    key, group = refused.groups()
    swept = any(re.match(rf"{group}=.*,", override) for override in overrides)
    typed = next((override for override in overrides if override.startswith(f"{key}=")), None)
    if not swept or typed is None:
        return None
    return f"in a sweep over {group}= Hydra looks for {key} in the default {group}, which has none: write ++{typed}"


def sweep_name(command: str, overrides: Sequence[str]) -> str:
    """A name for a sweep: the same when it is started again, be it on another launcher, device or tracker."""
    means = ("hydra", "device", "tracker", "rerun")
    own = sorted(o for o in overrides if re.split(r"[=./@]", o.lstrip("+~"))[0] not in means)
    return f"{command}-{hashlib.sha256(repr(own).encode()).hexdigest()[:6]}"


def leave_process_group() -> None:
    """Lightning does not leave the group of its processes; the next job of a sweep would wait in it for ever."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def quiet_lightning() -> None:
    """Keep Lightning's advertisements and hints at its own internals from burying our lines."""
    import pytorch_lightning  # sets its own levels when imported

    logging.getLogger(pytorch_lightning.__name__).setLevel(logging.WARNING)
    for pattern in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", pattern)


def choices() -> str:
    """The groups and what can be chosen in each, as help."""
    folder = config_folder()
    groups = sorted({file.parent.relative_to(folder).as_posix() for file in folder.glob("*/**/*.yaml")})
    return "\n".join(["\nChoices:", *(f"  {group:<16}{' '.join(of(group))}" for group in groups)])


def own_gpu(jobs: int = 1) -> int:
    """The number of a GPU for this process, until it ends: of those that the fewest other processes of this user have.

    Raises:
        MuroanError: at least `jobs` others have each GPU, or `jobs` is not a whole number, at least 1.
    """
    if not OWN_GPU:
        OWN_GPU.append(take_gpu(jobs))
    return OWN_GPU[0][0]


def take_gpu(jobs: int) -> tuple[int, TextIO]:
    """A GPU that fewer than `jobs` have taken, and the lock that tells others that one more has; see `own_gpu`."""
    import fcntl
    import tempfile

    import torch

    check_whole("device", jobs=jobs)
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    folder = Path(tempfile.gettempdir())
    with open(folder / f"muroan-{os.getuid()}-gpus", "w") as gate:  # one process at a time counts
        fcntl.flock(gate, fcntl.LOCK_EX)
        taken = []
        for index in range(count):
            gpu = visible[index] if index < len(visible) and visible[index] else index
            places = [folder / f"muroan-{os.getuid()}-gpu-{gpu}-{place}" for place in range(MOST_JOBS)]
            free = [place for place in places if not place.exists() or locked(place, keep=False)]
            taken.append((MOST_JOBS - len(free), index, free))
        others, index, free = min(taken, default=(jobs, 0, []))
        lock = locked(free[0], keep=True) if others < jobs and free else None
    if lock is None:
        raise MuroanError(
            f"device=own_gpu: other jobs have all {count} GPUs of this machine: run at most {count * jobs} at once "
            f"(hydra.launcher.n_jobs={count * jobs}), or more on each (device.jobs={jobs + 1})"
            if count
            else "device=own_gpu: there is no GPU here: choose device=cpu"
        )
    return index, lock


def locked(path: Path, keep: bool) -> TextIO | None:
    """A file that this process has locked, None where another has. Without `keep` the lock is given back at once."""
    import fcntl

    file = open(path, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    if not keep:
        file.close()
    return file


OmegaConf.register_new_resolver("own_gpu", own_gpu, replace=True)
OmegaConf.register_new_resolver("muroan_help", lambda: HELP + choices(), replace=True)
