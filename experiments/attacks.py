"""Every attack on every model at equal budget: which finds the smallest removals, and how often?

    python experiments/attacks.py                                   # all of it: hours on two cores
    python experiments/attacks.py quick                             # minutes: one small model, few samples
    python experiments/attacks.py seeds=0 models=mmbt datasets=easy_vqa attacks=decoupling,random_removal

Trains what is not trained, attacks what is not attacked (a killed run goes on where it was), and compares: tables and
curves in outputs/experiments/attacks/compare. Words with another `key=value` go to `muroan train` and `muroan attack`.
digit_sum needs its recordings: see the README.
"""

from __future__ import annotations

import subprocess
import sys

REMOVAL = ["decoupling", "decoupling_reference", "random_removal", "greedy_occlusion", "greedy_occlusion_rerank"]
REMOVAL += ["saliency_removal", "leave_one_out", "missing_modality", "decoupling_image"]
ONE_MODALITY = {"easy_vqa": ["decoupling_text"], "digit_sum": ["decoupling_audio"]}
VALUES = [
    "sparse_rs",
    "one_pixel",
    "pgd_linf",
    "pgd_l2",
    "pgd_l0",
    "sigma_zero",
    "fusion_embedding",
    "swapped_modality",
]
CORRUPTIONS = ["gaussian_noise", "salt_and_pepper"]
OF_TEXT = {"easy_vqa": ["word_substitution", "co_attack", "word_masking"], "digit_sum": ["audio_noise"]}

DEFAULTS = {
    "models": "mmbt,concat,cross_attention,late_fusion",
    "datasets": "easy_vqa,digit_sum",
    "seeds": "0,1,2",
    "samples": "300",
    "attacks": "",
}
QUICK = {"models": "mmbt", "datasets": "easy_vqa", "seeds": "0", "samples": "20"}
QUICK_OPTIONS = ["dataset.train_limit=12000", "dataset.val_limit=100", "training.epochs=2"]
# What each dataset is trained with, besides the model's own defaults.
TRAINED = {"easy_vqa": ["dataset=easy_vqa"], "digit_sum": ["experiment=digit_sum"]}
OUT = "outputs/experiments/attacks"


def attacks_on(dataset: str) -> list[str]:
    return REMOVAL + ONE_MODALITY[dataset] + VALUES + OF_TEXT[dataset][:-1] + CORRUPTIONS + OF_TEXT[dataset][-1:]


def muroan(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "muroan.cli", *words], check=True)


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    quick = "quick" in sys.argv[1:]
    chosen = {**DEFAULTS, **(QUICK if quick else {}), **{k: v for k, v in given.items() if k in DEFAULTS}}
    others = [f"{key}={value}" for key, value in given.items() if key not in DEFAULTS]
    for dataset in chosen["datasets"].split(","):
        if dataset not in TRAINED:
            sys.exit(f"datasets must be among {', '.join(TRAINED)}, got {dataset!r}")
        shared = [*TRAINED[dataset], *(QUICK_OPTIONS if quick else []), *others]
        shared += [f"model={chosen['models']}", f"seed={chosen['seeds']}"]
        muroan("train", "-m", *shared)
        names = chosen["attacks"] or ",".join(attacks_on(dataset))
        folder = f"folders.attack='{OUT}/${{hydra:runtime.choices.dataset}}-${{hydra:runtime.choices.model}}"
        folder += "-${hydra:runtime.choices.attack}-${cell:attack}'"
        muroan("attack", "-m", *shared, folder, f"attack={names}", f"dataset.test_limit={chosen['samples']}")
    muroan("compare", f"runs=[{OUT}]", f"out={OUT}/compare")


if __name__ == "__main__":
    main()
