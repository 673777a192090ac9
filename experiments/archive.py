"""The records behind the tables, kept with the code, so that tables can be made again and go on elsewhere.

    python experiments/archive.py pack      # outputs -> experiments/records, an archive a dataset and model
    python experiments/archive.py unpack    # experiments/records -> outputs; what is there stays

Another folder than experiments/records may follow the word.

After `unpack`, `python experiments/TABLE.py tabulate` makes a table anew from its records, and without `tabulate` the
command runs what is missing. Weights are not kept: a model that is trained again on another machine has others, and
a table refuses to put attacks on the two side by side (see sweep.py). Pictures of samples are not kept, either.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

OUTPUTS = Path("outputs")
RECORDS = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "records"
# What trainings, attacks and certificates leave besides weights.
FILES = ("run.json", "records.jsonl", "certificates.jsonl", "summary.json", "identity.json")


def kept() -> dict[str, list[Path]]:
    """The files of every finished training, attack and certificate, by dataset and model."""
    found: dict[str, list[Path]] = {}
    for pattern in ("train/*", "certify/*", "experiments/attacks/*"):
        for folder in sorted(OUTPUTS.glob(pattern)):
            if (folder / "summary.json").exists():  # written last
                name = "-".join(folder.name.split("-")[:2])  # dataset and model have no hyphens
                found.setdefault(name, []).extend(folder / file for file in FILES if (folder / file).exists())
    return found


def slim(file: Path) -> bytes:
    """A file without the pictures and sounds of the samples."""
    if file.suffix != ".jsonl":
        return file.read_bytes()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    media = ("media", "perturbed_media")
    lines = [{key: None if key in media else value for key, value in line.items()} for line in lines]
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()


def write(archive: Path, files: Iterable[Path]) -> None:
    """The same bytes for the same records."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for file in files:
            content = slim(file)
            entry = tarfile.TarInfo(str(file.relative_to(OUTPUTS)))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def pack() -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name, files in kept().items():
        archive = RECORDS / f"{name}.tar.xz"
        write(archive, files)
        print(f"{archive}: {len(files)} files, {archive.stat().st_size / 1e6:.1f} MB")


def unpack() -> None:
    for archive in sorted(RECORDS.glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            new = [entry for entry in tar.getmembers() if not (OUTPUTS / entry.name).exists()]
            for entry in new:
                content = tar.extractfile(entry)
                assert content is not None
                (OUTPUTS / entry.name).parent.mkdir(parents=True, exist_ok=True)
                (OUTPUTS / entry.name).write_bytes(content.read())
            print(f"{archive}: {len(new)} of {len(tar.getmembers())} files are new")


if __name__ == "__main__":
    if sys.argv[1:2] not in (["pack"], ["unpack"]) or len(sys.argv) > 3:
        sys.exit(f"expected pack or unpack, and perhaps a folder, got {' '.join(sys.argv[1:]) or 'nothing'}")
    {"pack": pack, "unpack": unpack}[sys.argv[1]]()
