"""Every file under conf/ composes into a whole job, and what it names can be made of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from toys import flips_when, word

import muroan.cli  # registers the resolvers
from muroan.attacks.base import Attack, ThreatModel
from muroan.cli import attacking, parts
from muroan.defenses.base import Defense
from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Text, WordTokenizer

CONF = ROOT / "conf"
FILES = [*CONF.glob("*/*.yaml"), *CONF.glob("hydra/launcher/*.yaml")]
CHOICES = sorted((f.parent.relative_to(CONF).as_posix(), f.stem) for f in FILES)
MODALITIES = {"image": Image((8, 8)), "text": Text(WordTokenizer(["a"]), 5), "audio": Audio(100, 1000)}


def job(*overrides: str, command: str = "attack") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"command={command}", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSDD_ROOT", "HATEFUL_MEMES_ROOT"):
        monkeypatch.setenv(name, str(tmp_path))
    no_gpus_taken(2, tmp_path, monkeypatch)


def no_gpus_taken(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with so many GPUs, in whose folder of temporary files there are no locks on them yet."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(muroan.cli, "OWN_GPU", [])


def test_there_is_a_group_for_every_choice() -> None:
    groups = {"attack", "dataset", "defense", "device", "experiment", "hydra/launcher", "model", "tracker"}
    assert {group for group, _ in CHOICES} == groups


@pytest.mark.parametrize("command", ["train", "harden", "report"])
def test_every_command_composes(command: str) -> None:
    OmegaConf.resolve(job(command=command))


@pytest.mark.parametrize(("group", "name"), CHOICES)
@pytest.mark.usefixtures("folders")
def test_every_choice_composes(group: str, name: str) -> None:
    mandatory = ["dataset.classes=[a,b]", "dataset.root=."] if (group, name) == ("dataset", "manifest") else []
    config = job(f"{group}={name}", *mandatory)
    missing = OmegaConf.missing_keys(config)
    assert not missing or name == "manifest"
    parts.check_switches(config)
    if not missing:
        OmegaConf.resolve(config)
    assert config.out


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "attack"])
def test_attacks(name: str, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").touch()
    attack = instantiate(job(f"attack={name}", *([f"attack.run={tmp_path}"] if name == "transferred" else [])).attack)
    assert isinstance(attack, Attack)
    assert attack.name == name, "the name in records is the name of the choice"


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "defense" and name != "none"])
def test_defenses(name: str) -> None:
    config = job(f"defense={name}", command="harden")
    assert f"mmbt-{name}-" in config.out
    model = flips_when(lambda present: present.gone(word(0)))
    module = instantiate(config.defense)(model=model, threat_model=instantiate(config.hardening.threat_model), seed=3)
    assert isinstance(module, Defense)
    assert module.seed == 3
    assert module.threat_model.max_queries == config.hardening.threat_model.max_queries


def test_a_class_is_known_by_its_name() -> None:
    assert attacking.class_index("red", ["blue", "red"]) == 1
    with pytest.raises(MuroanError, match=r"attack\.target=green: the dataset has no such class; it has blue, red"):
        attacking.class_index("green", ["blue", "red"])
    assert attacking.class_index(1, ["blue", "red"]) == 1
    # As of labels: a numeral is a name where classes are numerals, and never the place of another.
    assert attacking.class_index(1, ["1", "2", "3"]) == 0
    with pytest.raises(MuroanError, match=r"attack\.target=0: the dataset has no such class; it has 1, 2, 3"):
        attacking.class_index(0, ["1", "2", "3"])


@pytest.mark.parametrize(
    "option",
    [
        *("attack.valid_only=no", "attack=greedy_occlusion attack.rerank=off", "attack=leave_one_out attack.every=no"),
        *("attack=sparse_rs attack.shrink=0", "dataset=digit_sum dataset.augment=no", "dataset.skip_bad=null"),
        *("defense=adversarial_training_pgd defense.attack.stop_early=no", "rerun=no", "certification.smoothed=1"),
    ],
)
def test_a_switch_is_on_or_off(option: str) -> None:
    """Hydra takes `no` for a word, which Python takes for a yes."""
    *_, last = option.split()
    with pytest.raises(MuroanError, match=rf"^{last.split('=')[0]} must be true or false, got "):
        parts.check_switches(job(*option.split()))


@pytest.mark.parametrize("group", ["attack", "defense"])
def test_counts_are_whole_numbers(group: str, tmp_path: Path) -> None:
    """A command line makes 1e3 a float: each option that counts something says that it takes none."""
    model = flips_when(lambda present: present.gone(word(0)))

    def make(config: Mapping[str, Any]) -> Any:
        made = instantiate(config)
        return made(model=model) if group == "defense" else made

    counted = 0
    for name in (name for own, name in CHOICES if own == group and name not in ("none", "transferred")):
        config = job(f"{group}={name}", command="attack" if group == "attack" else "harden")[group]
        for option, value in config.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            for wrong in (float(value), value + 0.5, "many"):
                with pytest.raises((MuroanError, InstantiationException), match=f"{group}.{option} must be a whole"):
                    make({**config, option: wrong})
            counted += 1
    assert counted > (15 if group == "attack" else 3)


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "tracker"])
def test_trackers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))  # which it would set for the tests to come
    tracker = parts.tracker(job(f"tracker={name}", f"out={tmp_path}"))
    assert tracker is False if name == "none" else isinstance(tracker, pl.loggers.Logger)


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "hydra/launcher"])
def test_launchers(name: str) -> None:
    """What our file says is what the plugin takes."""
    config = launcher(f"hydra/launcher={name}")
    pytest.importorskip(config._target_.rsplit(".", 1)[0])
    assert type(instantiate(config)).__name__ == config._target_.rsplit(".", 1)[1]


def launcher(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["command=attack", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config.hydra.launcher


def test_every_process_gets_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpus_taken(2, tmp_path, monkeypatch)
    assert job("device=own_gpu").device.devices == [0]
    assert job("device=own_gpu").device.devices == [0], "a process keeps what it has"
    assert job("device=own_gpu", "device.jobs=2").device.devices == [0], "however many may share it"
    another = muroan.cli.take_gpu
    others = [another(1)]
    assert others[0][0] == 1
    with pytest.raises(MuroanError, match=r"other jobs have all 2 GPUs of this machine: .*hydra\.launcher\.n_jobs=2"):
        another(1)
    muroan.cli.OWN_GPU.pop()[1].close()  # the first process ends
    others.append(another(1))
    assert others[1][0] == 0
    no_gpus_taken(0, tmp_path, monkeypatch)
    with pytest.raises(MuroanError, match="there is no GPU here"):
        another(1)
    with pytest.raises(InterpolationResolutionError, match=r"device\.jobs must be a whole number, .* got 0"):
        job("device=own_gpu", "device.jobs=0").device.devices[0]


def test_processes_share_gpus_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpus_taken(2, tmp_path, monkeypatch)
    processes = [muroan.cli.take_gpu(3) for _ in range(6)]
    assert [index for index, _ in processes] == [0, 1, 0, 1, 0, 1]
    with pytest.raises(MuroanError, match=r"run at most 6 at once .*n_jobs=6\), or more on each \(device\.jobs=4\)"):
        muroan.cli.take_gpu(3)
    for ended in (1, 3, 0):  # of GPU 1 one is left, of GPU 0 two
        processes[ended][1].close()
    with pytest.raises(MuroanError, match="other jobs have all 2 GPUs"):
        muroan.cli.take_gpu(1)
    assert muroan.cli.take_gpu(3)[0] == 1, "that with the fewest jobs"


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "device"])
def test_devices(name: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if name == "own_gpu":
            no_gpus_taken(2, tmp_path, patch)
        options = parts.trainer_options(job(f"device={name}", f"out={tmp_path}"))
    if options["accelerator"] == "gpu":
        # Lightning looks for the GPUs at once; their number and precision are checked without.
        options |= {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
    pl.Trainer(**options, logger=False)


def test_threat_model() -> None:
    options = ("threat_model.replacement.image=blur", "threat_model.min_side.image=4", "threat_model.max_queries=9")
    threat_model = instantiate(job(*options).threat_model)
    assert isinstance(threat_model, ThreatModel)
    complete = threat_model.complete(MODALITIES)
    assert complete.replacement == {"image": "blur", "text": "delete", "audio": "zero"}
    assert complete.min_side == {"image": 4, "text": 1, "audio": 10}
    assert complete.max_queries == 9


def test_the_folder_of_a_job_tells_what_decides_its_outcome() -> None:
    same = ("device=cpu", "tracker=wandb", "engine.batch_size=7", "rerun=true", "dataset.test_batch_size=3")
    other = ("attack.patience=7", "seed=1", "dataset.test_limit=9", "model/fusion=gated", "training.lr=2e-3")
    other += ("device.precision=bf16-mixed", "threat_model.max_queries=5")
    plain = job().out
    assert "easy_vqa-mmbt-decoupling-" in plain
    assert {job(option).out for option in same} == {plain}
    assert len({plain, *(job(option).out for option in other)}) == 1 + len(other)


def test_an_attack_looks_where_training_wrote() -> None:
    shared = ("model=concat", "seed=2", "training.epochs=1", "dataset.train_limit=50")
    assert job(*shared, "dataset.test_limit=9").folders.train == job(*shared, command="train").out
    assert job(*shared, "seed=3").folders.train != job(*shared, command="train").out


def test_an_attack_looks_where_hardening_wrote() -> None:
    shared = ("model=concat", "seed=2", "defense=adversarial_training", "hardening.lr=1e-4")
    hardened = job(*shared, command="harden").out
    assert job(*shared, "dataset.test_limit=9", "threat_model.max_queries=5000").folders.harden == hardened
    other = ("seed=3", "hardening.epochs=9", "defense.ratio=0.1", "training.epochs=1", "attack@defense.attack=pgd_l2")
    assert len({hardened, *(job(*shared, option, command="harden").out for option in other)}) == 1 + len(other)
    assert job(*shared, "defense.folder=elsewhere", command="harden").out == hardened
    plain = job("model=concat", "seed=2").out
    assert job(*shared).out != plain
    assert job("model=concat", "seed=2", "hardening.lr=1e-4").out == plain, "an undefended model has no hardening"


@pytest.mark.parametrize(
    ("device", "apple", "chosen"), [("auto", True, "cpu"), ("auto", False, "auto"), ("gpu", True, "gpu")]
)
def test_auto_leaves_gpus_without_float64_alone(
    device: str, apple: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    assert parts.trainer_options(job(f"device={device}", "out=x"))["accelerator"] == chosen
