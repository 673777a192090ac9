"""The records behind the tables, kept with the code, so that tables can be made again and go on elsewhere.

    python experiments/archive.py pack      # outputs -> experiments/records, an archive a dataset, model and seed
    python experiments/archive.py unpack    # experiments/records -> outputs; folders that are there stay as they are

Another folder than experiments/records may follow the word.

After `unpack`, `python experiments/TABLE.py tabulate` makes a table anew from its records, and without `tabulate` the
command runs what is missing. Weights are not kept: a model that is trained again on another machine has others, and
a table refuses to put attacks on the two side by side (see sweep.py). Pictures of samples are not kept, either.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

OUTPUTS = Path("outputs")
RECORDS = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "records"
# What trainings, attacks and certificates leave besides weights.
FILES = ("run.json", "records.jsonl", "certificates.jsonl", "summary.json", "identity.json")


def finished() -> dict[str, list[Path]]:
    """The files of every finished training, attack and certificate, by dataset, model and seed."""
    found: dict[str, list[Path]] = {}
    for pattern in ("train/*", "certify/*", "experiments/attacks/*"):
        for folder in sorted(OUTPUTS.glob(pattern)):
            if (folder / "summary.json").exists():  # written last
                told = next(folder / file for file in ("run.json", "summary.json") if (folder / file).exists())
                seed = json.loads(told.read_text())["identity"]["seed"]
                name = "-".join([*folder.name.split("-")[:2], f"seed_{seed}"])  # dataset and model have no hyphens
                found.setdefault(name, []).extend(folder / file for file in FILES if (folder / file).exists())
    return found


def slim(file: Path) -> bytes:
    """A file without the pictures and sounds of the samples, and without where the data lay on this machine."""
    if file.name == "run.json":
        run = json.loads(file.read_text())
        run.get("config", {}).get("dataset", {}).pop("root", None)
        return (json.dumps(run, indent=2) + "\n").encode()
    if file.suffix != ".jsonl":
        return file.read_bytes()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    media = ("media", "perturbed_media")
    lines = [{key: None if key in media else value for key, value in line.items()} for line in lines]
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()


def write(archive: Path, files: Mapping[str, bytes]) -> None:
    """The same bytes for the same records; a reader sees the old archive or the new one, never half of it."""
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
    with tarfile.open(temporary, "w:xz", preset=9) as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    temporary.replace(archive)


def read(archive: Path) -> dict[str, bytes]:
    """The files of an archive, by their names below outputs."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for entry in tar.getmembers():
            name = PurePosixPath(entry.name)
            if not entry.isfile() or name.is_absolute() or ".." in name.parts or name.name not in FILES:
                sys.exit(f"{archive} is no archive of records: it holds {entry.name!r}")
            content = tar.extractfile(entry)
            assert content is not None
            found[entry.name] = content.read()
    return found


def pack() -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name, files in finished().items():
        archive = RECORDS / f"{name}.tar.xz"
        own = {file.relative_to(OUTPUTS).as_posix(): slim(file) for file in files}
        folders = {str(PurePosixPath(file).parent) for file in own}
        # What is not in outputs stays in the archive.
        other = read(archive) if archive.exists() else {}
        other = {file: content for file, content in other.items() if str(PurePosixPath(file).parent) not in folders}
        write(archive, {**other, **own})
        print(f"{archive}: {len(own)} files, and {len(other)} that it had; {archive.stat().st_size / 1e6:.1f} MB")


def unpack() -> None:
    archives = sorted(RECORDS.glob("*.tar.xz"))
    if not archives:
        sys.exit(f"{RECORDS} holds no archive of records: name a folder that `archive.py pack` wrote")
    for archive in archives:
        folders: dict[Path, dict[str, bytes]] = {}
        for file, content in read(archive).items():
            path = OUTPUTS / file
            folders.setdefault(path.parent, {})[path.name] = content
        new = {folder: files for folder, files in folders.items() if not folder.exists()}
        OUTPUTS.mkdir(exist_ok=True)
        for folder, files in new.items():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=OUTPUTS, prefix=".unpack-") as part:  # whole or not at all
                whole = Path(part, folder.name)
                whole.mkdir()
                for file, content in files.items():
                    (whole / file).write_bytes(content)
                whole.rename(folder)
        print(f"{archive}: {len(new)} of {len(folders)} folders are new")


if __name__ == "__main__":
    if sys.argv[1:2] not in (["pack"], ["unpack"]) or len(sys.argv) > 3:
        sys.exit(f"expected pack or unpack, and perhaps a folder, got {' '.join(sys.argv[1:]) or 'nothing'}")
    {"pack": pack, "unpack": unpack}[sys.argv[1]]()
